"""Decoding with a quarter of K and V in memory: cold layers from page files against everything hot."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from transformers import DynamicCache

from benchmarks import page_cache
from benchmarks.measure import BenchmarkError, Competitor, Options, Sample, Tokens, interleave
from benchmarks.result import Case, Result, Target, make_case
from benchmarks.streamed_process import measure_growth
from benchmarks.workload import (
    KeysValues,
    keys_values,
    load_chat,
    prefill,
    reported,
    running_text,
    seeded,
    seeded_cache,
)
from kvtier import PrefixStore, TieredCache, demo_model
from kvtier.cli.demo.conversation import ChatModel
from kvtier.hf.compat.names import passed

PLAIN = "DynamicCache"
_HOT = "TieredCache, all hot"
_COLD = "TieredCache, a quarter"
_DROPPED = "TieredCache, a quarter, page cache dropped"
_ZSTD = "TieredCache, a quarter, zstd pages"
_SHARE = 0.25
_QUICK_SHARE = 0.4  # of a short context, unfinished pages alone are more than a quarter
_CONTEXT = 7900
_TOKENS_A_RUN = 8
_READ_PASSES = 5


def run(options: Options) -> Result:
    """Measure seconds a step, bytes a step, and how much a process grows."""
    rounds = options.rounds_or(5)
    chat = load_chat()
    context = 1024 if options.quick else _CONTEXT
    options.say(f"prefilling {context} tokens")
    prompt = running_text(chat, context)
    known = context - 1
    plain = prefill(chat, prompt[:known])
    share = _QUICK_SHARE if options.quick else _SHARE
    budget = int(share * sum(k.nbytes + v.nbytes for k, v in keys_values(plain, known)))
    with tempfile.TemporaryDirectory(prefix="kvtier-bench-") as scratch_name:
        scratch = Path(scratch_name)
        case = _steps(chat, prompt, plain, budget, scratch, rounds, options)
        with PrefixStore(scratch / "store") as store:
            seeded(store, chat, prompt, keys_values(plain, known)).close()
        options.say("watching a new process")
        grown = measure_growth(demo_model(), scratch / "store", prompt, budget, _TOKENS_A_RUN)
        options.say("watching one without K and V")
        idle = measure_growth(demo_model(), scratch / "store", prompt, None, _TOKENS_A_RUN)
    up, down = bytes_that_offloading_moves(chat, plain, known)
    facts = dict(case.facts)
    hot, cold = case.row(_HOT).spread.median, case.row(_COLD).spread.median
    longest = max(hot, facts["cold_bytes"] / facts["read_bytes_per_second"])
    moved = case.row(_COLD).also["bytes_up_a_step"]
    targets = (
        Target(
            "a step, against an all-hot step or reading the cold bytes, whichever is longer",
            cold / longest,
            1.25,
            "at most",
        ),
        Target("resident memory for K and V, against the budget", (grown - idle) / budget, 1.1, "at most"),
        Target("bytes up a step, against the full pages of cold layers", moved / facts["cold_bytes"], 1.0, "at most"),
    )
    notes = (
        f"{facts['cold_layers']} of {len(plain.layers)} layers are cold: {_mb(moved)} come up in each step, none go "
        f"down. Offloading in transformers moves {_mb(up)} up and {_mb(down)} down for the same step: counted in "
        "its own code, which needs CUDA to run.",
        f"One thread reads the page files at {facts['read_bytes_per_second'] / 1e9:.2f} GB/s from the page cache.",
        f"A new process that restores the context and decodes grew by {_mb(grown)}, seen from outside; one that is "
        f"given a single token, by {_mb(idle)}. The budget is {_mb(budget)}.",
    )
    found = {"process_growth_bytes": grown, "process_growth_without_kv_bytes": idle, "offloading_bytes_up_a_step": up}
    found["offloading_bytes_down_a_step"] = down
    case = replace(case, facts=facts | found)
    return Result("stream", (__doc__ or "").strip(), rounds, options.quick, (case,), targets, notes)


def _steps(
    chat: ChatModel,
    prompt: Tokens,
    plain: Any,
    budget: int,
    scratch: Path,
    rounds: int,
    options: Options,
) -> Case:
    """Measure steps after the same context, each competitor from a cache of its own that stays."""
    known = len(prompt) - 1
    states = keys_values(plain, known)
    with contextlib.ExitStack() as stack:

        def tiered(name: str, budget_bytes: int | None, page_compression: str = "raw") -> TieredCache:
            store = stack.enter_context(PrefixStore(host_budget=2**20))
            cache = TieredCache(
                store,
                device_budget=budget_bytes,
                spill_dir=scratch / name,
                page_compression=page_compression,
                reuse="always",
            )
            return stack.enter_context(seeded_cache(cache, chat, prompt, states))

        hot, cold, dropped = tiered("hot", None), tiered("cold", budget), tiered("dropped", budget)
        compressed = tiered("compressed", budget, "zstd")
        files = page_files(scratch / "dropped")
        if not files:
            raise BenchmarkError("no layer went to page files")
        competitors = [
            Competitor(PLAIN, lambda: _decode(chat, prompt, plain, lambda: None)),
            Competitor(_HOT, lambda: _decode(chat, prompt, hot, lambda: None)),
            Competitor(_COLD, lambda: _decode(chat, prompt, cold, lambda: None)),
            Competitor(_ZSTD, lambda: _decode(chat, prompt, compressed, lambda: None)),
        ]
        if page_cache.can_drop():
            drop = partial(page_cache.drop, files)
            competitors.append(Competitor(_DROPPED, lambda: _decode(chat, prompt, dropped, drop)))
        samples = interleave(competitors, rounds, options.say)
        report = reported(cold)
        page_tokens = cold.store.block_size
        cold_bytes = report.cold_layers * (known // page_tokens * page_tokens) * _layer_token_bytes(states)
        facts = {
            "context_tokens": len(prompt),
            "kv_bytes": sum(k.nbytes + v.nbytes for k, v in states),
            "device_budget_bytes": budget,
            "cold_layers": report.cold_layers,
            "cold_bytes": cold_bytes,
            "read_bytes_per_second": _read_speed(page_files(scratch / "cold")),
            "page_files": len(files),
            "page_file_bytes": sum(path.stat().st_size for path in page_files(scratch / "cold")),
            "zstd_page_file_bytes": sum(path.stat().st_size for path in page_files(scratch / "compressed")),
        }
    return make_case(
        f"a step after {len(prompt)} tokens",
        samples,
        "step_s",
        unit="s/token",
        baseline=PLAIN,
        reference=PLAIN,
        facts=facts,
    )


def _layer_token_bytes(states: KeysValues) -> int:
    """Bytes of K and V of one token in one layer; all layers of the model are alike."""
    k, v = states[0]
    return (k.nbytes + v.nbytes) // k.shape[2]


def page_files(folder: Path) -> list[Path]:
    """Return the page files below ``folder``."""
    return sorted(path for path in folder.glob("*/*") if path.suffix in (".safetensors", ".pages"))


def _bytes_up(cache: TieredCache | None) -> int:
    """Return how much was brought up so far."""
    transfers = cache.transfers if cache is not None else None
    return transfers.bytes_up if transfers is not None else 0


def _decode(chat: ChatModel, prompt: Tokens, cache: Any, before_step: Callable[[], None]) -> Sample:
    """Feed the last token of the prompt, then some new ones; time those, and crop them off again."""
    tiered = cache if isinstance(cache, TieredCache) else None
    known = len(prompt) - 1
    if tiered is not None:
        tiered.begin(chat.model, torch.tensor([prompt]))
    seconds, tokens, moved = [], [], 0
    feed = torch.tensor([prompt[known:]])
    with torch.no_grad():
        for step in range(_TOKENS_A_RUN + 1):
            before_step()
            up = _bytes_up(tiered)
            started = time.perf_counter()
            logits = chat.model(feed, **passed(cache)).logits
            feed = logits[:, -1:].argmax(-1)
            tokens.append(int(feed))
            if step:  # the first one finds nothing prefetched
                seconds.append(time.perf_counter() - started)
                moved += _bytes_up(tiered) - up
    if tiered is not None:
        tiered.commit(torch.tensor([[*prompt, *tokens]]))
    cache.crop(known - cache.get_seq_length())
    return Sample({"step_s": median(seconds), "bytes_up_a_step": moved / _TOKENS_A_RUN}, tuple(tokens))


def _read_speed(files: Sequence[Path]) -> float:
    """Return the bytes per second at which one thread reads ``files`` from the page cache into memory that is there."""
    buffer = bytearray(max(path.stat().st_size for path in files))

    def read() -> tuple[int, float]:
        started, done = time.perf_counter(), 0
        for path in files:
            with path.open("rb", buffering=0) as file:
                done += file.readinto(buffer)
        return done, time.perf_counter() - started

    passes = [read() for _ in range(1 + _READ_PASSES)][1:]
    return median(done / seconds for done, seconds in passes)


class _Unordered(contextlib.nullcontext[None]):
    """A stream that orders nothing."""

    def wait_stream(self, stream: Any) -> None:
        """Do nothing."""


def bytes_that_offloading_moves(chat: ChatModel, plain: Any, known: int) -> tuple[int, int]:
    """Return the bytes up and down that a step of ``DynamicCache(offloading=True)`` moves, counted by running its code.

    Streams and events are replaced, since it knows only those of CUDA; each call that would copy a layer counts it.
    """
    moved = {"prefetch": 0, "offload": 0}
    cache = DynamicCache(config=chat.model.config)
    for layer, (k, v) in enumerate(keys_values(plain, known)):
        cache.update(k, v, layer)
    cache.offloading, cache.only_non_sliding, cache.prefetch_stream = True, True, _Unordered()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.cuda, "default_stream", return_value=_Unordered()))
        for layer in cache.layers:
            for name in moved:
                stack.enter_context(mock.patch.object(layer, name, partial(_count, moved, name, layer)))
        with torch.no_grad():
            chat.model(torch.tensor([[1]]), **passed(cache))
    return moved["prefetch"], moved["offload"]


def _count(moved: dict[str, int], name: str, layer: Any) -> None:
    moved[name] += layer.keys.nbytes + layer.values.nbytes


def _mb(nbytes: float) -> str:
    return f"{nbytes / 1e6:.0f} MB"
