"""On an unknown newer transformers, answers are right or refused, never wrong.

Each test changes a copy of the installed package, gives it a newer version number, and holds a conversation with it in
a separate process: under every name of the cache argument, and with a ``generate`` bound before kvtier was imported.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from tests.support.upstream import CACHE

ROOT = Path(__file__).parents[3]
taken = pytest.mark.sample(1, of="changed transformers")  # of 12: each starts processes with a copy of the package
PACKAGE = Path(transformers.__file__).parent

CONVERSATION = """
import functools, json, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
torch.set_num_threads(1)
config = LlamaConfig(vocab_size=60, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, initializer_range=0.2, eos_token_id=None, pad_token_id=0)
model = LlamaForCausalLM(config).eval()
settings = {"max_new_tokens": 4, "do_sample": False}
first = torch.randint(1, 60, (1, 30))
answered = model.generate(first, **settings)
longer = torch.cat([answered, torch.randint(1, 60, (1, 5))], 1)
edited = longer.clone()
edited[0, 9] = edited[0, 9] % 59 + 1
prompts = {"first": first, "longer": longer, "edited": edited, "shorter": longer[:, :20]}
expected = {name: model.generate(ids, **settings) for name, ids in prompts.items()}
taken = functools.partial(model.generate)

import kvtier
from kvtier.hf.compat import canary, names
arguments, without = json.loads(sys.argv[1]), sys.argv[2:]
if "canary" in without:
    names.NEWEST_TESTED = names.INSTALLED
if "guard" in without:
    import kvtier.hf.turn.manager
    kvtier.hf.turn.manager.running_generate = lambda: None
found, reused = {}, 0
for argument in arguments:
    for how, generate in (("wrapped", model.generate), ("taken before", taken)):
        with kvtier.TieredCache(kvtier.PrefixStore(block_size=8), config=config) as cache:
            for turn, ids in prompts.items():
                try:
                    right = torch.equal(generate(ids, **{argument: cache}, **settings), expected[turn])
                    outcome = "right" if right else "wrong"
                except Exception as error:
                    outcome = type(error).__name__
                found[f"{argument} {how} {turn}"] = outcome
                if how == "wrapped" and cache.last_turn is not None:
                    reused += cache.last_turn.cached_tokens
print(json.dumps({"outcomes": found, "reused": reused, "reason": canary.why_untrusted()}))
"""

GENERATION = "generation/utils.py"
WITH_A_CACHE = (GENERATION, "masking_utils.py", "modeling_outputs.py", "models/llama/modeling_llama.py")
APPENDING = ("cache_utils.py", "models/llama/modeling_llama.py")
Renames = dict[str, dict[str, str]]


def everywhere(old: str, new: str, files: tuple[str, ...] = WITH_A_CACHE) -> Renames:
    """Rename ``old``, a pattern of whole words, to ``new`` in all lines of ``files`` that import nothing."""
    return {file: {rf"^(?!.*\bimport\b)(.*?)\b({old})\b": rf"\g<1>{new}"} for file in files}


CHANGES: dict[str, Renames] = {
    "nothing": {},
    "the argument and the field of the output": everywhere(CACHE, "kv_memory"),
    "the methods of generation": everywhere("_prepare_cache_for_generation|_prefill", r"\g<2>_2", (GENERATION,)),
    "the method that returns a length": everywhere("get_seq_length", "tokens_held", (*WITH_A_CACHE, "cache_utils.py")),
    "the method that appends": everywhere(r"(?<=def )update|(?<=\.)update(?=\(key_states)", "append_states", APPENDING),
    "what is left of a prompt": {GENERATION: {r"input_ids.shape\[1\] - past_length": "input_ids.shape[1]"}},
}


@pytest.fixture(scope="module")
def converse(tmp_path_factory):
    """``converse(change, *without)`` returns the outcome of a conversation; ``without`` names disabled parts."""
    packages, found = {}, {}

    def changed(change):
        folder = tmp_path_factory.mktemp("upstream")
        package = folder / "transformers"
        shutil.copytree(PACKAGE, package, copy_function=os.symlink, ignore=shutil.ignore_patterns("__pycache__"))
        version = {"__init__.py": {r'^__version__ = ".*"': '__version__ = "5.99.0"'}}
        for file, renames in {**CHANGES[change], **version}.items():
            text = (package / file).read_text(encoding="utf-8")
            for old, new in renames.items():
                count = 1
                while count:  # a line may contain the pattern more than once
                    text, count = re.subn(old, new, text, flags=re.MULTILINE)
                    if not old.startswith("^(?!"):
                        break
            (package / file).unlink()
            (package / file).write_text(text, encoding="utf-8")
        return folder

    def run(change, *without):
        if (change, without) not in found:
            found[change, without] = play(change, *without)
        return found[change, without]

    def play(change, *without):
        if change not in packages:
            packages[change] = changed(change)
        path = [str(packages[change]), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        done = subprocess.run(
            [
                sys.executable,
                "-W",
                "ignore",
                "-c",
                CONVERSATION,
                json.dumps(["kv_memory", "cache", "past_key_values"]),
                *without,
            ],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


def outcomes(found, how=""):
    return {outcome for turn, outcome in found["outcomes"].items() if how in turn}


@taken
@pytest.mark.parametrize("change", CHANGES)
def test_changed_transformers_never_gives_a_wrong_answer(converse, change):
    found = converse(change)
    assert "wrong" not in outcomes(found), found


@taken
def test_newer_version_without_changes_is_reused(converse):
    found = converse("nothing")
    assert found["reason"] is None
    assert found["reused"] > 80, found
    assert outcomes(found, "past_key_values wrapped") == outcomes(found, "cache wrapped") == {"right"}


@taken
@pytest.mark.parametrize(
    "change", ["the argument and the field of the output", "the methods of generation", "what is left of a prompt"]
)
def test_wrapped_calls_are_right_on_a_changed_transformers(converse, change):
    """At worst they reuse nothing."""
    found = converse(change)
    assert outcomes(found, "past_key_values wrapped") == {"right"}, found
    assert outcomes(found, "cache wrapped") == {"right"}, found


@taken
def test_canary_catches_a_change_that_the_guard_misses(converse):
    change = "what is left of a prompt"
    found = converse(change)
    assert "5.99.0 is newer than" in found["reason"]
    assert found["reused"] == 0
    assert "wrong" in outcomes(converse(change, "canary"))


@taken
def test_guard_catches_a_change_that_the_canary_misses(converse):
    change = "the methods of generation"
    found = converse(change)
    assert found["reason"] is None
    assert "UnannouncedError" in outcomes(found, "taken before"), found
    assert "wrong" in outcomes(converse(change, "guard"), "taken before")
