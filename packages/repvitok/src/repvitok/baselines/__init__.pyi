from .wan import WanVae as WanVae
