"""What sliding layers hold, load and keep on disk, and what an edit costs, for several spacings of windows."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache

from benchmarks.measure import Competitor, Options, Sample, interleave
from benchmarks.result import Result, make_case
from benchmarks.workload import reported
from kvtier import PrefixStore, TieredCache
from kvtier.hf.compat.names import passed
from kvtier.hf.turn.cost import COSTS

_PLAIN = "DynamicCache"
_EVERYWHERE = "everywhere"
_WINDOW = 1024  # of Gemma 3 with 4B parameters and more
_EDITED_AT = 0.6  # of the prompt
_CHOSEN = f"every {COSTS.window_spacing_windows} windows"
_HEAD_DIM, _HEADS = 32, 1


def run(options: Options) -> Result:
    """Measure a first turn, a turn from disk and one whose prompt was edited, at several spacings.

    "Everywhere" keeps K and V of all tokens in the store, as for layers of full attention.
    """
    rounds, tokens = options.rounds_or(3), 2048 if options.quick else 8192
    window = _WINDOW // 4 if options.quick else _WINDOW
    model = gemma(window)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(1, model.config.vocab_size, (1, tokens), generator=generator)
    edited, at = prompt.clone(), int(tokens * _EDITED_AT)
    edited[0, at] = edited[0, at] % (model.config.vocab_size - 1) + 1

    def plain() -> Sample:
        cache = DynamicCache(config=model.config)
        seconds = _seconds(model, prompt, cache)
        return Sample({"first_s": seconds, "held_bytes": _held((layer.keys, layer.values) for layer in sliding(cache))})

    def turns(spacing: int) -> Sample:
        with tempfile.TemporaryDirectory(prefix="kvtier-bench-") as name:
            folder = Path(name)
            with PrefixStore(folder) as store, _cache(store, spacing) as cache:
                first = _seconds(model, prompt, cache)
                held = _held((layer.memory.k, layer.memory.v) for layer in sliding(cache))
            disk = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
            with PrefixStore(folder) as store, _cache(store, spacing) as cache:
                again = _seconds(model, prompt, cache)
                loaded = reported(cache).restored_bytes
            with PrefixStore(folder) as store, _cache(store, spacing) as cache:
                after_edit = _seconds(model, edited, cache)
                reused = reported(cache).cached_tokens
        figures = {"first_s": first, "again_s": again, "edited_s": after_edit, "held_bytes": held}
        return Sample({**figures, "loaded_bytes": loaded, "disk_bytes": disk, "reused_after_edit": reused})

    spacings = {_EVERYWHERE: tokens + 1} | {
        f"every {n} windows": n * window for n in (2, COSTS.window_spacing_windows, 8) if n * window < tokens
    }
    turns(tokens + 1)  # what the first call of a process pays for is no part of it
    kept = [Competitor(name, partial(turns, spacing)) for name, spacing in spacings.items()]
    samples = interleave([Competitor(_PLAIN, plain), *kept], rounds, options.say)
    stored = {name: found for name, found in samples.items() if name != _PLAIN}
    token_bytes = 2 * _HEADS * _HEAD_DIM * 4 * model.config.num_hidden_layers
    facts: dict[str, Any] = {
        "prompt_tokens": tokens,
        "window": window,
        "edited_at": at,
        "bytes_of_all_tokens": tokens * token_bytes,
        "chosen": _CHOSEN,
    }
    of_store: Any = {"baseline": _EVERYWHERE, "ratio_kind": "cost", "facts": facts}
    cases = (
        make_case(
            "bytes held by sliding layers",
            samples,
            "held_bytes",
            unit="bytes",
            baseline=_PLAIN,
            ratio_kind="cost",
            facts=facts,
        ),
        make_case("bytes loaded", stored, "loaded_bytes", unit="bytes", **of_store),
        make_case("bytes on disk", stored, "disk_bytes", unit="bytes", **of_store),
        make_case("turn after an edit", stored, "edited_s", **of_store),
    )
    notes = (
        "A random model with the layers of Gemma 3, five of six sliding, and small heads, in fp32. Bytes of all tokens "
        "are what buffers, loads and files would take if sliding layers kept everything.",
    )
    return Result("sliding", (__doc__ or "").strip(), rounds, options.quick, cases, (), notes)


def gemma(window: int) -> Any:
    """Return a random model of twelve layers, two of them with full attention."""
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=12,
        num_attention_heads=2,
        num_key_value_heads=_HEADS,
        head_dim=_HEAD_DIM,
        sliding_window=window,
        layer_types=[*["sliding_attention"] * 5, "full_attention"] * 2,
        max_position_embeddings=16384,
        attn_implementation="sdpa",
    )
    return transformers.Gemma3ForCausalLM(config).eval()


def _cache(store: PrefixStore, spacing: int) -> TieredCache:
    cache = TieredCache(store, reuse="always")
    cache.turns.costs = replace(COSTS, window_spacing_tokens=spacing, window_spacing_windows=1)
    return cache


def sliding(cache: Any) -> list[Any]:
    """Return the sliding layers of a cache."""
    return [layer for layer in cache.layers if layer.is_sliding]


def _held(layers: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> int:
    """Return the bytes of the storages of K and V."""
    return sum(part.untyped_storage().nbytes() for k_and_v in layers for part in k_and_v)


def _seconds(model: Any, prompt: torch.Tensor, cache: Any) -> float:
    started = time.perf_counter()
    model.generate(prompt, **passed(cache), max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    return time.perf_counter() - started
