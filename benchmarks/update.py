"""What ``update()`` takes for each layer and token of a decode step, around what the tensor operations take."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.measure import Competitor, Options, Sample, interleave
from benchmarks.result import Result, Target, make_case
from kvtier import PrefixStore, TieredCache

_PLAIN = "DynamicCache"
_TIERED = "TieredCache"
_LAYERS = 30
_PROMPT_TOKENS = 256
_STEPS = 200
_HEADS, _HEAD_DIM = 2, 8  # tiny: what is copied takes no time
_ROUNDS = 15
_BOUND = 4.0  # what it was before this benchmark


def run(options: Options) -> Result:
    """Append single tokens to all layers of a tiny model, without computing attention."""
    steps = _STEPS // 10 if options.quick else _STEPS
    model = _model()
    prompt = torch.randint(1, 64, (1, _PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))

    def append(cache: Any) -> Sample:
        many, one = (torch.randn(1, _HEADS, columns, _HEAD_DIM) for columns in (_PROMPT_TOKENS, 1))
        with torch.no_grad():
            for layer in range(_LAYERS):
                cache.update(many, many, layer)
            started = time.perf_counter()
            for _ in range(steps):
                for layer in range(_LAYERS):
                    cache.update(one, one, layer)
            seconds = (time.perf_counter() - started) / steps / _LAYERS
        return Sample({"seconds": seconds})

    def tiered() -> Sample:
        with PrefixStore(host_budget=2**20) as store, TieredCache(store) as cache:
            cache.begin(model, prompt)
            return append(cache)

    rounds = options.rounds_or(_ROUNDS)
    competitors = [Competitor(_PLAIN, lambda: append(DynamicCache(config=model.config))), Competitor(_TIERED, tiered)]
    case = make_case(
        f"{steps} tokens after {_PROMPT_TOKENS}, one by one, for each of {_LAYERS} layers",
        interleave(competitors, rounds, options.say),
        "seconds",
        baseline=_PLAIN,
        ratio_kind="cost",
        facts={"heads": _HEADS, "head_dim": _HEAD_DIM},
    )
    ratio = case.row(_TIERED).ratio
    measured = ratio.median if ratio is not None else float("nan")
    targets = (Target("an update, against DynamicCache's", measured, _BOUND, "at most"),)
    return Result("update", (__doc__ or "").strip(), rounds, options.quick, (case,), targets, ())


def _model() -> Any:
    """Return a random Llama, only so that a turn has a model to begin on."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=_HEADS,
        head_dim=_HEAD_DIM,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()
