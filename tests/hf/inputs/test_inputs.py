"""Inputs of a call: where each enters the chain, and which are left after a stored prefix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PaliGemmaConfig, PaliGemmaForConditionalGeneration

from kvtier.hf.compat.names import MEDIA_CONTINUE
from kvtier.hf.inputs.chain_inputs import Inputs, read_inputs
from kvtier.hf.inputs.content_ids import WHOLE, ContentId, digest_of, digest_tensors, marked, vector_ids
from kvtier.hf.inputs.multimodal import Media, read_media
from kvtier.hf.inputs.prompt import Prompt
from kvtier.hf.not_reusable import NotReusable
from tests.support.media import PLACE, Picture, prompt, seeing, words

ABOVE = 2**40  # larger than any vocabulary
DIGESTS = [digest_of(bytes([i])) for i in range(3)]


@pytest.fixture(autouse=True)
def _in_every_version(monkeypatch):
    """Inputs are read alike in all versions of transformers."""
    monkeypatch.setattr("kvtier.hf.inputs.chain_inputs.MEDIA_CONTINUE", True)


def read(family, *rows, copies=1, **changed):
    given = {**prompt(family, *rows), **changed}
    return read_inputs(seeing(family), given, given["input_ids"], given["attention_mask"], copies)


# --- ids that carry digests -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [3, 5, 8, 12])
def test_marked_ids_differ_from_tokens_and_from_other_marks(stop):
    ids = np.arange(20, dtype=np.int64)
    found = [marked(ids, [ContentId(2, stop, digest)]) for digest in DIGESTS]
    end = max(stop, 2 + WHOLE)
    for one in found:
        assert np.array_equal(one[:2], ids[:2])
        assert np.array_equal(one[end:], ids[end:])
        assert (one[2:end] > ABOVE).all()
        assert len(set(one[2:end].tolist())) == end - 2
    assert not (found[0][2:end] == found[1][2:end]).any()


def test_marked_ids_still_depend_on_the_original_token():
    ids, other = np.arange(20, dtype=np.int64), np.arange(20, dtype=np.int64)
    other[4] = 90
    same = marked(ids, [ContentId(2, 3, DIGESTS[0])]) == marked(other, [ContentId(2, 3, DIGESTS[0])])
    assert np.flatnonzero(~same).tolist() == [4]


def test_overlapping_marks_both_change_the_ids():
    ids = np.arange(20, dtype=np.int64)
    one, two, other = ContentId(2, 3, DIGESTS[0]), ContentId(4, 5, DIGESTS[1]), ContentId(4, 5, DIGESTS[2])
    both = marked(ids, [one, two])
    assert np.array_equal(both[:4], marked(ids, [one])[:4])
    assert not (both[4:9] == marked(ids, [one, other])[4:9]).any()
    assert not (both[4:7] == marked(ids, [two])[4:7]).any()


def test_mark_continues_into_generated_ids():
    ids = np.arange(20, dtype=np.int64)
    mark = ContentId(17, 18, DIGESTS[0])
    first = Prompt((marked(ids[:18], [mark]),), (0,), 18, marks=((mark,),))
    assert np.array_equal(first.continued(0, ids[18:]), marked(ids, [mark]))
    assert not np.array_equal(first.continued(0, ids[18:])[18:], ids[18:])


def test_vector_ids_depend_on_all_earlier_vectors_and_the_dtype():
    vectors = torch.randn(9, 4)
    other = vectors.clone()
    other[3, 1] += 1e-6
    ours, theirs = vector_ids(vectors), vector_ids(other)
    assert (ours > ABOVE).all()
    assert np.array_equal(ours[:3], theirs[:3])
    assert not (ours[3:] == theirs[3:]).any()
    assert not (ours == vector_ids(vectors.double())).any()


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.complex64],
    ids=str,
)
def test_vector_ids_ignore_strides_and_lazy_negation(dtype):
    """Strides and a lazily applied sign do not change an id. A changed value does."""
    plain = torch.randn(9, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    strided = torch.stack([plain, plain], 2)[:, :, 0]
    assert not strided.is_contiguous()
    assert np.array_equal(vector_ids(strided), vector_ids(plain))
    assert digest_tensors([("a", strided)]) == digest_tensors([("a", plain)])
    if dtype is torch.complex64:
        lazy = plain.conj().imag  # its sign is applied when it is read
        assert lazy.is_neg()
        assert np.array_equal(vector_ids(lazy), vector_ids(lazy.resolve_neg()))
    other = plain.clone()
    other.view(torch.uint8)[4, 0] += 1
    assert np.flatnonzero(vector_ids(plain) != vector_ids(other)).tolist() == [4, 5, 6, 7, 8]


def test_digest_depends_on_names_dtypes_shapes_and_bytes():
    ones = torch.ones(2, 3)
    all_of = [
        [("a", ones)],
        [("b", ones)],
        [("a", ones.double())],
        [("a", ones.reshape(3, 2))],
        [("a", ones * 2)],
        [("a", ones), ("b", ones)],
        [("a", ones.to(torch.bfloat16))],
        [("a", torch.ones(()))],
        [("a", torch.ones(0, 3))],
    ]
    assert len({digest_tensors(tensors) for tensors in all_of}) == len(all_of)
    assert digest_tensors([("a", ones), ("b", ones * 2)]) == digest_tensors([("b", ones * 2), ("a", ones)])
    assert digest_tensors([("a", ones.T)]) == digest_tensors([("a", ones.T.contiguous())])


# --- columns at which a prefix may end --------------------------------------------------------------------------------


def test_cut_ends_before_indivisible_spans_and_unproven_columns():
    cut = Prompt((), (), 40, wholes=((5, 9), (8, 12), (20, 21), (30, 35))).cut
    assert [cut(n) for n in (4, 5, 6, 8, 9, 11, 12, 20, 21, 31, 35, 39)] == [4, 5, 5, 5, 5, 5, 12, 20, 21, 30, 35, 39]
    assert Prompt((), (), 40, unproven=4).cut(3) == 0
    assert Prompt((), (), 40, unproven=4, wholes=((5, 9),)).cut(12) == 5


def test_admits_refuses_columns_inside_an_indivisible_span():
    admits = Prompt((), (), 40, wholes=((5, 9),)).admits
    assert [n for n in range(12) if not admits(n)] == [6, 7, 8]


# --- media, positions and types in a prompt ---------------------------------------------------------------------------


@pytest.mark.parametrize("seer", ["qwen2_5_vl", "llava", "idefics3", "voxtral"])
def test_media_enter_at_their_placeholders_and_are_dropped_after_them(seer):
    row = [words(6), Picture(1), words(3), Picture(2, wide=True), words(4)]
    found, given = read(seer, row), prompt(seer, row)
    assert isinstance(found, Inputs)
    ids = given["input_ids"][0]
    places = (ids == PLACE).cpu().numpy()
    assert ((found.prompt.rows[0] > ABOVE) >= places).all()
    starts = np.flatnonzero(places & ~np.roll(places, 1)).tolist()
    second = found.after(given, starts[1])
    alone = prompt(seer, [Picture(2, wide=True)])
    name = "input_features" if seer == "voxtral" else "pixel_values"
    assert torch.equal(second[name], alone[name])
    last = found.after(given, len(ids) - 1)
    assert not {"pixel_values", "image_grid_thw", "pixel_attention_mask", "input_features"} & last.keys()
    for columns in (0, starts[0]):
        assert torch.equal(found.after(given, columns)[name], given[name])


def test_images_that_cannot_be_separated_form_one_span():
    row = [words(6), Picture(1), words(3), Picture(2), words(4)]
    sizes = torch.tensor([[8, 8], [8, 4]])
    found, given = read("llava", row, image_sizes=sizes), prompt("llava", row)
    first, last = 7, 7 + 4 + 1 + 3 + 1 + 4 + 1  # four placeholders and the next id identify a digest
    assert [found.prompt.cut(n) for n in (7, 8, 14, last - 1, last)] == [7, 7, 7, 7, last]
    changed = read("llava", [words(6), Picture(1), words(3), Picture(3), words(4)], image_sizes=sizes)
    differ = np.flatnonzero(found.prompt.rows[0] != changed.prompt.rows[0])
    assert differ[0] == first
    assert torch.equal(found.after({**given, "image_sizes": sizes}, first)["pixel_values"], given["pixel_values"])
    assert "image_sizes" not in found.after({**given, "image_sizes": sizes}, last)


def test_pruned_images_form_one_span(monkeypatch):
    row = [words(6), Picture(1), words(3), Picture(2), words(4)]
    assert read("llava", row).prompt.cut(15) == 15
    monkeypatch.setattr(seeing("llava").config, "image_pruning_rate", 0.5, raising=False)
    assert read("llava", row).prompt.cut(15) == 7


def test_image_spanning_two_rows_marks_both_rows():
    given = prompt("llava", [words(3), Picture(1)], [words(3), Picture(2)])
    given["pixel_values"] = given["pixel_values"][:1]
    found = read_inputs(seeing("llava"), given, given["input_ids"], given["attention_mask"], 1)
    given["pixel_values"] = given["pixel_values"] + 1
    other = read_inputs(seeing("llava"), given, given["input_ids"], given["attention_mask"], 1)
    assert all(np.flatnonzero(a != b)[0] == 4 for a, b in zip(found.prompt.rows, other.prompt.rows, strict=True))
    assert found.prompt.cut(given["input_ids"].shape[1] - 2) == 4


def test_images_form_one_span_when_rows_have_unequal_counts():
    rows = [[words(3), Picture(1), words(3), Picture(2), words(2)], [words(3), Picture(3), words(2)]]
    found = read("idefics3", *rows)
    columns = found.prompt.columns
    assert found.prompt.cut(columns - 2 - 2) == found.prompt.cut(columns - 12) == 4
    assert found.prompt.cut(columns - 2) == columns - 2


def test_zero_padding_images_join_all_images_into_one_span():
    row = [words(6), Picture(1), words(3), Picture(2), words(2)]
    given = prompt("idefics3", row)
    two = torch.zeros(1, 2, 3, 8, 8)
    padded = torch.cat([given["pixel_values"], two], 1)
    mask = torch.ones(1, 4, 8, 8, dtype=torch.long)
    assert read("idefics3", row).prompt.cut(14) == 14
    assert read("idefics3", row, pixel_values=padded, pixel_attention_mask=mask).prompt.cut(14) == 7


def media_of(family, ids, **tensors):
    table = np.array([ids])
    found = read_media(tensors, seeing(family).config, table)
    assert isinstance(found, Media)
    return found


def test_video_with_text_between_frames_is_one_span():
    film = {"pixel_values_videos": torch.ones(32, 12), "video_grid_thw": torch.tensor([[2, 4, 4]])}
    ids = [*words(4), *[198] * 4, *words(3), *[198] * 4, *words(5)]
    assert media_of("qwen3_vl", ids, **film).wholes == [(4, 15)]


def test_grids_that_do_not_fit_the_placeholders_form_one_span():
    pictures = {"pixel_values": torch.ones(64, 12), "image_grid_thw": torch.tensor([[1, 4, 8], [1, 4, 8]])}
    fit, more = (
        media_of("qwen2_5_vl", [*words(4), *[PLACE] * n, *words(3), *[PLACE] * n, *words(5)], **pictures)
        for n in (8, 9)
    )
    assert fit.wholes == [(4, 12), (15, 23)]
    assert more.wholes == [(4, 25)]


def test_position_change_inside_an_image_changes_its_ids():
    row = [words(6), Picture(1), words(3)]
    columns = prompt("llava", row)["input_ids"].shape[1]
    other = torch.arange(columns)[None].clone()
    other[0, 8] = 90
    plain, moved = (read("llava", row, position_ids=p).prompt.rows[0] for p in (torch.arange(columns)[None], other))
    assert np.flatnonzero(plain != moved).tolist() == [7, 8, 9, 10, 11]


def test_only_position_jumps_mark_ids():
    model, ids = seeing("llava"), torch.tensor([words(12)])
    plain = read_inputs(model, {"position_ids": torch.arange(12)[None]}, ids, None, 1)
    assert np.array_equal(plain.prompt.rows[0], ids[0].cpu().numpy())
    jump = torch.cat([torch.arange(4), torch.arange(9, 17)])[None]
    found = read_inputs(model, {"position_ids": jump}, ids, None, 1).prompt.rows[0]
    assert np.flatnonzero(found > ABOVE).tolist() == [4, 5, 6, 7, 8]
    ahead = read_inputs(model, {"position_ids": torch.arange(3, 15)[None]}, ids, None, 1).prompt.rows[0]
    assert np.flatnonzero(ahead > ABOVE).tolist() == [0, 1, 2, 3, 4]


def test_positions_do_not_depend_on_earlier_prompts():
    """Positions that the model remembers from another prompt have no effect."""
    model = seeing("qwen2_5_vl")
    row = [words(6), Picture(1), words(3)]
    fresh = read("qwen2_5_vl", row).arguments["position_ids"]
    assert fresh.shape == (4, 1, prompt("qwen2_5_vl", row)["input_ids"].shape[1])
    read("qwen2_5_vl", [words(2), Picture(1, wide=True), words(3)])
    assert torch.equal(read("qwen2_5_vl", row).arguments["position_ids"], fresh)
    assert model.model.rope_deltas is not None
    text = read("qwen2_5_vl", [words(9)])
    assert torch.equal(text.arguments["position_ids"][1, 0], torch.arange(9))
    assert np.array_equal(text.prompt.rows[0], np.array(words(9)))


def test_tokens_of_one_type_form_an_indivisible_span():
    """Tokens of one type may attend to each other, whatever their ids."""
    ids, types = torch.tensor([words(20)]), torch.zeros(1, 20, dtype=torch.long)
    types[0, 5:12] = 1
    given = {"token_type_ids": types}
    found, other = (read_inputs(seeing("gemma3"), given, some, None, 1).prompt for some in (ids, ids.clone()))
    assert np.array_equal(found.rows[0], other.rows[0])
    assert np.flatnonzero(found.rows[0] > ABOVE).tolist() == list(range(5, 12))
    assert [found.cut(n) for n in (5, 6, 11, 12)] == [5, 5, 5, 12]
    ids[0, 10] = 3
    changed = read_inputs(seeing("gemma3"), given, ids, None, 1).prompt
    assert np.flatnonzero(changed.rows[0] != found.rows[0]).tolist() == list(range(5, 12))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int32, torch.float32, torch.bfloat16])
def test_types_and_positions_are_read_from_any_dtype(dtype):
    ids, types = torch.tensor([words(20)]), torch.zeros(1, 20, dtype=torch.long)
    types[0, 5:12] = 1
    plain, found = (
        read_inputs(seeing("gemma3"), {"token_type_ids": each}, ids, None, 1).prompt
        for each in (types, types.to(dtype))
    )
    assert np.array_equal(plain.rows[0], found.rows[0])
    assert plain.wholes == found.wholes
    positions = torch.arange(3, 23)[None]
    if not dtype.is_floating_point and dtype is not torch.bool:
        plain, found = (
            read_inputs(seeing("llava"), {"position_ids": each}, ids, None, 1).prompt
            for each in (positions, positions.to(dtype))
        )
        assert np.array_equal(plain.rows[0], found.rows[0])


def test_token_types_of_a_shorter_prompt_are_extended_with_text():
    ids = torch.tensor([words(20)])
    types = torch.zeros(1, 14, dtype=torch.long)
    types[0, 5:12] = 1
    whole = torch.cat([types, torch.zeros(1, 6, dtype=torch.long)], 1)
    shorter, longer = (read_inputs(seeing("gemma3"), {"token_type_ids": t}, ids, None, 1) for t in (types, whole))
    assert np.array_equal(shorter.prompt.rows[0], longer.prompt.rows[0])
    assert torch.equal(shorter.arguments["token_type_ids"], whole)
    assert not longer.arguments
    for odd in (types[:, :10], torch.cat([whole, whole], 1), types[0], torch.zeros(2, 20), types * 0.5):
        found = read_inputs(seeing("gemma3"), {"token_type_ids": odd}, ids, None, 1)
        assert isinstance(found, NotReusable)
        assert "token_type_ids" in found.reason
    seen = prompt("gemma3", [words(14), Picture(1)])  # an image after the end of the types has no type
    seen["token_type_ids"] = types
    found = read_inputs(seeing("gemma3"), seen, seen["input_ids"], None, 1)
    assert "another shape" in found.reason


@pytest.mark.parametrize(
    ("kind", "types", "both_ways"),
    [
        ("gemma3", [0] * 20, False),
        ("gemma3", [0] * 5 + [1] + [0] * 14, False),  # a single token
        ("gemma3", [0] * 5 + [1, 1] + [0] * 13, True),
    ],
)
def test_adjacent_tokens_of_one_type_may_attend_both_ways(kind, types, both_ways):
    given = {"token_type_ids": torch.tensor([types])}
    assert read_inputs(seeing(kind), given, torch.tensor([words(20)]), None, 1).both_ways is both_ways


@pytest.mark.parametrize(("kind", "both_ways"), [("gemma3", True), ("qwen2_5_vl", False), ("llava", False)])
def test_only_gemma3_images_may_attend_both_ways(kind, both_ways):
    """Where types only count positions, or where there are no types, attention is causal."""
    assert read(kind, [words(6), Picture(1), words(3)]).both_ways is both_ways


def test_answer_follows_is_false_directly_after_a_typed_image():
    row = [words(6), Picture(1, bare=True)]
    assert read("gemma3", row).prompt.answer_follows is False
    assert read("gemma3", [*row, words(2)]).prompt.answer_follows is True


# --- inputs that turn reuse off ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "changed", "reason"),
    [
        ([words(6)], {"pixel_values": torch.ones(1, 3, 8, 8)}, "no placeholder tells where pixel_values enter"),
        ([words(6), Picture(1)], {"pixel_values": [torch.ones(3, 8, 8)]}, "cannot tell what is in pixel_values"),
        ([words(6), Picture(1)], {"token_type_ids": torch.ones(1, 3)}, "another shape"),
        ([words(6)], {"position_ids": torch.arange(5)[None]}, "another shape"),
        ([words(6)], {"position_ids": torch.ones(1, 6)}, "no integers"),
        ([words(6)], {"inputs_embeds": torch.ones(6, 64)}, "batch, columns, width"),
    ],
    ids=["nowhere", "a-list", "types", "positions", "positions-of-rows", "vectors"],
)
def test_unreadable_inputs_give_a_reason(row, changed, reason):
    found = read("llava", row, **changed)
    assert isinstance(found, NotReusable)
    assert reason in found.reason


def test_models_that_do_not_merge_inputs_are_refused():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2))
    ids = torch.ones(1, 5, dtype=torch.long)
    found = read_inputs(model, {"token_type_ids": torch.zeros(1, 5)}, ids, None, 1)
    assert "inputs besides tokens may decide K and V: token_type_ids" in found.reason


def test_models_whose_prompts_attend_ahead_refuse_media():
    text = {"vocab_size": 200, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}
    eyes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = PaliGemmaConfig(
        text_config={"model_type": "gemma", **text, **heads},
        vision_config={"model_type": "siglip_vision_model", **eyes, "image_size": 8, "patch_size": 4},
        image_token_index=PLACE,
        projection_dim=16,
    )
    model = PaliGemmaForConditionalGeneration(config)
    ids = torch.tensor([[PLACE] * 4 + [5, 6]])
    found = read_inputs(model, {"pixel_values": torch.ones(1, 3, 8, 8)}, ids, None, 1)
    assert "inputs besides tokens may decide K and V: pixel_values" in found.reason


def test_positions_from_an_earlier_call_are_refused(monkeypatch):
    model = seeing("llava")
    monkeypatch.setattr(model.model, "rope_deltas", None, raising=False)
    assert "positions from an earlier call" in read("llava", [words(6)]).reason


@pytest.mark.skipif(not MEDIA_CONTINUE, reason="this transformers gives beams each other's pictures")
def test_media_of_beams_are_accepted_joined_or_refused():
    one, two = [words(6), Picture(1), words(3)], [words(6), Picture(1), words(3), Picture(2), words(3)]
    assert isinstance(read("voxtral", one, one, copies=2), Inputs)
    assert "each beam or sample" in read("voxtral", two, copies=2).reason
    assert isinstance(read("voxtral", two), Inputs)
    together = read("llava", two, copies=2)
    end = 6 + 6 + 3 + 1 + 4 + 1
    assert [together.prompt.cut(n) for n in (7, 12, end - 1, end)] == [7, 7, 7, end]
