"""Prefill in chunks, for models that continue from states."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache, GenerationMixin, PreTrainedModel, StoppingCriteria

from kvtier.hf.compat.external_state import ExternalState
from kvtier.hf.compat.model_profiles import passed_argument
from kvtier.hf.compat.names import CACHE_ARGUMENTS, CARRIED_ARGUMENTS
from kvtier.hf.generate.replaced_method import ReplacedMethod
from kvtier.hf.turn.manager import turns_of


def prefill_chunk(
    model: PreTrainedModel,
    cache: Cache | ExternalState,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    begin: int,
    end: int,
) -> None:
    """Feed the model the columns ``[begin, end)`` of ``input_ids [batch, columns]``, which continue ``cache``.

    No row may be padded.
    """
    parameters = inspect.signature(model.forward).parameters
    ids = input_ids[:, begin:end].to(model.device)
    arguments: dict[str, Any] = {str(passed_argument(model)): cache, "use_cache": True}
    if "position_ids" in parameters:  # not every model counts from the end of the cache
        arguments["position_ids"] = torch.arange(begin, end, device=ids.device)[None].expand_as(ids)
    if "attention_mask" in parameters and attention_mask is not None and not all(cache.is_linear):
        arguments["attention_mask"] = attention_mask[:, :end].to(ids.device)
    if "logits_to_keep" in parameters:
        arguments["logits_to_keep"] = 1
    if isinstance(cache, ExternalState):
        cache.feeding(end - begin)
    with torch.no_grad():
        model(input_ids=ids, **arguments)


class PrefillDone(StoppingCriteria):
    """Stops nothing. Calls ``passed`` once, when the model has processed the whole prompt and no further token.

    ``generate`` calls stopping criteria after each forward pass, first after the pass with the end of the prompt.
    """

    def __init__(self, passed: Callable[[], None]) -> None:
        self._passed: Callable[[], None] | None = passed

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Return False for each row."""
        passed, self._passed = self._passed, None
        if passed is not None:
            passed()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _is_ours(value: Any) -> bool:
    return isinstance(value, ExternalState) or turns_of(value) is not None


_prepare_inputs = ReplacedMethod("prepare_inputs_for_generation")


def patch_prepare_inputs(model: PreTrainedModel) -> None:
    """Make ``generate`` feed a model of only linear attention no tokens that its cache already has.

    ``generate`` does so by itself when any layer has full attention, and feeds other models the whole prompt again.
    Wraps ``prepare_inputs_for_generation`` of the model's class, once, only for kvtier caches and external states.
    """
    owner: Any = next(c for c in type(model).__mro__ if "prepare_inputs_for_generation" in vars(c))
    if owner is GenerationMixin:
        owner = type(model)
    _prepare_inputs.wrap(owner, _feeding_unknown_tokens)


def _feeding_unknown_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def prepare(self: PreTrainedModel, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        given = (kwargs.get(name) for name in (*CACHE_ARGUMENTS, *CARRIED_ARGUMENTS))
        cache: Any = next((value for value in given if _is_ours(value)), None)
        is_whole = kwargs.get("is_first_iteration") and kwargs.get("next_sequence_length") is None
        if cache is not None and is_whole and all(cache.is_linear):
            known = cache.get_seq_length()
            if known:
                input_ids = input_ids[:, known:]
                if kwargs.get("inputs_embeds") is not None:
                    kwargs["inputs_embeds"] = kwargs["inputs_embeds"][:, known:]
                kwargs["attention_mask"] = None  # no row is padded
        inputs = original(self, input_ids, *args, **kwargs)
        if isinstance(cache, ExternalState):
            fed = inputs["inputs_embeds"] if inputs["input_ids"] is None else inputs["input_ids"]
            cache.feeding(fed.shape[1])
        return inputs

    return prepare


def restore_classes() -> None:
    """Restore the original methods of all classes."""
    _prepare_inputs.restore()
