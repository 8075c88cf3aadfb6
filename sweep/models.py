"""Tiny models: one for each causal language model of the installed transformers."""

from __future__ import annotations

import re

import torch
import transformers
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sweep.families import NOT_ALONE, VARIANTS
from sweep.shrink import PAD, WEIGHT_SPREAD, shrink

MOST_PARAMETERS = 20_000_000


class NotMadeError(Exception):
    """There is no tiny model of this type; the message says why."""


def listed() -> dict[str, str]:
    """Return ``model type → class`` of every causal language model that transformers lists."""
    return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def architectures() -> dict[str, str]:
    """Return ``name → class`` of everything there is to examine: what transformers lists, and variants of that."""
    found = listed()
    return found | {name: found[base_of(name)] for name in VARIANTS if base_of(name) in found}


def base_of(name: str) -> str:
    """Return the model type of a variant or of itself."""
    return name.partition(":")[0]


def tiny_config(name: str) -> PreTrainedConfig:
    """Return a tiny config for the class of an architecture: of its text part, if the class runs that alone."""
    model_type = base_of(name)
    config_class = CONFIG_MAPPING[model_type]
    runs = getattr(transformers, architectures()[name]).config_class
    if any(isinstance(part, runs) for part in vars(config_class()).values()):
        config_class = runs
    config: PreTrainedConfig = config_class(**{**shrink(config_class()), **VARIANTS.get(name, {})})
    return config


def tiny_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """Return a tiny model of an architecture in fp32 on the CPU with random weights; the same seed, the same weights.

    Raises:
        NotMadeError: transformers refuses the config or cannot build it here, or it stays large.
    """
    if model_type in NOT_ALONE:
        raise NotMadeError(NOT_ALONE[model_type])
    try:
        config = tiny_config(model_type)
        model_class = getattr(transformers, architectures()[model_type])
        with torch.device("meta"):
            parameters = sum(weight.numel() for weight in model_class(config).parameters())
    except Exception as error:  # of any class: each family has checks of its own
        raise NotMadeError(brief(error)) from error
    if parameters > MOST_PARAMETERS:
        raise NotMadeError(f"it still has {parameters:,} parameters")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = model_class(config).eval()
        _wake(model)
    # What a family's own generation config forces or forbids is not what is examined here.
    model.generation_config = GenerationConfig(
        pad_token_id=PAD, bos_token_id=1, decoder_start_token_id=1, num_return_sequences=1, use_cache=True
    )
    return model


def _wake(model: PreTrainedModel) -> None:
    """Give random values to parameters that begin as zeros: a gate or a convolution of zeros hides a wrong state."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.is_floating_point() and not weight.any() and not name.endswith("bias"):
                weight.normal_(std=WEIGHT_SPREAD)


def brief(error: BaseException) -> str:
    """Return an exception in one line, without what is particular to a machine."""
    missing = sorted(set(re.findall(r"requires the (\S+) library", str(error))))
    if isinstance(error, ImportError) and missing:
        return f"needs {', '.join(missing)}, not installed here"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines)
    if len(text) > 140:
        text = text[:139].rsplit(" ", 1)[0] + " …"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
