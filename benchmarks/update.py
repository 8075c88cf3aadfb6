"""What ``update()`` takes for each layer and token of a decode step: tiny tensors, and those of a real model."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.measure import Competitor, Options, Sample, interleave
from benchmarks.result import Case, Result, Target, make_case
from kvtier import PrefixStore, TieredCache

_PLAIN = "DynamicCache"
_TIERED = "TieredCache"
_BARE = "tensor operations alone"
_LAYERS = 30
_STEPS = 200
_ROUNDS = 15
_TINY = (2, 8)  # heads, dim: what is copied takes no time
_REAL = (3, 64)  # of SmolLM2-135M
_SHORT, _LONG = 256, 4096  # tokens held before
_BOUND = 3.0  # of an update of tiny tensors, against DynamicCache's
_BOUND_ABOVE_BARE = 2.0
_BOUND_LONG = 1.0


def run(options: Options) -> Result:
    """Append single tokens to all layers, without computing attention."""
    rounds = options.rounds_or(_ROUNDS)
    tiny, real, long = (_case(options, rounds, *at) for at in ((_TINY, _SHORT), (_REAL, _SHORT), (_REAL, _LONG)))
    targets = (
        Target("an update of tiny tensors, against DynamicCache's", tiny.ratio(_TIERED), _BOUND, "at most"),
        Target(
            "an update of tiny tensors, against the tensor operations alone",
            tiny.ratio(_TIERED) / tiny.ratio(_BARE),
            _BOUND_ABOVE_BARE,
            "at most",
        ),
        Target(f"an update after {_LONG} tokens, against DynamicCache's", long.ratio(_TIERED), _BOUND_LONG, "at most"),
    )
    notes = (
        f"{_BARE}: the six calls that append K and V to buffers with room and show what attention sees of them. "
        "DynamicCache makes two, each of which copies all that it holds.",
    )
    return Result("update", (__doc__ or "").strip(), rounds, options.quick, (tiny, real, long), targets, notes)


def _case(options: Options, rounds: int, shape: tuple[int, int], held: int) -> Case:
    heads, dim = shape
    steps = _STEPS // 10 if options.quick else _STEPS
    model = _model(heads, dim)
    prompt = torch.randint(1, 64, (1, held), generator=torch.Generator().manual_seed(0))
    many, one = (torch.randn(1, heads, columns, dim) for columns in (held, 1))

    def append(cache: Any) -> Sample:
        with torch.no_grad():
            for layer in range(_LAYERS):
                cache.update(many, many, layer)
            started = time.perf_counter()
            for _ in range(steps):
                for layer in range(_LAYERS):
                    cache.update(one, one, layer)
            return Sample({"seconds": (time.perf_counter() - started) / steps / _LAYERS})

    def tiered() -> Sample:
        with PrefixStore(host_budget=2**20) as store, TieredCache(store) as cache:
            cache.begin(model, prompt)
            return append(cache)

    competitors = [
        Competitor(_PLAIN, lambda: append(DynamicCache(config=model.config))),
        Competitor(_TIERED, tiered),
        Competitor(_BARE, lambda: append(_Buffers(heads, held + steps, dim))),
    ]
    return make_case(
        f"{steps} tokens after {held}, one by one, for each of {_LAYERS} layers, {heads} heads of {dim}",
        interleave(competitors, rounds, options.say),
        "seconds",
        baseline=_PLAIN,
        ratio_kind="cost",
    )


class _Buffers:
    """K and V ``[1, heads, capacity, dim]`` of each layer, and nothing around them."""

    def __init__(self, heads: int, capacity: int, dim: int) -> None:
        self._layers = [[torch.empty(1, heads, capacity, dim) for _ in "kv"] for _ in range(_LAYERS)]
        self._ends = [0] * _LAYERS

    def update(self, k_bhtd: torch.Tensor, v_bhtd: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = self._layers[layer]
        begin, columns = self._ends[layer], k_bhtd.shape[2]
        k.narrow(2, begin, columns).copy_(k_bhtd)
        v.narrow(2, begin, columns).copy_(v_bhtd)
        end = self._ends[layer] = begin + columns
        return k.narrow(2, 0, end), v.narrow(2, 0, end)


def _model(heads: int, dim: int) -> Any:
    """Return a random Llama, only so that a turn has a model to begin on."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=48,  # of any number of heads here
        intermediate_size=32,
        num_hidden_layers=_LAYERS,
        num_attention_heads=2 * heads,
        num_key_value_heads=heads,
        head_dim=dim,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()
