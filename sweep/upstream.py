"""Transformers alone with one model: the answers that kvtier's are compared with, and the control of the comparison."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from kvtier.hf.compat.names import CACHE_ARGUMENTS, generate_argument
from sweep.judging import judge
from sweep.models import brief
from sweep.outcome import Outcome
from sweep.turns import ROUNDING, Answer, ask, ask_rows, reference_cache


class Upstream:
    """One model on transformers' own cache, which it is given under transformers' own name for it.

    To be asked before kvtier is in use: a failure afterwards may be one of kvtier.

    Args:
        model: the model.

    Attributes:
        failure: the exception in which a ``DynamicCache`` ended, at first or when it was continued; None if it did not,
            or was not tried yet.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._argument = generate_argument(model)
        self._takes_cache = self._argument is not None
        self.failure: Exception | None = None

    def answer(self, ids_1t: torch.Tensor) -> Answer:
        """Answer on a fresh ``DynamicCache``, or on the model's own kind of cache where that fails."""
        cache = self._cache()
        if cache is not None:
            try:
                return ask(self._model, ids_1t, cache, self._argument)
            except Exception as error:  # of any class: each model refuses in its own way
                self.failure, self._takes_cache = error, False
        return ask(self._model, ids_1t)

    def answer_rows(self, ids: torch.Tensor, mask: torch.Tensor) -> list[Answer]:
        """Answer each of ``ids [rows, columns]`` on the kind of cache that ``answer`` found to work."""
        return ask_rows(self._model, ids, mask, self._cache())

    def kept(self, ids_1t: torch.Tensor) -> Any:
        """Return the cache that the model has filled after a turn: the one it was given, or one that it made."""
        cache = self._cache()
        made = ask(self._model, ids_1t, cache, self._argument).cache
        return made if cache is None else cache

    def control(self, first: torch.Tensor, second: torch.Tensor, cold: Answer) -> Outcome:
        """Return how transformers continues its own cache: the answer to ``second`` beside the ``cold`` one."""
        if self._argument is None:
            return Outcome("refused", "the model takes no cache")
        if self.failure is not None:
            if names_unknown_argument(self.failure):
                reason = f"passed as {self._argument}=, a name that the model does not know: {brief(self.failure)}"
                return Outcome("misnamed", reason)
            return Outcome("refused", brief(self.failure))
        try:
            cache = reference_cache(self._model)
            ask(self._model, first, cache, self._argument)
            # Up to twenty times what rounding may change is taken for the model's own inexactness.
            return judge(ask(self._model, second, cache, self._argument), cold, 20 * ROUNDING)
        except Exception as error:
            self.failure = error
            return Outcome("misnamed" if names_unknown_argument(error) else "failed", brief(error))

    def crash(self, error: Exception) -> Outcome:
        """Return what ``error``, in which kvtier ended, says: transformers' own failure, or one of kvtier's."""
        failure = self.failure
        if failure is None or names_unknown_argument(failure):
            return Outcome("failed", brief(error))
        if type(error) is not type(failure):
            return Outcome("failed", f"{brief(error)} (on a DynamicCache: {brief(failure)})")
        return Outcome("upstream", f"transformers on a DynamicCache: {brief(failure)}")

    def _cache(self) -> DynamicCache | None:
        return reference_cache(self._model) if self._takes_cache else None


def names_unknown_argument(error: BaseException) -> bool:
    """Return whether ``error`` says that a function was given a cache under a name that it does not have."""
    text = str(error)
    unknown = (isinstance(error, TypeError) and "unexpected keyword argument" in text) or (
        isinstance(error, ValueError) and "`model_kwargs` are not used by the model" in text
    )
    return unknown and any(f"'{name}'" in text for name in CACHE_ARGUMENTS)


def has_tensors(value: Any) -> bool:
    """Return whether a layer's attribute holds a tensor that has any content, at any depth."""
    if isinstance(value, dict):
        return any(map(has_tensors, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(has_tensors, value))
    return isinstance(value, torch.Tensor) and value.ndim > 1 and value.numel() > 0


def keeps(cache: Any) -> bool:
    """Return whether a model has put anything into ``cache``, and that is a ``DynamicCache``."""
    return type(cache) is DynamicCache and any(has_tensors(vars(layer)) for layer in cache.layers)


def token_bytes(layer: Any) -> int:
    """Return the bytes that one of transformers' layers keeps of a token: K, V, and keys of an indexer."""
    found = 0
    for name in ("keys", "values", "indexer_keys"):
        tensor = getattr(layer, name, None)
        if isinstance(tensor, torch.Tensor) and tensor.ndim >= 3:
            found += tensor.narrow(-2, 0, 1).nbytes if tensor.shape[-2] else 0
    return found
