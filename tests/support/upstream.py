"""What the installed transformers calls things, for tests that call it themselves."""

from __future__ import annotations

from importlib.metadata import version

from kvtier.hf.compat.names import CACHE_ARGUMENT, INSTALLED, forward_argument, version_of

CACHE = CACHE_ARGUMENT
"""Under which it takes a cache in ``generate()`` and attention models, and returns it in their outputs."""


PEFT_KNOWS_IT = version_of(version("peft")) >= (0, 22) or INSTALLED < (5, 24)
"""Whether the installed PEFT fits it: transformers' own adapters and prompt learning ask for 0.22 since 5.24."""


def given(model, cache):
    """``cache`` as an argument of a forward pass of ``model``."""
    return {forward_argument(model): cache}
