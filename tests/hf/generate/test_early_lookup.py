"""``import kvtier`` imports no transformers; ``generate`` may be looked up before ``TieredCache``."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.upstream import CACHE

_MODEL = """
from transformers import LlamaConfig, LlamaForCausalLM
import torch
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                     num_attention_heads=1, num_key_value_heads=1)).eval()
"""
_CALL = """
ids = torch.arange(1, 21)[None]
model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0, CACHE=kvtier.TieredCache())
store = kvtier.TieredCache().store
assert store.stats().committed_tokens >= 20, store.stats()
"""


def run(script):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "start",
    [
        "import sys, kvtier\nassert 'transformers' not in sys.modules" + _MODEL,
        _MODEL + "import kvtier\n",
        # a library that wraps the stand-in
        "import kvtier" + _MODEL + "from transformers import GenerationMixin\n"
        "below = GenerationMixin.generate\n"
        "GenerationMixin.generate = lambda *args, **kwargs: below(*args, **kwargs)\n",
    ],
    ids=["before transformers", "after transformers", "wrapped"],
)
def test_generate_looked_up_before_tiered_cache_is_a_turn(start):
    run(start + _CALL.replace("CACHE", CACHE))


def test_uninstall_leaves_no_stand_in():
    run(
        _MODEL + "from transformers import GenerationMixin\n"
        "before = GenerationMixin.generate\n"
        "import kvtier\n"
        "assert GenerationMixin.generate is not before\n"
        "kvtier.TieredCache\n"
        "kvtier.uninstall()\n"
        "assert GenerationMixin.generate is before\n"
    )


def test_stand_in_passes_calls_without_a_cache_through():
    run("import kvtier" + _MODEL + "assert model.generate(torch.ones(1, 3).long(), max_new_tokens=1).shape == (1, 4)\n")
