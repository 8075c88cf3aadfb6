"""What telling models apart costs: the first time in a process, every turn after that, and as a part of begin()."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import Competitor, Options, Sample, interleave
from benchmarks.result import Result, make_case
from benchmarks.workload import load_chat, seconds_of
from kvtier import PrefixStore, TieredCache
from kvtier.hf.identity.fingerprint import identify
from kvtier.hf.identity.module_walk import ModelWalk
from kvtier.hf.identity.weights.digest import digest_weights

_SMALL = "SmolLM2-135M"
_PROMPT_TOKENS = 4096


def run(options: Options) -> Result:
    """Measure on the demo model and on a larger one with random weights."""
    rounds = options.rounds_or(20)
    models: dict[str, Any] = {_SMALL: load_chat().model}
    if not options.quick:
        options.say("making a Llama of about 1 GB")
        large = random_llama()
        models[f"Llama, random, {_gigabytes(large):.2f} GB"] = large
        options.say("making a Llama of thousands of small tensors")
        many = random_llama(hidden_size=256, intermediate_size=256, num_hidden_layers=448, num_attention_heads=8)
        models[f"Llama, random, {_tensors(many)} tensors"] = many
    samples = interleave(
        [Competitor(name, partial(_measure, model)) for name, model in models.items()], rounds, options.say
    )
    facts = {name: {"bytes": _bytes(model), "tensors": _tensors(model)} for name, model in models.items()}
    cases = (
        make_case("identity, first time in a process", samples, "first_s", facts=facts),
        make_case("identity, later turns", samples, "later_s", facts=facts),
        make_case("of it, weights, later turns", samples, "weights_s", facts=facts),
        make_case(f"the same with a prompt of {_PROMPT_TOKENS} different tokens", samples, "rows_s", facts=facts),
        make_case("begin() on an empty store, later turns", samples, "begin_s", facts=facts),
    )
    notes = (
        "No target. begin() computes the identity and looks for the prompt; it is paid before every first token.",
        "The first time, every weight is read.",
    )
    return Result("identity", (__doc__ or "").strip(), rounds, options.quick, cases, (), notes)


def random_llama(**shape: int) -> Any:
    """Return a bf16 Llama with random weights: of about 1 GB, but for what ``shape`` says."""
    sizes = {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 10,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    }
    config = LlamaConfig(vocab_size=32_000, tie_word_embeddings=True, **(sizes | shape))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        previous = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            return LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(previous)


def _measure(model: Any) -> Sample:
    # Another module object with the same weights: nothing is remembered of it, as of a model that was just loaded.
    unknown = copy.copy(model)
    first_seconds = seconds_of(lambda: identify(unknown, "", 256))
    later_seconds = seconds_of(lambda: identify(unknown, "", 256))
    identify(model, "", 256)
    tensors, tokens = ModelWalk(model).tensors, np.arange(_PROMPT_TOKENS) * 7
    weights_seconds = seconds_of(lambda: digest_weights(model, tensors))
    rows_seconds = seconds_of(lambda: digest_weights(model, tensors, tokens))
    ids = torch.tensor([[1, 2, 3, 4]])
    with PrefixStore() as store, TieredCache(store, config=model.config) as cache:
        begin_seconds = seconds_of(lambda: cache.begin(model, ids))
        cache.reset()
    return Sample(
        {
            "first_s": first_seconds,
            "later_s": later_seconds,
            "weights_s": weights_seconds,
            "rows_s": rows_seconds,
            "begin_s": begin_seconds,
        }
    )


def _bytes(model: Any) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def _gigabytes(model: Any) -> float:
    return _bytes(model) / 1e9


def _tensors(model: Any) -> int:
    return sum(1 for _ in model.parameters()) + sum(1 for _ in model.buffers())
