"""A batch is read as rows without padding; masks with holes or another shape are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier import PromptError
from kvtier.hf.inputs.prompt import Prompt, read_prompt
from kvtier.hf.not_reusable import NotReusable


def rows_of(prompt):
    assert isinstance(prompt, Prompt)
    return [row.tolist() for row in prompt.rows]


def test_without_a_mask_every_id_counts():
    prompt = read_prompt(torch.tensor([[0, 1, 2], [0, 0, 3]]), None)
    assert rows_of(prompt) == [[0, 1, 2], [0, 0, 3]]
    assert (prompt.pads, prompt.columns) == ((0, 0), 3)


def test_padding_follows_the_mask_not_the_ids():
    ids = torch.tensor([[5, 5, 0, 5], [5, 0, 0, 7], [1, 2, 3, 4]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]])
    prompt = read_prompt(ids, mask)
    assert rows_of(prompt) == [[5, 5, 0, 5], [0, 7], [4]]
    assert (prompt.pads, prompt.columns) == ((0, 2, 3), 4)


def test_row_of_only_padding_is_empty():
    prompt = read_prompt(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[0, 0], [1, 1]]))
    assert rows_of(prompt) == [[], [3, 4]]
    assert prompt.pads == (2, 0)


def test_padding_on_either_or_both_sides_is_removed():
    ids = torch.tensor([[1, 2, 3, 4], [0, 5, 0, 0], [6, 7, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 0], [1, 1, 0, 0]])
    prompt = read_prompt(ids, mask)
    assert rows_of(prompt) == [[1, 2, 3, 4], [5], [6, 7]]
    assert prompt.pads == (0, 1, 0)
    assert [prompt.ends_early(row) for row in range(3)] == [False, True, True]
    assert prompt.is_padded
    assert prompt.begins(torch.tensor([[1, 2, 3, 4, 8], [9, 5, 9, 9, 8], [6, 7, 9, 9, 8]]))
    assert not prompt.begins(torch.tensor([[1, 2, 3, 4], [0, 5, 0, 0], [6, 8, 0, 0]]))


def test_nothing_is_padded_without_a_mask():
    assert not read_prompt(torch.tensor([[0, 0]]), None).is_padded


@pytest.mark.parametrize("mask", [[1, 0, 1], [0, 1, 0, 1], [1, 0, 0, 1, 0]], ids=str)
def test_mask_with_holes_is_not_reusable(mask):
    ids = torch.ones(2, len(mask), dtype=torch.long)
    found = read_prompt(ids, torch.tensor([[1] * len(mask), mask]))
    assert isinstance(found, NotReusable)
    assert "has holes" in found.reason


@pytest.mark.parametrize("shape", [(1, 4), (1, 6), (2, 5), (0, 5), (5, 1)], ids=str)
def test_mask_of_another_shape_raises_prompt_error(shape):
    with pytest.raises(PromptError) as error:
        read_prompt(torch.ones(1, 5, dtype=torch.long), torch.ones(shape))
    assert str(shape) in str(error.value)
    assert "(1, 5)" in str(error.value)
    assert "pass the whole conversation as input_ids" in str(error.value)


@pytest.mark.parametrize("dimensions", [1, 3, 4])
def test_ids_or_mask_with_wrong_dimensions_are_not_reusable(dimensions):
    odd = torch.ones([1] * (dimensions - 1) + [4], dtype=torch.long)
    found = read_prompt(odd, None)
    assert isinstance(found, NotReusable)
    assert found.reason == f"input_ids have {dimensions} dimensions"
    found = read_prompt(torch.ones(1, 4, dtype=torch.long), odd)
    assert isinstance(found, NotReusable)
    assert found.reason == f"the attention mask has {dimensions} dimensions"


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
@pytest.mark.parametrize(
    "mask_dtype",
    [torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32],
)
def test_ids_and_masks_of_any_dtype_give_int64_rows(dtype, mask_dtype):
    ids, mask = torch.tensor([[9, 1, 2], [3, 4, 5]], dtype=dtype), torch.tensor([[0, 1, 1], [1, 1, 1]]).to(mask_dtype)
    prompt = read_prompt(ids, mask)
    assert rows_of(prompt) == [[1, 2], [3, 4, 5]]
    assert all(row.dtype == np.int64 for row in prompt.rows)


@pytest.mark.parametrize("odd", [2.0, -1.0, 0.5, float("nan"), float("-inf")])
def test_mask_with_values_besides_0_and_1_is_not_reusable(odd):
    """Models sum the mask to count positions, so a 2 in it makes positions jump."""
    found = read_prompt(torch.ones(1, 3, dtype=torch.long), torch.tensor([[1.0, odd, 1.0]]))
    assert isinstance(found, NotReusable)
    assert found.reason == "the attention mask has values besides 0 and 1"


def test_large_ids_keep_all_their_bits():
    assert rows_of(read_prompt(torch.tensor([[2**40 + 1, 2**53 + 1]]), None)) == [[2**40 + 1, 2**53 + 1]]


@pytest.mark.parametrize("mask", [None, torch.ones(1, 3)], ids=["no mask", "mask"])
def test_rows_are_copies_of_the_ids(mask):
    """The caller may overwrite its tensor afterwards. The rows must not change."""
    ids = torch.tensor([[1, 2, 3]])
    prompt = read_prompt(ids, mask)
    ids.zero_()
    assert rows_of(prompt) == [[1, 2, 3]]


@pytest.mark.parametrize("shape", [(1, 0), (0, 4), (0, 0)], ids=str)
def test_empty_batches_give_empty_rows(shape):
    ids = torch.empty(shape, dtype=torch.long)
    for mask in (None, torch.empty(shape, dtype=torch.long)):
        prompt = read_prompt(ids, mask)
        assert rows_of(prompt) == [[]] * shape[0]
        assert (prompt.pads, prompt.columns) == ((0,) * shape[0], shape[1])


@given(st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(1, 9), max_size=6)), min_size=1, max_size=4))
def test_reading_a_padded_batch_restores_its_rows(rows):
    columns = max(left + len(row) for left, row in rows)
    padded = [[0] * left + row + [0] * (columns - left - len(row)) for left, row in rows]
    ids = torch.tensor(padded, dtype=torch.long).view(len(rows), columns)
    prompt = read_prompt(ids, ids != 0)
    assert rows_of(prompt) == [row for _, row in rows]
    assert list(prompt.pads) == [left if row else columns for left, row in rows]
