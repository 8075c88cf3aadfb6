"""A tiny model, run with a ``TieredCache`` in place of transformers' own cache, and without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kvtier import PrefixStore, TieredCache
from tests.support import families
from tests.support.tiny import assert_same_answer
from tests.support.upstream import CACHE

# Rounding differs between a prompt computed whole and a prompt continued from a cache.
CLOSE = 1e-3
_ALL = {
    "return_dict_in_generate": True,
    "output_logits": True,
    "output_scores": True,
    "do_sample": False,
    "max_new_tokens": 5,
}


def outcome(call: Callable[[], Any]) -> Any:
    """Return the result of ``call``, or its error: some models do not support every call."""
    try:
        return call()
    except (ValueError, NotImplementedError, RuntimeError, TypeError, AttributeError, IndexError) as error:
        return error


class Subject:
    """A model of one family and a store in RAM.

    ``reference`` lets transformers make its own ``DynamicCache``; ``ask`` passes a ``TieredCache``.
    """

    def __init__(self, name: str, store: PrefixStore) -> None:
        self.name, self.family, self.store = name, families.FAMILIES[name], store
        self.model = families.build(name)
        self.config = self.model.config

    def prompt(self, columns: int = 22, rows: int = 1, seed: int = 0) -> torch.Tensor:
        """Return ``[rows, columns]`` words without padding, longer than the sliding windows of these models."""
        return torch.randint(1, 60, (rows, columns), generator=torch.Generator().manual_seed(seed))

    def padded(self, lengths: tuple[int, ...] = (22, 9), seed: int = 0) -> torch.Tensor:
        """Return rows of these lengths, padded on the left."""
        ids = self.prompt(max(lengths), len(lengths), seed)
        for row, length in enumerate(lengths):
            ids[row, : ids.shape[1] - length] = families.PADDING
        return ids

    def reference(self, ids: torch.Tensor | None, **settings: Any) -> Any:
        return self._generate(ids, settings)

    def ask(self, ids: torch.Tensor | None, cache: TieredCache, **settings: Any) -> Any:
        return self._generate(ids, {**settings, "past_key_values": cache})

    def _generate(self, ids: torch.Tensor | None, settings: dict[str, Any]) -> Any:
        torch.manual_seed(5)
        if ids is not None and "attention_mask" not in settings:
            settings = {**settings, "attention_mask": (ids != families.PADDING).long()}
        return self.model.generate(ids, **{**_ALL, "suppress_tokens": [families.PADDING], **settings})

    def cache(self) -> TieredCache:
        return TieredCache(self.store)

    def check(self, ids: torch.Tensor, *, against: Any = None, exact: bool = True, **settings: Any) -> Any:
        """Ask three times: on an empty cache, on the same cache again, and on a new cache over the same store.

        Each answer equals that of ``reference``: to the bit if it was computed the same way, to rounding otherwise.
        If transformers raises, kvtier must raise the same error.

        Args:
            ids: the prompt.
            against: the expected answer; by default, ``reference`` with the same settings.
            exact: whether the first answer was computed the same way as the expected answer.
            settings: of ``generate``.

        Returns:
            The first answer.
        """
        expected = outcome(lambda: self.reference(ids, **settings)) if against is None else against
        with self.cache() as cache, self.cache() as other:
            found = outcome(lambda: self.ask(ids, cache, **settings))
            if isinstance(expected, Exception) or isinstance(found, Exception):
                assert type(found) is type(expected), f"{type(found)}, not {type(expected)}"
                return found
            assert getattr(found, CACHE) is cache
            self.compare(found, expected, exact and cache.last_turn.cached_tokens == 0)
            for again in (cache, other):
                self.compare(self.ask(ids, again, **settings), expected, False)
                report = again.last_turn
                assert report.cached_tokens or report.miss_reason
        return found

    @staticmethod
    def compare(found: Any, expected: Any, exact: bool) -> None:
        """Compare tokens, and either the logits of a row or the scores of beams."""
        if "beam_indices" not in expected:
            assert_same_answer(found, expected, exact=exact)
            return
        assert torch.equal(found.sequences, expected.sequences)
        assert torch.equal(found.beam_indices, expected.beam_indices)
        close = 0.0 if exact else CLOSE
        assert torch.allclose(found.sequences_scores, expected.sequences_scores, rtol=0, atol=close)


def assert_alike(found: Any, expected: Any) -> None:
    """Assert that nested tuples of tensors are equal to the bit."""
    if isinstance(expected, tuple):
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert_alike(ours, theirs)
    elif expected is not None:
        assert found.shape == expected.shape
        assert torch.equal(found, expected)
