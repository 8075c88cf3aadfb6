"""Recurrent and convolution states, read from layers row by row and restored.

Recurrent and convolution states, and the pools of layers that compress K and V, cannot be cut to shorter prefixes.
They are kept whole, for the few positions at which they were read. As bytes they are a safetensors file: one tensor for
each tensor of a layer, named by layer and attribute, and the layer's numbers in the metadata.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from kvtier.kv.allocation import writable_results

# State attributes of linear attention and convolution layers. A buffer in the same layer is kept separately.
_LINEAR = (
    "conv_states",
    "recurrent_states",
    "is_conv_states_initialized",
    "is_recurrent_states_initialized",
    "has_previous_state",
    "conv_kernel_size",
    "dtype",
)
# Names of layers whose attributes are all states: transformers' own, and the stand-in for external states.
_WHOLE = frozenset({"heavily_compressed_attention", "compressed_sparse_attention", "carried"})
_PLAIN = (bool, int, float, str, type(None))
_NUMBERS = "numbers"

Path = tuple[str, ...]


def has_states(layer: Any) -> bool:
    """Whether a layer keeps states, which are valid after one token only."""
    return isinstance(layer, LinearAttentionCacheLayerMixin) or getattr(layer, "_layer_type", None) in _WHOLE


class UnreadableError(Exception):
    """States cannot be separated by row, or do not fit the layers they are put into."""


def _attributes(layer: Any) -> dict[str, Any]:
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        return {name: getattr(layer, name) for name in _LINEAR}
    return {name: value for name, value in vars(layer).items() if name != "device"}


def _leaves(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, (*path, str(key)))
    else:
        yield path, value


def _tensors(layer: Any) -> Iterator[tuple[Path, torch.Tensor]]:
    for path, value in _leaves(_attributes(layer), ()):
        if isinstance(value, torch.Tensor) and value.ndim:  # a tensor without dimensions is a constant of the layer
            yield path, value


def rows_of(layer: Any) -> int:
    """Return the number of sequences in the states of a layer; 0 before the first token."""
    return max((len(tensor) for _, tensor in _tensors(layer)), default=0)


def read_states(layers: Mapping[int, Any], row: int) -> torch.Tensor:
    """Return the states of ``row`` in all ``layers`` (index → layer) as bytes: U8 ``[bytes]`` on the host.

    Raises:
        UnreadableError: a layer has tensors with different numbers of rows, or an attribute that cannot be kept.
    """
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, Any] = {}
    for index, layer in layers.items():
        rows = rows_of(layer)
        for path, value in _leaves(_attributes(layer), ()):
            name = ".".join((str(index), *path))
            if isinstance(value, torch.Tensor):
                if value.ndim and len(value) != rows:
                    raise UnreadableError(f"{name} has {len(value)} rows where other states have {rows}")
                if value.ndim:
                    tensors[name] = value[row : row + 1].detach().to("cpu", copy=True).contiguous()
            elif isinstance(value, torch.dtype):
                numbers[name] = str(value)
            elif isinstance(value, _PLAIN):
                numbers[name] = value
            else:
                raise UnreadableError(f"{name} is a {type(value).__name__}, which cannot be kept")
    data = safetensors.torch.save(tensors, {_NUMBERS: json.dumps(numbers, sort_keys=True)})
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def put_states(layers: Mapping[int, Any], rows: Sequence[torch.Tensor], device: torch.device, repeats: int = 1) -> None:
    """Put the states ``rows``, as returned by ``read_states``, into new ``layers``.

    Args:
        layers: layers by index.
        rows: states of each row, U8 ``[bytes]``.
        device: where the layers compute.
        repeats: copies of each row, next to each other.

    Raises:
        UnreadableError: the states do not fit the layers, or belong to different positions.
    """
    parsed = [_parse(states) for states in rows]
    numbers = parsed[0][1]
    if any(others != numbers or tensors.keys() != parsed[0][0].keys() for tensors, others in parsed):
        raise UnreadableError("the states of the rows are not of one position")
    for index, layer in layers.items():
        _forget(layer)
        prefix = f"{index}."
        for name, value in numbers.items():
            if name.startswith(prefix):
                _set(layer, name.removeprefix(prefix).split("."), _number(value))
        for name in parsed[0][0]:
            if name.startswith(prefix):
                try:
                    with writable_results():  # models and layers write states in place
                        joined = torch.cat([tensors[name] for tensors, _ in parsed]).to(device)
                        joined = joined.repeat_interleave(repeats, 0)
                except RuntimeError as error:
                    raise UnreadableError(f"{name} has another shape in every row: {error}") from error
                _set(layer, name.removeprefix(prefix).split("."), joined)
        layer.device = device
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            layer.record_past = False
    known = {str(index) for index in layers}
    if not all(name.split(".")[0] in known for name in (*numbers, *parsed[0][0])):
        raise UnreadableError("they are of other layers")


def _parse(states: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    data = states.numpy().tobytes()
    try:
        tensors = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        numbers = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_NUMBERS])
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UnreadableError(f"they are no file of states: {error}") from error
    if not isinstance(numbers, dict):
        raise UnreadableError("they are no file of states")
    return tensors, numbers


def _number(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("torch."):
        return getattr(torch, value.removeprefix("torch."), None)
    return value


def _set(layer: Any, path: Sequence[str], value: Any) -> None:
    """Set the value at ``path``, an attribute and then keys of nested dicts. The path must exist already."""
    holder: Any = vars(layer)
    holder.setdefault("dtype", None)  # some layers get it with their first token
    for depth, part in enumerate(path):
        key = next((key for key in holder if str(key) == part), None) if isinstance(holder, dict) else None
        if key is None:
            raise UnreadableError(f"a {type(layer).__name__} has no {'.'.join(path)}")
        if depth == len(path) - 1:
            holder[key] = value
        holder = holder[key]


def _forget(layer: Any) -> None:
    """Drop all state tensors."""
    for path, _ in list(_tensors(layer)):
        _set(layer, path, None)


def move_rows(layer: Any, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace every state tensor, ``[rows, …]``, by the result of ``move``."""
    with writable_results():
        for path, tensor in list(_tensors(layer)):
            _set(layer, path, move(tensor))


def copy_states(layer: Any, twin: Any) -> None:
    """Copy the states to ``twin``, a layer of the same kind."""
    with writable_results():
        for name, value in _attributes(layer).items():
            setattr(twin, name, _copied(value))
    if hasattr(layer, "device"):
        twin.device = layer.device


def clone_states(layer: Any, memo: dict[int, Any]) -> None:
    """Put clones of the states into the ``memo`` of a deep copy of ``layer``: they may belong to an autograd graph."""
    with writable_results():
        for _, tensor in _tensors(layer):
            memo.setdefault(id(tensor), tensor.detach().clone())


def _copied(value: Any) -> Any:
    """Return a copy. Tensors are detached: tensors of an autograd graph cannot be copied deeply."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return copy.copy(value)


def state_marks(layer: Any) -> list[tuple[torch.Tensor, int]]:
    """Return the state tensors of a layer, each with its number of writes in place.

    Equal marks, by ``same_marks``, mean that no model has changed the states. Tensors made in inference mode do not
    count writes: kvtier makes none that are written to, and layers replace the tensors that they make themselves.
    """
    return [(tensor, -1 if tensor.is_inference() else tensor._version) for _, tensor in _tensors(layer)]


def same_marks(one: Sequence[tuple[torch.Tensor, int]], other: Sequence[tuple[torch.Tensor, int]]) -> bool:
    """Whether two results of ``state_marks`` have the same tensors, unchanged in between."""
    return len(one) == len(other) and all(a is b and m == n for (a, m), (b, n) in zip(one, other, strict=True))
