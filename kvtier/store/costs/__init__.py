"""Costs in a store: books for each model, kept beside its root, and what is encoded because of them."""
