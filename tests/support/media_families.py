"""More tiny vision and audio models, for tests that only check exactness and reuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import transformers
from transformers import PreTrainedModel

from tests.support.media import _EYES, _IDS, _PATCHES, _ROPE, _TEXT, END, PLACE, START, Part, Picture

_PLAIN = {name: value for name, value in _TEXT.items() if name != "head_dim"}
_SMALL: dict[str, Any] = {**_EYES, "patch_size": 2}
_WINDOWS: dict[str, Any] = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
_STRIPES: dict[str, Any] = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}


class Seer(NamedTuple):
    """Recipe for a model, the number of placeholders per picture, and the tensors of pictures with given seeds."""

    model: str
    config: Callable[[], Any]
    places: int
    tensors: Callable[[Sequence[int]], dict[str, torch.Tensor]]
    types: bool = False


def _noise(*shape: int) -> Callable[[Sequence[int]], torch.Tensor]:
    def make(seeds: Sequence[int]) -> torch.Tensor:
        return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    return make


def _pixels(*shape: int, **beside: Sequence[int] | int) -> Callable[[Sequence[int]], dict[str, torch.Tensor]]:
    """Make one tensor per picture; ``beside`` adds arguments with one value per picture."""

    def make(seeds: Sequence[int]) -> dict[str, torch.Tensor]:
        return {"pixel_values": _noise(*shape)(seeds)} | {n: torch.tensor([v] * len(seeds)) for n, v in beside.items()}

    return make


def _patches(*shape: int) -> Callable[[Sequence[int]], dict[str, torch.Tensor]]:
    """Make the patches of all pictures in sequence, 4 by 4 per picture."""

    def make(seeds: Sequence[int]) -> dict[str, torch.Tensor]:
        return {
            "pixel_values": _noise(16, *shape)(seeds).flatten(0, 1),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * len(seeds)),
        }

    return make


def _clip() -> Any:
    return transformers.CLIPVisionConfig(**{**_SMALL, "patch_size": 4}, projection_dim=32)


def _llama() -> Any:
    return transformers.LlamaConfig(**_TEXT)


def _cohere() -> Any:
    return transformers.Cohere2Config(**_TEXT, **_WINDOWS)


def _siglip() -> Any:
    return transformers.SiglipVisionConfig(**_SMALL)


SEERS: dict[str, Seer] = {
    "llava_next": Seer(
        "LlavaNextForConditionalGeneration",
        lambda: transformers.LlavaNextConfig(
            text_config=_llama(),
            vision_config=_clip(),
            image_token_index=PLACE,
            image_grid_pinpoints=[[8, 8], [8, 16], [16, 8]],
            vision_feature_layer=-1,
        ),
        10,
        _pixels(3, 3, 8, 8, image_sizes=[8, 8]),
    ),
    "llava_onevision": Seer(
        "LlavaOnevisionForConditionalGeneration",
        lambda: transformers.LlavaOnevisionConfig(
            text_config=transformers.Qwen2Config(**_TEXT),
            vision_config=transformers.SiglipVisionConfig(**{**_SMALL, "patch_size": 4}),
            image_token_index=PLACE,
            video_token_index=198,
            image_grid_pinpoints=[[8, 8]],
            vision_feature_layer=-1,
        ),
        10,
        _pixels(2, 3, 8, 8, image_sizes=[8, 8]),
    ),
    "vipllava": Seer(
        "VipLlavaForConditionalGeneration",
        lambda: transformers.VipLlavaConfig(
            text_config=_llama(), vision_config=_clip(), image_token_index=PLACE, vision_feature_layers=[-1, -2]
        ),
        4,
        _pixels(3, 8, 8),
    ),
    "smolvlm": Seer(
        "SmolVLMForConditionalGeneration",
        lambda: transformers.SmolVLMConfig(
            text_config=_llama(), vision_config=_SMALL, scale_factor=2, image_token_id=PLACE, pad_token_id=0
        ),
        4,
        lambda seeds: {
            "pixel_values": _noise(3, 8, 8)(seeds)[None],
            "pixel_attention_mask": torch.ones(1, len(seeds), 8, 8, dtype=torch.long),
        },
    ),
    "internvl": Seer(
        "InternVLForConditionalGeneration",
        lambda: transformers.InternVLConfig(
            text_config=_llama(),
            vision_config={**_SMALL, "image_size": [8, 8], "patch_size": [2, 2]},
            image_token_id=PLACE,
            image_seq_length=4,
            downsample_ratio=0.5,
            vision_feature_layer=-1,
        ),
        4,
        _pixels(3, 8, 8),
    ),
    "mistral3": Seer(
        "Mistral3ForConditionalGeneration",
        lambda: transformers.Mistral3Config(
            text_config=transformers.MistralConfig(**_TEXT, sliding_window=None),
            vision_config=transformers.PixtralVisionConfig(**_SMALL),
            image_token_index=PLACE,
            spatial_merge_size=2,
            vision_feature_layer=-1,
        ),
        4,
        _pixels(3, 8, 8, image_sizes=[8, 8]),
    ),
    "aya_vision": Seer(
        "AyaVisionForConditionalGeneration",
        lambda: transformers.AyaVisionConfig(
            text_config=_cohere(),
            vision_config=_siglip(),
            image_token_index=PLACE,
            downsample_factor=2,
            vision_feature_layer=-1,
        ),
        4,
        _pixels(3, 8, 8),
    ),
    "cohere2_vision": Seer(
        "Cohere2VisionForConditionalGeneration",
        lambda: transformers.Cohere2VisionConfig(
            text_config=_cohere(),
            vision_config=_siglip(),
            image_token_id=PLACE,
            downsample_factor=2,
            alignment_intermediate_size=32,
        ),
        4,
        _pixels(3, 8, 8),
    ),
    "lfm2_vl": Seer(  # with states
        "Lfm2VlForConditionalGeneration",
        lambda: transformers.Lfm2VlConfig(
            text_config=transformers.Lfm2Config(**_PLAIN, layer_types=["conv", "full_attention"]),
            vision_config={**_SMALL, "model_type": "siglip2_vision_model", "num_patches": 16},
            image_token_id=PLACE,
            downsample_factor=2,
        ),
        4,
        _pixels(16, 12, spatial_shapes=[4, 4], pixel_attention_mask=[1] * 16),
    ),
    "glm4v": Seer(
        "Glm4vForConditionalGeneration",
        lambda: transformers.Glm4vConfig(
            text_config={**_TEXT, "rope_parameters": {**_STRIPES, "partial_rotary_factor": 0.5}},
            vision_config={**_PATCHES, "image_size": 8},
            image_token_id=PLACE,
            video_token_id=198,
            image_start_token_id=START,
            image_end_token_id=END,
            video_start_token_id=194,
            video_end_token_id=193,
        ),
        4,
        _patches(12),
        types=True,
    ),
    "paddleocr_vl": Seer(
        "PaddleOCRVLForConditionalGeneration",
        lambda: transformers.PaddleOCRVLConfig(
            text_config={**_TEXT, "rope_parameters": _ROPE},
            vision_config={**_SMALL, "spatial_merge_size": 2},
            **_IDS,
        ),
        4,
        _patches(3, 2, 2),
        types=True,
    ),
    "granite_speech": Seer(
        "GraniteSpeechForConditionalGeneration",
        lambda: transformers.GraniteSpeechConfig(
            text_config=transformers.GraniteConfig(**_PLAIN),
            encoder_config={
                "input_dim": 8,
                "num_layers": 2,
                "hidden_dim": 32,
                "feedforward_mult": 2,
                "num_heads": 2,
                "dim_head": 16,
                "output_dim": 16,
                "context_size": 8,
                "max_pos_emb": 16,
            },
            projector_config={
                "model_type": "blip_2_qformer",
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 32,
                "encoder_hidden_size": 32,
            },
            audio_token_index=PLACE,
            window_size=8,
            downsample_rate=2,
            has_lora_adapter=False,
        ),
        4,
        lambda seeds: {"input_features": _noise(8, 8)(seeds)},
    ),
    "audioflamingo3": Seer(
        "AudioFlamingo3ForConditionalGeneration",
        lambda: transformers.AudioFlamingo3Config(
            text_config=transformers.Qwen2Config(**_TEXT),
            audio_config={
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_mel_bins": 8,
                "max_source_positions": 16,
            },
            audio_token_id=PLACE,
        ),
        8,
        lambda seeds: {
            "input_features": _noise(8, 32)(seeds),
            "input_features_mask": torch.ones(len(seeds), 32, dtype=torch.long),
        },
    ),
}
_SENSES = ("visual", "vision", "projector", "connector", "audio", "encoder.")


def make_seer(name: str) -> PreTrainedModel:
    """A new model; the same name gives the same weights."""
    seer = SEERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = getattr(transformers, seer.model)(seer.config()).eval()
        for name_of, weight in model.named_parameters():  # pictures must decide the next token
            if any(sense in name_of for sense in _SENSES):
                torch.nn.init.normal_(weight, std=0.2)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def seer_prompt(name: str, row: Sequence[Part]) -> dict[str, Any]:
    """Return the arguments of ``generate`` for one row."""
    seer, ids, seeds = SEERS[name], [], []
    for part in row:
        ids += [START, *[PLACE] * seer.places, END] if isinstance(part, Picture) else part
        seeds += [part.seed] if isinstance(part, Picture) else []
    table = torch.tensor([ids])
    given: dict[str, Any] = {"input_ids": table, "attention_mask": torch.ones_like(table)}
    if seeds and seer.types:
        given["mm_token_type_ids"] = (table == PLACE).long()
    return given | (seer.tensors(seeds) if seeds else {})
