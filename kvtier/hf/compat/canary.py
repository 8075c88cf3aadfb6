"""Canary: a short conversation with a tiny model, once per process, on an untested transformers."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers

from kvtier.hf.compat import names
from kvtier.hf.not_reusable import warn_of

_log = logging.getLogger("kvtier.hf")

_VOCABULARY = 64
_PROMPT_TOKENS, _QUESTION_TOKENS, _NEW_TOKENS = 24, 4, 2
_TOLERANCE = 1e-3  # far above rounding errors of these logits, far below the effect of one other token

_lock = threading.RLock()
_tried = False
_reason: str | None = None


def try_upstream(make_cache: Callable[[], Any]) -> None:
    """Hold a conversation with a tiny model, unless that was done or the whole test suite passed on this version.

    Args:
        make_cache: returns a new cache over its own store; both are discarded after the trial.
    """
    global _tried, _reason
    with _lock:
        if _tried:
            return
        _tried = True  # set first: the trial makes caches itself
        if names.INSTALLED <= names.NEWEST_TESTED:
            return
        try:
            found = _trial(make_cache)
        except Exception as error:  # a different upstream may raise anything; the reason names the error
            _log.debug("the trial of this transformers failed", exc_info=True)
            found = f"{type(error).__name__}: {error}"
        if found is not None:
            newest = ".".join(map(str, names.NEWEST_TESTED))
            _reason = (
                f"transformers {transformers.__version__} is newer than {newest}, the newest that kvtier was tested "
                f"with, and a trial on a tiny model failed ({found}); upgrade kvtier, or install transformers {newest}"
            )
            warn_of(_reason)


def why_untrusted() -> str | None:
    """Return why this transformers must not use a kvtier cache; None when it may."""
    return _reason


def _trial(make_cache: Callable[[], Any]) -> str | None:
    """Return the failed step; None when all answers equal those with transformers' own cache."""
    with _left_alone():
        model = _tiny_model()
        ids = torch.randint(1, _VOCABULARY, (1, _PROMPT_TOKENS))
        first = ids[:, :-_QUESTION_TOKENS]
        expected = {"the first turn": _answer(model, first)}
        second = torch.cat([expected["the first turn"].sequences, ids[:, -_QUESTION_TOKENS:]], 1)
        expected["a second turn"] = _answer(model, second)
        edited = second.clone()
        edited[:, _PROMPT_TOKENS // 2] = edited[:, _PROMPT_TOKENS // 2] % (_VOCABULARY - 1) + 1
        expected["a turn with an edited history"] = _answer(model, edited)
        for name in names.CACHE_ARGUMENTS[:2]:
            with make_cache() as cache:
                for turn, prompt in zip(expected, (first, second, edited), strict=True):
                    if not _equal(_answer(model, prompt, **{name: cache}), expected[turn]):
                        return f"{turn}, with {name}=, was wrong"
    return None


def _answer(model: Any, ids: torch.Tensor, **cache: Any) -> Any:
    """Return the output that ``model`` generates, with its logits."""
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=_NEW_TOKENS,
        min_new_tokens=_NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **cache,
    )


def _equal(found: Any, expected: Any) -> bool:
    """Whether two answers have the same tokens, and logits that differ only by rounding."""
    pairs = zip(found.logits, expected.logits, strict=True)
    return torch.equal(found.sequences, expected.sequences) and all(
        torch.allclose(ours, theirs, atol=_TOLERANCE) for ours, theirs in pairs
    )


def _tiny_model() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.5,  # small weights would give nearly the same logits after any prompt
        eos_token_id=None,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval()


@contextlib.contextmanager
def _left_alone() -> Iterator[None]:
    """Keep the caller's random numbers, default device and dtype, and modes of autograd as they are."""
    dtype = torch.get_default_dtype()
    # The mode of a default device costs time in every operation.
    elsewhere = torch.get_default_device().type != "cpu"
    on_host = torch.device("cpu") if elsewhere else contextlib.nullcontext()
    with torch.random.fork_rng(devices=[]), on_host, torch.inference_mode(False), torch.no_grad():
        torch.set_default_dtype(torch.float32)
        torch.default_generator.manual_seed(0)  # not torch.manual_seed, which would seed accelerators too
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
