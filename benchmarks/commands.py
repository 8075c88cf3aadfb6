"""Store commands in new processes, over a store of a few conversations and one of 5,700 blocks under 150 names."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.machine import CHECKOUT
from benchmarks.measure import BenchmarkError, Competitor, Options, Sample, interleave
from benchmarks.result import Case, Result, Target, make_case
from kvtier import PrefixStore
from kvtier.kv.page import Page
from kvtier.store.chain import TokenIds
from kvtier.store.format.vocabulary import Vocabulary

ROOT = "c4" * 32
_BLOCK = 256  # tokens
_IDS = 49_152  # as many as the tokenizer of SmolLM2 has
_SHARED_BLOCKS, _OWN_BLOCKS = 8, 32
_IN_A_GROUP = 10  # names that begin with the same blocks
_MOST_SECONDS = 0.7
_NAME, _EXPORTED, _IMPORTED = "chat 0", "chat 1", "from elsewhere"


def run(options: Options) -> Result:
    """Make the stores, then run each command on both by turns."""
    rounds = options.rounds_or(7)
    cases: list[Case] = []
    with tempfile.TemporaryDirectory(prefix="kvtier-bench-") as scratch:
        stores = {}
        for label, names, unnamed in (("small", 5, 1), ("large", 10, 2) if options.quick else ("large", 150, 25)):
            options.say(f"writing a store of {names} names")
            stores[label] = Path(scratch) / label
            make_store(stores[label], names, unnamed)
        for label, command in _commands(Path(scratch)).items():
            runs = [Competitor(f"{size} store", _runner(folder, command)) for size, folder in stores.items()]
            samples = interleave(runs, rounds, options.say)
            cases.append(
                make_case(f"kvtier store {label}", samples, "seconds", baseline="small store", ratio_kind="cost")
            )
    targets = tuple(
        Target(f"seconds of {case.title}", case.row("large store").spread.median, _MOST_SECONDS, "less than", "s")
        for case in cases
        if "verify" not in case.title  # it reads every file
    )
    notes = (
        "Blocks have one layer with one head of one dimension: it is their number that is measured.",
        "Each name has a saved chat. Each command runs in a new interpreter; its start and imports count.",
    )
    return Result("commands", (__doc__ or "").strip(), rounds, options.quick, tuple(cases), targets, notes)


def make_store(folder: Path, names: int, unnamed: int) -> None:
    """Make a store of small blocks with names, a saved chat for each, chains without a name, and a vocabulary."""
    dice = np.random.default_rng(0)
    manifest = {"model": "LlamaForCausalLM", "config": {"_name_or_path": "small/model", "num_hidden_layers": 1}}
    with PrefixStore(folder, host_budget=1, block_size=_BLOCK, durability="lazy", tail_delay=0) as store:
        shared = np.empty(0, dtype=np.int64)
        for number in range(names + unnamed):
            if number % _IN_A_GROUP == 0:
                shared = dice.integers(0, _IDS, _SHARED_BLOCKS * _BLOCK)
            tokens = np.concatenate([shared, dice.integers(0, _IDS, _OWN_BLOCKS * _BLOCK)])
            store.commit(ROOT, tokens, _pages, manifest)
            if number < names:
                store.name(f"chat {number}", ROOT, tokens)
                store.chats.write(f"chat {number}", _chat(tokens), after=None)
        store.keep_vocabulary(ROOT, lambda: Vocabulary.of({index: f" word{index}".encode() for index in range(_IDS)}))


def _pages(start: int, stop: int) -> tuple[Page, ...]:
    return (Page(torch.zeros(1, stop - start, 1), torch.zeros(1, stop - start, 1)),)


def _chat(tokens: TokenIds) -> dict[str, object]:
    words = [f" word{index}" for index in tokens.tolist()]
    pieces = range(0, len(tokens), _BLOCK)
    return {
        "messages": [{"role": "user", "content": "".join(words[at : at + _BLOCK])} for at in pieces],
        "segments": [["".join(words[at : at + _BLOCK]), tokens[at : at + _BLOCK].tolist(), None, 0] for at in pieces],
    }


def _commands(scratch: Path) -> dict[str, tuple[str, ...]]:
    """Return the measured commands by what they are called here; each leaves the store as it found it."""
    archive = str(scratch / "exported.safetensors")
    return {
        "ls": ("ls",),
        "ls --quiet": ("ls", "--quiet"),
        "ls --unnamed": ("ls", "--unnamed"),
        "ls --json": ("ls", "--json"),
        "show": ("show", _NAME),
        "du": ("du",),
        "stats": ("stats",),
        "pin": ("pin", _NAME),
        "unpin": ("unpin", _NAME),
        "rm --dry-run": ("rm", _NAME, "--dry-run"),
        "prune --unused-for --dry-run": ("prune", "--unused-for", "9w", "--dry-run"),
        "prune --to --dry-run": ("prune", "--to", "1MiB", "--dry-run"),
        "clear --dry-run": ("clear", "--dry-run"),
        "export": ("export", _EXPORTED, archive, "--overwrite"),
        "import": ("import", archive, "--name", _EXPORTED),
        "verify": ("verify",),
    }


def _runner(folder: Path, command: tuple[str, ...]) -> Callable[[], Sample]:
    def run_once() -> Sample:
        environment = {**os.environ, "KVTIER_STORE": str(folder), "COLUMNS": "160"}
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "kvtier", "store", *command],
            cwd=CHECKOUT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - started
        if done.returncode != 0:
            raise BenchmarkError(f"kvtier store {' '.join(command)} failed: {done.stderr.strip()}")
        return Sample({"seconds": seconds})

    return run_once
