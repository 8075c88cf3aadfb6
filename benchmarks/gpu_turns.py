"""Whole turns on an accelerator with all layers hot: loads and commits beside the computation, and device memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from transformers import DynamicCache

from benchmarks.gpu import models
from benchmarks.measure import Competitor, Options, Sample, SkippedError, Tokens, interleave
from benchmarks.result import Case, Result, make_case
from benchmarks.workload import TimedTurn, timed_turn
from kvtier import PrefixStore, TieredCache
from kvtier.cli.doctor.devices import accelerators
from kvtier.transfer.accelerator import engine_for
from kvtier.transfer.engines import MakeEngine

PLAIN = "DynamicCache"
CONTINUED = "DynamicCache, continued"
TIERED = "TieredCache"
_PROMPTS = (1024, 8192, 16384)
_NEW_TOKENS = 16
_QUESTION = 32  # tokens that a later turn adds


@dataclass(frozen=True, slots=True)
class Setup:
    """A model on a device, and a prompt for it."""

    name: str
    model: Any
    device: torch.device
    prompt: Tokens
    engine: MakeEngine = engine_for


def run(options: Options) -> Result:
    """Measure a first turn, and one that continues, with models of full and of sliding layers.

    Raises:
        SkippedError: there is no accelerator.
    """
    found = accelerators()
    if not found:
        raise SkippedError("no accelerator")
    device, rounds = found[0], options.rounds_or(5)
    cases: list[Case] = []
    for name, model in (*models(device), ("random Gemma 3", gemma(device))):
        for tokens in _PROMPTS[:1] if options.quick else _PROMPTS:
            if tokens + 3 * _NEW_TOKENS < model.config.max_position_embeddings:
                options.say(f"{name}, {tokens} tokens")
                cases += measure(Setup(name, model, device, prompt_of(model, tokens)), rounds, options)
    notes = (
        "seconds: until generate() has returned, its commit included; first_token_s: until the first new token. "
        "held_bytes and peak_bytes: device memory after the turn, and at most during it, beyond what was held before.",
    )
    return Result("gpu_turns", (__doc__ or "").strip(), rounds, options.quick, tuple(cases), (), notes)


def gemma(device: torch.device) -> Any:
    """Return a random model with the layers of Gemma 3: five of six slide, with a window of 1,024."""
    config = transformers.Gemma3TextConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=18,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        sliding_window=1024,
        layer_types=[*["sliding_attention"] * 5, "full_attention"] * 3,
        max_position_embeddings=32768,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    with device:
        return transformers.Gemma3ForCausalLM(config).to(torch.bfloat16).eval()


def prompt_of(model: Any, tokens: int) -> Tokens:
    """Return a random prompt."""
    chance = torch.Generator().manual_seed(0)
    return tuple(torch.randint(1, model.config.vocab_size, (tokens,), generator=chance).tolist())


def measure(setup: Setup, rounds: int, options: Options) -> Iterator[Case]:
    """Yield a case for a first turn, and one for a turn of a new cache object that continues it from RAM."""
    later = (*setup.prompt, *prompt_of(setup.model, len(setup.prompt) + _QUESTION)[-_QUESTION:])

    def plain(prompt: Tokens) -> Sample:
        return _sample(setup, prompt, DynamicCache(config=setup.model.config))

    def continued() -> Sample:
        cache = DynamicCache(config=setup.model.config)
        timed_turn(setup, setup.prompt, cache, 1)
        return _sample(setup, later, cache)

    def first() -> Sample:
        with PrefixStore() as store, TieredCache(store, engine=setup.engine, reuse="always") as cache:
            return _sample(setup, setup.prompt, cache)

    with PrefixStore() as known:
        with TieredCache(known, engine=setup.engine, reuse="always") as cache:
            timed_turn(setup, setup.prompt, cache, 1)

        def from_ram() -> Sample:
            with TieredCache(known, engine=setup.engine, reuse="always") as cache:
                return _sample(setup, later, cache)

        title = f"{setup.name}, {len(setup.prompt)} prompt tokens"
        samples = interleave(
            [Competitor(PLAIN, partial(plain, setup.prompt)), Competitor(TIERED, first)], rounds, options.say
        )
        facts = {"device": str(setup.device), "prompt_tokens": len(setup.prompt)}
        of_turn: dict[str, Any] = {"baseline": PLAIN, "reference": PLAIN, "facts": facts}
        yield make_case(f"first turn, {title}", samples, "seconds", ratio_kind="cost", **of_turn)
        samples = interleave(
            [Competitor(PLAIN, partial(plain, later)), Competitor(CONTINUED, continued), Competitor(TIERED, from_ram)],
            rounds,
            options.say,
        )
        pieces = [CONTINUED, TIERED]  # they compute the prompt in two
        yield make_case(f"later turn, {title}", samples, "first_token_s", other_calls=pieces, **of_turn)


def _sample(setup: Setup, prompt: Tokens, cache: Any) -> Sample:
    turn, held, peak = _watched(setup.device, lambda: timed_turn(setup, prompt, cache, _NEW_TOKENS))
    figures = {"seconds": turn.seconds, "first_token_s": turn.token_seconds[0]}
    return Sample(figures | {"held_bytes": held, "peak_bytes": peak}, turn.tokens)


def _watched(device: torch.device, turn: Callable[[], TimedTurn]) -> tuple[TimedTurn, int, int]:
    """Return what ``turn`` returns, and the device memory held after it and at its peak; 0 where none is counted."""
    module: Any = torch.get_device_module(device)
    if not hasattr(module, "max_memory_allocated"):
        return turn(), 0, 0
    gc.collect()
    module.synchronize(device)
    module.reset_peak_memory_stats(device)
    before = module.memory_allocated(device)
    done = turn()
    module.synchronize(device)
    return done, module.memory_allocated(device) - before, module.max_memory_allocated(device) - before
