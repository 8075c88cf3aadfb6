"""The turn after an interrupt at any point of a forward pass is right, in every kind of layer.

KVTIER_INTERRUPT_POINTS=1000000 tries every point instead of a few, on caches of every kind.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import os
from pathlib import Path

import pytest
import torch
from transformers import cache_utils

import kvtier.hf.layers.build
import kvtier.hf.layers.container
from kvtier import PrefixStore, TieredCache
from tests.support import families
from tests.support.interrupts import InterruptAtLine

MANY = "KVTIER_INTERRUPT_POINTS" in os.environ
POINTS = int(os.environ.get("KVTIER_INTERRUPT_POINTS", "3"))
STEPS = 3
FAMILIES = (
    "llama",
    "deepseek_v3",
    "mistral",
    "llama4",
    "gemma3n",
    "gemma4",
    "deepseek_v32",
    "glm_moe_dsa",
    "deepseek_v4",
    "mamba2",
    "falcon_h1",
    "zamba2",
    "jamba",
    "bamba",
    "nemotron_h",
    "qwen3_next",
    "lfm2",
)
STARTS = ("empty", "device", "store")
cases = pytest.mark.parametrize(
    ("name", "start"),
    [(name, start) for i, name in enumerate(FAMILIES) for j, start in enumerate(STARTS) if MANY or i % 3 == j],
)


class InterruptedCache(TieredCache):
    """Raises ``KeyboardInterrupt`` at point ``at``. Each update of a layer has a point before and a point after."""

    at: int | None = None
    points = 0

    def _point(self):
        self.points += 1
        if self.points - 1 == self.at:
            raise KeyboardInterrupt

    def update(self, *arguments, **settings):
        return self._between(super().update, *arguments, **settings)

    def update_indexer(self, *arguments, **settings):
        return self._between(super().update_indexer, *arguments, **settings)

    def update_conv_state(self, *arguments, **settings):
        return self._between(super().update_conv_state, *arguments, **settings)

    def update_recurrent_state(self, *arguments, **settings):
        return self._between(super().update_recurrent_state, *arguments, **settings)

    def _between(self, update, *arguments, **settings):
        self._point()
        states = update(*arguments, **settings)
        self._point()
        return states


class Scene:
    """A model, a first turn, a prompt that continues it, and the prompts to try after an interrupt in that turn."""

    def __init__(self, name, tokens):
        self.model = families.build(name)
        self.first = tokens(26) % 59 + 1
        self.ids = torch.cat([self.answer(self.first), tokens(5, seed=1) % 59 + 1], 1)
        changed = self.ids.clone()
        changed[0, 20] = 60 - changed[0, 20]
        longer = torch.cat([self.answer(self.ids)[:, :-1], tokens(3, seed=2) % 59 + 1], 1)
        self.then = {name: (ids, self.answer(ids)) for name, ids in self._prompts(changed, longer)}

    def _prompts(self, changed, longer):
        return [("again", self.ids), ("changed", changed), ("longer", longer), ("shorter", self.ids[:, :22])]

    def answer(self, ids, cache=None):
        arguments = {} if cache is None else {"past_key_values": cache}
        mask = torch.ones_like(ids)
        return self.model.generate(ids, attention_mask=mask, max_new_tokens=STEPS, do_sample=False, **arguments)

    def play(self, start, then, interrupt):
        """Interrupt a turn on a cache, and check later turns on it and on another cache.

        Args:
            start: where the first turn is: nowhere (``empty``), on the ``device`` of the cache, or in its ``store``.
            then: the name of the next prompt in ``self.then``.
            interrupt: a function of a cache and ``turn``; it runs ``turn()`` and interrupts it.
        """
        with PrefixStore(block_size=8) as store, InterruptedCache(store) as cache:
            if start != "empty":
                self.answer(self.first, cache)
            with InterruptedCache(store) as target:
                target = target if start == "store" else cache
                interrupt(target, lambda: self.answer(self.ids, target))
                target.at = None
                ids, expected = self.then[then]
                assert torch.equal(self.answer(ids, target), expected), "on the cache that was interrupted"
                with TieredCache(store) as other:
                    assert torch.equal(self.answer(ids, other), expected), "from what the store knows"
                ids, expected = self.then["again"]
                assert torch.equal(self.answer(ids, target), expected), "in the turn after the next"


@functools.cache
def scene(name, tokens):
    return Scene(name, tokens)


def some(points):
    """Return ``POINTS`` of ``points``, spread evenly, with the first and the last."""
    points = list(points)
    count = min(POINTS, len(points))
    return [points[i * (len(points) - 1) // max(1, count - 1)] for i in range(count)]


def points_of(play):
    """Return the number of points in the turn that ``play(interrupt)`` interrupts."""
    seen = []

    def count(cache, turn):
        cache.points = 0
        turn()
        seen.append(cache.points)

    play(count)
    return seen[0]


@pytest.mark.sample(3)  # of 17
@cases
def test_turn_after_an_interrupt_around_a_layer_update_is_exact(name, start, tokens):
    played = scene(name, tokens)
    points = points_of(functools.partial(played.play, start, "again"))
    assert points >= 2 * STEPS  # at least one layer in the prefill and in each step: some states change unseen

    def interrupt(at, cache, turn):
        cache.points, cache.at = 0, at
        with pytest.raises(KeyboardInterrupt):
            turn()

    for at, then in some(itertools.product(range(points), played.then)):
        try:
            played.play(start, then, functools.partial(interrupt, at))
        except Exception as error:
            raise AssertionError(f"interrupted at point {at} of {points}, then {then}: {error}") from error


OF_KVTIER = {str(path) for part in (kvtier.hf, kvtier.kv) for path in Path(part.__file__).parent.rglob("*.py")}
FILES = OF_KVTIER | {cache_utils.__file__}


@pytest.mark.sample(3)  # of 17
@cases
def test_turn_after_an_interrupt_at_a_line_of_cache_or_model_is_exact(name, start, tokens):
    """Interrupts also come in the middle of updates: of states, of buffers, of the turn's begin and end.

    The model's own lines are included: some change a state in place, and the cache is not told.
    """
    played = scene(name, tokens)
    files = FILES | {inspect.getsourcefile(type(played.model))}
    far = InterruptAtLine(10**9, files)

    def trace(cache, turn):
        with far:
            turn()

    played.play(start, "again", trace)
    lines = 10**9 - far._left

    def interrupt(at, cache, turn):
        with InterruptAtLine(at, files) as coming:
            try:
                turn()
            except KeyboardInterrupt:
                return
        assert not coming.came, "the interrupt was swallowed"

    for at, then in some(zip(range(lines), itertools.cycle(played.then), strict=False)):
        try:
            played.play(start, then, functools.partial(interrupt, at))
        except Exception as error:
            raise AssertionError(f"interrupted at line {at} of {lines}, then {then}: {error}") from error


@pytest.mark.sample(1)  # of 2
@pytest.mark.parametrize("on_disk", [False, True], ids=["ram", "disk"])
def test_interrupt_while_layers_are_built_loses_no_stored_prefix(model, generate, tokens, tmp_path, on_disk):
    """The next turn has layers for the stored prefix, and finds all of it."""
    files = {kvtier.hf.layers.container.__file__, kvtier.hf.layers.build.__file__}
    ids = tokens(30)
    with PrefixStore(tmp_path if on_disk else None, block_size=8) as store:
        with TieredCache(store) as cache:
            generate(model, ids, cache)
        for at in itertools.count():
            with TieredCache(store) as cache:
                with contextlib.suppress(KeyboardInterrupt), InterruptAtLine(at, files) as interrupt:
                    cache.begin(model, ids)
                assert cache.begin(model, ids).cached_tokens == 29, at
            if not interrupt.came:
                break
    assert at > 20
