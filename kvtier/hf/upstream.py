"""What the command line needs of transformers: it has it from here, so that only this package imports it."""

from __future__ import annotations

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    TextStreamer,
)
from transformers.utils import logging as transformers_logging

__all__ = [
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "DynamicCache",
    "LlamaConfig",
    "LlamaForCausalLM",
    "TextStreamer",
    "transformers_logging",
]
