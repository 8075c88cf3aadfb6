"""ModelSheet: what a config tells of a model's K and V, states, weights and operations, without its weights.

The model is made on the meta device, where tensors have shapes but no memory, and fed a few tokens. So its cache has
the shapes that the model's own code gives it, however that code reads its config.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from kvtier.costs.footprint import Footprint
from kvtier.errors import ConfigurationError
from kvtier.hf.compat.model_profiles import why_no_cache, why_off
from kvtier.hf.identity.eligibility import why_unsound
from kvtier.hf.identity.module_walk import ModelWalk
from kvtier.hf.layers.states import has_states
from kvtier.hf.meta_model import on_meta

# Names of the number of experts that compute a token.
_ACTIVE_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts", "moe_k")
_EXPERT = re.compile(r"(?:^|\.)experts(?:\.(\d+))?\.")  # experts in one tensor, or in one module each


@dataclass(frozen=True, slots=True)
class ModelSheet:
    """A model as its config describes it.

    Attributes:
        model_type: transformers' name of its architecture.
        dtype: dtype of weights, K and V.
        attention_layers: layers that keep K and V of their own.
        sliding_layers: those of them with sliding attention.
        state_layers: layers with recurrent or convolution states.
        footprint: bytes of K, V and states of a sequence.
        unknown_layers: layers whose states grow in steps, or are only known to a running model; not in ``footprint``.
        parameters: all weights.
        token_parameters: weights that take part in computing one token: no tables, of experts the chosen ones.
        experts: ``(experts that compute a token, experts)``; None without experts, or if the config does not tell.
        has_experts: whether some weights belong to experts.
        is_quantised: whether the weights in files are in fewer bits than ``dtype`` has.
        pair_operations: additions and multiplications for a token and a token that it sees, in all full layers.
        window_pair_operations: ``(tokens that a token sees, operations)`` for each width of sliding attention.
        longest_tokens: the longest sequence that the model is made for; None if the config does not tell.
        not_reusable: why kvtier reuses nothing with this model; None when it does.
    """

    model_type: str
    dtype: torch.dtype
    attention_layers: int
    sliding_layers: int
    state_layers: int
    footprint: Footprint
    unknown_layers: int
    parameters: int
    token_parameters: int
    experts: tuple[int, int] | None
    has_experts: bool
    is_quantised: bool
    pair_operations: float
    window_pair_operations: tuple[tuple[int, float], ...]
    longest_tokens: int | None
    not_reusable: str | None

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights in ``dtype``."""
        return self.parameters * self.dtype.itemsize

    @property
    def token_operations(self) -> float:
        """Additions and multiplications for a token, without its attention: two for each weight."""
        return 2.0 * self.token_parameters


def model_sheet(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> ModelSheet:
    """Return the sheet of the decoder that ``config`` describes; of a model with images or sounds, of its text part.

    Args:
        config: config of the model.
        dtype: dtype of weights, K and V; by default the config's, else bfloat16.

    Raises:
        ConfigurationError: it is no decoder, or transformers cannot make a model of this config.
    """
    if config.is_encoder_decoder:
        raise ConfigurationError(
            f"model={config.model_type}: an encoder-decoder model, with which kvtier reuses nothing; name a decoder."
        )
    text: PreTrainedConfig = copy.deepcopy(config.get_text_config(decoder=True))
    is_quantised = any(getattr(each, "quantization_config", None) is not None for each in (config, text))
    if hasattr(text, "quantization_config"):  # it would ask for a library that only real weights need
        del text.quantization_config
    if dtype is None:
        told = next((each for each in (text.dtype, config.dtype) if isinstance(each, torch.dtype)), None)
        dtype = told or torch.bfloat16
    model, layers, not_kept = on_meta(config, text, dtype)
    token_bytes = window_bytes = state_bytes = unknown = 0
    visible: list[int] = []
    pair_operations, in_windows = 0.0, dict[int, float]()
    attending = [layer for layer in layers if getattr(layer, "keys", None) is not None]
    operations = _pair_operations(text, attending)
    for layer in layers:
        if has_states(layer):
            known = _state_bytes(layer)
            state_bytes, unknown = state_bytes + (known or 0), unknown + (known is None)
        nbytes = _token_bytes(layer)
        if nbytes and layer.is_sliding:
            visible.append(int(layer.sliding_window))
            window_bytes += nbytes
        else:
            token_bytes += nbytes
    for width in _widths(text, attending):
        if width is None:
            pair_operations += operations
        else:
            in_windows[width] = in_windows.get(width, 0.0) + operations
    parameters, active, experts, has_experts = _parameters(model, text)
    return ModelSheet(
        model_type=text.model_type,
        dtype=dtype,
        attention_layers=len(attending),
        sliding_layers=len(visible),
        state_layers=sum(map(has_states, layers)),
        # kvtier keeps the same columns in all sliding layers, those of the widest one.
        footprint=Footprint(token_bytes, window_bytes, max(visible, default=1) - 1, state_bytes),
        unknown_layers=unknown,
        parameters=parameters,
        token_parameters=active,
        experts=experts,
        has_experts=has_experts,
        is_quantised=is_quantised,
        pair_operations=pair_operations,
        window_pair_operations=tuple(sorted(in_windows.items())),
        longest_tokens=getattr(text, "max_position_embeddings", None),
        not_reusable=why_no_cache(model) or why_off(model) or not_kept or _why_unsound(config),
    )


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, Mapping):
            yield from _tensors(value.values())
        elif isinstance(value, torch.Tensor) and value.ndim:
            yield value


def _token_bytes(layer: Any) -> int:
    """Return the bytes of one token: of K, V and the keys of an indexer, each ``[1, …, tokens, channels]``."""
    per_token = [value for value in vars(layer).values() if isinstance(value, torch.Tensor) and value.ndim > 2]
    return sum(tensor.nbytes // tensor.shape[-2] for tensor in per_token if tensor.shape[-2])


def _state_bytes(layer: Any) -> int | None:
    """Return the bytes of a layer's states; None where they grow, or are known only to a running model."""
    if not isinstance(layer, LinearAttentionCacheLayerMixin):
        return None
    states = list(_tensors((layer.conv_states, layer.recurrent_states)))
    return sum(tensor.nbytes for tensor in states) if states else None


def _pair_operations(text: PreTrainedConfig, attending: list[Any]) -> float:
    """Return the operations for one pair of attention in one layer: two for each channel of every head's K and V."""
    heads = getattr(text, "num_attention_heads", 0) or 0
    if hasattr(text, "qk_nope_head_dim") and hasattr(text, "v_head_dim"):  # K and V are cached in another form
        return float(2 * heads * (text.qk_nope_head_dim + text.qk_rope_head_dim + text.v_head_dim))
    if not attending or not heads:
        return 0.0
    channels: int = sum(layer.keys.shape[-1] + layer.values.shape[-1] for layer in attending)
    return 2.0 * heads * channels / len(attending)


def _widths(text: PreTrainedConfig, attending: list[Any]) -> Iterator[int | None]:
    """Yield for each layer that attends the tokens that a token sees; None for all of them."""
    widths = [int(layer.sliding_window) if layer.is_sliding else None for layer in attending]
    yield from widths
    # Layers that read the K and V of an earlier layer attend too.
    shared = getattr(text, "num_kv_shared_layers", 0) or 0
    sliding = next((width for width in widths if width is not None), None)
    for kind in (getattr(text, "layer_types", None) or ())[-shared:] if shared else ():
        yield sliding if kind == "sliding_attention" else None


def _parameters(model: Any, text: PreTrainedConfig) -> tuple[int, int, tuple[int, int] | None, bool]:
    """Return all parameters, those that compute one token, ``(active experts, experts)``, and whether there are any."""
    tables = {
        id(p) for module in model.modules() if isinstance(module, torch.nn.Embedding) for p in module.parameters()
    }
    head = model.get_output_embeddings()  # computes the last token of a prompt only
    tables |= {id(p) for p in head.parameters()} if head is not None else set()
    chosen = next((n for n in (getattr(text, name, None) for name in _ACTIVE_EXPERTS) if isinstance(n, int)), None)
    total = dense = in_experts = 0
    numbers: set[int] = set()
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        if id(parameter) in tables:
            continue
        match = _EXPERT.search(name)
        if match is None:
            dense += parameter.numel()
            continue
        in_experts += parameter.numel()
        # One tensor has all experts in its first dimension; otherwise the module's number is counted.
        numbers.add(parameter.shape[0] if match[1] is None else int(match[1]) + 1)
    count = max(numbers, default=0)
    if not in_experts or chosen is None or not 0 < chosen <= count:
        return total, dense + in_experts, None, bool(in_experts)
    return total, dense + in_experts * chosen // count, (chosen, count), True


class _Shell(torch.nn.Module):
    """A model without weights or code, to ask what its config alone forbids."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config


def _why_unsound(config: PreTrainedConfig) -> str | None:
    shell = _Shell(config).eval()
    unsound = why_unsound(shell, ModelWalk(shell))
    return unsound.reason if unsound is not None else None
