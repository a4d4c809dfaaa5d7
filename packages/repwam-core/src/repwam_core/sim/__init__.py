"""Simulated tasks: collecting demonstrations from them, and measuring policies in them."""
