"""Names that a model's code can read: in code, in strings and in containers. Other attributes do not affect K and V."""

from __future__ import annotations

import torch

from kvtier.hf.identity.attribute_reads import reads_of_class


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
