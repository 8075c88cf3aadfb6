"""Names in the installed transformers, for tests that call it themselves."""

from __future__ import annotations

from importlib.metadata import version

from kvtier.hf.compat.names import CACHE_ARGUMENT, INSTALLED, forward_argument, version_of

CACHE = CACHE_ARGUMENT
"""Name of the cache argument in ``generate()`` and attention models, and of the cache in their outputs."""


PEFT_KNOWS_IT = version_of(version("peft")) >= (0, 22) or INSTALLED < (5, 24)
"""Whether the installed PEFT fits: since 5.24, transformers' adapters and prompt learning need PEFT 0.22."""


def given(model, cache):
    """Return ``cache`` as an argument of a forward pass of ``model``."""
    return {forward_argument(model): cache}
