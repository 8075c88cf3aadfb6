"""All tensors of a model → one digest, kept up to date at the price of a few samples a turn."""
