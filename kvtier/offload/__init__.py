"""Layers of a running call that exceed the budget of their device, and the pages that are prefetched for them."""
