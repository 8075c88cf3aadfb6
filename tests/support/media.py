"""Tiny vision and audio models, and prompts for them that mix words and pictures."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import transformers
from transformers import DynamicCache, PreTrainedModel

from kvtier import TieredCache
from tests.support.upstream import CACHE

VOCABULARY = 190  # words; higher ids are placeholders
END, START, PLACE = 196, 197, 199
_TEXT: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
_EYES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "initializer_range": 0.2,
}
_PATCHES: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 2,
    "spatial_merge_size": 2,
    "temporal_patch_size": 1,
    "initializer_range": 0.2,
}
_ROPE: dict[str, Any] = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
_IDS = {"image_token_id": PLACE, "video_token_id": 198, "vision_start_token_id": START, "vision_end_token_id": END}


def _qwen(config: str, text: dict[str, Any], vision: dict[str, Any]) -> Any:
    return getattr(transformers, config)(text_config={**_TEXT, **text}, vision_config={**_PATCHES, **vision}, **_IDS)


def _config(family: str) -> Any:
    llama = transformers.LlamaConfig(**_TEXT)
    if family == "qwen3_5":
        mixed = {f"linear_{part}": n for part, n in (("key_head_dim", 16), ("value_head_dim", 16))}
        mixed |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
        rope = {**_ROPE, "mrope_section": [2, 1, 1], "mrope_interleaved": True, "partial_rotary_factor": 0.5}
        text = {**mixed, "layer_types": ["linear_attention", "full_attention"], "rope_parameters": rope}
        return _qwen("Qwen3_5Config", text, {"num_position_embeddings": 64})
    if family == "qwen2_vl":
        vision = {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 1}
        return _qwen("Qwen2VLConfig", {"rope_parameters": _ROPE}, vision)
    if family == "qwen2_5_vl":
        vision = {"window_size": 8, "fullatt_block_indexes": [1]}
        return _qwen("Qwen2_5_VLConfig", {"rope_parameters": _ROPE}, vision)
    if family == "qwen3_vl":
        vision = {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
        return _qwen("Qwen3VLConfig", {"rope_parameters": {**_ROPE, "mrope_interleaved": True}}, vision)
    if family == "llava":
        eyes = transformers.CLIPVisionConfig(**_EYES, patch_size=4, projection_dim=32)
        deep = transformers.LlamaConfig(**{**_TEXT, "num_hidden_layers": 4})  # enough layers for some to be cold
        return transformers.LlavaConfig(
            text_config=deep, vision_config=eyes, image_token_index=PLACE, image_seq_length=4, vision_feature_layer=-1
        )
    if family == "gemma3":
        kinds = ["sliding_attention", "full_attention"]
        text = transformers.Gemma3TextConfig(**{**_TEXT, "sliding_window": 16, "layer_types": kinds})
        eyes = transformers.SiglipVisionConfig(**_EYES, patch_size=2)
        return transformers.Gemma3Config(
            text_config=text,
            vision_config=eyes,
            mm_tokens_per_image=4,
            image_token_index=PLACE,
            boi_token_index=START,
            eoi_token_index=END,
        )
    if family == "idefics3":
        eyes = {**_EYES, "patch_size": 2}
        return transformers.Idefics3Config(
            text_config=llama, vision_config=eyes, scale_factor=2, image_token_id=PLACE, pad_token_id=0
        )
    ears = {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_mel_bins": 8,
        "max_source_positions": 16,
        "initializer_range": 0.2,
    }
    return transformers.VoxtralConfig(text_config=llama, audio_config=ears, audio_token_id=PLACE)


WITH_STATES = "qwen3_5"
_CLASSES = {
    WITH_STATES: "Qwen3_5ForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
    "gemma3": "Gemma3ForConditionalGeneration",
    "idefics3": "Idefics3ForConditionalGeneration",
    "voxtral": "VoxtralForConditionalGeneration",
}
BY_GRID = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", WITH_STATES)
FAMILIES = tuple(family for family in _CLASSES if family != WITH_STATES)


@functools.cache
def seeing(family: str) -> PreTrainedModel:
    """A vision or audio model."""
    config = _config(family)
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = getattr(transformers, _CLASSES[family])(config).eval()
        for name, weight in model.named_parameters():  # pictures must decide the next token
            if "visual" in name or "vision" in name or "projector" in name or "connector" in name or "audio" in name:
                torch.nn.init.normal_(weight, std=0.3)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


class Picture(NamedTuple):
    """A picture or sound; ``wide`` pictures have twice as many placeholders, in families that support it.

    ``bare`` pictures have no begin and end ids around them.
    """

    seed: int
    wide: bool = False
    bare: bool = False


Part = tuple[int, ...] | Picture


def words(count: int, seed: int = 0) -> tuple[int, ...]:
    """Random words."""
    return tuple(torch.randint(1, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def places_of(family: str) -> int:
    """Return the placeholders per picture that is not wide. They are few: fewer ids than a digest needs."""
    return 8 if family in BY_GRID else 4


def _columns(family: str, part: Part) -> list[int]:
    if not isinstance(part, Picture):
        return list(part)
    places = [PLACE] * (places_of(family) * (2 if part.wide and family in BY_GRID else 1))
    return places if part.bare else [START, *places, END]


def _random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompt(family: str, *rows: Sequence[Part]) -> dict[str, Any]:
    """Return the arguments of ``generate`` for these rows, padded on the left."""
    ids = [[column for part in row for column in _columns(family, part)] for row in rows]
    width = max(map(len, ids))
    table = torch.tensor([[0] * (width - len(row)) + row for row in ids])
    given: dict[str, Any] = {"input_ids": table, "attention_mask": (table != 0).long()}
    pictures = [[part for part in row if isinstance(part, Picture)] for row in rows]
    flat = [picture for row in pictures for picture in row]
    types = (table == PLACE).long()
    if family == "gemma3":
        given["token_type_ids"] = types
    if family in BY_GRID:
        given["mm_token_type_ids"] = types
    if not flat:
        return given
    if family in BY_GRID:
        grids = [(1, 8 if picture.wide else 4, 8) for picture in flat]
        given["image_grid_thw"] = torch.tensor(grids)
        given["pixel_values"] = torch.cat(
            [_random(p.seed, t * h * w, 12) for p, (t, h, w) in zip(flat, grids, strict=True)]
        )
    elif family == "idefics3":
        most = max(map(len, pictures))
        nothing = torch.zeros(3, 8, 8)
        given["pixel_values"] = torch.stack(
            [
                torch.stack([*(_random(p.seed, 3, 8, 8) for p in row), *[nothing] * (most - len(row))])
                for row in pictures
            ]
        )
        given["pixel_attention_mask"] = torch.ones(len(rows), most, 8, 8, dtype=torch.long)
    elif family == "voxtral":
        given["input_features"] = torch.stack([_random(p.seed, 8, 32) for p in flat])
    else:
        given["pixel_values"] = torch.stack([_random(p.seed, 3, 8, 8) for p in flat])
    return given


def answer(model: PreTrainedModel, given: dict[str, Any], cache: Any = None, **settings: Any) -> Any:
    """Run ``generate`` with logits; on a fresh ``DynamicCache`` by default."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    return model.generate(
        **given,
        **{"past_key_values" if isinstance(cache, TieredCache) else CACHE: cache},
        return_dict_in_generate=True,
        output_logits=True,
        **{"do_sample": False, "max_new_tokens": 6, "suppress_tokens": [0, START, END, 198, PLACE], **settings},
    )


def new_words(given: dict[str, Any], answered: Any) -> tuple[int, ...]:
    """Return the new words of a turn in its first row."""
    said = answered.sequences[0]
    return tuple(said[given["input_ids"].shape[1] if "input_ids" in given else 0 :].tolist())
