"""What the installed transformers calls things, for tests that call it themselves."""

from __future__ import annotations

from kvtier.hf.compat.names import CACHE_ARGUMENT, forward_argument

CACHE = CACHE_ARGUMENT
"""Under which it takes a cache in ``generate()`` and attention models, and returns it in their outputs."""


def given(model, cache):
    """``cache`` as an argument of a forward pass of ``model``."""
    return {forward_argument(model): cache}
