"""How many bytes a conversation writes to disk for each byte of K and V that it keeps."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import BenchmarkError, Competitor, Options, Sample, interleave
from benchmarks.result import Case, Result, Target, make_case
from kvtier import PrefixStore
from kvtier.kv.page import Page
from kvtier.kv.spec import KVSpec, LayerSpec
from kvtier.store.store import DEFAULT_TAIL_DELAY_SECONDS

ROOT = "77" * 32
_LAYER = LayerSpec(3, 64, 3, 64, torch.bfloat16)
_GEOMETRY = KVSpec((_LAYER,) * 4)  # the heads of SmolLM2, and few layers: the ratios do not depend on how many
AT_ONCE = "each tail written at once"
AT_REST = "tails wait for rest"
_MOST = 1.5
_DELAY_SECONDS = 0.2  # stands for the 60 s of the default; pauses between turns shrink by the same factor
_CHATS = (
    # title, turns, tokens of each, pause between turns as a part of the delay
    ("200 turns of 30 tokens, one after the other", 200, 30, 0.0),
    ("250 calls of one token, one after the other", 250, 1, 0.0),
    ("60 turns of 30 tokens, a third of the delay apart", 60, 30, 1 / 3),
    ("20 turns of 30 tokens, twice the delay apart", 20, 30, 2.0),
)


def run(options: Options) -> Result:
    """Hold each conversation with a store that writes tails at once, and with one that lets them wait."""
    rounds = options.rounds_or(3)
    chats = _CHATS[:2] if options.quick else _CHATS
    cases = [_case(*chat, rounds, options) for chat in chats]
    targets = [
        Target(f"bytes written for each byte kept: {case.title}", case.row(AT_REST).spread.median, _MOST, "at most")
        for case in cases[:2]
    ]
    notes = ("Pauses are scaled: the delay of tails is 0.2 s there, and 60 s by default.",)
    return Result("writes", (__doc__ or "").strip(), rounds, options.quick, tuple(cases), tuple(targets), notes)


def _case(title: str, turns: int, tokens_each: int, pause: float, rounds: int, options: Options) -> Case:
    def competitor(name: str, delay_seconds: float) -> Competitor:
        return Competitor(name, lambda: _chat(turns, tokens_each, pause * _DELAY_SECONDS, delay_seconds))

    at_rest = competitor(AT_REST, _DELAY_SECONDS if pause else DEFAULT_TAIL_DELAY_SECONDS)
    samples = interleave([competitor(AT_ONCE, 0.0), at_rest], rounds, options.say)
    facts = {"turns": turns, "tokens_each": tokens_each, "pause_of_delay": pause}
    return make_case(
        title, samples, "written_for_each_byte", unit="share", baseline=AT_ONCE, ratio_kind="speedup", facts=facts
    )


def _chat(turns: int, tokens_each: int, pause_seconds: float, delay_seconds: float) -> Sample:
    """Commit a conversation turn by turn; return what was written for each byte of K and V, headers included."""
    generator = torch.Generator().manual_seed(0)
    tokens = np.random.default_rng(0).integers(0, 49_152, turns * tokens_each)
    k_htd, v_htd = (
        torch.randn(3, len(tokens), 64, generator=generator).to(torch.bfloat16) for _ in "kv"
    )  # of every layer
    with tempfile.TemporaryDirectory(prefix="kvtier-bench-") as folder:
        with PrefixStore(Path(folder), tail_delay=delay_seconds, durability="lazy") as store:
            for turn in range(1, turns + 1):
                store.commit(
                    ROOT,
                    tokens[: turn * tokens_each],
                    lambda start, stop: tuple(
                        Page(k_htd[:, start:stop].clone(), v_htd[:, start:stop].clone()) for _ in _GEOMETRY.layers
                    ),
                )
                time.sleep(pause_seconds)
            store.flush()
            written = store.stats().written_bytes
        with PrefixStore(Path(folder)) as store:
            if store.match(ROOT, tokens).length != len(tokens):
                raise BenchmarkError("not all of the conversation was kept")
    return Sample({"written_for_each_byte": written / (_GEOMETRY.token_bytes * len(tokens))})
