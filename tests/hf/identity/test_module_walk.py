"""A walk finds everything a model computes with, and its memory of the last walk hides no change."""

from __future__ import annotations

import torch

from kvtier.hf.identity.module_walk import ModelWalk


def text_of(model):
    return "\n".join(ModelWalk(model).text)


class Scaled(torch.nn.Module):
    scale = 1.5

    def __init__(self, **own):
        super().__init__()
        for name, value in own.items():
            setattr(self, name, value)

    def forward(self, x):
        return x * self.scale


def test_walk_notices_a_changed_class_attribute(monkeypatch):
    """An attribute equal to its class attribute is described by the class, until the class attribute changes."""
    same = Scaled(scale=Scaled.scale)
    text_of(same)
    monkeypatch.setattr(Scaled, "scale", 3.5)
    assert text_of(same) != text_of(Scaled())


KNOWN_TO_A_CLASS = Scaled(scale=2.0)


class Asking(torch.nn.Module):
    def forward(self, x):
        return KNOWN_TO_A_CLASS(x)


def test_walk_describes_modules_that_class_code_calls(monkeypatch):
    model = Asking()
    before = text_of(model)
    assert text_of(model) == before
    monkeypatch.setattr(KNOWN_TO_A_CLASS, "scale", 4.0)
    assert text_of(model) != before


def test_walk_reaches_modules_known_only_to_functions():
    """Only a function holds the first module, and only a function of that module holds the second."""

    def model_around(factor):
        deep, met = Scaled(scale=factor), Scaled(scale=1.0)
        met.forward = lambda x: deep(x)
        model = torch.nn.Linear(2, 2)
        model.forward = lambda x: met(x)
        return model

    model = model_around(2.0)
    walk = ModelWalk(model)
    assert len(walk.parts) == 3
    assert text_of(model) == "\n".join(walk.text)
    assert text_of(model) != text_of(model_around(4.0))
