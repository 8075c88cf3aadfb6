"""What telling models apart costs: the first time in a process, every turn after that, and as a part of begin()."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import Competitor, Options, Sample, interleave
from benchmarks.result import Result, make_case
from benchmarks.workload import load_chat, seconds_of
from kvtier import PrefixStore, TieredCache
from kvtier.hf.identity import identify

_SMALL = "SmolLM2-135M"


def run(options: Options) -> Result:
    """Measure on the demo model and on a larger one with random weights."""
    rounds = options.rounds_or(20)
    models: dict[str, Any] = {_SMALL: load_chat().model}
    if not options.quick:
        options.say("making a Llama of about 1 GB")
        large = random_llama()
        models[f"Llama, random, {_gigabytes(large):.2f} GB"] = large
    samples = interleave(
        [Competitor(name, partial(_measure, model)) for name, model in models.items()], rounds, options.say
    )
    facts = {name: {"bytes": _bytes(model), "tensors": _tensors(model)} for name, model in models.items()}
    cases = (
        make_case("identity, first time in a process", samples, "first_s", facts=facts),
        make_case("identity, later turns", samples, "later_s", facts=facts),
        make_case("begin() on an empty store, later turns", samples, "begin_s", facts=facts),
    )
    notes = (
        "No target. begin() computes the identity and looks for the prompt; it is paid before every first token.",
        "The first time, every weight is read.",
    )
    return Result("identity", (__doc__ or "").strip(), rounds, options.quick, cases, (), notes)


def random_llama() -> Any:
    """Return a bf16 Llama of about 1 GB with random weights."""
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=10,
        num_attention_heads=32,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
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
    ids = torch.tensor([[1, 2, 3, 4]])
    with PrefixStore() as store, TieredCache(store, config=model.config) as cache:
        begin_seconds = seconds_of(lambda: cache.begin(model, ids))
        cache.reset()
    return Sample({"first_s": first_seconds, "later_s": later_seconds, "begin_s": begin_seconds})


def _bytes(model: Any) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def _gigabytes(model: Any) -> float:
    return _bytes(model) / 1e9


def _tensors(model: Any) -> int:
    return sum(1 for _ in model.parameters()) + sum(1 for _ in model.buffers())
