"""Samples of every tensor, compared each turn to notice writes that PyTorch does not count.

``SAMPLES`` words of 8 bytes of each tensor are read at irregular distances; all bytes of a tensor that has no more.
Contiguous tensors in main memory are read by one gather over their addresses; calling PyTorch or NumPy once per
tensor takes five times as long.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from kvtier.hf.identity.weights.block_sums import WORD_BYTES
from kvtier.hf.identity.weights.tensor_values import byte_view, memory

SAMPLES = 64
# Samples gathered at once: few enough that PyTorch does not wake other threads, which can take milliseconds.
_GATHERED = 256
_MULTIPLIER = 0x9E3779B97F4A7C15
_PLAIN = (torch.Tensor, torch.nn.Parameter)
# dtypes that torch.take knows; others are sampled as integers of their size.
_TAKEN = frozenset(
    {torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16, torch.int32}
    | {torch.int64, torch.bool, torch.complex64, torch.complex128}
)
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class UnsampledError(Exception):
    """The tensor at ``index`` does not offer its elements."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index


class Samples:
    """The sampled words of all tensors in one reading."""

    def __init__(self, words: npt.NDArray[np.int64], rows: dict[int, int], others: dict[int, bytes]) -> None:
        self._words = words
        self._rows = rows
        self._others = others

    def equal(self, other: Samples) -> bool:
        """Whether two readings of one ``Sampler`` found the same words."""
        return bool(np.array_equal(self._words, other._words)) and self._others == other._others

    def of(self, index: int) -> bytes:
        """Return the bytes sampled from the tensor at ``index``."""
        row = self._rows.get(index)
        return self._others[index] if row is None else self._words[row].tobytes()


class Sampler:
    """Sample positions in a list of tensors. Holds addresses, but no tensor.

    The same place, shape, strides and dtype of a tensor give the same words in every ``Sampler``.

    Args:
        tensors: readable tensors. Later readings must be of the same tensors, in the same places.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._rows: dict[int, int] = {}
        self._others: list[int] = []
        begins: list[int] = []
        counts: list[int] = []
        for index, tensor in enumerate(tensors):
            words = _whole_words(tensor)
            if words is None:
                self._others.append(index)
            else:
                self._rows[index] = len(begins)
                begins.append(words[0])
                counts.append(words[1])
        self._first = min(begins, default=0)
        begin_words = (np.array(begins, dtype=np.int64) - self._first) // WORD_BYTES
        self._positions = begin_words[:, None] + _word_positions(np.array(counts, dtype=np.int64))
        self._words = int(self._positions.max(initial=-1)) + 1

    def read(self, tensors: Sequence[torch.Tensor]) -> Samples:
        """Read the words. The caller must hold the storages of ``tensors`` meanwhile.

        Raises:
            UnsampledError: a subclass of tensors does not offer its elements.
        """
        words = memory(self._first, self._words * WORD_BYTES).view(np.int64)
        others = []
        for index in self._others:
            try:
                others.append(_sample(tensors[index]))
            except Exception as error:  # of any kind: tensors may be subclasses
                raise UnsampledError(index, str(error)) from error
        found = dict(zip(self._others, _gather(others), strict=True))
        return Samples(words.take(self._positions), self._rows, found)


def _whole_words(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Return address and number of the aligned words of a tensor in main memory; None if they do not represent it."""
    if type(tensor) not in _PLAIN or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return None
    if tensor.is_conj() or tensor.is_neg():
        return None
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    first, last = -(-begin // WORD_BYTES), end // WORD_BYTES
    count = last - first
    whole = count * WORD_BYTES == end - begin
    return (first * WORD_BYTES, count) if count > SAMPLES or (whole and count > 0) else None


def _word_positions(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return one position in each of ``SAMPLES`` equal parts of ``counts`` words each: ``[counts, samples]``.

    The distances between neighbours fit no row length: consecutive samples lie in different columns for any width, so
    an edited column is met as often as an edited row. With fewer words than samples, every word is met.
    """
    parts = counts[:, None] * np.arange(SAMPLES + 1) // SAMPLES
    fractions = np.array([i * _MULTIPLIER % 2**64 / 2**64 for i in range(SAMPLES)])
    begins, sizes = parts[:, :-1], np.diff(parts)
    # A part is empty where there are fewer words than samples: there, the word before or after is read twice.
    positions = np.minimum(begins + (sizes * fractions).astype(np.int64), counts[:, None] - 1)
    found: npt.NDArray[np.int64] = np.minimum(positions, begins + np.maximum(sizes - 1, 0))
    return found


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Return all bytes of a small tensor, ``SAMPLES`` elements of a large one: uint8 ``[bytes]``."""
    count = tensor.numel()
    if count <= SAMPLES or tensor.nbytes <= SAMPLES * WORD_BYTES:
        return byte_view(tensor)
    if tensor.dtype not in _TAKEN:
        tensor = tensor.view(_INTEGERS[tensor.dtype.itemsize])
    return torch.take(tensor.detach(), _element_positions(count, tensor.device)).view(torch.uint8)


def _gather(samples: Sequence[torch.Tensor]) -> list[bytes]:
    """Return the bytes of each sample (uint8), with few transfers per device."""
    found = [b""] * len(samples)
    groups: dict[torch.device, list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault(sample.device, []).append(index)
    for group in groups.values():
        for begin in range(0, len(group), _GATHERED):
            indices = group[begin : begin + _GATHERED]
            data = torch.cat([samples[i] for i in indices]).cpu().numpy().tobytes()
            start = 0
            for index in indices:
                end = start + samples[index].numel()
                found[index] = data[start:end]
                start = end
    return found


@functools.lru_cache(maxsize=512)
def _element_positions(count: int, device: torch.device) -> torch.Tensor:
    """Return ``_word_positions`` for the elements of one large tensor."""
    return torch.from_numpy(_word_positions(np.array([count], dtype=np.int64))[0]).to(device)
