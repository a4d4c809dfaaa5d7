"""Other ways to learn latent actions, written from their papers, to be measured beside the LAT."""
