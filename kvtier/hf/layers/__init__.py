"""Layers of a transformers cache: one class for each kind, built from the config of a model."""
