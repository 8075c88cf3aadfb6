"""All tensors of a model → one digest in which every byte counts, kept up to date at the price of a few samples.

The first turn reads every tensor: SHA-256 over a weighted sum of the 64-bit words of each 2 KiB. An edit of any
element changes its block's sum, and so does what changes places within a block. (It is no cryptographic hash:
someone who wants two models to look alike can make them so.)

Later turns read a tensor again when it is another tensor, lies elsewhere, has another version (PyTorch counts what
is written in place), holds a gradient, or when one of its sampled elements differs: the whole of a small tensor,
``SAMPLED_ELEMENTS`` of a large one, at irregular distances. PyTorch does not count what is written through
``.data``, NumPy or by fused optimizers. Of such an edit, made between two turns of one process, only the samples
can tell: one that changes most of a tensor is noticed, one of a few elements may be missed, and the turns after it
then go on under the root of the model as it was. Write in place under ``torch.no_grad()`` instead, or load the
edited model anew: both are noticed in any case.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

SAMPLED_ELEMENTS = 64
# Samples gathered at once: so few that PyTorch does not wake other threads for them, which can take milliseconds.
_GATHERED = 256
_BLOCK_WORDS = 256
_BLOCKS_AT_ONCE = 64 * 1024 * 1024 // (_BLOCK_WORDS * 8)
_FACTORS = (np.arange(1, 2 * _BLOCK_WORDS, 2, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)).view(np.int64)
_SMALL_BYTES = 16 * 1024
_WORD = 8
# dtypes that torch.take knows; others are sampled as integers of their size.
_TAKEN = frozenset(
    {torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16, torch.int32}
    | {torch.int64, torch.bool, torch.complex64, torch.complex128}
)
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_Place = tuple[int, int, torch.Size, torch.dtype]


@dataclass(frozen=True, slots=True)
class Unread:
    """A tensor whose values cannot be read, and why."""

    name: str
    error: str


@dataclass(frozen=True, slots=True)
class _Read:
    """What a tensor was when it was read last."""

    tensor: weakref.ref[torch.Tensor]
    place: _Place
    samples: bytes
    digest: bytes


@dataclass(slots=True)
class _Model:
    reads: dict[str, _Read]
    digest: str


_models: weakref.WeakKeyDictionary[torch.nn.Module, _Model] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def digest_weights(model: torch.nn.Module, tensors: Sequence[tuple[str, torch.Tensor]]) -> str | Unread:
    """Return SHA-256, as hex, over names, shapes, dtypes and values of ``tensors``, which belong to ``model``.

    Equal on every device and in every process. What is remembered of a model holds no tensor and goes with it.
    """
    with _lock, torch.no_grad():
        known = _models.get(model)
        before = known.reads if known is not None else {}
        reads: list[tuple[str, _Read]] = []
        name = ""
        try:
            pieces, places = [], []
            for name, tensor in tensors:  # noqa: B007  (named in the handler)
                places.append(_place(tensor))
                pieces.append(_sample(tensor))
            same = known is not None and len(before) == len(tensors)
            for (name, tensor), place, samples in zip(tensors, places, _gather(pieces), strict=True):
                read = before.get(name)
                if (
                    read is None
                    or read.samples != samples
                    or read.place != place
                    or read.tensor() is not tensor
                    or (tensor.is_leaf and tensor.grad is not None)
                ):
                    digest = _digest(tensor)
                    same = same and read is not None and (read.digest, read.place[2:]) == (digest, place[2:])
                    read = _Read(weakref.ref(tensor), place, samples, digest)
                reads.append((name, read))
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:  # what tensor subclasses do not offer
            return Unread(name, str(error).partition("\n")[0])
        if known is None or not same:
            whole = hashlib.sha256()
            for name, read in sorted(reads, key=lambda one: one[0]):
                whole.update(f"{name}:{tuple(read.place[2])}:{read.place[3]}:".encode() + read.digest)
            known = _models[model] = _Model({}, whole.hexdigest())
        known.reads = dict(reads)
        return known.digest


def _place(tensor: torch.Tensor) -> _Place:
    version = -1 if tensor.is_inference() else tensor._version  # inference tensors do not count
    return tensor.data_ptr(), version, tensor.shape, tensor.dtype


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    count = tensor.numel()
    if tensor.dtype not in _TAKEN:
        tensor = tensor.view(_INTEGERS[tensor.dtype.itemsize])
    return torch.take(tensor, _positions(count, tensor.device)) if count > SAMPLED_ELEMENTS else tensor.reshape(-1)


def _gather(samples: Sequence[torch.Tensor]) -> list[bytes]:
    """Return the bytes of each sample, with few transfers per device and dtype."""
    found = [b""] * len(samples)
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault((sample.device, sample.dtype), []).append(index)
    for (_, dtype), group in groups.items():
        for begin in range(0, len(group), _GATHERED):
            indices = group[begin : begin + _GATHERED]
            data = torch.cat([samples[i] for i in indices]).view(torch.uint8).cpu().numpy().tobytes()
            start = 0
            for index in indices:
                end = start + samples[index].numel() * dtype.itemsize
                found[index] = data[start:end]
                start = end
    return found


@functools.lru_cache(maxsize=512)
def _positions(count: int, device: torch.device) -> torch.Tensor:
    """Return one position in each of ``SAMPLED_ELEMENTS`` equal parts, at distances that fit no row length.

    Element ``i`` and the next one lie in other columns whatever the width, so an edited column is met as often as an
    edited row.
    """
    parts = [i * count // SAMPLED_ELEMENTS for i in range(SAMPLED_ELEMENTS + 1)]
    return torch.tensor(
        [
            begin + (i * 0x9E3779B97F4A7C15 % 2**64) * (end - begin) // 2**64
            for i, (begin, end) in enumerate(itertools.pairwise(parts))
        ],
        device=device,
    )


def _digest(tensor: torch.Tensor) -> bytes:
    """Return SHA-256 over the values of one tensor, in the order of its elements."""
    data = tensor.detach().reshape(-1).view(torch.uint8)
    digest = hashlib.sha256()
    done = 0
    if data.numel() > _SMALL_BYTES:
        if data.storage_offset() % _WORD:
            data = data.clone()
        done = data.numel() // (_BLOCK_WORDS * _WORD) * (_BLOCK_WORDS * _WORD)
        digest.update(_block_sums(data[:done].view(torch.int64).view(-1, _BLOCK_WORDS)))
    digest.update(data[done:].cpu().numpy().tobytes())
    return digest.digest()


def _block_sums(blocks: torch.Tensor) -> bytes:
    """Return the sum of each row, its words multiplied by one odd number each, modulo 2**64.

    Exact in any order, so equal on every device.
    """
    if blocks.device.type == "cpu":
        # One thread of NumPy reads nearly as fast as memory delivers; PyTorch would wake its threads for each tensor.
        sums: bytes = np.einsum("bw,w->b", blocks.numpy(), _FACTORS).tobytes()  # twice as fast as @ on integers
        return sums
    factors = torch.from_numpy(_FACTORS).to(blocks.device)
    begins = range(0, len(blocks), _BLOCKS_AT_ONCE)
    parts = [(blocks[begin : begin + _BLOCKS_AT_ONCE] * factors).sum(dim=1) for begin in begins]
    return torch.cat(parts).cpu().numpy().tobytes()
