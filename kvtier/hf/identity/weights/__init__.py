"""All tensors of a model → one digest, kept up to date with a few samples per turn."""
