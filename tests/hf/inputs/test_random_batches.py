"""Random batches of changing size, padded on any side: answers are right, and each row reuses all it can.

Rows begin with one of a few prefixes, so they share prefixes with rows of the same batch and of earlier batches, also
at other positions. The expected number of cached tokens is computed exactly, from the sequences kept before.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier import PrefixStore, TieredCache
from tests.support.stores import shared
from tests.support.tiny import VOCABULARY, Tokens, answer, assert_same_answer, tiny

WINDOW = 6  # of the sliding layers
words = st.integers(1, VOCABULARY - 1)
PREFIXES: tuple[Tokens, ...] = (
    (1, 2, 3, 4, 5, 1, 1, 2, 2, 3, 3, 4, 4, 5),
    (1, 2, 3, 4, 5, 1, 1, 5, 4),
    (5, 5, 4, 3, 3, 3, 2, 1, 4, 4, 4, 2, 2, 1, 5, 3, 1),
    (2,),
)
rows = st.tuples(
    st.sampled_from(range(len(PREFIXES) + 1)),  # the last index: a row of the previous batch with its answer
    st.integers(1, 20),  # number of tokens of the prefix
    st.lists(words, max_size=4).map(tuple),
    st.sampled_from(["left", "left", "right", "both"]),
    st.integers(0, 3),
)
turns = st.tuples(
    st.lists(rows, min_size=1, max_size=4),
    st.sampled_from(["go on", "go on", "go on", "restore", "fork"]),
    st.sampled_from([{}, {}, {"eos_token_id": 3}, {"do_sample": True, "top_k": 0, "num_return_sequences": 2}]),
)


def padded(sequences: list[Tokens], sides: list[str], extra: int) -> tuple[torch.Tensor, list[int]]:
    """Return ids, and the column where each row begins."""
    columns = max(map(len, sequences)) + extra
    free = [columns - len(row) for row in sequences]
    pads = [{"left": n, "right": 0, "both": n // 2}[side] for n, side in zip(free, sides, strict=True)]
    lines = [(0,) * pad + row + (0,) * (columns - pad - len(row)) for pad, row in zip(pads, sequences, strict=True)]
    return torch.tensor(lines), pads


def expected_of(sequences: list[Tokens], pads: list[int], columns: int, kept: set[Tokens]) -> tuple[list[int], ...]:
    """Return the number of known tokens and of usable tokens of each row."""
    known, limits = [], [columns - 1]
    for row, pad in zip(sequences, pads, strict=True):
        ends_early = pad + len(row) < columns
        most = len(row) if ends_early else len(row) - 1
        known.append(min(most, max((shared(row, other) for other in kept), default=0)))
        if not (ends_early and known[-1] == len(row)):
            limits.append(pad + known[-1])
    cut = min(limits)
    return known, [max(0, min(cut - pad, len(row))) for row, pad in zip(sequences, pads, strict=True)]


@pytest.mark.sample(3)  # of 4
@pytest.mark.parametrize("budgeted", [False, True], ids=["hot", "cold"])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@settings(max_examples=max(1, settings().max_examples // 8))
@given(st.lists(turns, min_size=2, max_size=5), st.sampled_from([4, 8]))
def test_random_batches_are_correct_and_reuse_all_usable_tokens(tmp_path_factory, kind, budgeted, batches, block_size):
    model = tiny(kind, 3)
    options = {"device_budget": 60_000, "spill_dir": tmp_path_factory.getbasetemp()} if budgeted else {}
    with PrefixStore(block_size=block_size) as store:
        caches = [TieredCache(store, **options)]
        kept: set[Tokens] = set()
        ended: list[Tokens] = [(1, 2, 3)]
        for drawn, how, mode in batches:
            if how == "restore":
                caches.append(TieredCache(store, **options))
            elif how == "fork":
                caches.append(caches[-1].fork())
            sequences = [
                ((*PREFIXES, ended[n % len(ended)])[which][:n] + more)[-24:] or (1,) for which, n, more, *_ in drawn
            ]
            ids, pads = padded(sequences, [side for *_, side, _ in drawn], drawn[0][4])
            known, usable = expected_of(sequences, pads, ids.shape[1], kept)
            ends = [pad + len(row) for pad, row in zip(pads, sequences, strict=True)]
            hidden = kind == "gemma3" and ids.shape[1] - min(ends) >= WINDOW
            if hidden:
                known = usable = [0] * len(sequences)

            found = answer(model, ids, caches[-1], **mode)
            report = caches[-1].last_turn

            assert_same_answer(found, answer(model, ids, **mode), exact=report.cached_tokens == 0)
            assert [row.prompt_tokens for row in report.rows] == [len(row) for row in sequences]
            assert [row.cached_tokens for row in report.rows] == usable
            assert [row.known_tokens for row in report.rows] == known
            assert (report.cached_tokens, report.known_tokens) == (sum(usable), sum(known))
            assert sum(report.cached_by_tier.values()) == sum(usable)
            cut_short = sum(known) - sum(usable)
            assert not hidden or "right padding" in report.miss_reason
            assert hidden or (report.miss_reason is None) == (cut_short == 0 and any(known))
            assert not cut_short or f"{cut_short} known tokens of other rows" in report.miss_reason

            each = len(found.sequences) // len(sequences)
            ended = []
            for i, sequence in enumerate(found.sequences.tolist()):
                row, pad = sequences[i // each], pads[i // each]
                new = tuple(sequence[ids.shape[1] :])
                if "eos_token_id" in mode and 3 in new:
                    new = new[: new.index(3) + 1]
                ended.append(row + new)
                if hidden or pad + len(row) < ids.shape[1]:
                    kept.add(row)  # generated tokens stand at other columns, behind padding
                else:
                    kept.add((row + new)[: len(sequence) - 1 - pad])
        for cache in caches:
            cache.close()
