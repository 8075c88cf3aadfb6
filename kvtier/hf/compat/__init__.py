"""Differences between versions of transformers and between its models, as data."""
