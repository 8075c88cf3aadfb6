"""Two models with five words, and helpers that run them in the property tests."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from kvtier.hf.compat.names import CHUNKS_CONTINUE
from tests.support import families
from tests.support.upstream import CACHE

VOCABULARY = 6  # five words; 0 is padding
HEAD_DIM = 8
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 256,
    "initializer_range": 0.6,  # smaller models need larger weights, or earlier tokens would not matter
}
CHUNKS: dict[str, Any] = {"prefill_chunk_size": 3} if CHUNKS_CONTINUE else {}  # elsewhere, chunking turns reuse off
Tokens = tuple[int, ...]


@functools.cache
def tiny(family: str, layers: int) -> PreTrainedModel:
    """``llama``: full attention. ``gemma3``: sliding windows of 6 except in the last layer; longer prompts overflow."""
    shape: dict[str, Any] = {**_SHAPE, "num_hidden_layers": layers}
    if family == "llama":
        return families.build(family, attention="sdpa", seed=1, **shape)
    kinds = [*["sliding_attention"] * (layers - 1), "full_attention"]
    return families.build(family, seed=1, **shape, sliding_window=6, layer_types=kinds)


def left_padded(rows: list[Tokens], extra: int = 0) -> torch.Tensor:
    columns = max(map(len, rows)) + extra
    return torch.tensor([(0,) * (columns - len(row)) + row for row in rows])


def answer(model: PreTrainedModel, ids: torch.Tensor, cache: Any = None, argument: str = CACHE, **settings: Any) -> Any:
    """Run ``generate`` with logits and a fixed random seed; by default on the ``DynamicCache`` that it makes itself."""
    torch.manual_seed(11)
    return model.generate(
        ids,
        attention_mask=(ids != 0).long(),
        **({} if cache is None else {argument: cache}),
        suppress_tokens=[0],
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        **{"do_sample": False, "max_new_tokens": 3, **settings},
    )


class FedAlike:
    """Notes, in a ``with`` block, the K and V that each layer of ``cache`` gives to the first update of a turn.

    ``appended`` gets the layer, the first column, and K and V of each update.
    """

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self.appended: list[tuple[int, int, torch.Tensor, torch.Tensor]] = []
        self._begins: dict[int, int] = {}
        self._first: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __enter__(self) -> FedAlike:
        update = self._cache.update

        def noted(k: torch.Tensor, v: torch.Tensor, index: int, *args: Any, **kwargs: Any) -> Any:
            layers = self._cache.layers
            begin = layers[index].get_seq_length() if index < len(layers) else 0
            states = update(k, v, index, *args, **kwargs)
            self.appended.append((index, begin, k.clone(), v.clone()))
            if begin <= self._begins.get(index, begin):  # the first update, also of a turn that starts again
                self._begins[index] = begin
                self._first[index] = tuple(part[:, :, : part.shape[2] - k.shape[2]].clone() for part in states)
            return states

        self._cache.update = noted
        return self

    def __exit__(self, *_: object) -> None:
        del self._cache.update

    def cache(self, columns: int, model: PreTrainedModel) -> DynamicCache:
        """Return a ``DynamicCache`` as the turn found it, with ``columns`` columns."""
        alike = DynamicCache(config=model.config)
        for index, (k, v) in self._first.items() if columns else ():
            alike.update(k, v, index)
            if alike.layers[index].is_sliding:
                alike.layers[index].cumulative_length = columns
        return alike


def columns_of(cache: Any, row: int) -> list[dict[int, bytes]]:
    """K and V of each column of ``row``, as bytes by layer; sliding layers have only the last columns."""
    columns: list[dict[int, bytes]] = [{} for _ in range(cache.get_seq_length())]
    for index, layer in enumerate(cache.layers):
        held = bytes_of_columns(layer.keys[row], layer.values[row])
        assert layer.get_seq_length() == len(columns), "layers of different lengths"
        assert layer.is_sliding or len(held) == len(columns)
        for column, values in zip(columns[len(columns) - len(held) :], held, strict=True):
            column[index] = values
    return columns


def bytes_of_columns(k_htd: torch.Tensor, v_htd: torch.Tensor) -> list[bytes]:
    """K and V of each column, as bytes."""
    parts = [part.transpose(0, 1) for part in (k_htd, v_htd)]
    return [each.tobytes() for each in torch.cat([part.reshape(len(part), -1) for part in parts], 1).cpu().numpy()]


def assert_same_answer(found: Any, expected: Any, *, exact: bool) -> None:
    """Assert equal tokens and logits, to the bit if ``exact``. Two equally likely words may change places."""
    for step, (ours, theirs) in enumerate(zip(found.logits, expected.logits, strict=True)):
        if exact:
            assert torch.equal(ours, theirs), f"step {step}: logits differ by {(ours - theirs).abs().max()}"
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-3), f"step {step}: by {(ours - theirs).abs().max()}"
        column = step - len(found.logits)
        if not torch.equal(found.sequences[:, column], expected.sequences[:, column]):
            best, second = theirs[:, 1:].topk(2).values.unbind(1)
            assert not exact, f"step {step}: other tokens"
            assert bool((best - second < 1e-4).any()), f"step {step}: other tokens, and no draw"
            return  # the rest follows from a different token
    assert torch.equal(found.sequences, expected.sequences)
