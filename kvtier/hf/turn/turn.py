"""Turn: the known prefix, the row moves and the report of one turn."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from kvtier.errors import BusyError
from kvtier.hf.identity.fingerprint import Identity
from kvtier.hf.inputs.prompt import Prompt, ResidentPrefix
from kvtier.hf.layers.loads.prefix_load import PrefixLoad, RowPlan
from kvtier.hf.turn.choice.clock import TurnClock
from kvtier.hf.turn.choice.decision import COMPUTE, Decision
from kvtier.hf.turn.choice.meeting import Meeting
from kvtier.hf.turn.plan import NO_PREFILL, Prefill, TurnPlan
from kvtier.hf.turn.reporting.turn_progress import TurnProgress
from kvtier.hf.turn.token_trace import TokenTrace
from kvtier.report import RowReport, TurnReport
from kvtier.store.chain import TokenIds
from kvtier.store.reading.load import LoadJob
from kvtier.store.reading.lookup import Span

MakeLoad = Callable[[int, int, Sequence[RowPlan], LoadJob | None, int], PrefixLoad]
"""``(columns, first, rows, job, held rows)`` → the load of a prefix, as the layers of this turn need it."""


@dataclass(slots=True, eq=False)
class Turn:
    """A turn that has begun and is not committed.

    Attributes:
        prompt: the prompt of the turn; None when the turn must neither reuse nor be kept.
        identity: identity of the model.
        prefix: the known prefix of the prompt; None for none.
        reason: why no more tokens were reused.
        prompt_only: whether generated tokens can no longer be assigned to rows.
        row_of: the prompt row that each cache row continues; None until rows have moved.
        cropped_to: fewest columns left by a crop; tokens appended after a crop are not those of the returned sequences.
        intact: leading columns that no later token has overwritten, fed to every layer by complete forward passes.
        is_strict: whether only the running ``generate()`` may change the cache, and only by appending.
        ends: columns that each layer held after its last update in the turn, and the number of that forward pass.
        passes: forward passes of the turn, including the running one.
        trace: the tokens fed, recorded for decoding modes whose returned sequences do not show them.
        custom: whether only a trace can show the tokens fed: even the prompt may not have been fed.
        match_seconds: time spent finding the prefix.
        plan: the plan of the turn; None when nothing of it was looked up.
        cached_by_tier: tokens of the prefix by source tier.
        clock: the times of the turn's forward passes.
        meeting: computes the front of the prefix while its end loads; None where it does not.
        make_load: makes the load of what was not computed while it came; None without a meeting.
        fronted: columns of the prefix that were computed while the rest loaded.
        keeps_answer_states: whether states after generated tokens equal those after the same tokens in a prompt.
        progress: is told how far the prompt is; None when nothing is, and once the prompt is computed.
    """

    prompt: Prompt | None
    identity: Identity | None
    prefix: PrefixLoad | None
    reason: str | None = None
    prompt_only: bool = False
    row_of: list[int] | None = None
    cropped_to: int | None = None
    intact: int = sys.maxsize
    is_strict: bool = False
    ends: dict[int, tuple[int, int]] = field(default_factory=dict)
    passes: int = 0
    trace: TokenTrace | None = None
    custom: bool = False
    match_seconds: float = 0.0
    plan: TurnPlan | None = None
    cached_by_tier: Mapping[str, int] = field(default_factory=dict)
    clock: TurnClock | None = None
    meeting: Meeting | None = None
    make_load: MakeLoad | None = None
    fronted: int = 0
    keeps_answer_states: bool = True
    progress: TurnProgress | None = None

    @classmethod
    def off(cls, reason: str) -> Turn:
        """Return a turn that neither reuses nor is kept."""
        return cls(None, None, None, reason)

    @classmethod
    def planned(
        cls, prompt: Prompt, identity: Identity, prefix: PrefixLoad | None, plan: TurnPlan, job: LoadJob | None
    ) -> Turn:
        """Return the turn that a plan describes, with the reused ``prefix`` and the ``job`` that loads it, if any."""
        by_tier: dict[str, int] = {}
        if prefix is not None:
            by_tier["device"] = sum(min(row.device_tokens, max(0, plan.columns - row.pad)) for row in plan.rows)
        if job is not None:
            by_tier |= tokens_by_tier(job, plan.spans)
        return cls(prompt, identity, prefix, plan.reason, plan=plan, cached_by_tier=by_tier)

    @property
    def prefill(self) -> Prefill:
        """Chunks of the prompt, and checkpoint columns besides the ends of prompt and turn."""
        return self.plan.prefill if self.plan is not None else NO_PREFILL

    def twin(self, memo: dict[int, Any] | None) -> Turn:
        """Return the same turn for a copy of the cache.

        Args:
            memo: memo of the deep copy of layers that wait for the prefix; None when no layer waits.
        """
        prefix = copy.deepcopy(self.prefix, memo) if memo is not None else self.prefix
        row_of = list(self.row_of) if self.row_of is not None else None
        trace, ends = copy.deepcopy(self.trace), dict(self.ends)
        meeting = self.meeting if self.meeting is not None and self.meeting.joined is not None else None
        return replace(
            self,
            prefix=prefix,
            row_of=row_of,
            trace=trace,
            ends=ends,
            is_strict=False,
            clock=None,
            meeting=meeting,
            progress=None,
        )

    def meet_at_once(self) -> None:
        """Wait as long as is planned; go on with the load of the whole prefix if it has come before anything else."""
        assert self.meeting is not None
        try:
            if self.meeting.first_chunk() is None:
                self.join(self.meeting.begin)
        except BaseException:
            self.let_go()
            raise

    def join(self, column: int) -> PrefixLoad | None:
        """End the meeting at ``column``. Return the load of what was not computed; None where nothing is left of it."""
        assert self.meeting is not None
        assert self.prompt is not None
        assert self.plan is not None
        assert self.make_load is not None
        share = self.meeting.arrived_share
        job = self.meeting.join(column)
        if self.progress is not None:
            self.progress.arrived(share)
            self.progress.joined()
        if job is None:
            return None
        rows, resident = self.plan.rows, self.plan.candidates.resident
        held_rows = len(resident.rows) if resident is not None else 0
        if column > self.meeting.begin:  # passes have put what was held, and what they computed, in its place
            rows = tuple(RowPlan(0, row, 0, column, len(tokens)) for row, tokens in enumerate(self.prompt.rows))
            held_rows = len(rows)
        self.prefix = self.make_load(self.plan.columns, 0, rows, job, held_rows)
        self.ends = {layer: (self.plan.columns, last_pass) for layer, (_, last_pass) in self.ends.items()}
        self.fronted = column - self.meeting.begin
        parts = [[part for span in spans if (part := span.from_token(column)) is not None] for spans in self.plan.spans]
        self.cached_by_tier = {"device": self.meeting.begin * len(rows)} | tokens_by_tier(job, parts)
        return self.prefix

    def let_go(self) -> None:
        """Stop loading, and telling of progress. May be called more than once."""
        if self.progress is not None:
            self.progress.end(whole=False)
            self.progress = None
        if self.prefix is not None:
            self.prefix.close()
        if self.meeting is not None:
            self.meeting.close()

    def rows_moved(self, rows: torch.Tensor, held_rows: int) -> None:
        """Note that cache row ``i`` is the former row ``rows[i]``: generated tokens have no known row from now on."""
        if self.prompt is None:
            return
        if rows.dtype == torch.bool:
            rows = rows.nonzero().flatten()
        before = self.prompt_rows(held_rows)
        self.row_of = [before[int(r)] for r in rows.tolist()]
        self.prompt_only = True
        if self.trace is not None:
            self.trace.move(rows.tolist())

    def appending(self, layer: int, begin: int, columns: int) -> None:
        """Note that ``columns`` columns are appended to ``layer``, which holds ``begin``.

        Raises:
            BusyError: something other than the running ``generate()`` has changed the layer.
        """
        ends = self.ends
        resident = ends.get(layer)
        expected, last_pass = resident if resident is not None else (self.reused_columns, 0)
        if begin != expected:
            self._changed(layer, begin, expected)
        if not ends or layer == next(iter(ends)):  # the first layer: another forward pass
            self.passes += 1
            if self.clock is not None:
                self.clock.begin_pass(begin, columns, self.waited_seconds)
        elif last_pass != self.passes - 1:  # an interrupted pass skipped this layer; later passes saw its leftovers
            self.intact = min(self.intact, begin)
        ends[layer] = begin + columns, self.passes
        if self.progress is not None and not self.progress.appending(layer, begin, columns, self.passes):
            self.progress = None
        if self.cropped_to is not None:
            self.prompt_only = True
            if self.trace is None:
                self.intact = min(self.intact, self.cropped_to)
        if self.trace is not None:
            self.trace.appended(begin, columns)

    @property
    def waited_seconds(self) -> float:
        """How long the turn has waited for pages, and copied them, inside forward passes."""
        return self.prefix.seconds if self.prefix is not None else 0.0

    @property
    def reused_columns(self) -> int:
        """Columns of the known prefix that the turn begins with; 0 for none."""
        return self.prefix.columns if self.prefix is not None else 0

    def _changed(self, layer: int, begin: int, expected: int) -> None:
        if self.is_strict:
            raise BusyError(
                f"this TieredCache was changed inside generate(): layer {layer} holds {begin} columns where generate() "
                f"has fed {expected}. Change it (crop, reset, layers) after generate() has returned, or stop "
                "generate() by a stopping criterion and call it again with the prompt that is wanted"
            )
        self.prompt_only = True
        self.intact = min(self.intact, begin, expected)

    def cropped(self, columns: int, ends: Mapping[int, int]) -> None:
        """Note a crop: ``columns`` columns are left, ``ends[layer]`` of them in each layer."""
        self.cropped_to = columns if self.cropped_to is None else min(columns, self.cropped_to)
        if not self.is_strict:  # else the next update must detect the crop
            self.ends = {layer: (ends[layer], last_pass) for layer, (_, last_pass) in self.ends.items()}
        if self.trace is not None:
            self.trace.cut(columns)

    def prompt_rows(self, held_rows: int) -> list[int]:
        """Return the prompt row that each of ``held_rows`` cache rows continues; ``generate`` expands them in order."""
        assert self.prompt is not None
        repeats = max(1, held_rows // len(self.prompt.rows))
        return self.row_of or [row // repeats for row in range(held_rows)]

    def named(
        self, generated: Sequence[TokenIds], held_rows: int, columns: int, ends: Sequence[int]
    ) -> ResidentPrefix | None:
        """Return the tokens in the ``held_rows`` rows of the buffers; None when they are not known.

        Args:
            generated: the new tokens of each returned sequence.
            held_rows: rows of the buffers.
            columns: columns of the buffers.
            ends: ids that end a sequence.
        """
        if self.prompt is None or not held_rows:
            return None
        row_of = self.prompt_rows(held_rows)
        seen = self.trace.rows(row_of, columns) if self.trace is not None else None
        if seen is not None:
            lengths = [len(self.prompt.rows[p]) for p in row_of]
            rows = tuple(np.concatenate([ids[:n], _until(ids[n:], ends)]) for ids, n in zip(seen, lengths, strict=True))
            return self._resident(rows, row_of)
        if self.custom:
            return None
        by_row = not self.prompt_only and self.prompt.answer_follows and len(generated) == held_rows
        nothing = np.empty(0, np.int64)
        tails = [
            generated[row] if by_row and not self.prompt.ends_early(p) else nothing for row, p in enumerate(row_of)
        ]
        rows = tuple(self.prompt.continued(p, tail) for p, tail in zip(row_of, tails, strict=True))
        return self._resident(rows, row_of)

    def _resident(self, rows: tuple[TokenIds, ...], row_of: Sequence[int]) -> ResidentPrefix:
        """Return ``rows``, which continue the prompt rows ``row_of``, as a prefix cut to the intact columns."""
        prompt = self.prompt
        assert prompt is not None
        marks = tuple(prompt.marks[p] for p in row_of) if prompt.marks else ()
        positions = tuple(prompt.positions[p] for p in row_of) if prompt.positions else ()
        return ResidentPrefix(rows, tuple(prompt.pads[p] for p in row_of), None, marks, positions).cut(self.intact)

    def reads(self, sequences: Any) -> bool:
        """Whether the returned ``sequences`` are ids ``[rows, columns]`` of prompt and answer."""
        if self.prompt is None:
            return True
        if not isinstance(sequences, torch.Tensor) or sequences.ndim != 2:
            return False
        integers = not (sequences.is_floating_point() or sequences.is_complex() or sequences.dtype == torch.bool)
        rows, columns = sequences.shape
        return integers and rows % len(self.prompt.rows) == 0 and columns >= self._returned

    @property
    def _returned(self) -> int:
        """Columns of the prompt that ``generate`` returns before the new tokens."""
        assert self.prompt is not None
        return self.prompt.columns if self.prompt.returned is None else self.prompt.returned

    def generated(self, sequences: torch.Tensor, eos_ids: Iterable[int]) -> list[TokenIds]:
        """Return the new tokens of each of ``sequences [rows, columns]``, up to its end of sequence."""
        if self.prompt is None:
            return []
        new = sequences[:, self._returned :].detach().to("cpu", torch.int64).numpy()
        ends = list(eos_ids)
        return [_until(ids, ends) for ids in new]

    def _cut_short(self) -> str | None:
        """Return, in words, the tokens lost by cutting all rows at one column; None when none were lost."""
        if self.prompt is None or self.plan is None:
            return None
        limit, known = self.plan.candidates.limit, self.plan.candidates.known
        lost = [n - min(n, max(0, limit - pad)) for n, pad in zip(known, self.prompt.pads, strict=True)]
        if not any(lost):
            return None
        row = [pad + n for n, pad in zip(known, self.prompt.pads, strict=True)].index(limit)
        return (
            f"rows are cut at one column, {limit}, where row {row} stops being known: {sum(lost)} known "
            "tokens of other rows are computed again"
        )

    def report(self, generated: Sequence[TokenIds] = (), kept_tokens: int = 0) -> TurnReport:
        """Return the report of the turn.

        Args:
            generated: the new tokens of each returned sequence.
            kept_tokens: tokens of all sequences that the cache holds after the turn.
        """
        if self.prompt is None:
            return TurnReport(miss_reason=self.reason)
        rows = []
        repeats = max(1, len(generated) // len(self.prompt.rows))
        found = self.plan.candidates if self.plan is not None else None
        for r, (tokens, pad) in enumerate(zip(self.prompt.rows, self.prompt.pads, strict=True)):
            cached = min(len(tokens), max(0, self.reused_columns - pad)) - self.fronted
            made = sum(map(len, generated[r * repeats : (r + 1) * repeats]))
            divergence, known = (found.divergence(r, tokens), found.known[r]) if found is not None else (None, 0)
            rows.append(RowReport(len(tokens), cached, made, divergence, known))
        decision = self.plan.decision if self.plan is not None else Decision(COMPUTE, 0)
        prompt_tokens, cached_tokens = sum(r.prompt_tokens for r in rows), sum(r.cached_tokens for r in rows)
        return TurnReport(
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            computed_tokens=prompt_tokens - cached_tokens,
            generated_tokens=sum(r.generated_tokens for r in rows),
            cached_by_tier=MappingProxyType({"device": 0, "host": 0, "disk": 0} | dict(self.cached_by_tier)),
            restored_bytes=self.prefix.restored_bytes if self.prefix else 0,
            restore_seconds=self.match_seconds + (self.prefix.seconds if self.prefix else 0.0),
            miss_reason=self.reason or self._cut_short(),
            divergence=rows[0].divergence,
            rows=tuple(rows),
            known_tokens=sum(r.known_tokens for r in rows),
            decision=decision.way,
            predicted_seconds=decision.seconds or 0.0,
            actual_seconds=self.clock.prompt_seconds if self.clock is not None else 0.0,
            first_token_seconds=self.clock.first_token_seconds if self.clock is not None else 0.0,
            other_ways=decision.others,
            cold_seconds=decision.cold_seconds,
            kept_tokens=kept_tokens,
        )


def tokens_by_tier(job: LoadJob, rows: Iterable[Iterable[Span]]) -> dict[str, int]:
    """Return the number of tokens of all ``rows`` that ``job`` loads from each tier."""
    by_tier: dict[str, int] = {}
    for span in (span for spans in rows for span in spans):
        tier = job.tier(span.block.key)
        by_tier[tier] = by_tier.get(tier, 0) + span.tokens
    return by_tier


def _until(ids: TokenIds, ends: Sequence[int]) -> TokenIds:
    """Cut ``ids`` after the first of ``ends``: the rest is padding."""
    found = np.flatnonzero(np.isin(ids, ends))
    return ids[: int(found[0]) + 1] if len(found) else ids
