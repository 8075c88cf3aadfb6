"""Seconds per decode token on an accelerator when K and V do not fit there: streaming against offloading everything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.measure import BenchmarkError, Competitor, Options, Sample, SkippedError, Tokens, interleave
from benchmarks.result import Case, Result, make_case
from benchmarks.workload import KeysValues, reported, timed_turn
from kvtier import PrefixStore, TieredCache
from kvtier.cli.doctor.devices import accelerators, link
from kvtier.hf.demo_model import demo_model_folder
from kvtier.transfer.accelerator import engine_for
from kvtier.transfer.engines import MakeEngine

PLAIN = "DynamicCache"
OFFLOADED = "DynamicCache, offloading"
_ALL_HOT = "TieredCache, all hot"
_FRACTIONS = {"TieredCache, 50 %": 0.5, "TieredCache, 25 %": 0.25}
_CONTEXTS = (4096, 16384)
_TOKENS_A_RUN = 16
_CHUNK = 512  # tokens that a cache is filled with at a time, as a chunked prefill would


@dataclass(frozen=True, slots=True)
class _Setup:
    """A model, K and V of a context for it on the host, and the prompt that they stand for."""

    name: str
    model: Any
    device: torch.device
    prompt: Tokens
    states: KeysValues
    engine: MakeEngine = engine_for

    @property
    def known(self) -> int:
        """Tokens in the cache before a run; ``generate`` must be given one to compute."""
        return len(self.prompt) - 1

    @property
    def nbytes(self) -> int:
        """Bytes of K and V of the context."""
        return sum(k.nbytes + v.nbytes for k, v in self.states)


def run(options: Options) -> Result:
    """Measure every model at its contexts; all caches start from the same bytes.

    Raises:
        SkippedError: there is no accelerator.
    """
    found = accelerators()
    if not found:
        raise SkippedError("no accelerator")
    device = found[0]
    rounds = options.rounds_or(5)
    cases: list[Case] = []
    notes: list[str] = [
        "K and V of the context are random: what decoding costs does not depend on their values. "
        f"Each run decodes {_TOKENS_A_RUN} tokens with generate(); filling and committing are off the clock.",
        "floor: bytes that went up per forward call over the measured bandwidth of the link.",
    ]
    for name, model in models(device):
        for context in _CONTEXTS[:1] if options.quick else _CONTEXTS:
            if context + _TOKENS_A_RUN < model.config.max_position_embeddings:
                options.say(f"{name}, {context} tokens")
                case = measure(set_up(name, model, device, context), rounds, options)
                cases.append(case)
                notes += _movements(case)
    return Result("gpu", (__doc__ or "").strip(), rounds, options.quick, tuple(cases), (), tuple(notes))


def models(device: torch.device) -> Iterator[tuple[str, Any]]:
    """Yield models one by one: a random Llama of some 600 MB, and SmolLM2 where it was fetched before."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    config._attn_implementation = "eager"  # the one whose kernels do not depend on how K and V lie in memory
    torch.manual_seed(0)
    with device:
        model: Any = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    yield "random Llama", model
    if (demo_model_folder() / "config.json").exists():
        model = AutoModelForCausalLM.from_pretrained(demo_model_folder(), dtype="auto", attn_implementation="eager")
        yield "SmolLM2-135M", model.to(device).eval()


def set_up(name: str, model: Any, device: torch.device, context: int, engine: MakeEngine = engine_for) -> _Setup:
    """Return ``model`` with random K and V, ``[1, heads, context - 1, dim]`` in each layer, and a random prompt."""
    config, chance = model.config, torch.Generator().manual_seed(0)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (1, config.num_key_value_heads, context - 1, dim)
    states = [
        (
            torch.randn(shape, generator=chance, dtype=torch.float32).to(model.dtype),
            torch.randn(shape, generator=chance, dtype=torch.float32).to(model.dtype),
        )
        for _ in range(config.num_hidden_layers)
    ]
    prompt = tuple(torch.randint(1, config.vocab_size, (context,), generator=chance).tolist())
    return _Setup(name, model, device, prompt, states, engine)


def measure(setup: _Setup, rounds: int, options: Options, *, offloading: bool = True) -> Case:
    """Compare all caches in ``rounds`` rounds; ``offloading=False`` leaves out the one that needs CUDA."""
    bandwidth = link(setup.device, setup.engine).facts["up_bytes_per_second"]
    with TemporaryDirectory(prefix="kvtier-bench-") as scratch:

        def plain(**settings: Any) -> Sample:
            cache = DynamicCache(config=setup.model.config, **settings)
            _fill(setup, cache)
            turn = timed_turn(setup, setup.prompt, cache, _TOKENS_A_RUN + 1)
            return Sample({"decode_s": turn.seconds_per_decode_token}, turn.tokens)

        def tiered(budget: int | None, cold: bool) -> Sample:
            with _filled(setup, budget or 2**62, Path(scratch)) as cache:
                turn = timed_turn(setup, setup.prompt, cache, _TOKENS_A_RUN + 1)
                report = reported(cache)
            if bool(report.cold_layers) != cold:
                raise BenchmarkError(f"device_budget={budget}: {report.cold_layers} layers were cold")
            up = report.bytes_up / (_TOKENS_A_RUN + 1)
            return Sample(
                {
                    "decode_s": turn.seconds_per_decode_token,
                    "bytes_up_per_call": up,
                    "bytes_down_per_call": report.bytes_down / (_TOKENS_A_RUN + 1),
                    "floor_s": up / bandwidth,
                    "cold_layers": report.cold_layers,
                    "peak_device_bytes": report.peak_device_bytes,
                    "wait_s": report.wait_seconds,
                },
                turn.tokens,
            )

        competitors = [Competitor(PLAIN, plain)]
        if offloading:
            competitors.append(Competitor(OFFLOADED, lambda: plain(offloading=True)))
        competitors.append(Competitor(_ALL_HOT, lambda: tiered(None, cold=False)))
        for name, fraction in _FRACTIONS.items():
            budget = int(fraction * setup.nbytes)
            competitors.append(Competitor(name, partial(tiered, budget, cold=True)))
        samples = interleave(competitors, rounds, options.say)
    facts = {
        "context_tokens": len(setup.prompt),
        "tokens_a_run": _TOKENS_A_RUN,
        "device": str(setup.device),
        "keys_values_bytes": setup.nbytes,
        "link_up_bytes_per_second": bandwidth,
    }
    title = f"{setup.name}, {len(setup.prompt)} tokens of context, {setup.nbytes / 1e6:.0f} MB of K and V"
    return make_case(title, samples, "decode_s", unit="s/token", baseline=PLAIN, reference=PLAIN, facts=facts)


def _fill(setup: _Setup, cache: Any) -> None:
    """Let ``cache`` hold the context."""
    for first in range(0, setup.known, _CHUNK):
        for layer, pair in enumerate(setup.states):
            k, v = (part[:, :, first : first + _CHUNK].to(setup.device) for part in pair)
            cache.update(k, v, layer)


@contextmanager
def _filled(setup: _Setup, budget: int, scratch: Path) -> Iterator[TieredCache]:
    """Yield a cache under ``budget`` that has had a turn with the context."""
    ids = torch.tensor([setup.prompt])
    with (
        PrefixStore() as store,
        TieredCache(store, device_budget=budget, spill_dir=scratch, engine=setup.engine, reuse="always") as cache,
    ):
        cache.begin(setup.model, ids)
        _fill(setup, cache)
        cache.commit(ids)
        yield cache


def _movements(case: Case) -> Sequence[str]:
    """Say what moved in each row of a case that moved anything."""
    return [
        f"{case.title}; {row.name}: {row.also['cold_layers']:.0f} layers cold, "
        f"{row.also['bytes_up_per_call'] / 1e6:.1f} MB up per call, floor {row.also['floor_s'] * 1000:.2f} ms"
        for row in case.rows
        if row.also.get("bytes_up_per_call")
    ]
