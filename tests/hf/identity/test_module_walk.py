"""A walk finds all that a model computes with, and its memory of the last walk hides nothing."""

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


def test_what_a_class_said_of_an_object_once_is_not_taken_for_what_it_says_now(monkeypatch):
    """An object that says the same as its class is described by its class, until the class says something else."""
    same = Scaled(scale=Scaled.scale)
    text_of(same)
    monkeypatch.setattr(Scaled, "scale", 3.5)
    assert text_of(same) != text_of(Scaled())


KNOWN_TO_A_CLASS = Scaled(scale=2.0)


class Asking(torch.nn.Module):
    def forward(self, x):
        return KNOWN_TO_A_CLASS(x)


def test_modules_that_the_code_of_a_class_meets_are_walked(monkeypatch):
    model = Asking()
    before = text_of(model)
    assert text_of(model) == before
    monkeypatch.setattr(KNOWN_TO_A_CLASS, "scale", 4.0)
    assert text_of(model) != before


def test_modules_that_code_meets_are_walked():
    """A module that only a function knows, and one that only a function of that module knows."""

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
