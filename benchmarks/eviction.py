"""What a store of a given size finds again, by the policy that decides which blocks go first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median

from benchmarks.block_workloads import ASSISTANTS, CHATS, MODELS, SCANS, TWO_MODELS, Habits, draw
from benchmarks.contenders import Balance, Frequency, GreedyDual, Library, Optimum, ThreeQueues
from benchmarks.measure import Options, Sample
from benchmarks.replay import Contender, Replay
from benchmarks.result import Case, Result, Target, make_case
from benchmarks.trace import Trace, read_trace
from kvtier.store.eviction import Adaptive, LeastRecentlyUsed

DEFAULT = "kvtier"
UNMEASURED = "kvtier, nothing measured"
CLASSIC = ("LRU", "LFU", "ARC")
CONTENDERS: Mapping[str, Callable[[Trace], Contender]] = {
    DEFAULT: lambda trace: Library(trace, Adaptive(), DEFAULT),
    UNMEASURED: lambda trace: Library(trace, Adaptive(), UNMEASURED, weighs=False),
    "LRU": lambda trace: Library(trace, LeastRecentlyUsed(), "LRU"),
    "LFU": Frequency,
    "ARC": Balance,
    "S3-FIFO": ThreeQueues,
    "GDSF": GreedyDual,
    "optimum": Optimum,
}
TRACE_BLOCKS = (1_000, 3_000, 10_000, 30_000, 50_000)
_REQUESTS = 6_000
_QUICK_REQUESTS = 300
_WORKLOADS: tuple[tuple[str, Habits, tuple[int, ...]], ...] = (
    ("prompts shared by many, conversations", ASSISTANTS, (500, 2_000, 8_000)),
    ("many shared prompts, a third one-off", SCANS, (500, 2_000, 8_000)),
    ("conversations alone", CHATS, (500, 2_000, 5_000)),
)
_MODELS: tuple[tuple[str, Habits], ...] = (
    ("two models, the larger one of fewer bytes", TWO_MODELS),
    ("models of three sizes", MODELS),
)
_SHARES_OF_ALL = (0.01, 0.1, 0.25)
_TOLERANCE = 0.02


def run(options: Options) -> Result:
    """Replay the trace, if there is one, and the workloads, each drawn anew in every round."""
    rounds = options.rounds_or(3)
    cases: list[Case] = []
    targets: list[Target] = []
    if options.trace is not None:
        trace = read_trace(options.trace, _QUICK_REQUESTS if options.quick else None)
        for blocks in TRACE_BLOCKS:
            options.say(f"{options.trace.name}: room for {blocks} blocks")
            cases.append(_case(f"{options.trace.name}: {blocks:,} blocks", [trace], [blocks], "blocks"))
            targets.append(_target(cases[-1], f"trace, {blocks:,} blocks"))
    requests = _QUICK_REQUESTS if options.quick else _REQUESTS
    for name, habits, capacities in _WORKLOADS:
        options.say(name)
        traces = [draw(habits, requests, seed) for seed in range(rounds)]
        for trace in traces:
            trace.count_bytes_by_blocks()
        for blocks in capacities:
            cases.append(_case(f"{name}: {blocks:,} blocks", traces, [blocks] * rounds, "blocks"))
            targets.append(_target(cases[-1], f"{name}, {blocks:,} blocks"))
    for name, habits in _MODELS:
        options.say(name)
        traces = [draw(habits, requests, seed) for seed in range(rounds)]
        for share in _SHARES_OF_ALL:
            rooms = [share * sum(trace.sizes) for trace in traces]
            cases.append(_case(f"{name}: room for {share:.0%} of all", traces, rooms, "operations"))
            targets.append(_target(cases[-1], f"{name}, {share:.0%} of all"))
    notes = (
        "Shares of what was asked for that was there. Figures of one round are exact: nothing here depends on time.",
        "The optimum knows the future. For models of several sizes it is a guide, no bound.",
    )
    return Result("eviction", (__doc__ or "").strip(), rounds, options.quick, tuple(cases), tuple(targets), notes)


def _case(title: str, traces: Sequence[Trace], capacities: Sequence[float], metric: str) -> Case:
    samples: dict[str, list[Sample]] = {name: [] for name in CONTENDERS}
    for trace, capacity in zip(traces, capacities, strict=True):
        for name, contender in CONTENDERS.items():
            found = Replay(trace, contender(trace), capacity).run()
            samples[name].append(
                Sample({"blocks": found.blocks, "tokens": found.tokens, "operations": found.operations})
            )
    best = [sample.values[metric] for sample in samples["optimum"]]
    gaps = {
        name: median(b - s.values[metric] for b, s in zip(best, kept, strict=True)) for name, kept in samples.items()
    }
    facts = {"capacity": median(capacities), "blocks": median(len(t.parents) for t in traces), "below_optimum": gaps}
    return make_case(title, samples, metric, unit="share", facts=facts)


def _target(case: Case, where: str) -> Target:
    best = max(case.row(name).spread.median for name in CLASSIC)
    ahead = case.row(DEFAULT).spread.median - best
    return Target(f"{where}: ahead of the best of {', '.join(CLASSIC)}", ahead, -_TOLERANCE, "at least", "of all")
