"""All tensors of a model → one digest in which every byte counts, kept up to date with a few samples per turn.

The first turn reads every tensor: SHA-256 over a weighted sum of the 64-bit words of each 2 KiB. An edit of any
element changes its block's sum, and so does a swap of elements within a block. (It is not a cryptographic hash:
collisions can be constructed.)

Later turns read a tensor whole again when

- it is another tensor, lies elsewhere or has another version: PyTorch counts in-place writes;
- it holds a gradient, or an optimizer has made a step since, whose writes PyTorch may not count;
- it was made in inference mode, where PyTorch counts no writes;
- one of its samples differs (``samples.py``), or any byte of an ``Embedding`` row that the prompt looks up.

Not detected (``docs/limits.md``): a write to a few elements that PyTorch does not count, through ``.data``, NumPy or a
custom kernel. ``torch.autograd.graph.increment_version`` makes it count.
"""

from __future__ import annotations

import hashlib
import os
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from kvtier.hf.identity.weights.samples import Sampler, Samples, UnsampledError
from kvtier.hf.identity.weights.tensor_values import (
    UnreadableError,
    Values,
    read_values,
    rows_differ,
    why_unreadable,
)

_Named = Sequence[tuple[str, torch.Tensor]]
_Place = tuple[int, int, int, int, int, torch.Size, tuple[int, ...], torch.dtype]
_UNCOUNTED = -1  # the version of a tensor that counts no writes


@dataclass(frozen=True, slots=True)
class Unread:
    """A tensor whose values cannot be read, and why."""

    name: str
    error: str


class _UnreadError(Exception):
    """Its arguments are those of an ``Unread``."""


@dataclass(frozen=True, slots=True)
class _Read:
    """The last reading of a tensor.

    It holds no weak reference to the tensor: ``torch.utils.swap_tensors`` refuses tensors that have one. While it
    holds a weak reference to the storage, no other storage gets this address, which is part of the place.
    """

    storage: StorageWeakRef
    digest: bytes
    table: Values | None
    """For an embedding weight, the values that its rows are compared with."""


@dataclass(frozen=True, slots=True)
class _Model:
    """The readings of all tensors of a model, in their order, after its last turn."""

    names: list[str]
    places: list[_Place]
    reads: list[_Read]
    tables: list[int]
    """Indices of the weights of embeddings."""
    sampler: Sampler
    samples: Samples
    steps: int
    digest: str


@dataclass(frozen=True, slots=True)
class _Present:
    """Current places of a model's tensors. Keeps their storages from being freed."""

    names: list[str]
    tensors: list[torch.Tensor]
    places: list[_Place]
    storages: list[torch.UntypedStorage]
    doubtful: set[int]
    """Indices of tensors that PyTorch may write without counting: made in inference mode, or with a gradient."""
    steps: int
    """Optimizer steps before the reading: a step during the reading shows in the next turn."""


class OptimizerSteps:
    """A count that grows before and after every step of any optimizer, from ``watch`` on.

    Fused optimizers write weights without counting a version. The count does not say which tensors a step wrote:
    optimizers with flat buffers or master weights write other tensors than they were given. It costs the same for every
    model, and holds neither an optimizer nor a tensor.

    A reading of weights is out of date when the count differs from the count *before* the reading. A step that fails
    half way has written some weights: it was counted at its beginning.
    """

    def __init__(self) -> None:
        self._count = 0
        self._handles: tuple[RemovableHandle, ...] = ()
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """A number that was never returned before the last step began."""
        return self._count

    def watch(self) -> None:
        """Count from now on. Called again, it does nothing."""
        with self._lock:
            if not self._handles:
                self._count += 1  # steps may have been made unseen
                self._handles = (
                    register_optimizer_step_pre_hook(self._note),
                    register_optimizer_step_post_hook(self._note),
                )

    def unwatch(self) -> None:
        """Remove the hooks. Called again, it does nothing."""
        with self._lock:
            for handle in self._handles:
                handle.remove()
            self._handles = ()

    def _note(self, _optimizer: Any, _args: Any, _kwargs: Any) -> None:
        with self._lock:  # += of two threads could count once, and the second would end unseen
            self._count += 1


_models: weakref.WeakKeyDictionary[torch.nn.Module, _Model] = weakref.WeakKeyDictionary()
_reading: weakref.WeakKeyDictionary[torch.nn.Module, threading.Lock] = weakref.WeakKeyDictionary()
"""One lock per model, held while its tensors are read."""
_lock = threading.Lock()
_steps = OptimizerSteps()


def _let_go() -> None:
    """Replace, in a forked child, the locks that a thread of the parent may have held."""
    global _lock
    _lock = threading.Lock()
    for model in list(_reading):
        _reading[model] = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def digest_weights(model: torch.nn.Module, tensors: _Named, tokens: npt.ArrayLike = ()) -> str | Unread:
    """Return SHA-256, as hex, over names, shapes, dtypes and values of ``tensors``, which belong to ``model``.

    Equal on every device and in every process. The cached readings hold no tensor and are freed with the model.

    Args:
        model: the rows of ``tokens`` in its embeddings are compared with the last reading.
        tensors: all tensors of the model, by name.
        tokens: ids of the prompt. They are not part of the digest.
    """
    with _lock:
        _steps.watch()
        alone = _reading.setdefault(model, threading.Lock())
    with alone, torch.no_grad():  # reading a large model takes long: other models' turns go on
        with _lock:
            known = _models.get(model)
        try:
            present = _look(tensors, _steps.count)
            if known is None or not _unchanged(known, present, tokens):
                known = _read(model, known, present, tokens)
                with _lock:
                    _models[model] = known
        except _UnreadError as error:
            return Unread(*error.args)
        return known.digest


def forget_models() -> None:
    """Forget all readings, and count no optimizer steps until the next reading."""
    with _lock:
        _models.clear()
        _steps.unwatch()


def _look(tensors: _Named, steps: int) -> _Present:
    names, present = [name for name, _ in tensors], [tensor for _, tensor in tensors]
    places: list[_Place] = []
    storages: list[torch.UntypedStorage] = []
    doubtful: set[int] = set()
    try:
        for tensor in present:  # once per tensor in every turn: every call here costs as much as a sample
            storage = tensor.untyped_storage()
            version = _UNCOUNTED if tensor.is_inference() else tensor._version
            if version == _UNCOUNTED or (tensor.is_leaf and tensor.grad is not None):
                doubtful.add(len(places))
            storages.append(storage)
            places.append(
                (
                    id(tensor),
                    tensor.data_ptr(),
                    version,
                    storage._cdata,
                    storage.nbytes(),
                    tensor.shape,
                    tensor.stride(),
                    tensor.dtype,
                )
            )
    except Exception as error:  # of any kind: tensors may be subclasses
        index = len(places)
        raise _unread(names[index], present[index], error) from error
    return _Present(names, present, places, storages, doubtful, steps)


def _unchanged(known: _Model, present: _Present, tokens: npt.ArrayLike) -> bool:
    """Whether every tensor is unchanged since the last turn, as far as can be seen without reading it whole."""
    if known.steps != present.steps or present.doubtful:
        return False
    if known.places != present.places or known.names != present.names:
        return False
    if not _read_samples(known.sampler, present).equal(known.samples):
        return False
    return not any(_rows_differ(known.reads[index], present.tensors[index], tokens) for index in known.tables)


def _read(model: torch.nn.Module, known: _Model | None, present: _Present, tokens: npt.ArrayLike) -> _Model:
    """Read whole all new or possibly changed tensors. Samples are read first, so that they show a write meanwhile."""
    for name, tensor in zip(present.names, present.tensors, strict=True):
        why = why_unreadable(tensor)
        if why is not None:
            raise _UnreadError(name, why)
    sampler = Sampler(present.tensors)
    samples = _read_samples(sampler, present)
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    before = {} if known is None else {name: index for index, name in enumerate(known.names)}
    reads: dict[int, _Read] = {}
    tables: list[int] = []
    whole = hashlib.sha256()
    for index, (name, tensor, place) in enumerate(zip(present.names, present.tensors, present.places, strict=True)):
        is_table = id(tensor) in embedded and tensor.is_contiguous()
        if is_table:
            tables.append(index)
        old = before.get(name)
        if (
            known is not None
            and old is not None
            and known.steps == present.steps
            and known.places[old] == place
            and index not in present.doubtful
            and known.samples.of(old) == samples.of(index)
            and (known.reads[old].table is not None) == is_table
            and not _rows_differ(known.reads[old], tensor, tokens)
        ):
            reads[index] = known.reads[old]
    unread = [index for index in range(len(present.tensors)) if index not in reads]
    try:
        found = read_values([present.tensors[index] for index in unread])
    except UnreadableError as error:
        index = unread[error.index]
        raise _unread(present.names[index], present.tensors[index], error.cause) from error
    for index, values in zip(unread, found, strict=True):
        storage = StorageWeakRef(present.storages[index])  # type: ignore[no-untyped-call]
        reads[index] = _Read(storage, values.digest, values if index in tables else None)
    in_order = [reads[index] for index in range(len(present.tensors))]
    for name, tensor, read in sorted(
        zip(present.names, present.tensors, in_order, strict=True), key=lambda one: one[0]
    ):
        whole.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}:".encode() + read.digest)
    return _Model(present.names, present.places, in_order, tables, sampler, samples, present.steps, whole.hexdigest())


def _read_samples(sampler: Sampler, present: _Present) -> Samples:
    try:
        return sampler.read(present.tensors)
    except UnsampledError as error:
        raise _unread(present.names[error.index], present.tensors[error.index], error) from error


def _rows_differ(read: _Read, tensor: torch.Tensor, tokens: npt.ArrayLike) -> bool:
    return read.table is not None and rows_differ(tensor, read.table, tokens)


def _unread(name: str, tensor: torch.Tensor, error: Exception) -> _UnreadError:
    """Return an error with the reason why a tensor cannot be read; the first line of ``error`` if there is no other."""
    try:
        why = why_unreadable(tensor)
    except Exception:  # ``error`` says more
        why = None
    return _UnreadError(name, why or str(error).partition("\n")[0])
