"""Names that a model's code can read: in code, in strings and in containers. Other attributes do not affect K and V."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaAttention
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM, LlamaMLP

from kvtier.hf.identity import attribute_reads
from kvtier.hf.identity.attribute_reads import ReadsOfModel, join, reads_of_class


def test_names_in_class_level_containers_count_as_read():
    class Layer(torch.nn.Module):
        table = ("hidden_scale", ["other_scale"])

    reads = reads_of_class(Layer)
    assert reads.may_read("hidden_scale")
    assert reads.may_read("other_scale")
    assert not reads.may_read("no_scale")


def test_code_that_computes_attribute_names_may_read_anything():
    class Layer(torch.nn.Module):
        def forward(self, x):
            return x * getattr(self, "".join(chr(97) for _ in range(3)))

    class Plain(torch.nn.Module):
        def forward(self, x):
            return x * self.factor

    assert reads_of_class(Layer).may_read("aaa")
    assert not reads_of_class(Plain).may_read("aaa")


RELEASED = [LlamaForCausalLM, LlamaMLP, torch.nn.Linear, LlamaAttention]


class Own(torch.nn.Module):
    def forward(self, x):
        return x * self.factor_of_ours


def read_all(kinds, before=None):
    """Return what ``kinds`` may read, added one by one, and the names that they may read after each."""
    reads = ReadsOfModel(before)
    names = sorted(join(map(reads_of_class, (*RELEASED, *kinds))).names)[::20]
    for n, kind in enumerate(kinds):
        reads.add(kind)
        expected = join(reads_of_class(one) for one in kinds[: n + 1])
        for name in (*names, "factor_of_ours"):
            assert reads.may_read(name) == expected.may_read(name), (kind, name)
    return reads


@pytest.mark.parametrize(
    "again", [RELEASED, RELEASED[:2], RELEASED[::-1], [*RELEASED, GemmaAttention], [Own, *RELEASED]]
)
def test_reads_of_a_model_grow_class_by_class_also_after_another_walk(again):
    """What a walk knows must not depend on earlier walks: it decides what the root covers."""
    read_all(again, read_all(RELEASED))


def test_second_walk_reads_only_own_classes_again(monkeypatch):
    before = read_all([*RELEASED, Own])
    read, kinds = attribute_reads._Reader.read, []
    monkeypatch.setattr(attribute_reads._Reader, "read", lambda self, kind: kinds.append(kind) or read(self, kind))
    again = ReadsOfModel(before)
    for kind in (*RELEASED, Own):
        again.add(kind)
    monkeypatch.setattr(Own, "forward", lambda self, x: x * self.other_of_ours)
    assert not kinds
    assert again.may_read("other_of_ours")
    assert kinds == [Own]
