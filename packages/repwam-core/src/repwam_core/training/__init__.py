"""Training and evaluation of the world action model."""
