"""Turns that are timed: a model, a prompt, and greedy answers with their logits."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

from kvtier.errors import ConfigurationError
from kvtier.hf.compat.names import passed
from kvtier.hf.meta_model import read_config
from kvtier.platform.filesystem import folder_path

Ids = tuple[int, ...]
_FEW = 8  # different ids


@dataclass(frozen=True, slots=True)
class Answer:
    """A greedy answer.

    Attributes:
        tokens: the new tokens.
        logits: ``[new tokens, vocabulary]`` on the host, as the model computed them.
        first_token_seconds: from the call of ``generate()``, or from opening a store for it, to the first new token.
        cached_by_tier: tokens that kvtier reused, by tier; empty for other caches.
        miss_reason: why kvtier reused no more; None when it reused all it could.
    """

    tokens: Ids
    logits: torch.Tensor
    first_token_seconds: float
    cached_by_tier: Mapping[str, int] = field(default_factory=dict)
    miss_reason: str | None = None

    @property
    def cached_tokens(self) -> int:
        """Tokens that kvtier reused."""
        return sum(self.cached_by_tier.values())


class _Clock(BaseStreamer):
    """Notes when the first new token came; ``generate()`` puts the prompt before it."""

    def __init__(self) -> None:
        self._puts = 0
        self.first_token_at: float | None = None

    def put(self, value: torch.Tensor) -> None:
        self._puts += 1
        if self._puts == 2:
            self.first_token_at = time.perf_counter()

    def end(self) -> None:
        pass


def load_model(name: str, device: torch.device) -> Any:
    """Load a model and warm it up.

    Raises:
        ConfigurationError: there is no such model, or it cannot be loaded; the message says why.
    """
    read_config(name)  # its errors are clearer
    transformers_logging.disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(_local(name), dtype="auto").to(device).eval()
    except Exception as error:  # of the hub's client, the file system, a parser, or too little memory
        text = " ".join(str(error).split())
        raise ConfigurationError(
            f"model={name!r:.200} cannot be loaded: {type(error).__name__}: {text:.300}"
        ) from error
    # The first calls of a process set up thread pools and choose kernels.
    answer(model, new_cache(model), (1, 2, 3, 4), 2)
    gc.collect()
    return model


def _local(name: str) -> str:
    folder = folder_path(name, "model")
    return str(folder) if folder.is_dir() else name


def text_ids(name: str, document: Path | None, vocabulary: int, tokens: int) -> tuple[Ids, str]:
    """Return ``tokens`` ids and what they are: a text, over and over where it is short, or random ids.

    Args:
        name: the model; without a tokenizer that knows the text, ids are random.
        document: a text file; None for the demo's text.
        vocabulary: number of ids.
        tokens: how many to return.

    Raises:
        ConfigurationError: the file cannot be read, or has no text.
    """
    if document is None:
        text = resources.files("kvtier.cli.demo").joinpath("lighthouse.txt").read_text(encoding="utf-8")
    else:
        try:
            text = document.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"--document={str(document)!r:.200} is no text: {error}; name another.") from error
    if not text.strip():
        raise ConfigurationError(f"--document={str(document)!r:.200} has no text; name a file with a few words.")
    try:
        ids = AutoTokenizer.from_pretrained(_local(name))(text.strip() + "\n\n", add_special_tokens=False).input_ids
    except Exception:  # a folder without tokenizer, or one whose package is missing
        ids = []
    # Of a folder without tokenizer, transformers makes some that know no word.
    if len(set(ids)) < min(_FEW, len(text.split())) or max(ids) >= vocabulary:
        chance = torch.Generator(device="cpu").manual_seed(0)
        ids = torch.randint(vocabulary, (tokens,), generator=chance, device="cpu").tolist()
        return tuple(ids), "random ids: the model has no tokenizer"
    what = str(document) if document is not None else "the text of kvtier demo"
    return tuple((ids * (tokens // len(ids) + 1))[:tokens]), what


def new_cache(model: Any) -> Any:
    """Return an empty cache of plain transformers."""
    return DynamicCache(config=model.config)


def answer(model: Any, cache: Any, prompt: Ids, new_tokens: int, started_at: float | None = None) -> Answer:
    """Generate exactly ``new_tokens`` tokens on ``cache``.

    Args:
        model: the model.
        cache: any cache.
        prompt: its ids.
        new_tokens: length of the answer.
        started_at: when the work for this turn began; by default when ``generate()`` is called.
    """
    ids = torch.tensor([prompt], device=model.device)
    clock = _Clock()
    started_at = time.perf_counter() if started_at is None else started_at
    done = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **passed(cache),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        streamer=clock,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert clock.first_token_at is not None
    report = getattr(cache, "last_turn", None)
    return Answer(
        tuple(done.sequences[0, len(prompt) :].tolist()),
        torch.cat(done.logits).cpu(),
        clock.first_token_at - started_at,
        dict(report.cached_by_tier) if report is not None else {},
        report.miss_reason if report is not None else None,
    )
