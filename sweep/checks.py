"""The checks: a conversation of two turns with a tiny model, on kvtier and on transformers' own cache."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from kvtier import BudgetError, PrefixStore, TieredCache
from sweep.judging import judge, worst
from sweep.models import NotMadeError, architectures, brief, tiny_model
from sweep.outcome import Outcome, Row
from sweep.turns import (
    LONGER,
    NAMES,
    PROMPT,
    QUESTION,
    ROUNDING,
    Answer,
    ask,
    ask_rows,
    compare,
    edited,
    next_prompt,
    padded,
    prompt,
)
from sweep.upstream import Upstream, keeps, names_unknown_argument, token_bytes

BLOCK = 8
EVIDENT = 10  # times the rounding that is allowed: what an edit must change where a stale answer is possible
NO_REASON = "kvtier gave no reason"
UNSEEN = "kvtier did not see the turn"
_REUSING = partial(TieredCache, reuse="always")  # tiny models compute faster than anything loads


def examine(model_type: str) -> Row:
    """Return what the checks find about one architecture."""
    started = time.perf_counter()
    class_name = architectures()[model_type]
    try:
        model = tiny_model(model_type)
    except NotMadeError as error:
        return Row(model_type, class_name, not_made=str(error))
    folder = Path(tempfile.mkdtemp(prefix="kvtier-sweep-"))
    try:
        row = Examination(model, folder).run(model_type, class_name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return replace(row, seconds=round(time.perf_counter() - started, 2))


@dataclass(frozen=True, slots=True)
class _Batch:
    """A shorter prompt and the ``other`` one with a question, as one batch ``ids [rows, columns]``."""

    other: torch.Tensor
    ids: torch.Tensor
    mask: torch.Tensor
    references: Sequence[Answer]


class Examination:
    """One model under all checks.

    Args:
        model: the model.
        folder: an empty one, for stores and pages.
        make_cache: makes the caches under examination, as ``TieredCache`` does.
        make_store: makes the stores behind them, as ``PrefixStore`` does.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        folder: Path,
        make_cache: Callable[..., TieredCache] = _REUSING,
        make_store: Callable[..., PrefixStore] = PrefixStore,
    ) -> None:
        self._model = model
        self._folder = folder
        self._make_cache, self._make_store = make_cache, make_store
        self._upstream = Upstream(model)
        self._rounding = ROUNDING
        self._outcomes: dict[str, Outcome] = {}

    def run(self, model_type: str, class_name: str) -> Row:
        """Return the row of ``model_type``. No exception that a turn raises leaves it."""
        first = prompt(PROMPT, seed=1)
        layers = layer_kinds(self._model)
        try:  # before the first TieredCache: what fails here fails without kvtier
            reference = self._upstream.answer(first)
            second = next_prompt(reference)
            cold = self._upstream.answer(second)
            changed = self._upstream.answer(edited(second))
            kept = self._upstream.kept(first)
        except Exception as error:  # whatever it is: transformers alone cannot generate with this model
            return Row(model_type, class_name, layers, not_made=f"transformers cannot generate with it: {brief(error)}")
        control = self._upstream.control(first, second, cold)
        batch = self._batch(second)
        if control.right and control.deviation is not None:
            # Some models compute a prompt and a new token in different ways. What that changes is no error of a cache.
            self._rounding = max(ROUNDING, 3 * control.deviation)
        influence = compare(changed, cold).deviation
        folder = self._folder / "store"
        with self._make_store(folder, block_size=BLOCK) as store:
            with self._make_cache(store) as cache:
                self._note("generates", self._generated, cache, first, reference)
                self._note("reuses", self._reused, cache, second, cold, "device")
            with self._make_cache(store) as cache:
                self._note("ram", self._reused, cache, second, cold, "host")
            store.flush()
        with self._make_store(folder, block_size=BLOCK) as store, self._make_cache(store) as cache:
            self._note("disk", self._reused, cache, second, cold, "disk")
        turns = ((first, reference), (second, cold))
        self._note("streams", self._streamed, turns, sum(map(token_bytes, getattr(kept, "layers", ()))))
        self._note("edited", self._edited, first, edited(second), changed, influence)
        self._note("padded", self._padded, batch, first, second, cold)
        self._note("names", self._named, turns)
        return Row(model_type, class_name, layers, self._outcomes, control, keeps(kept), influence=influence)

    def _note(self, check: str, find: Callable[..., Outcome], *arguments: Any) -> None:
        try:
            self._outcomes[check] = find(*arguments)
        except Exception as error:  # of kvtier or of the model: each is a finding
            self._outcomes[check] = self._upstream.crash(error)

    def _generated(self, cache: TieredCache, ids_1t: torch.Tensor, reference: Answer) -> Outcome:
        """Answer ``ids_1t`` on ``cache``, and then without: kvtier must leave calls alone that are not its own."""
        judged = self._answered(cache, ids_1t, reference)
        try:
            without = judge(self._upstream.answer(ids_1t), reference)
        except Exception as error:
            return Outcome("failed", f"on transformers' own cache, once kvtier is in use: {brief(error)}")
        if not without.right:
            return replace(without, reason=f"on transformers' own cache, once kvtier is in use: {without.reason}")
        return judged

    def _answered(self, cache: TieredCache, ids_1t: torch.Tensor, reference: Answer) -> Outcome:
        """Answer ``ids_1t`` on ``cache`` and judge the answer."""
        return judge(ask(self._model, ids_1t, cache), reference, self._rounding)

    def _reused(
        self, cache: TieredCache, ids_1t: torch.Tensor, reference: Answer, tier: str = "", name: str | None = None
    ) -> Outcome:
        """Answer a prompt whose beginning is known.

        Args:
            cache: that the answer is computed on.
            ids_1t: ``[1, columns]``, the prompt.
            reference: the right answer.
            tier: from which tokens must be reused; any if empty.
            name: see ``ask``.
        """
        before = cache.last_turn
        judged = judge(ask(self._model, ids_1t, cache, name), reference, self._rounding)
        report = cache.last_turn
        if not judged.right:
            return judged
        if report is None or report is before:
            return Outcome("no", UNSEEN, None, judged.deviation)
        if not (report.cached_by_tier[tier] if tier else report.cached_tokens):
            return Outcome("no", report.miss_reason or NO_REASON, None, judged.deviation)
        return replace(judged, cached=report.cached_tokens)

    def _streamed(self, turns: Sequence[tuple[torch.Tensor, Answer]], bytes_per_token: int) -> Outcome:
        """Answer both turns under the smallest budget that suffices, up to some hundredths."""
        columns = turns[-1][0].shape[1] + turns[-1][1].logits.shape[0]
        whole = bytes_per_token * (columns + columns // 8 + 3 * BLOCK)
        if not whole:
            return Outcome("no", "it has no layer of K and V")
        too_small, enough = whole // 30, 2 * whole
        found = self._under(too_small, turns)
        if found is not None:
            return found  # a budget does not matter to it
        while enough - too_small > whole // 30 and (found is None or found.verdict != "wrong"):
            budget = (too_small + enough) // 2
            tried = self._under(budget, turns)
            too_small, enough = (budget, enough) if tried is None else (too_small, budget)
            found = tried or found
        return found or Outcome("failed", f"{enough} bytes are too small a budget, and {whole} hold everything")

    def _under(self, budget: int, turns: Sequence[tuple[torch.Tensor, Answer]]) -> Outcome | None:
        """Judge ``turns`` of one conversation under a ``device_budget``; None if it is too small."""
        judged = []
        spill = self._folder / f"pages-{budget}"
        with (
            self._make_store(block_size=BLOCK) as store,
            self._make_cache(store, device_budget=budget, spill_dir=spill) as cache,
        ):
            for ids_1t, expected in turns:
                try:
                    judged.append(judge(ask(self._model, ids_1t, cache), expected, self._rounding))
                except BudgetError:
                    return None
            report = cache.last_turn
        found = worst(judged)
        if not found.right or (report is not None and report.cold_layers):
            return found
        reason = (report.miss_reason if report is not None else UNSEEN) or "none of its layers can be cold"
        return Outcome("no", reason, None, found.deviation)

    def _edited(self, first: torch.Tensor, changed: torch.Tensor, reference: Answer, influence: float) -> Outcome:
        """Answer a turn whose history was changed in the middle, which changes logits by ``influence``."""
        with self._make_store(block_size=BLOCK) as store, self._make_cache(store) as cache:
            ask(self._model, first, cache)
            judged = self._answered(cache, changed, reference)
        reuses = self._outcomes["reuses"].right
        if judged.right and not influence > (EVIDENT if reuses else 1) * self._rounding:
            reason = f"the edit changes logits by {influence:.2%} of their spread: a stale answer would pass"
            return Outcome("no", reason, None, judged.deviation)
        return judged

    def _batch(self, second: torch.Tensor) -> _Batch | Outcome:
        """Return a padded batch and its right answers; an outcome if transformers cannot answer it."""
        other = prompt(PROMPT + LONGER, seed=4)
        ids, mask = padded(second, torch.cat([other, prompt(QUESTION, seed=5)], 1))
        try:
            return _Batch(other, ids, mask, self._upstream.answer_rows(ids, mask))
        except Exception as error:
            misnamed = names_unknown_argument(error)
            return Outcome("failed" if misnamed else "upstream", f"transformers on a padded batch: {brief(error)}")

    def _padded(self, batch: _Batch | Outcome, first: torch.Tensor, second: torch.Tensor, cold: Answer) -> Outcome:
        """Answer in one batch what two prompts know that were asked alone, one of them behind padding; then alone."""
        if isinstance(batch, Outcome):
            return batch
        with self._make_store(block_size=BLOCK) as store, self._make_cache(store) as cache:
            for known in (batch.other, first):
                ask(self._model, known, cache)
            before = cache.last_turn
            answers = ask_rows(self._model, batch.ids, batch.mask, cache)
            report = cache.last_turn
            answers.append(ask(self._model, second, cache))
        pairs = zip(answers, [*batch.references, cold], strict=True)
        found = worst([judge(answer, reference, self._rounding) for answer, reference in pairs])
        if not found.right:
            return found
        if report is None or report is before:
            return Outcome("no", UNSEEN)
        return found if report.cached_tokens else Outcome("no", report.miss_reason or NO_REASON)

    def _named(self, turns: Sequence[tuple[torch.Tensor, Answer]]) -> Outcome:
        """Answer both turns with the cache under one name and then another, in either order."""
        (first, reference), (second, cold) = turns
        found = []
        for before, after in (NAMES, NAMES[::-1]):
            with self._make_store(block_size=BLOCK) as store, self._make_cache(store) as cache:
                found.append(judge(ask(self._model, first, cache, before), reference, self._rounding))
                found.append(self._reused(cache, second, cold, name=after))
        return replace(worst(found), cached=None)


def layer_kinds(model: PreTrainedModel) -> str:
    """Return the kinds of a model's layers in words, such as ``2 linear, 1 full``."""
    try:
        kinds = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))[0]
    except Exception as error:
        return f"unknown ({brief(error)})"
    words = [kind.removesuffix("_attention").replace("_", " ") for kind in kinds]
    return ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
