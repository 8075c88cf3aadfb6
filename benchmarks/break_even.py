"""Time to first token over links from slow to fast: computing a prefix, loading it, and what kvtier decides."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import torch
import transformers

from benchmarks.measure import Competitor, Options, Sample, Tokens, interleave
from benchmarks.result import Case, Result, Target, make_case
from benchmarks.workload import reported, timed_turn
from kvtier import PrefixStore, TieredCache
from kvtier.hf.turn.choice.estimates import machine_name
from kvtier.store.eviction.adaptive import Adaptive
from kvtier.store.tiers.host.tier import HostTier
from kvtier.testing import Link, SlowTier

_COLD, _LOAD, _AUTO = "computed", "loaded", "kvtier decides"
_BANDWIDTHS = (1e6, 1e7, 1e8, 1e9)  # bytes a second
_LATENCIES = (0.0, 0.02, 0.2)
_PREFIXES = (64, 512, 2048, 8000)
_NEW_TOKENS = 2  # the second one shows when the first pass has ended
_REST = 16  # tokens of a prompt after its known prefix
_LEARNING = (64, 512, 2048)  # prefixes of the turns before the first that is measured
_HOPELESS = 3.0  # a load that the link alone makes so many times slower than computing is not run
_HOST_BYTES = 2**30


@dataclass(slots=True, eq=False)
class Setup:
    """A model, the tier that has all its prefixes, and what was learnt over each link."""

    model: Any
    blocks: HostTier
    root: str = ""
    token_bytes: float = 0.0
    learnt: dict[tuple[float, float], Any] = field(default_factory=dict)
    predictions: list[tuple[float, float]] = field(default_factory=list)

    @contextmanager
    def cache(self, link: tuple[float, float], reuse: str) -> Iterator[TieredCache]:
        """Yield a cache over a store that has nothing but a tier behind ``link``, and what was learnt of it."""
        bandwidth, latency = link
        with PrefixStore(lower_tiers=[SlowTier(self.blocks, Link(bandwidth, latency))]) as store:
            book = store.costs(self.root, machine_name(self.model.device))
            book.learn(self.learnt.get(link, {}))
            with TieredCache(store, reuse=reuse) as cache:
                yield cache
        self.learnt[link] = book.to_dict()  # as a store keeps it when it is closed


def run(options: Options) -> Result:
    """Measure computing, loading and deciding, at every prefix over every link."""
    rounds = options.rounds_or(3)
    prefixes = _PREFIXES[:2] if options.quick else _PREFIXES
    links = [(1e6, 0.0), (1e8, 0.2)] if options.quick else list(product(_BANDWIDTHS, _LATENCIES))
    setup = prepared(prefixes)
    computing = {tokens: _cold(setup, tokens).values["first_token_s"] for tokens in prefixes}
    for link in links:
        for tokens in (each for each in _LEARNING if each in prefixes):
            _turn(setup, tokens, link, "auto", note=False)
    cases: list[Case] = []
    for tokens in prefixes:
        for link in links:
            competitors = [
                Competitor(_COLD, partial(_cold, setup, tokens)),
                Competitor(_AUTO, partial(_turn, setup, tokens, link, "auto")),
            ]
            carried = link[1] + tokens * setup.token_bytes / link[0]
            if carried < _HOPELESS * computing[tokens]:
                competitors.append(Competitor(_LOAD, partial(_turn, setup, tokens, link, "always")))
            title = f"{tokens:,} tokens over {link[0] / 1e6:,.0f} MB/s, {link[1] * 1e3:.0f} ms"
            options.say(title)
            samples = interleave(competitors, rounds, lambda _: None)
            facts = {"prefix_tokens": tokens, "bytes_per_second": link[0], "latency_seconds": link[1]}
            cases.append(
                make_case(title, samples, "first_token_s", baseline=_COLD, facts=facts | _ways(samples[_AUTO]))
            )
    within = [abs(predicted / actual - 1) <= 0.25 for predicted, actual in setup.predictions]
    targets = (
        Target(
            "the slowest decision, against the better of computing and loading", _worst(cases), 1.05, "at most", "×"
        ),
        Target("both at once, where computing and loading take about as long", _crossing(cases), 1.3, "at least", "×"),
        Target("turns whose prediction was within 25 %", sum(within) / len(within), 0.9, "at least", "share"),
    )
    notes = (
        "A random model in fp32 whose K and V take 3 kB a token, so that links of a few MB/s decide. Who waits for a "
        "link sleeps: loading leaves the cores alone, as copies to an accelerator do.",
        "Computing is a turn of a TieredCache over an empty store; `first_turn` compares one with DynamicCache.",
        f"Each link begins with {len(_LEARNING)} turns that are not measured. A load is not run where its link alone "
        f"takes {_HOPELESS:.0f} times as long as computing.",
    )
    return Result("break_even", (__doc__ or "").strip(), rounds, options.quick, tuple(cases), targets, notes)


def prepared(prefixes: tuple[int, ...]) -> Setup:
    """Return a model and a tier with its prefixes."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=16384,
    )
    blocks = HostTier(_HOST_BYTES, Adaptive(), time.time, frozenset, None, lambda: None)
    setup = Setup(transformers.LlamaForCausalLM(config).eval(), blocks)
    longest = prompt_of(max(prefixes))
    with (
        PrefixStore(lower_tiers=[SlowTier(blocks, Link(1e12, 0.0))]) as store,
        TieredCache(store, reuse="always") as cache,
    ):
        timed_turn(setup, longest, cache, _NEW_TOKENS)
        setup.root, _ = cache.turns.kept_row(0)
        setup.token_bytes = store.costs(setup.root, machine_name(setup.model.device)).token_bytes
        store.flush()
    return setup


def prompt_of(prefix: int) -> Tokens:
    """Return a prompt whose first ``prefix`` tokens are those of all others, and whose last ones are its own."""
    generator = torch.Generator().manual_seed(1)
    shared = torch.randint(3, 512, (max(_PREFIXES),), generator=generator)[:prefix]
    own = torch.randint(3, 512, (_REST,), generator=torch.Generator().manual_seed(prefix))
    return tuple(shared.tolist() + own.tolist())


def _cold(setup: Setup, tokens: int) -> Sample:
    with PrefixStore() as store, TieredCache(store, reuse="always") as cache:
        turn = timed_turn(setup, prompt_of(tokens), cache, _NEW_TOKENS)
        return Sample({"first_token_s": turn.token_seconds[0]})


def _turn(setup: Setup, tokens: int, link: tuple[float, float], reuse: str, *, note: bool = True) -> Sample:
    with setup.cache(link, reuse) as cache:
        turn = timed_turn(setup, prompt_of(tokens), cache, _NEW_TOKENS)
        report = reported(cache)
    if note and reuse == "auto" and report.predicted_seconds:
        setup.predictions.append((report.predicted_seconds, report.actual_seconds))
    ways = {f"is_{way}": float(report.decision == way) for way in ("compute", "load", "both")}
    figures = {"predicted_s": report.predicted_seconds, "actual_s": report.actual_seconds}
    return Sample({"first_token_s": turn.token_seconds[0], "cached": report.cached_tokens, **figures, **ways})


def _ways(samples: tuple[Sample, ...]) -> dict[str, Any]:
    """Return how often each way was taken."""
    return {way: sum(sample.values[f"is_{way}"] for sample in samples) for way in ("compute", "load", "both")}


def _best(case: Case) -> float:
    return min(row.spread.median for row in case.rows if row.name != _AUTO)


def _worst(cases: list[Case]) -> float:
    return max(case.row(_AUTO).spread.median / _best(case) for case in cases)


def _crossing(cases: list[Case]) -> float:
    """Return the gain where computing and loading are closest, among the points where both can gain seconds."""
    closest: Callable[[Case], float] = lambda case: abs(  # noqa: E731
        case.row(_LOAD).spread.median / case.row(_COLD).spread.median - 1
    )
    loaded = [case for case in cases if any(row.name == _LOAD and row.also["cached"] > 0 for row in case.rows)]
    case = min(loaded, key=closest)
    return _best(case) / case.row(_AUTO).spread.median
