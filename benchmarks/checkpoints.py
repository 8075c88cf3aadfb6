"""How far apart to keep the states of a long prompt: what it costs the first turn, what it spares an edited one."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import transformers

from benchmarks.measure import Competitor, Options, Sample, interleave
from benchmarks.result import Result, make_case
from benchmarks.workload import reported
from kvtier import PrefixStore, TieredCache
from kvtier.hf.compat.names import passed
from kvtier.hf.turn.cost import COSTS

_NONE = "at the end only"
_SPACINGS = (2048, 1024, 512)
_EDITED_AT = 0.8  # of the prompt


def run(options: Options) -> Result:
    """Measure a first turn and one whose prompt was edited late, at several spacings."""
    rounds, tokens = options.rounds_or(5), 1024 if options.quick else 4096
    model = hybrid()
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(1, model.config.vocab_size, (1, tokens), generator=generator)
    edited = prompt.clone()
    at = int(tokens * _EDITED_AT)
    edited[0, at] = edited[0, at] % (model.config.vocab_size - 1) + 1

    def turns(spacing: int) -> Sample:
        with PrefixStore() as store, TieredCache(store, reuse="always") as cache:
            cache.turns.costs = replace(COSTS, checkpoint_spacing_tokens=spacing)
            first = _seconds(model, prompt, cache)
            kept = sum(tier.nbytes for tier in store.stats().tiers)
            again = _seconds(model, edited, cache)
            spared = reported(cache).cached_tokens
        return Sample({"first_s": first, "edited_s": again, "kept_bytes": kept, "cached_tokens": spared})

    names = {_NONE: 2 * tokens} | {f"every {spacing} tokens": spacing for spacing in _SPACINGS if spacing < tokens}
    competitors = [Competitor(name, partial(turns, spacing)) for name, spacing in names.items()]
    turns(2 * tokens)  # what the first call of a process pays for is no part of it
    samples = interleave(competitors, rounds, options.say)
    facts: dict[str, Any] = {"prompt_tokens": tokens, "edited_at": at, "chosen": COSTS.checkpoint_spacing_tokens}
    cases = (
        make_case("first turn", samples, "first_s", baseline=_NONE, ratio_kind="cost", facts=facts),
        make_case("turn after a late edit", samples, "edited_s", baseline=_NONE, ratio_kind="speedup", facts=facts),
    )
    notes = (
        "A random hybrid model: three layers of linear attention for one of full attention, in fp32. "
        "kept_bytes are K, V and states in the store after the first turn.",
    )
    return Result("checkpoints", (__doc__ or "").strip(), rounds, options.quick, cases, (), notes)


def hybrid() -> Any:
    """Return a Qwen3-Next of a few million parameters with random weights."""
    config = transformers.Qwen3NextConfig(
        vocab_size=1000,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=128,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=32_768,
        pad_token_id=0,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.Qwen3NextForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    return model


def _seconds(model: Any, ids: torch.Tensor, cache: TieredCache) -> float:
    started = time.perf_counter()
    model.generate(ids, attention_mask=torch.ones_like(ids), **passed(cache), max_new_tokens=1, do_sample=False)
    return time.perf_counter() - started
