"""Promise 1b on a real model: logits equal those of ``DynamicCache`` bit for bit, from every tier.

Random weights could hide an error that only real activations show. The demo model gets its document in float32 and in
bfloat16, in four turns: cold, continued, from RAM, and from files in a new process.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

from kvtier import PrefixStore, TieredCache
from kvtier.hf.compat.names import passed
from kvtier.hf.demo_model import demo_model_folder
from tests.support.stores import block_files

HERE = demo_model_folder()
pytestmark = [
    pytest.mark.real_model,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (HERE / "config.json").exists(), reason=f"the demo model is not in {HERE}; `kvtier demo` fetches it"
    ),
]

FIRST, MORE, NEW = 300, 10, 3
"""Tokens of the first prompt (more than two blocks of 128), of each addition to a later prompt, and of an answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The prompt with its answer, and the logits ``[new tokens, vocabulary]`` that decided the answer."""

    sequences: torch.Tensor
    logits: torch.Tensor


# --- code that also runs in the other process: importable, and without fixtures ---------------------------------------


def load(dtype: torch.dtype) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(HERE, dtype=dtype, local_files_only=True)
    model.generation_config.eos_token_id = None  # every answer has NEW tokens
    return model


def answer(model: PreTrainedModel, prompt: torch.Tensor, cache: Any) -> Answer:
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        **passed(cache),
        max_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return Answer(out.sequences, torch.cat(out.logits))


def answer_from_files(dtype: torch.dtype, folder: str, prompt: list[int], result: str) -> tuple[int, dict[str, int]]:
    """Answer ``prompt`` with the store in ``folder``; return the process id, and the cached tokens by tier."""
    torch.set_num_threads(1)
    with PrefixStore(folder, block_size=128) as store, TieredCache(store) as cache:
        said = answer(load(dtype), torch.tensor([prompt]), cache)
        save_file({"sequences": said.sequences, "logits": said.logits}, result)
        return os.getpid(), dict(cache.last_turn.cached_by_tier)


# --- the conversation -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Conversation:
    """Four turns with plain transformers on one ``DynamicCache``."""

    model: PreTrainedModel
    prompts: list[torch.Tensor]
    answers: list[Answer]

    def known(self, turn: int) -> int:
        """Tokens with known K and V at the start of ``turn``: the last token of an answer was never fed."""
        return self.answers[turn - 1].sequences.shape[1] - 1


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def plain(request) -> Conversation:
    text = resources.files("kvtier.cli.demo").joinpath("lighthouse.txt").read_text(encoding="utf-8")
    document = AutoTokenizer.from_pretrained(HERE, local_files_only=True)(text, return_tensors="pt").input_ids
    model = load(request.param)
    cache = DynamicCache(config=model.config)
    prompts, answers = [document[:, :FIRST]], []
    for turn in range(4):
        answers.append(answer(model, prompts[-1], cache))
        begin = FIRST + turn * MORE
        prompts.append(torch.cat([answers[-1].sequences, document[:, begin : begin + MORE]], 1))
    return Conversation(model, prompts, answers)


def assert_same(ours: Answer, theirs: Answer) -> None:
    assert torch.equal(ours.sequences, theirs.sequences)
    assert ours.logits.shape == theirs.logits.shape
    assert torch.equal(ours.logits, theirs.logits), f"up to {(ours.logits - theirs.logits).abs().max()} apart"


@pytest.mark.sample(1, of="real model")  # of 10
@pytest.mark.parametrize("compression", ["raw", "zstd"])
def test_every_turn_of_a_conversation_matches_dynamic_cache_bitwise(plain, tmp_path, compression):
    folder, result = tmp_path / "store", tmp_path / "answer.safetensors"
    with PrefixStore(folder, block_size=128, compression=compression) as store:
        with TieredCache(store) as cache:
            assert_same(answer(plain.model, plain.prompts[0], cache), plain.answers[0])
            assert cache.last_turn.cached_tokens == 0
            assert_same(answer(plain.model, plain.prompts[1], cache), plain.answers[1])
            assert dict(cache.last_turn.cached_by_tier) == {"device": plain.known(1), "host": 0, "disk": 0}
        with TieredCache(store) as other:
            assert_same(answer(plain.model, plain.prompts[2], other), plain.answers[2])
            assert dict(other.last_turn.cached_by_tier) == {"device": 0, "host": plain.known(2), "disk": 0}

    assert [codec_of(file) for file in block_files(folder)] == [compression] * 3
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as others:
        prompt = plain.prompts[3][0].tolist()
        process, reused = others.submit(answer_from_files, plain.model.dtype, str(folder), prompt, str(result)).result()
    assert process != os.getpid()
    assert reused == {"device": 0, "host": 0, "disk": plain.known(3)}
    assert_same(Answer(**load_file(result)), plain.answers[3])


def codec_of(file: Path) -> str:
    with safe_open(file, "pt") as opened:
        return opened.metadata()["codec"]


@pytest.mark.sample(1, of="real model")  # of 10
@pytest.mark.parametrize("share", [0.2, 0.3, 0.6])
def test_turns_under_a_device_budget_match_dynamic_cache_bitwise(plain, tmp_path, share):
    """Nearly all layers, most or some are cold. Turns continue; the last turn's cold layers borrow pages from files."""
    columns = plain.answers[3].sequences.shape[1]
    everything = columns * 30 * 2 * 3 * 64 * plain.model.dtype.itemsize
    arguments = {"device_budget": int(share * everything * 1.5), "spill_dir": tmp_path / "spill"}
    with PrefixStore(tmp_path / "store", block_size=64) as store, TieredCache(store, **arguments) as cache:
        for turn in (0, 1, 2):
            assert_same(answer(plain.model, plain.prompts[turn], cache), plain.answers[turn])
            assert cache.last_turn.cold_layers > 2
            assert cache.last_turn.peak_device_bytes <= arguments["device_budget"]
    with PrefixStore(tmp_path / "store", block_size=64) as store, TieredCache(store, **arguments) as cache:
        assert_same(answer(plain.model, plain.prompts[3], cache), plain.answers[3])
        assert cache.last_turn.cached_by_tier["disk"] == plain.known(3)
        assert cache.last_turn.bytes_up > 0
