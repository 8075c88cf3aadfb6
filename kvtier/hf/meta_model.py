"""A model on the meta device: made from its config alone, with shapes but without memory."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedConfig,
)
from transformers.utils import logging as transformers_logging

from kvtier.errors import ConfigurationError
from kvtier.hf.compat.external_state import external_states
from kvtier.hf.compat.model_profiles import passed_argument
from kvtier.hf.layers.build import build_layers
from kvtier.platform.filesystem import folder_path

_FED_TOKENS = 8
_PATH_STARTS = ("/", "./", "../", "~")


def read_config(model: str) -> PreTrainedConfig:
    """Return the config in a folder or on the hub; no weights are read.

    Raises:
        ConfigurationError: there is no config that the installed transformers can read; the message says why.
    """
    folder = folder_path(model, "model")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigurationError(f"model={model!r:.200}: the folder has no config.json; name a folder that has one.")
    if not folder.exists() and (model.startswith(_PATH_STARTS) or model.count("/") > 1):  # no name on the hub is so
        raise ConfigurationError(f"model={model!r:.200}: there is no such folder; name one with a config.json.")
    try:
        with _quiet():
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                str(folder) if folder.is_dir() else model, trust_remote_code=False
            )
    except Exception as error:  # of the hub's client, the file system, a parser, or a config class
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigurationError(
            f"model={model!r:.200} has no config that can be read: {reason:.300} Name a folder with a config.json, or "
            "a model of the hub."
        ) from error
    return config


def on_meta(config: PreTrainedConfig, text: PreTrainedConfig, dtype: torch.dtype) -> tuple[Any, list[Any], str | None]:
    """Return the model without memory, the layers of its cache after a few tokens, and why these are not reused.

    Args:
        config: config of the model.
        text: the config of its decoder, a copy that may be changed.
        dtype: dtype of weights, K and V.

    Raises:
        ConfigurationError: transformers cannot make such a model, or it needs the values of its weights.
    """
    # Some text parts have no entry of their own in transformers' table of models.
    made_from = text if type(text) in MODEL_FOR_CAUSAL_LM_MAPPING else copy.deepcopy(config)
    # Ways to compute that need no values: others look at which experts are chosen, or take one dtype only.
    ways = {"attn_implementation": "eager", "experts_implementation": "batched_mm"}
    try:
        with _quiet(), torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(made_from, dtype=dtype, **ways).eval()
        with _quiet():
            _, not_kept = build_layers(text)
            carried = external_states(text)
            layers = [carried] if carried is not None else _fed(model, text)
    except Exception as error:  # of any model's code
        raise ConfigurationError(
            f"model={text.model_type}: transformers {transformers.__version__} cannot make a decoder of this config "
            f"without its weights: {' '.join(str(error).split()):.200}"
        ) from error
    return model, layers, not_kept


def _fed(model: Any, text: PreTrainedConfig) -> list[Any]:
    """Return the layers of the cache of a model that was fed a few tokens."""
    layers: list[Any] = (cache := DynamicCache(config=text)).layers
    argument = passed_argument(model)
    if argument is None:
        return layers
    with suppress(Exception):  # some configs allow no other value
        model.config.pad_token_id = None  # many models look for padding in the ids, which have no values here
    try:
        with torch.no_grad():
            model(torch.zeros(1, _FED_TOKENS, dtype=torch.long, device="meta"), use_cache=True, **{argument: cache})
    except Exception:
        # Some experts look at values, which there are none of. The layers before them show what the others are like.
        reached = {type(layer): layer for layer in reversed(layers) if getattr(layer, "keys", None) is not None}
        if any(type(layer) not in reached for layer in layers):
            raise
        return [reached[type(layer)] for layer in layers]
    return layers


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers and the hub's client from printing and warning about a model that will never run."""
    level, hub = transformers_logging.get_verbosity(), logging.getLogger("huggingface_hub")
    hub_level = hub.level
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    hub.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        hub.setLevel(hub_level)
