"""Self-test of offloading: answers on this device must equal those of a DynamicCache, bit for bit."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kvtier.cli.doctor.findings import Finding, Level
from kvtier.cli.doctor.scripts import (
    LAYERS,
    Script,
    budgets,
    first_difference,
    longest_sequence,
    random_script,
    run_plain,
    run_tiered,
    steady_script,
    tiny_model,
)
from kvtier.hf.cache import TieredCache
from kvtier.report import TurnReport
from kvtier.store import PrefixStore
from kvtier.transfer.accelerator import engine_for
from kvtier.transfer.base import CopyEngine
from kvtier.transfer.engines import MakeEngine
from kvtier.transfer.threads import Readers

_log = logging.getLogger("kvtier.cli")

_RACE_TOKENS = 240
_PAGE_TOKENS = 8
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_SMALL_HOST_BYTES = 2**18  # so little that, beside an accelerator, some pages go to files
_LOAD_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class Trial:
    """One script on one cache: its setting and its result.

    Attributes:
        setting: script, dtype, budgets and page size, in words.
        report: report of the last turn; empty when there was none.
        difference: first difference from a DynamicCache, or the error of the run; None for neither.
        repeatable: whether a DynamicCache gives the same bits a second time; only checked after a difference.
    """

    setting: str
    report: TurnReport
    device_budget_bytes: int
    turns: int
    difference: str | None
    repeatable: bool = True


@dataclass(slots=True)
class SelfTest:
    """Runs scripts under budgets on one device.

    Args:
        device: where the model computes.
        spill_dir: folder for page files.
        engine: ``device`` → its copy engine.
    """

    device: torch.device
    spill_dir: Path
    engine: MakeEngine = engine_for
    _models: dict[torch.dtype, Any] = field(default_factory=dict)

    def run(self, seconds: float) -> Iterator[Finding]:
        """Yield the findings of the exactness test and of ``seconds`` of race stress (at least one script)."""
        yield self._finding("exactness", list(self.exactness()))
        yield self._finding("races", list(self.races(seconds)))

    def exactness(self) -> Iterator[Trial]:
        """Yield one trial for each budget, from every layer cold to every layer hot, in fp32 and bf16."""
        script = steady_script()
        for name, dtype in _DTYPES.items():
            model = self._model(dtype)
            for budget in budgets(model, longest_sequence(script), _PAGE_TOKENS):
                yield self._trial(name, model, script, budget, _PAGE_TOKENS)

    def races(self, seconds: float) -> Iterator[Trial]:
        """Yield trials of random scripts, budgets and page sizes beside a busy load, until ``seconds`` are over."""
        until = time.monotonic() + seconds
        with busy(self.engine(self.device), self.device):
            number = 0
            while number == 0 or time.monotonic() < until:
                chance = random.Random(number)
                name = chance.choice(sorted(_DTYPES))
                model = self._model(_DTYPES[name])
                script, page_tokens = random_script(chance, _RACE_TOKENS), chance.choice((4, 8, 16))
                least, *_, most = budgets(model, longest_sequence(script), page_tokens)
                budget, host_budget = chance.randint(least, most), chance.choice((None, _SMALL_HOST_BYTES))
                yield self._trial(f"script {number} in {name}", model, script, budget, page_tokens, host_budget)
                number += 1

    def _model(self, dtype: torch.dtype) -> Any:
        if dtype not in self._models:
            self._models[dtype] = tiny_model(self.device, dtype)
        return self._models[dtype]

    def _trial(
        self, name: str, model: Any, script: Script, budget: int, page_tokens: int, host_budget: int | None = None
    ) -> Trial:
        setting = f"{name}, device_budget={budget}, host_budget={host_budget}, pages of {page_tokens} tokens"
        report = None
        try:
            with (
                PrefixStore(block_size=page_tokens) as store,
                TieredCache(
                    store,
                    config=model.config,
                    device_budget=budget,
                    host_budget=host_budget,
                    spill_dir=self.spill_dir,
                    reuse="always",
                    engine=self.engine,
                ) as cache,
            ):
                ours = run_tiered(model, script, cache)
                report = cache.last_turn
        except Exception as error:  # any error is a result of the trial
            _log.debug("%s", setting, exc_info=True)
            text = f"it ends with {type(error).__name__}: {error}"
            return Trial(setting, report or TurnReport(), budget, len(script), text)
        known = [answer.known for answer in ours]
        theirs = run_plain(model, script, known)
        difference = first_difference(ours, theirs)
        # A device that does not repeat its own bits cannot be judged by them.
        repeatable = difference is None or first_difference(run_plain(model, script, known), theirs) is None
        return Trial(setting, report or TurnReport(), budget, len(script), difference, repeatable)

    def _finding(self, subject: str, trials: list[Trial]) -> Finding:
        facts: dict[str, Any] = {
            "device": str(self.device),
            "scripts": len(trials),
            "turns": sum(trial.turns for trial in trials),
            "cold_layers": [trial.report.cold_layers for trial in trials],
            "differences": [f"{t.setting}: {t.difference}" for t in trials if t.difference is not None],
        }
        over = next((t for t in trials if t.report.peak_device_bytes > t.device_budget_bytes), None)
        wrong = next((t for t in trials if t.difference is not None and t.repeatable), None)
        vague = next((t for t in trials if t.difference is not None), None)
        level: Level = "problem"
        if wrong is not None:
            text = (
                f"{len(facts['differences'])} of {len(trials)} scripts go wrong, the first with {wrong.setting}: "
                f"{wrong.difference}. Do not use device_budget here, and report this line."
            )
        elif over is not None:
            text = (
                f"{over.setting}: K and V took {over.report.peak_device_bytes} bytes. "
                "The budget is not kept; please report this line."
            )
        elif subject == "exactness" and max(facts["cold_layers"]) < LAYERS:
            text = "not every layer turned cold under the smallest budget: nothing was tested."
        elif vague is not None:
            level = "note"
            text = (
                f"cannot be judged: {vague.setting}: {vague.difference}, but plain transformers does "
                "not repeat its own bits here either. Try torch.use_deterministic_algorithms(True)."
            )
        else:
            level = "ok"
            same = f"{facts['turns']} turns of {len(trials)} scripts have the tokens and logits of DynamicCache"
            text = f"{same}, bit for bit{', beside a busy load' if subject == 'races' else ''}"
        return Finding(level, subject, f"{self.device}: {text}", facts)


@contextmanager
def busy(engine: CopyEngine, device: torch.device) -> Iterator[None]:
    """Keep ``device`` and its links busy from another thread, so that copies without a wait come at a bad moment.

    The matrix products run on the current stream of that thread, on most devices the stream that models compute on.
    """
    stop = False
    thread = Readers(threads=1)

    def load() -> None:
        host, there = engine.host_empty(_LOAD_BYTES), torch.zeros(_LOAD_BYTES, dtype=torch.uint8, device=device)
        factor = torch.zeros(256, 256, device=device)
        host.zero_()
        while True:
            up = engine.copy(there, host, after=[engine.mark()])
            factor = factor @ factor
            engine.settle(engine.copy(host, there, after=[up, engine.mark()]))
            if stop:
                return

    done = thread.submit(load)
    try:
        yield
    finally:
        stop = True
        try:
            done.result()
        finally:
            thread.close()
            engine.close()
