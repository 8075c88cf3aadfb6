"""Layers of a running call that exceed the budget of their device: where their pages lie, and how they come back in time."""
