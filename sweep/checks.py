"""The checks: a conversation of two turns with a tiny model, on kvtier and on transformers' own cache."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from kvtier import BudgetError, PrefixStore, TieredCache
from sweep.models import NotMadeError, architectures, brief, tiny_model
from sweep.outcome import Outcome, Row, Verdict
from sweep.turns import (
    LONGER,
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
    reference_cache,
)

BLOCK = 8
NO_REASON = "kvtier gave no reason"


def examine(model_type: str) -> Row:
    """Return what the checks find about one architecture. No exception of a model or of kvtier leaves it."""
    started = time.perf_counter()
    class_name = architectures()[model_type]
    try:
        model = tiny_model(model_type)
    except NotMadeError as error:
        return Row(model_type, class_name, not_made=str(error))
    folder = Path(tempfile.mkdtemp(prefix="kvtier-sweep-"))
    try:
        examination = Examination(model, folder)
        row = examination.run(model_type, class_name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return replace(row, seconds=round(time.perf_counter() - started, 2))


class Examination:
    """One model under all checks.

    Args:
        model: the model.
        folder: an empty one, for stores and pages.
    """

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        self._model = model
        self._folder = folder
        self._no_dynamic: str | None = None  # why transformers refuses its own cache here
        self._rounding = ROUNDING
        self._influence: float | None = None

    def run(self, model_type: str, class_name: str) -> Row:
        """Return the row of ``model_type``."""
        first = prompt(PROMPT, seed=1)
        layers = layer_kinds(self._model)
        try:
            reference = self._reference(first)
            second = next_prompt(reference)
            cold = self._reference(second)
        except Exception as error:  # whatever it is: transformers alone cannot generate with this model
            return Row(model_type, class_name, layers, not_made=f"transformers cannot generate with it: {brief(error)}")
        keeps = self._keeps(first)
        control = self._control(first, second, cold)
        if control.verdict in ("yes", "draw") and control.deviation is not None:
            # Some models compute a prompt and a new token in different ways. What that changes is no error of a cache.
            self._rounding = max(ROUNDING, 3 * control.deviation)
        outcomes: dict[str, Outcome] = {}
        store = PrefixStore(self._folder / "store", block_size=BLOCK)
        try:
            with TieredCache(store) as cache:
                outcomes["generates"] = self._outcome(cache, first, reference, wants_reuse=False)
                if outcomes["generates"].verdict == "refused":
                    return Row(model_type, class_name, layers, outcomes, control, keeps)
                outcomes["reuses"] = self._outcome(cache, second, cold)
            with TieredCache(store) as cache:
                outcomes["ram"] = self._outcome(cache, second, cold, tier="host")
            store.flush()
        finally:
            store.close()
        with PrefixStore(self._folder / "store", block_size=BLOCK) as again, TieredCache(again) as cache:
            outcomes["disk"] = self._outcome(cache, second, cold, tier="disk")
        outcomes["streams"] = self._streams(first, reference, second, cold)
        outcomes["edited"] = self._edited(first, second, cold)
        outcomes["padded"] = self._padded(first, second, cold)
        return Row(model_type, class_name, layers, outcomes, control, keeps, influence=self._influence)

    def _upstream_cache(self) -> DynamicCache | None:
        """Return a fresh ``DynamicCache``; None where it is refused: the model then makes what it takes."""
        return reference_cache(self._model) if self._no_dynamic is None else None

    def _reference(self, ids: torch.Tensor) -> Answer:
        """Answer on a fresh ``DynamicCache``, or on the model's own kind of cache where that is refused."""
        if self._no_dynamic is None:
            try:
                return ask(self._model, ids, reference_cache(self._model))
            except Exception as error:
                self._no_dynamic = brief(error)
        return ask(self._model, ids)

    def _keeps(self, ids: torch.Tensor) -> bool:
        """Return whether a ``DynamicCache`` that the model is given, or makes, holds anything after a turn."""
        cache: Any = self._upstream_cache()
        made = ask(self._model, ids, cache).cache
        if cache is None:
            cache = made
        return type(cache) is DynamicCache and any(_has_tensors(vars(layer)) for layer in cache.layers)

    def _control(self, first: torch.Tensor, second: torch.Tensor, cold: Answer) -> Outcome:
        """Let transformers continue its own cache."""
        if self._no_dynamic is not None:
            return Outcome("refused", self._no_dynamic)
        try:
            cache = reference_cache(self._model)
            ask(self._model, first, cache)
            # Up to twenty times what rounding may change is taken for the model's own inexactness.
            return judge(ask(self._model, second, cache), cold, 20 * ROUNDING)
        except Exception as error:
            return Outcome("failed", brief(error))

    def _outcome(
        self, cache: TieredCache, ids: torch.Tensor, reference: Answer, *, wants_reuse: bool = True, tier: str = ""
    ) -> Outcome:
        """Answer ``ids`` on ``cache`` and judge the answer; ``tier``: where what is reused must come from."""
        try:
            answer = ask(self._model, ids, cache)
        except Exception as error:
            text = brief(error)
            if self._no_dynamic is not None and text.split(":")[0] == self._no_dynamic.split(":")[0]:
                return Outcome("refused", text)
            return Outcome("failed", text)
        report = cache.last_turn
        judged = judge(answer, reference, self._rounding)
        cached = report.cached_tokens if report is not None else 0
        if judged.verdict in ("wrong", "failed") or not wants_reuse:
            return Outcome(judged.verdict, judged.reason, cached, judged.deviation)
        found = cached if not tier or report is None else report.cached_by_tier[tier]
        if not found:
            reason = report.miss_reason if report is not None else "the turn was not seen"
            return Outcome("no", reason or NO_REASON, cached, judged.deviation)
        return Outcome(judged.verdict, judged.reason, cached, judged.deviation)

    def _streams(self, first: torch.Tensor, reference: Answer, second: torch.Tensor, cold: Answer) -> Outcome:
        """Answer both turns under the smallest budget that suffices, up to some hundredths."""
        columns = second.shape[1] + reference.logits.shape[0]
        whole = self._bytes_per_token(first) * (columns + columns // 8 + 3 * BLOCK)
        if not whole:
            return Outcome("no", "it has no layer of K and V")
        turns = ((first, reference), (second, cold))
        try:
            too_small, enough = whole // 30, 2 * whole
            found = self._under(too_small, turns)
            if found is not None:
                return found  # a budget does not matter to it
            while enough - too_small > whole // 30 and (found is None or found.verdict != "wrong"):
                budget = (too_small + enough) // 2
                tried = self._under(budget, turns)
                too_small, enough = (budget, enough) if tried is None else (too_small, budget)
                found = tried or found
        except Exception as error:
            return Outcome("failed", brief(error))
        return found or Outcome("failed", f"{enough} bytes are too small a budget, and {whole} hold everything")

    def _under(self, budget: int, turns: Sequence[tuple[torch.Tensor, Answer]]) -> Outcome | None:
        """Judge ``turns`` of one conversation under a ``device_budget``; None if it is too small."""
        judged = []
        spill = self._folder / f"pages-{budget}"
        with (
            PrefixStore(block_size=BLOCK) as store,
            TieredCache(store, device_budget=budget, spill_dir=spill) as cache,
        ):
            for ids, expected in turns:
                try:
                    judged.append(judge(ask(self._model, ids, cache), expected, self._rounding))
                except BudgetError:
                    return None
            report = cache.last_turn
        worst = next((outcome for outcome in judged if outcome.verdict == "wrong"), judged[-1])
        if worst.verdict == "wrong" or (report is not None and report.cold_layers):
            return worst
        reason = (report.miss_reason if report is not None else None) or "none of its layers can be cold"
        return Outcome("no", reason, None, worst.deviation)

    def _bytes_per_token(self, ids: torch.Tensor) -> int:
        """Return the bytes that all layers keep of one token."""
        cache = ask(self._model, ids, self._upstream_cache()).cache
        return sum(map(token_bytes, getattr(cache, "layers", ())))

    def _edited(self, first: torch.Tensor, second: torch.Tensor, unedited: Answer) -> Outcome:
        """Answer a turn whose history was changed in the middle."""
        ids = edited(second)
        reference = self._reference(ids)
        self._influence = compare(reference, unedited).deviation
        with PrefixStore(block_size=BLOCK) as store, TieredCache(store) as cache:
            try:
                ask(self._model, first, cache)
            except Exception as error:
                return Outcome("failed", brief(error))
            return self._outcome(cache, ids, reference, wants_reuse=False)

    def _padded(self, first: torch.Tensor, second: torch.Tensor, cold: Answer) -> Outcome:
        """Answer in one batch what two prompts know that were asked alone, one of them behind padding; then alone."""
        other = prompt(PROMPT + LONGER, seed=4)
        ids, mask = padded(second, torch.cat([other, prompt(QUESTION, seed=5)], 1))
        try:
            references = ask_rows(self._model, ids, mask, self._upstream_cache())
        except Exception as error:
            return Outcome("no", f"transformers cannot answer a padded batch: {brief(error)}")
        with PrefixStore(block_size=BLOCK) as store, TieredCache(store) as cache:
            try:
                for known in (other, first):
                    ask(self._model, known, cache)
                answers = ask_rows(self._model, ids, mask, cache)
                report = cache.last_turn
                answers.append(ask(self._model, second, cache))
            except Exception as error:
                return Outcome("failed", brief(error))
        pairs = zip(answers, [*references, cold], strict=True)
        judged = [judge(answer, reference, self._rounding) for answer, reference in pairs]
        for outcome in judged:
            if outcome.verdict == "wrong":
                return outcome
        if report is None or not report.cached_tokens:
            return Outcome("no", (report.miss_reason if report is not None else None) or NO_REASON)
        return judged[0]


def layer_kinds(model: PreTrainedModel) -> str:
    """Return the kinds of a model's layers in words, such as ``2 linear, 1 full``."""
    try:
        kinds = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))[0]
    except Exception as error:
        return f"unknown ({brief(error)})"
    words = [kind.removesuffix("_attention").replace("_", " ") for kind in kinds]
    return ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))


def token_bytes(layer: Any) -> int:
    """Return the bytes that one of transformers' layers keeps of a token: K, V, and keys of an indexer."""
    found = 0
    for name in ("keys", "values", "indexer_keys"):
        tensor = getattr(layer, name, None)
        if isinstance(tensor, torch.Tensor) and tensor.ndim >= 3:
            found += tensor.narrow(-2, 0, 1).nbytes if tensor.shape[-2] else 0
    return found


def _has_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_tensors, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_has_tensors, value))
    return isinstance(value, torch.Tensor) and value.ndim > 1 and value.numel() > 0


def judge(answer: Answer, reference: Answer, rounding: float = ROUNDING) -> Outcome:
    """Return whether ``answer`` is right. Equal tokens are not enough: with other logits they are luck."""
    comparison = compare(answer, reference, rounding)
    verdict: Verdict = "yes"
    reason = None
    if comparison.differs_at is not None:
        verdict = "draw" if comparison.draw else "wrong"
        reason = f"differs at token {comparison.differs_at}"
    elif comparison.deviation > rounding:
        verdict, reason = "wrong", f"the same tokens, but logits off by {comparison.deviation:.1%} of their spread"
    return Outcome(verdict, reason, None, comparison.deviation)
