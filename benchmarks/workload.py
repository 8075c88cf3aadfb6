"""The job that is measured: a real model, the shipped document, and a conversation about it."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from benchmarks.measure import BenchmarkError, Tokens
from kvtier import PrefixStore, TieredCache, TurnReport, demo_model
from kvtier.cli.demo.conversation import ChatModel
from kvtier.hf.compat.names import passed

KeysValues = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""K and V of each layer, ``[1, heads, tokens, dim]``."""

FIRST_QUESTION = "When was the lamp lit for the first time?"
NEXT_QUESTION = "Who was the principal keeper when the great wave put out the light?"
_FIRST_ANSWER_TOKENS = 16


def load_chat() -> ChatModel:
    """Load the demo model and warm it up."""
    return ChatModel(demo_model())


def document() -> str:
    """Return the shipped document."""
    return resources.files("kvtier.cli.demo").joinpath("lighthouse.txt").read_text(encoding="utf-8").strip()


def _first_text(chat: ChatModel, tokens: int) -> str:
    """Return the message of a first turn of about ``tokens`` tokens: the document, cut to fit, and a question.

    The whole document where it is shorter than that.
    """
    ids = chat.tokenizer(document(), add_special_tokens=False).input_ids
    rest = len(chat.first_prompt(f"\n\n{FIRST_QUESTION}"))
    text = chat.tokenizer.decode(ids[: max(1, tokens - rest)])
    return f"{text}\n\n{FIRST_QUESTION}"


def running_text(chat: ChatModel, tokens: int) -> Tokens:
    """Return exactly ``tokens`` tokens of the document, over and over where it is too short."""
    ids = chat.tokenizer(document() + "\n\n", add_special_tokens=False).input_ids
    return tuple((ids * (tokens // len(ids) + 1))[:tokens])


@dataclass(frozen=True, slots=True, eq=False)
class Conversation:
    """A first turn that is over, and the prompt of the next one.

    ``plain`` is the ``DynamicCache`` that ran the first turn: it holds ``sequence`` but for its last token.
    """

    sequence: Tokens
    prompt: Tokens
    plain: Any

    @property
    def known(self) -> int:
        """Tokens of ``prompt`` whose K and V are known."""
        return len(self.sequence) - 1

    @property
    def keys_values(self) -> KeysValues:
        """K and V of the known tokens."""
        return keys_values(self.plain, self.known)

    def rewind(self) -> None:
        """Take from ``plain`` what came after the first turn."""
        surplus = self.plain.get_seq_length() - self.known
        if surplus > 0:
            self.plain.crop(-surplus)


def hold_first_turn(chat: ChatModel, tokens: int) -> Conversation:
    """Hold a first turn of about ``tokens`` prompt tokens with plain transformers."""
    plain = DynamicCache(config=chat.model.config)
    text = _first_text(chat, tokens)
    answer = chat.answer(chat.first_prompt(text), plain, _FIRST_ANSWER_TOKENS)
    return Conversation(answer.sequence, chat.next_prompt(text, answer, NEXT_QUESTION), plain)


def prefill(chat: ChatModel, tokens: Tokens) -> Any:
    """Return a ``DynamicCache`` that holds ``tokens``."""
    cache = DynamicCache(config=chat.model.config)
    with torch.no_grad():
        chat.model(input_ids=torch.tensor([tokens]), **passed(cache), logits_to_keep=1)
    return cache


def keys_values(cache: Any, tokens: int) -> KeysValues:
    """Return K and V of the first ``tokens`` tokens of a cache."""
    return [(layer.keys[:, :, :tokens], layer.values[:, :, :tokens]) for layer in cache.layers]


def seeded(store: PrefixStore, chat: ChatModel, sequence: Tokens, known: KeysValues) -> TieredCache:
    """Return a cache that has had a turn with ``sequence``, and whose store got it, without computing it again.

    Args:
        store: a store that knows none of it.
        chat: the model that computed ``known``.
        sequence: the whole turn, at least one token longer than ``known``.
        known: its K and V.
    """
    return seeded_cache(TieredCache(store), chat, sequence, known)


def seeded_cache(cache: TieredCache, chat: ChatModel, sequence: Tokens, known: KeysValues) -> TieredCache:
    """Return ``cache``, which has held nothing yet, after such a turn."""
    ids = torch.tensor([sequence])
    report = cache.begin(chat.model, ids)
    if report.cached_tokens:
        raise BenchmarkError("the store that is to be filled knows the conversation already")
    for layer, (k, v) in enumerate(known):
        cache.update(k, v, layer)
    cache.commit(ids)
    return cache


@contextmanager
def copied(folder: Path) -> Iterator[Path]:
    """Copy a store's folder for one turn: a turn adds what it computed, and the next one would find it."""
    with tempfile.TemporaryDirectory(prefix="kvtier-bench-") as scratch_name:
        copy = Path(scratch_name) / "store"
        shutil.copytree(folder, copy)
        yield copy


def expect_source(cached_by_tier: Mapping[str, int], expected: Mapping[str, int]) -> None:
    """Check that a turn took its known tokens from where ``expected`` says, and no others.

    Raises:
        BenchmarkError: it did not.
    """
    seen = {tier: tokens for tier, tokens in cached_by_tier.items() if tokens}
    if seen != expected:
        raise BenchmarkError(f"expected known tokens {dict(expected)}, the turn reports {seen}")


def reported(cache: TieredCache) -> TurnReport:
    """Return the report of the turn that a cache has just had.

    Raises:
        BenchmarkError: it has had none.
    """
    if cache.last_turn is None:
        raise BenchmarkError("the cache reports no turn: generate() did not treat it as a TieredCache")
    return cache.last_turn


@dataclass(frozen=True, slots=True)
class TimedTurn:
    """One ``generate()``: its new tokens, when each came, and when it returned, in seconds after the call."""

    tokens: Tokens
    token_seconds: tuple[float, ...]
    seconds: float

    @property
    def seconds_per_decode_token(self) -> float:
        """Mean time between new tokens, the first one left out."""
        return (self.token_seconds[-1] - self.token_seconds[0]) / (len(self.token_seconds) - 1)


class _TokenTimes(BaseStreamer):
    """Notes when each token came."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.at.append(time.perf_counter())

    def end(self) -> None:
        pass


class HasModel(Protocol):
    """Something with a model to generate with."""

    @property
    def model(self) -> Any:
        """A transformers model, which knows its device."""


def timed_turn(chat: HasModel, prompt: Tokens, cache: Any, new_tokens: int) -> TimedTurn:
    """Generate exactly ``new_tokens`` tokens greedily, with nothing in the loop but a clock."""
    input_ids = torch.tensor([prompt], device=chat.model.device)
    mask = torch.ones_like(input_ids)
    times = _TokenTimes()
    started = time.perf_counter()
    sequences = chat.model.generate(
        input_ids=input_ids,
        attention_mask=mask,
        **passed(cache),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        streamer=times,
    )
    seconds = time.perf_counter() - started
    new = tuple(sequences[0, len(prompt) :].tolist())
    at = [moment - started for moment in times.at[1:]]  # the prompt comes first
    if len(new) != new_tokens or len(at) != new_tokens:
        raise BenchmarkError(f"asked for {new_tokens} tokens, got {len(new)} in {len(at)} steps")
    return TimedTurn(new, tuple(at), seconds)


def seconds_of(job: Callable[[], object]) -> float:
    """Return how long ``job`` takes."""
    started = time.perf_counter()
    job()
    return time.perf_counter() - started
