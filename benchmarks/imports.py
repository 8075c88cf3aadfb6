"""What importing kvtier adds to importing transformers, and that it changes there what it says and no more."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from benchmarks.machine import CHECKOUT
from benchmarks.measure import BenchmarkError, Competitor, Options, Sample, Spread, interleave
from benchmarks.result import Result, Target, make_case

PLAIN = "transformers"
WITH_KVTIER = "transformers, then kvtier"
_MOST_SECONDS = 0.1
WRAPPED = [
    "GenerationMixin.__init_subclass__",
    "GenerationMixin._prepare_cache_for_generation",
    "GenerationMixin.generate",
]
"""What kvtier wraps, and nothing else: ``generate``, how it looks at its cache, and the making of classes below it."""


def run(options: Options) -> Result:
    """Import in new interpreters, with and without kvtier by turns."""
    rounds = options.rounds_or(9)
    options.say("importing once off the clock: compiled modules and the page cache are then there for all")
    _probe(with_kvtier=True)
    samples = interleave(
        [
            Competitor(PLAIN, lambda: Sample({"import_s": _probe(with_kvtier=False)["seconds"]})),
            Competitor(WITH_KVTIER, _with_kvtier),
        ],
        rounds,
        options.say,
    )
    case = make_case("importing in a new interpreter", samples, "import_s", baseline=PLAIN, ratio_kind="cost")
    added = case.row(WITH_KVTIER).spread.median - case.row(PLAIN).spread.median
    alone = Spread.of([sample.values["kvtier_s"] for sample in samples[WITH_KVTIER]])
    targets = (
        Target("seconds kvtier adds, difference of the medians", added, _MOST_SECONDS, "less than", "s"),
        Target("seconds of `import kvtier` after transformers", alone.median, _MOST_SECONDS, "less than", "s"),
    )
    notes = (
        "GenerationMixin, DynamicCache and PreTrainedModel had the same attributes afterwards, but for "
        f"{', '.join(WRAPPED)}; no thread was started.",
    )
    return Result("imports", (__doc__ or "").strip(), rounds, options.quick, (case,), targets, notes)


def _with_kvtier() -> Sample:
    seen = _probe(with_kvtier=True)
    if seen["replaced"] != WRAPPED:
        raise BenchmarkError(f"importing kvtier changed transformers: {', '.join(seen['replaced'])}")
    if seen["threads_started"]:
        raise BenchmarkError(f"importing kvtier started threads: {seen['threads_started']}")
    return Sample({"import_s": seen["seconds"], "kvtier_s": seen["kvtier_seconds"]})


def _probe(with_kvtier: bool) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.import_probe", *(["kvtier"] if with_kvtier else [])]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchmarkError(f"importing failed:\n{done.stderr.strip()}")
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen
