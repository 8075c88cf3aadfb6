"""``kvtier plan``: what a model's K and V take, and when loading them beats computing them, from its config alone."""
