"""A process that decodes under a budget, and how much it grows, seen from outside.

    python -m benchmarks.streamed_process model store budget tokens < prompt.json

``measure_growth`` starts it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from benchmarks.machine import CHECKOUT
from benchmarks.measure import BenchmarkError, Tokens

if TYPE_CHECKING:
    from collections.abc import Mapping

_POLL_SECONDS = 0.005
_READY = "ready\n"
_STORE_RAM = 2**20  # blocks of the store have a budget of their own, which is not what is measured


def measure_growth(model_folder: Path, store: Path, prompt: Tokens, budget_bytes: int | None, tokens: int) -> int:
    """Return how many bytes of resident memory a new process gains while it restores ``prompt`` and decodes.

    Args:
        model_folder: what to load.
        store: a store that knows all of ``prompt`` but its last token.
        prompt: the context.
        budget_bytes: of its ``TieredCache``; None for a process that is given one token of it, to see what a turn takes
            besides K and V.
        tokens: how many to decode.

    Raises:
        BenchmarkError: the process failed; the message has what it said.
    """
    arguments = [str(model_folder), str(store), str(budget_bytes or 0)]
    command = [sys.executable, "-m", "benchmarks.streamed_process", *arguments]
    given = prompt if budget_bytes is not None else prompt[:1]
    with subprocess.Popen(
        [*command, str(tokens)],
        cwd=CHECKOUT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        if process.stdout.readline() != _READY:
            raise BenchmarkError(f"a process under a budget failed:\n{process.communicate()[1].strip()}")
        watched = psutil.Process(process.pid)
        before = peak = watched.memory_info().rss
        process.stdin.write(json.dumps(given) + "\n")
        process.stdin.close()
        while True:
            try:
                process.wait(_POLL_SECONDS)
                break
            except subprocess.TimeoutExpired:
                peak = max(peak, watched.memory_info().rss)
        if process.returncode != 0:
            raise BenchmarkError(f"a process under a budget failed:\n{process.stderr.read() if process.stderr else ''}")
        report: Mapping[str, int] = json.loads(process.stdout.read())
        if budget_bytes is not None and not report["cold_layers"]:
            raise BenchmarkError("no layer of the process was cold")
        return int(peak - before)


def main(model_folder: str, store_folder: str, budget: str, tokens: str) -> None:
    """Decode; say ``ready`` first, and wait for the prompt."""
    from kvtier import PrefixStore, TieredCache
    from kvtier.cli.demo.conversation import ChatModel

    chat = ChatModel(model_folder)
    sys.stdout.write(_READY)
    sys.stdout.flush()
    prompt = tuple(json.loads(sys.stdin.readline()))
    with (
        PrefixStore(store_folder, host_budget=_STORE_RAM) as store,
        TieredCache(store, device_budget=int(budget) or None, reuse="always") as cache,
    ):
        chat.answer(prompt, cache, int(tokens))
        assert cache.last_turn is not None
        if len(prompt) > 1 and cache.last_turn.cached_tokens != len(prompt) - 1:
            raise BenchmarkError("the store does not know the context")
        sys.stdout.write(json.dumps({"cold_layers": cache.last_turn.cold_layers}))


if __name__ == "__main__":
    main(*sys.argv[1:])
