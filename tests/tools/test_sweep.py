"""The sweep on a sample of models with every layer kind, or with KVTIER_SWEEP=all on every causal language model."""

from __future__ import annotations

import os

import pytest
import transformers
from packaging.version import Version
from transformers import cache_utils
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, get_layer_types_and_kwargs

from sweep.checks import EVIDENT, NO_REASON, examine
from sweep.judging import judge
from sweep.models import architectures, tiny_model
from sweep.turns import PROMPT, ROUNDING, ask, edited, next_prompt, prompt, reference_cache

SAMPLE = (
    "llama",  # full
    "gemma3_text",  # sliding and full
    "llama4_text",  # chunked and full
    "deepseek_v3",  # K and V of different sizes
    "gemma4_text",  # layers that read the K and V of others; heads of different sizes
    "deepseek_v32",  # indexed
    "deepseek_v4",  # compressed
    "minimax_m3_vl_text",  # keys chosen in blocks
    "qwen3_next",  # linear and full
    "lfm2",  # convolutions and full
    "falcon_h1",  # linear and full in one layer
    "inkling_text",  # linear and sliding in one layer
    "nemotron_h",  # layers without any attention
    "jamba",  # transformers drops its state in a forward of many tokens
    "mamba2",  # takes its cache under another name
    "prophetnet",  # cannot continue a cache with more than one token
    "openai-gpt",  # has no cache
    "rwkv",  # carries its states past any cache
    "bart",  # its positions count padding
    "phi3:longrope",  # its keys depend on the length of the sequence
)
# Right tokens, but no reuse; each row gives the reason.
WITHOUT_REUSE = {
    *("openai-gpt", "xlm"),  # no cache at all
    *("reformer", "xlnet", "recurrent_gemma"),  # their own cache or state
    *("cpmant", "prophetnet"),  # transformers itself is wrong when it continues a cache
    *("musicgen", "musicgen_melody"),  # their own generate()
    "phi3:longrope",  # a longer sequence has other keys
    "doge:beyond_window",  # equal tokens have equal ranks, and a longer sequence selects others among them
    "dory:last_loop",  # a token's entry depends on whether the tokens before it were in the same pass
}
if Version(transformers.__version__) < Version("5.21"):  # does not report the length of a cache with states only
    WITHOUT_REUSE |= {"mamba", "mamba2", "falcon_mamba"}
ALL = os.environ.get("KVTIER_SWEEP") == "all"


@pytest.mark.sample(1)  # of 20
@pytest.mark.parametrize("model_type", architectures() if ALL else SAMPLE)
def test_model_gives_right_tokens_without_errors_and_reuses(model_type):
    row = examine(model_type)
    if row.not_made is not None:
        assert model_type not in SAMPLE, row.not_made
        pytest.skip(row.not_made)
    assert not row.bad
    reuse = {row.outcomes[check].verdict for check in ("reuses", "ram", "disk", "names")}
    if model_type in WITHOUT_REUSE:
        assert reuse == {"no"}
        assert row.outcomes["reuses"].reason not in (None, NO_REASON)
    else:
        assert reuse <= {"yes", "draw"}, row.outcomes["reuses"].reason
        assert row.influence > EVIDENT * ROUNDING, "a stale answer would pass for a right one"


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen3_next", "deepseek_v32", "falcon_h1"])
def test_stale_answer_is_judged_wrong(model_type):
    """Transformers' own cache does not compare the prompt with its contents."""
    model = tiny_model(model_type)
    cache = reference_cache(model)
    second = next_prompt(ask(model, prompt(PROMPT, seed=1), cache))
    right = ask(model, edited(second), reference_cache(model))
    assert judge(ask(model, edited(second), cache), right).verdict == "wrong"


def test_sample_covers_every_layer_kind():
    kinds = set()
    for model_type in SAMPLE:
        config = tiny_model(model_type).config.get_text_config(decoder=True)
        kinds |= set(get_layer_types_and_kwargs(config)[0])
    classes = {DYNAMIC_LAYER_TYPE_MAPPING[kind] for kind in kinds}
    # Importing a model adds kinds to the mapping, so its contents depend on the tests that ran before.
    assert {kind for kind in DYNAMIC_LAYER_TYPE_MAPPING.values() if kind.__module__ == cache_utils.__name__} <= classes
