"""Replacements for the cache of models that carry their recurrent states outside of any cache.

RWKV passes on a list, xLSTM its own object, MiniMax its own cache class, which also holds the states of linear layers.
The tensors of the replacements lie in the layers of a ``TieredCache``, and are kept like these.
"""

from __future__ import annotations

import functools
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from kvtier.hf.compat.model_profiles import profile_of
from kvtier.kv.allocation import as_writable


class ExternalStates:
    """One layer that stands for all layers of a model that carries its own states; holds the tensors of these states.

    Args:
        names: names of the tensors.
    """

    _layer_type = "carried"
    is_sliding = is_compileable = is_initialized = False

    def __init__(self, names: Iterable[str]) -> None:
        self.tensors: dict[str, torch.Tensor | None] = dict.fromkeys(names)
        self.device: torch.device | None = None

    def reset(self) -> None:
        """Hold nothing."""
        self.tensors = dict.fromkeys(self.tensors)

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: earlier states cannot be derived from later states.

        Raises:
            RuntimeError: tokens are to be removed.
        """
        if tokens_to_remove:
            raise RuntimeError("states cannot be taken back; pass the shorter prompt to generate() instead of cropping")

    def hold(self, new: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """Return the restored tensors in the order of their names; if any is missing, take and return ``new``."""
        if any(tensor is None for tensor in self.tensors.values()):
            self.tensors = dict(zip(self.tensors, map(as_writable, new), strict=True))
        return [tensor for tensor in self.tensors.values() if tensor is not None]


class ExternalState(ABC):
    """The replacement for a cache that is passed to a model."""

    is_compileable = False  # ``generate`` asks, of a cache of any class

    @property
    @abstractmethod
    def is_linear(self) -> list[bool]:
        """Return which layers have linear attention alone; if all have, ``generate`` does not cut the prompt."""

    @abstractmethod
    def get_seq_length(self) -> int:
        """Return the number of columns it holds."""

    @abstractmethod
    def feeding(self, columns: int) -> None:
        """Note that ``columns`` more columns are about to be fed."""


class _Counted(ExternalState):
    """Counts fed columns for a cache whose layers cannot count them."""

    _cache: Any
    is_linear = [True]  # noqa: RUF012 - read only

    def get_seq_length(self) -> int:
        return int(self._cache.get_seq_length())

    def feeding(self, columns: int) -> None:
        self._cache.turns.layers.fed_columns += columns


class _RwkvState(_Counted, list[torch.Tensor]):
    """Five tensors ``[rows, width, layers]``, which the model overwrites."""


def _rwkv_state(model: PreTrainedModel, cache: Any, rows: int) -> ExternalState:
    """Begin as the model does: zeros, with the largest exponent of the sums at -1e30."""
    embedding = model.get_input_embeddings().weight
    shape = rows, model.config.hidden_size, model.config.num_hidden_layers
    new = [
        torch.zeros(shape, dtype=embedding.dtype if i < 2 else torch.float32, device=embedding.device) for i in range(5)
    ]
    new[4] -= 1e30
    state = _RwkvState(cache.layers[0].hold(new))
    state._cache = cache
    return state


def _xlstm_cache(model: PreTrainedModel, cache: Any, rows: int) -> ExternalState:
    """Return the model's own object, with tensors that the model overwrites."""
    embedding = model.get_input_embeddings().weight
    made: Any = _own(type(model).__module__, "xLSTMCache", _Counted)(
        config=model.config, max_batch_size=rows, dtype=embedding.dtype, device=embedding.device
    )
    held = iter(cache.layers[0].hold(state for states in made.rnn_state.values() for state in states))
    made.rnn_state = {layer: tuple(next(held) for _ in states) for layer, states in made.rnn_state.items()}
    made._cache = cache
    found: ExternalState = made
    return found


class _MiniMaxFront(ExternalState):
    """The interface of the model's own cache class, forwarded to the ``TieredCache`` behind it."""

    _cache: Any

    @property
    def stands_for(self) -> Any:
        """The cache behind this object, which ``generate`` returns in its output and may get passed again."""
        return self._cache

    @property
    def layers(self) -> Any:
        return self._cache.layers

    @property
    def is_linear(self) -> Any:
        return self._cache.is_linear

    def __len__(self) -> int:
        return len(self._cache.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return int(self._cache.get_seq_length(layer_idx))

    def feeding(self, columns: int) -> None:
        pass  # buffers know what they hold

    def update(self, *args: Any, **kwargs: Any) -> Any:
        return self._cache.update(*args, **kwargs)

    def get_linear_cache(self, layer_idx: int) -> Any:
        states = self._cache.layers[layer_idx].recurrent_states
        return states[0] if isinstance(states, dict) else states

    def set_linear_cache(self, layer_idx: int, linear_cache: torch.Tensor) -> None:
        self._cache.update_recurrent_state(linear_cache, layer_idx)


def _minimax_cache(model: PreTrainedModel, cache: Any, rows: int) -> ExternalState:
    kind: Any = _own(type(model).__module__, "MiniMaxCache", _MiniMaxFront)
    made: ExternalState = kind.__new__(kind)  # without __init__: its layers are those of the cache
    made._cache = cache  # type: ignore[attr-defined]
    return made


@functools.cache
def _own(module: str, name: str, front: type) -> type:
    """Return a subclass of ``front`` and of the class ``name`` from the ``module`` of a model."""
    return type(f"Carried{name}", (front, getattr(sys.modules[module], name)), {})


_CARRIERS: dict[str, Callable[[PreTrainedModel, Any, int], ExternalState]] = {
    "minimax": _minimax_cache,
    "rwkv": _rwkv_state,
    "xlstm": _xlstm_cache,
}
"""Model type → function that makes its replacement for a cache."""


def why_not_carried(model: Any, rows: int, repeats: int) -> str | None:
    """Return why the carried states cannot be kept in a turn of ``rows`` rows, each continued ``repeats`` times.

    None when they can, or when ``model`` carries no states outside of a cache.
    """
    if profile_of(model).carried_argument is None:
        return None
    if repeats > 1:
        return "beams and samples do not each get the states that this model carries past a cache"
    if rows > 1 and model.config.model_type == "rwkv":  # its time shift adds [rows, width] to [rows, 1, width]
        return "transformers mixes up the rows of a batch when this model generates"
    return None


def settle(model: Any) -> None:
    """Make RWKV scale its weights now instead of in its first pass: the model is identified by its weights."""
    if model.config.model_type == "rwkv":
        for part in model.modules():
            if hasattr(part, "layers_are_rescaled"):
                part._rescale_layers()


def carry(model: PreTrainedModel, cache: Any, rows: int) -> Any:
    """Return the object to pass to ``model`` for ``cache``: the cache itself, or its replacement.

    None if a replacement is needed and ``rows`` is 0, in a turn that is not kept: the model then makes its own states.
    """
    make = _CARRIERS.get(model.config.model_type)
    if make is None:
        return cache
    return make(model, cache, rows) if rows else None


def external_states(config: PreTrainedConfig) -> ExternalStates | None:
    """Return the layer that stands for all layers of a model; None when the model has layers in the cache."""
    if config.model_type == "rwkv":
        return ExternalStates(map(str, range(5)))
    if config.model_type == "xlstm":
        return ExternalStates(f"{layer}-{i}" for layer in range(config.num_hidden_layers) for i in range(3))
    return None
