"""Shapes of K and V, and the bytes of one token in each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """K and V of one layer for one token: ``[k_heads, k_dim]`` and ``[v_heads, v_dim]``.

    Attributes:
        dtype: dtype of K, and of V unless ``v_dtype`` is set.
        v_dtype: dtype of V if it differs; such layers are held, but neither stored nor offloaded.
    """

    k_heads: int
    k_dim: int
    v_heads: int
    v_dim: int
    dtype: torch.dtype
    v_dtype: torch.dtype | None = None

    @property
    def values_dtype(self) -> torch.dtype:
        """Dtype of V."""
        return self.dtype if self.v_dtype is None else self.v_dtype

    @property
    def k_bytes(self) -> int:
        """Bytes of K for one token."""
        return self.k_heads * self.k_dim * self.dtype.itemsize

    @property
    def v_bytes(self) -> int:
        """Bytes of V for one token."""
        return self.v_heads * self.v_dim * self.values_dtype.itemsize

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V for one token."""
        return self.k_bytes + self.v_bytes

    @classmethod
    def of(cls, k_bhtd: torch.Tensor, v_bhtd: torch.Tensor) -> LayerSpec:
        """Return the spec of ``[batch, heads, tokens, dim]`` K and V."""
        k_shape, v_shape, dtype = k_bhtd.shape, v_bhtd.shape, k_bhtd.dtype
        v_dtype = v_bhtd.dtype
        return cls(k_shape[1], k_shape[3], v_shape[1], v_shape[3], dtype, None if v_dtype is dtype else v_dtype)


@dataclass(frozen=True, slots=True)
class KVSpec:
    """The layers of a model that keep K and V, in order."""

    layers: tuple[LayerSpec, ...]

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V for one token in all layers."""
        return sum(layer.token_bytes for layer in self.layers)

    def is_like(self, other: KVSpec) -> bool:
        """Whether both have the same layers; of layers without bytes the dtype and sizes do not count."""
        if self == other:
            return True
        pairs = list(zip(self.layers, other.layers, strict=False))
        same = len(self.layers) == len(other.layers)
        return same and all(a == b or a.token_bytes == b.token_bytes == 0 for a, b in pairs)
