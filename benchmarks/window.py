"""A window of 128k tokens of a tiny model under a budget of 64 MiB: it must run to the end, with the same tokens."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.measure import BenchmarkError, Competitor, Options, Sample, interleave
from benchmarks.result import Result, Target, make_case
from benchmarks.workload import reported
from kvtier import PrefixStore, TieredCache
from kvtier.hf.compat.names import passed

PLAIN = "DynamicCache"
_TIERED = "TieredCache, 64 MiB"
_TOKENS = 131_072
_LAYERS = 12
_HEAD_DIM = 8
_BUDGET_BYTES = 64 * 2**20
_CHUNK = 512
_NEW_TOKENS = 8


def run(options: Options) -> Result:
    """Generate after 128k tokens, fed in pieces."""
    tokens = _TOKENS // 8 if options.quick else _TOKENS
    budget = _BUDGET_BYTES // 8 if options.quick else _BUDGET_BYTES
    model = _model(tokens + _NEW_TOKENS)
    prompt = torch.randint(1, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))

    def generate(cache: Any) -> Sample:
        started = time.perf_counter()
        sequences = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            **passed(cache),
            max_new_tokens=_NEW_TOKENS,
            do_sample=False,
            prefill_chunk_size=_CHUNK,
        )
        seconds = time.perf_counter() - started
        values = {"seconds": seconds}
        if isinstance(cache, TieredCache):
            report = reported(cache)
            if not report.cold_layers:
                raise BenchmarkError("all layers fitted into the budget")
            values |= {"peak_device_bytes": report.peak_device_bytes, "cold_layers": report.cold_layers}
        return Sample(values, tuple(sequences[0, tokens:].tolist()))

    def tiered() -> Sample:
        with (
            tempfile.TemporaryDirectory(prefix="kvtier-bench-") as scratch,
            PrefixStore(host_budget=2**20) as store,
            TieredCache(store, device_budget=budget, spill_dir=Path(scratch)) as cache,
        ):
            return generate(cache)

    rounds = options.rounds_or(1)
    competitors = [Competitor(PLAIN, lambda: generate(DynamicCache(config=model.config))), Competitor(_TIERED, tiered)]
    case = make_case(
        f"{tokens} tokens in pieces of {_CHUNK}, and {_NEW_TOKENS} new ones",
        interleave(competitors, rounds, options.say),
        "seconds",
        baseline=PLAIN,
        ratio_kind="cost",
        reference=PLAIN,
        facts={"kv_bytes": tokens * _LAYERS * 2 * _HEAD_DIM * 4, "device_budget_bytes": budget},
    )
    peak = case.row(_TIERED).also["peak_device_bytes"] / budget
    targets = (Target("the most that K and V held in memory, against the budget", peak, 1.0, "at most"),)
    return Result("window", (__doc__ or "").strip(), rounds, options.quick, (case,), targets, ())


def _model(positions: int) -> Any:
    """Return a random Llama with one tiny head, so that 128k tokens take minutes on two cores."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=_HEAD_DIM,
        intermediate_size=_HEAD_DIM,
        num_hidden_layers=_LAYERS,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=_HEAD_DIM,
        initializer_range=0.5,
        max_position_embeddings=positions,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()
