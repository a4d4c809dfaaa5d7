"""The world action model: token layout, attention mask, transformer, flow matching, cached rollout."""
