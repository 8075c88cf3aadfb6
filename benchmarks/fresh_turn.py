"""One turn in a process of its own: load the model, warm it up, answer one prompt, say how it went.

    python -m benchmarks.fresh_turn task.json result.json

``run_fresh_turn`` starts it; a process that has run nothing before is the only honest stand-in for a restart.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.machine import CHECKOUT
from benchmarks.measure import BenchmarkError, Tokens
from benchmarks.start_parts import part_clocks

if TYPE_CHECKING:
    from benchmarks.workload import KeysValues
    from kvtier.cli.demo.conversation import ChatModel

CacheKind = Literal["dynamic", "tiered_ram", "tiered_folder", "torch_load", "torch_load_mmap"]


@dataclass(frozen=True, slots=True)
class FreshTurn:
    """What the new process did.

    Attributes:
        answer: the new tokens.
        opening_seconds: making the cache: opening the store, or loading the file.
        first_token_seconds: from the call of ``generate()`` to its first new token.
        cached_by_tier: what kvtier reported; empty for other caches.
        start_peak_bytes: peak of resident memory when the model was warm.
        peak_bytes: peak of resident memory at the end.
        parts: seconds of each part of ``first_token_seconds``, where they were asked for.
    """

    answer: Tokens
    opening_seconds: float
    first_token_seconds: float
    cached_by_tier: dict[str, int]
    start_peak_bytes: int
    peak_bytes: int
    parts: dict[str, float]

    @classmethod
    def from_json(cls, text: str) -> FreshTurn:
        """Read what ``main`` wrote."""
        fields = json.loads(text)
        fields["answer"] = tuple(fields["answer"])
        return cls(**fields)


def save_by_hand(keys_values: KeysValues, path: Path) -> None:
    """Write K and V as one would without kvtier."""
    import torch

    torch.save([(k.clone(), v.clone()) for k, v in keys_values], path)


def run_fresh_turn(
    model_folder: Path,
    kind: CacheKind,
    prompt: Tokens,
    max_new_tokens: int,
    path: Path | None = None,
    *,
    in_parts: bool = False,
) -> FreshTurn:
    """Answer ``prompt`` in a new process.

    Args:
        model_folder: what to load.
        kind: the cache to use.
        prompt: its tokens.
        max_new_tokens: longest answer.
        path: the store's folder, or the file that ``save_by_hand`` wrote.
        in_parts: time the parts of a turn of kvtier too.

    Raises:
        BenchmarkError: the process failed; the message has what it said.
    """
    with tempfile.TemporaryDirectory(prefix="kvtier-bench-") as scratch_name:
        task, result = Path(scratch_name) / "task.json", Path(scratch_name) / "result.json"
        fields = {"model": str(model_folder), "kind": kind, "prompt": prompt, "max_new_tokens": max_new_tokens}
        fields |= {"path": str(path) if path else None, "in_parts": in_parts}
        task.write_text(json.dumps(fields), encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.fresh_turn", str(task), str(result)]
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BenchmarkError(f"a new process with {kind} failed:\n{done.stderr.strip()}")
        return FreshTurn.from_json(result.read_text(encoding="utf-8"))


def main(task_name: str, result_name: str) -> None:
    """Run the turn that ``task_name`` describes."""
    from kvtier import PrefixStore, TieredCache  # noqa: F401  # programs import them at their start, off this clock
    from kvtier.cli.demo.conversation import ChatModel

    task = json.loads(Path(task_name).read_text(encoding="utf-8"))
    chat = ChatModel(task["model"])
    prompt = tuple(task["prompt"])
    start_peak = _peak_bytes()
    with ExitStack() as stack:
        started = time.perf_counter()
        cache = _OPEN[task["kind"]](chat, task["path"], stack)
        opening = time.perf_counter() - started
        parts_of = stack.enter_context(part_clocks()) if task["in_parts"] else lambda _: {}
        answer = chat.answer(prompt, cache, task["max_new_tokens"])
        peak = _peak_bytes()
        report = getattr(cache, "last_turn", None)
        turn = FreshTurn(
            answer=answer.new_tokens,
            opening_seconds=opening,
            first_token_seconds=answer.first_token_seconds,
            cached_by_tier=dict(report.cached_by_tier) if report is not None else {},
            start_peak_bytes=start_peak,
            peak_bytes=peak,
            parts=parts_of(answer.first_token_seconds),
        )
    Path(result_name).write_text(json.dumps(asdict(turn)), encoding="utf-8")


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts kilobytes


def _dynamic(chat: ChatModel, path: str | None, stack: ExitStack) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=chat.model.config)


def _tiered(chat: ChatModel, path: str | None, stack: ExitStack) -> Any:
    from kvtier import PrefixStore, TieredCache

    store = stack.enter_context(PrefixStore(path))
    return stack.enter_context(TieredCache(store))


def _loaded(chat: ChatModel, path: str | None, stack: ExitStack, mmap: bool) -> Any:
    import torch

    assert path is not None
    cache = _dynamic(chat, None, stack)
    for layer, (k, v) in enumerate(torch.load(path, mmap=mmap)):
        cache.update(k, v, layer)
    return cache


_OPEN: dict[CacheKind, Callable[[ChatModel, str | None, ExitStack], Any]] = {
    "dynamic": _dynamic,
    "tiered_ram": _tiered,
    "tiered_folder": _tiered,
    "torch_load": lambda chat, path, stack: _loaded(chat, path, stack, mmap=False),
    "torch_load_mmap": lambda chat, path, stack: _loaded(chat, path, stack, mmap=True),
}

if __name__ == "__main__":
    main(*sys.argv[1:])
