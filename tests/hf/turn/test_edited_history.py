"""A history edited between turns gets the answer of a fresh cache, with every kind of layer.

A script plays two conversations with a vocabulary of five words on one cache object. They are extended, edited, cut,
spliced and continued from each other, alone and together in a batch, on the same cache, on a new cache over the same
store, and through another store on the same folder.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import event, example, given, note, settings
from hypothesis import strategies as st

from kvtier import PrefixStore, TieredCache
from kvtier.hf.turn import plan
from kvtier.hf.turn.choice import decision
from kvtier.hf.turn.choice.decision import BOTH, COMPUTE, LOAD, Decision, StoredRange
from kvtier.hf.turn.cost import COSTS, Costs
from sweep.models import tiny_model
from tests.support import families
from tests.support.tiny import VOCABULARY, Tokens, answer, assert_same_answer, left_padded

NIGHTLY = settings().max_examples > 100
EXAMPLES = 500 if NIGHTLY else 1
LONGEST = 36  # more than twice the sliding windows of these models
SAME = 1e-3

FAMILIES = (
    "llama",
    "deepseek_v3",
    "mistral",
    "gemma3",
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
    "granitemoehybrid",
    "nemotron_h",
    "qwen3_next",
    "lfm2",
)
ARGUMENTS = ("past_key_values", "cache")  # kvtier accepts both with every version of transformers
CARRIERS = ("rwkv", "xlstm", "minimax")  # they take no DynamicCache

words = st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=7).map(tuple)
places = st.integers(0, 255)


@dataclass(frozen=True)
class Step:
    """One turn.

    Attributes:
        change: the change to the history before the turn.
        which: index of the conversation, of two.
        at: place of the change, modulo the history's length.
        words: words to put in.
        new: number of words to generate.
        through: the cache of the turn: the ``same`` cache, a ``new`` cache over the same store, or a cache over a store
            that was ``reopened``; in RAM, such a store is empty.
        sampled: whether words are sampled.
        argument: the argument name under which ``generate`` gets the cache.
    """

    change: str
    which: int
    at: int
    words: Tokens
    new: int
    through: str
    sampled: bool
    argument: str


CHANGES = {
    "extend": lambda own, other, at, words: own + words,
    "edit": lambda own, other, at, words: own[:at] + words + own[at + len(words) :],
    "insert": lambda own, other, at, words: own[:at] + words + own[at:],
    "delete": lambda own, other, at, words: own[:at] + own[at + len(words) :],
    "shorten": lambda own, other, at, words: own[:at],
    "ask again": lambda own, other, at, words: own,
    "last word again": lambda own, other, at, words: own[:-1] + words[:1],
    "take up the other": lambda own, other, at, words: other[: len(other) - at % 3] + words,
    "splice": lambda own, other, at, words: own[:at] + other[at:],
    "forget": lambda own, other, at, words: words,
}

steps = st.builds(
    Step,
    change=st.sampled_from(["extend", "extend", *CHANGES, "both"]),
    which=st.integers(0, 1),
    at=places,
    words=words,
    new=st.integers(1, 4),
    through=st.sampled_from(["same"] * 6 + ["new", "reopened"]),
    sampled=st.sampled_from([False, False, True]),
    argument=st.sampled_from(ARGUMENTS),
)
beginnings = st.lists(st.integers(1, VOCABULARY - 1), min_size=3, max_size=24).map(tuple)


@functools.cache
def model_of(name: str) -> Any:
    return tiny_model(name) if name in CARRIERS else families.build(name, vocab_size=VOCABULARY)


def is_indexed(name: str) -> bool:
    return name not in CARRIERS and "indexed" in families.FAMILIES[name].kinds


def by_chance(model: Any, ids: torch.Tensor, expected: Any, mode: dict[str, Any]) -> bool:
    """Return whether a fresh cache gives other logits too when it is fed in other chunks.

    An indexer that takes the best eight keys may take another key because of the last bit of a score.
    """
    for chunk in (1, 2, 3, 5, 8, 13):
        control = answer(model, ids, prefill_chunk_size=chunk, **mode)
        pairs = zip(control.logits, expected.logits, strict=True)
        if any((ours - theirs).abs().max() > SAME for ours, theirs in pairs):
            return True
    return False


class Conversations:
    """Two histories, one cache, and the store below it."""

    def __init__(
        self, name: str, beginnings: tuple[Tokens, Tokens], folder: Path | None, costs: Costs, reuse: str
    ) -> None:
        self.name, self.model, self.folder, self.reuse = name, model_of(name), folder, reuse
        self.histories = list(beginnings)
        self.store, self.costs = PrefixStore(folder, block_size=4), costs
        self.cache = self.new_cache()

    def new_cache(self) -> TieredCache:
        cache = TieredCache(self.store, reuse=self.reuse)
        cache.turns.costs = self.costs
        return cache

    def close(self) -> None:
        self.cache.close()
        self.store.close()

    def play(self, step: Step) -> None:
        if step.through != "same":
            self.cache.close()
            if step.through == "reopened":
                self.store.close()
                self.store = PrefixStore(self.folder, block_size=4)
            self.cache = self.new_cache()
        if step.change == "both":
            rows = [history[-LONGEST:] for history in self.histories]
        else:
            own, other = self.histories[step.which], self.histories[1 - step.which]
            changed = CHANGES[step.change](own, other, 1 + step.at % len(own), step.words)
            rows = [changed[-LONGEST:]]
        sequences = self.ask(rows, step)
        for row, sequence in enumerate(sequences):
            self.histories[step.which if len(rows) == 1 else row] = sequence

    def ask(self, rows: list[Tokens], step: Step) -> list[Tokens]:
        ids = left_padded(rows)
        mode = {"max_new_tokens": step.new, **({"do_sample": True, "top_k": 0} if step.sampled else {})}
        found = answer(self.model, ids, self.cache, step.argument, **mode)
        report = self.cache.last_turn
        note(f"{step.change}: {rows} knew {report.cached_tokens} ({report.miss_reason})")
        event(f"{self.name}: {'reused' if report.cached_tokens else 'not reused'}")
        event(f"began with {report.decision}")
        if report.prompt_tokens:  # 0 where reuse is off
            assert report.prompt_tokens == sum(map(len, rows))
            for tokens, row in zip(rows, report.rows, strict=True):
                assert 0 <= row.cached_tokens <= len(tokens) - 1
        expected = answer(self.model, ids, **mode)
        # A prompt is computed in two pieces if its states are kept where it branches from another prompt.
        has_states = self.name in CARRIERS or families.FAMILIES[self.name].has_states
        # So is one of which all was computed while nothing of the rest arrived.
        in_one_piece = report.cached_tokens == 0 and not has_states and report.decision in ("", COMPUTE)
        try:
            assert_same_answer(found, expected, exact=in_one_piece)
        except AssertionError:
            indexed = is_indexed(self.name)
            if not (indexed and report.cached_tokens and by_chance(self.model, ids, expected, mode)):
                raise
            event(f"{self.name}: an indexer had to draw lots")
        new = found.sequences[:, ids.shape[1] :].tolist()
        return [row + tuple(words) for row, words in zip(rows, new, strict=True)]


def _step(change: str, which: int, at: int = 0, words: Tokens = (1, 4, 2, 3, 5), through: str = "same") -> Step:
    return Step(change, which, at, words, 2, through, False, ARGUMENTS[which])


# The cached tokens of one conversation are as many as the known tokens of the other.
TAKING_TURNS = [_step("extend", which) for which in (0, 1, 0, 1, 0)]
# They are fewer than the known tokens of the other, which continues from a place without a checkpoint.
EDITING_THE_LONGER = [_step("extend", 0), _step("extend", 1), _step("edit", 0, 24), _step("extend", 1)]
GOING_BACK = [
    _step("extend", 0),
    _step("edit", 0, 17),
    _step("shorten", 0, 11),
    _step("extend", 1, through="new"),
    _step("take up the other", 0, 1),
    _step("splice", 1, 9),
    _step("extend", 0, through="reopened"),
]


def play(
    name: str,
    beginnings: tuple[Tokens, Tokens],
    script: list[Step],
    on_disk: bool,
    costs: Costs = COSTS,
    reuse: str = "always",
) -> None:
    folder = Path(tempfile.mkdtemp(prefix="kvtier-edited-")) if on_disk else None
    conversations = Conversations(name, beginnings, folder, costs, reuse)
    try:
        for step in script:
            conversations.play(step)
    finally:
        conversations.close()
        if folder is not None:
            shutil.rmtree(folder)


@pytest.mark.sample(2)  # of 22
@pytest.mark.parametrize("name", [*FAMILIES, *CARRIERS])
@settings(max_examples=EXAMPLES)
@example(beginnings=((1, 2, 3, 4) * 4, (5, 2, 3, 1) * 4), script=TAKING_TURNS, on_disk=False)
@example(beginnings=((1, 2, 3, 4) * 6, (5, 2, 3, 1) * 2), script=EDITING_THE_LONGER, on_disk=False)
@example(beginnings=((1, 2, 3, 4) * 4, (1, 2, 3, 4, 5, 1)), script=GOING_BACK, on_disk=True)
@given(
    beginnings=st.tuples(beginnings, beginnings),
    script=st.lists(steps, min_size=3, max_size=7),
    on_disk=st.sampled_from([False, False, True]),
)
def test_edited_history_gets_the_answer_of_a_fresh_cache(name, beginnings, script, on_disk):
    play(name, beginnings, script, on_disk)


SLIDING = sorted(name for name, family in families.FAMILIES.items() if {"sliding", "chunked"} & family.kinds)
FEW_WINDOWS = Costs(
    window_spacing_tokens=9, window_spacing_windows=1, window_margin_tokens=0, checkpoint_worth_tokens=2
)


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", SLIDING)
@settings(max_examples=EXAMPLES)
@example(beginnings=((1, 2, 3, 4) * 6, (5, 2, 3, 1) * 2), script=EDITING_THE_LONGER, on_disk=False)
@example(beginnings=((1, 2, 3, 4) * 4, (1, 2, 3, 4, 5, 1)), script=GOING_BACK, on_disk=True)
@given(
    beginnings=st.tuples(beginnings, beginnings),
    script=st.lists(steps, min_size=3, max_size=7),
    on_disk=st.sampled_from([False, False, True]),
)
def test_edited_history_is_exact_where_sliding_layers_keep_few_windows(name, beginnings, script, on_disk):
    play(name, beginnings, script, on_disk, FEW_WINDOWS)


IN_SMALL_CHUNKS = replace(FEW_WINDOWS, shortest_chunk_tokens=2, longest_chunk_tokens=3, watched_load_seconds=0.0)


def any_way(
    end: int, held: int, cuts: Sequence[int], stored: Sequence[StoredRange], *costs: Any, may_split: bool
) -> Decision:
    """Return one of the ways that are possible, by lot."""
    if not cuts or cuts[-1] <= held:
        return decision.decide(end, held, cuts, stored, *costs, may_split=may_split)
    ways = [COMPUTE, LOAD, *[BOTH] * (2 * may_split)]
    lot = zlib.crc32(repr((end, held, tuple(cuts), len(stored))).encode())
    way = ways[lot % len(ways)]
    columns = {COMPUTE: held, LOAD: cuts[lot % len(cuts)], BOTH: cuts[-1]}[way]
    return Decision(way, columns, held, 1e-3, 1e-3)


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", [*FAMILIES, *CARRIERS])
@settings(max_examples=EXAMPLES)
@example(beginnings=((1, 2, 3, 4) * 6, (5, 2, 3, 1) * 2), script=EDITING_THE_LONGER, on_disk=False)
@example(beginnings=((1, 2, 3, 4) * 4, (1, 2, 3, 4, 5, 1)), script=GOING_BACK, on_disk=True)
@given(
    beginnings=st.tuples(beginnings, beginnings),
    script=st.lists(steps, min_size=3, max_size=7),
    on_disk=st.sampled_from([False, False, True]),
)
def test_edited_history_is_exact_however_a_turn_begins(name, beginnings, script, on_disk):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(plan, "decide", any_way)
        play(name, beginnings, script, on_disk, IN_SMALL_CHUNKS, "auto")
