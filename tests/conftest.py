"""Tiny seeded models of many families, and the one way the tests call generate()."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings
from transformers import DynamicCache, PreTrainedModel

from kvtier import PrefixStore, TieredCache

# A change must not fail for what another one broke: CI tries the same examples every time. New ones are looked for by
# `pytest --hypothesis-profile=nightly`, or with HYPOTHESIS_PROFILE=nightly in the environment.
_ANY_TIME = {
    "deadline": None,  # a disk, a thread or a neighbour may be slow
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    "print_blob": True,
}
settings.register_profile("ci", max_examples=100, derandomize=True, **_ANY_TIME)
settings.register_profile("nightly", max_examples=2500, **_ANY_TIME)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

VOCABULARY = 200
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,  # far from zero: what is attended to must decide which token comes next
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
_SLIDING_THEN_FULL = ["sliding_attention", "sliding_attention", "full_attention"]
# family: config class, model class, what differs from _SHAPE
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 16}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 16, "head_dim": 16}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {"sliding_window": 16, "head_dim": 16}),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {"sliding_window": 16, "head_dim": 16, "layer_types": _SLIDING_THEN_FULL},
    ),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {"sliding_window": 16, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {}),
}
SLIDING_FAMILIES = ("mistral", "gemma2", "gemma3", "gpt_oss")
WITHOUT_SDPA = frozenset({"gemma2", "gpt_oss"})  # soft caps and attention sinks are not what SDPA computes

MakeModel = Callable[..., PreTrainedModel]
Generate = Callable[..., Any]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Tiny matrices: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """``make_model(family, dtype, attention, **config)``: a new tiny model; the same arguments, the same weights."""

    def make(
        family: str = "llama", dtype: torch.dtype = torch.float32, attention: str = "eager", **config: Any
    ) -> PreTrainedModel:
        config_class, model_class, different = FAMILIES[family]
        settings = getattr(transformers, config_class)(**{**_SHAPE, **different, **config})
        settings._attn_implementation = attention
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model: PreTrainedModel = getattr(transformers, model_class)(settings).eval()
        model.generation_config.pad_token_id = 0
        model.generation_config.eos_token_id = None
        return model.to(dtype)

    return make


@pytest.fixture
def model(make_model: MakeModel) -> PreTrainedModel:
    """A tiny Llama in fp32."""
    return make_model("llama")


@pytest.fixture(scope="session")
def tokens() -> Callable[..., torch.Tensor]:
    """``tokens(columns, rows, seed)``: random ids without padding ids."""

    def make(columns: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
        return torch.randint(1, VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture(scope="session")
def generate() -> Generate:
    """``generate(model, ids, cache, **settings)``: greedy, with logits, on a fresh ``DynamicCache`` by default."""

    def run(model: PreTrainedModel, ids: torch.Tensor, cache: Any = None, **settings: Any) -> Any:
        settings = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [0], **settings}
        if "attention_mask" not in settings:
            settings["attention_mask"] = (ids != 0).long()
        return model.generate(
            ids,
            past_key_values=DynamicCache(config=model.config) if cache is None else cache,
            return_dict_in_generate=True,
            output_logits=True,
            **settings,
        )

    return run


@pytest.fixture
def store() -> Iterator[PrefixStore]:
    """A store in RAM with small blocks."""
    with PrefixStore(block_size=8) as store:
        yield store


@pytest.fixture
def cache(store: PrefixStore) -> Iterator[TieredCache]:
    """A cache over ``store``."""
    with TieredCache(store) as cache:
        yield cache


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Offer ``family``, ``sliding_family`` and ``attention`` to every test that names them."""
    if "attention" in metafunc.fixturenames and "family" in metafunc.fixturenames:
        pairs = [(f, a) for f in FAMILIES for a in ("eager", "sdpa") if a == "eager" or f not in WITHOUT_SDPA]
        metafunc.parametrize(("family", "attention"), pairs)
    elif "family" in metafunc.fixturenames:
        metafunc.parametrize("family", list(FAMILIES))
    if "sliding_family" in metafunc.fixturenames:
        metafunc.parametrize("sliding_family", list(SLIDING_FAMILIES))


@pytest.fixture
def warned(caplog):
    """``warned()``: the warnings of kvtier since the last call."""

    def texts():
        found = [r.getMessage() for r in caplog.records if r.name.startswith("kvtier") and r.levelno >= 30]
        caplog.clear()
        return found

    return texts
