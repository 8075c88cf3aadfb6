"""Shapes of K and V: what one token costs in each layer, and where a layer's bytes lie in a block."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class LayerGeometry:
    """K and V of one layer for one token: ``[k_heads, k_dim]`` and ``[v_heads, v_dim]`` of ``dtype``."""

    k_heads: int
    k_dim: int
    v_heads: int
    v_dim: int
    dtype: torch.dtype

    @property
    def k_bytes(self) -> int:
        """Bytes of K for one token."""
        return self.k_heads * self.k_dim * self.dtype.itemsize

    @property
    def v_bytes(self) -> int:
        """Bytes of V for one token."""
        return self.v_heads * self.v_dim * self.dtype.itemsize

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V for one token."""
        return self.k_bytes + self.v_bytes

    @classmethod
    def of(cls, k_bhtd: torch.Tensor, v_bhtd: torch.Tensor) -> LayerGeometry:
        """Return the geometry of ``[batch, heads, tokens, dim]`` K and V."""
        return cls(k_bhtd.shape[1], k_bhtd.shape[3], v_bhtd.shape[1], v_bhtd.shape[3], k_bhtd.dtype)


@dataclass(frozen=True, slots=True)
class Geometry:
    """The layers of a model that keep K and V, in order."""

    layers: tuple[LayerGeometry, ...]

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V for one token in all layers."""
        return sum(layer.token_bytes for layer in self.layers)
