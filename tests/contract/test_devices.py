"""kvtier passes a device for every tensor that it makes: ``torch.set_default_device`` belongs to the user."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import kvtier
from tests.support.upstream import given

PACKAGE = Path(kvtier.__file__).parent
# Functions that ``torch.set_default_device`` affects.
MAKING = frozenset(
    [
        "arange",
        "as_tensor",
        "asarray",
        "empty",
        "empty_strided",
        "eye",
        "full",
        "linspace",
        "ones",
        "rand",
        "randint",
        "randn",
        "randperm",
        "scalar_tensor",
        "tensor",
        "zeros",
    ]
)
# These make whole models and their inputs, and use them together, on the user's default device.
BESIDE = {"hf/compat/canary.py"}


def unplaced(source: str) -> Iterator[int]:
    """Yield the lines that make a tensor without a device."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            made = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch" and node.func.attr in MAKING
            if made and "device" not in {keyword.arg for keyword in node.keywords}:
                yield node.lineno


def test_every_tensor_is_created_with_an_explicit_device():
    found = []
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith(("cli/", "testing/")) and name not in BESIDE:
            found += [f"{name}:{line}" for line in unplaced(path.read_text(encoding="utf-8"))]
    assert not found


def test_unplaced_finds_a_tensor_without_a_device():
    assert list(unplaced("torch.empty(3)\ntorch.empty(3, device='cpu')\nx.empty(3)")) == [1]


@pytest.mark.parametrize("settings", [{}, {"device_budget": "64KiB"}], ids=["hot", "cold"])
def test_turns_work_under_another_default_device(make_model, tokens, tmp_path, settings):
    model, ids = make_model("gemma3"), tokens(30)
    with kvtier.PrefixStore(tmp_path, block_size=8) as store:
        for known in (0, 29):
            with kvtier.TieredCache(store, **settings) as cache:
                torch.set_default_device("meta")
                try:
                    cache.begin(model, ids)
                    with torch.no_grad(), torch.device("cpu"):  # the model makes its own tensors
                        model(ids[:, cache.get_seq_length() :], **given(model, cache))
                    cache.commit(ids)
                finally:
                    torch.set_default_device(None)
                assert cache.last_turn.cached_tokens == known
