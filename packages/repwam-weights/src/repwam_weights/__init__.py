"""Folders of trained models: `repvitok-small` and `latent-action-small`. Nothing here runs."""
