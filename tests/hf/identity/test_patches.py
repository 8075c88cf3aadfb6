"""Patches of helpers count: a function that a model's module imports calls others of its own module."""

from __future__ import annotations

from transformers import modeling_rope_utils
from transformers.models.llama.modeling_llama import LlamaModel

from kvtier.hf.identity.patches import describe_patches
from kvtier.hf.identity.stable_repr import Describer


def test_patching_a_helper_of_an_imported_function_is_noticed(monkeypatch):
    def words():
        return describe_patches([LlamaModel], [], Describer([]))

    before = words()
    assert words() == before
    monkeypatch.setattr(modeling_rope_utils, "_compute_yarn_parameters", lambda config, device: None)
    assert words() != before
