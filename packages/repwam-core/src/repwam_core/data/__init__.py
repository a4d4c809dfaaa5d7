"""From latent shards to training segments."""
