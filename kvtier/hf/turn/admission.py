"""Admission: decides from request, model and layers whether a turn may reuse and be kept."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from kvtier.hf.compat.canary import why_untrusted
from kvtier.hf.compat.model_profiles import why_not_so, why_off
from kvtier.hf.inputs.prompt import Prompt
from kvtier.hf.inputs.request import GenerateRequest
from kvtier.hf.layers.attention import SlidingWindowLayer
from kvtier.hf.layers.container import LayerContainer
from kvtier.hf.not_reusable import NotReusable


def admit(model: PreTrainedModel, request: GenerateRequest, layers: LayerContainer) -> Prompt | NotReusable:
    """Return the prompt of a turn that may reuse and be kept, otherwise the reason against both.

    Args:
        model: the model of the turn.
        request: the request of the call.
        layers: layers of the cache, laid out for the model.
    """
    prompt, states = request.prompt, bool(layers.states)
    reason = why_untrusted() or request.off
    if not isinstance(getattr(model, "config", None), PreTrainedConfig):
        reason = reason or "the model has no config"
    else:
        reason = reason or layers.no_reuse or why_off(model)
    if prompt is not None and not reason and states and prompt.is_padded:  # K and V then depend on the padding too
        reason = "padding would go into the states of this model"
    if prompt is not None and not reason:
        reason = why_not_so(model, prompt.columns, prompt.is_padded, request.longest_answer)
    if prompt is None or reason or prompt.columns == 0 or not prompt.rows:
        return NotReusable(reason or "the prompt is empty")
    if states and is_spread(model):
        return NotReusable("states of layers on several devices are not restored")
    return prompt


def why_cold(prompt: Prompt, request: GenerateRequest, layers: LayerContainer) -> str | None:
    """Return why a turn must not start from a known prefix, though its tokens may be kept; None when it may."""
    if request.cold is None and _hides_rows(prompt, layers):
        return "right padding fills the whole sliding window, so that a row's last tokens are not visible"
    return request.cold


def is_spread(model: PreTrainedModel) -> bool:
    """Return whether the layers of ``model`` are on several devices."""
    devices: dict[str, Any] = getattr(model, "hf_device_map", None) or {}
    return len(set(devices.values())) > 1


def _hides_rows(prompt: Prompt, layers: LayerContainer) -> bool:
    """Whether right padding may hide all tokens of a row from the last column: the answer then depends on chunking."""
    trailing = max(prompt.columns - pad - len(row) for row, pad in zip(prompt.rows, prompt.pads, strict=True))
    if trailing <= 0:
        return False
    text = layers.config.get_text_config(decoder=True) if layers.config is not None else None
    widths = [layer.sliding_window for layer in layers.attention if isinstance(layer, SlidingWindowLayer)]
    return bool(widths) and (trailing >= min(widths) or bool(getattr(text, "attention_chunk_size", None)))
