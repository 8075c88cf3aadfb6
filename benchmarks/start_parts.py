"""Clocks around the parts of a turn's start: who waits for what, in the thread that calls ``generate()``."""

from __future__ import annotations

import functools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

OPENING = "open the store"
REST = "transformers, and the model"


def _clocked() -> list[tuple[Any, str, str]]:
    """Return what is timed: its owner, its name there, and its part. A call inside another counts only as its own."""
    from kvtier import PrefixStore
    from kvtier.hf.identity import fingerprint
    from kvtier.hf.turn import manager, start
    from kvtier.store.reading.load import LoadJob

    return [
        (manager, "identify", "identity: the rest"),
        (fingerprint, "ModelWalk", "identity: modules and code"),
        (fingerprint, "digest_weights", "identity: weights"),
        (start, "find_candidates", "find the prompt in the catalog"),
        (PrefixStore, "restore", "open blocks"),
        (manager, "start_load", "make buffers, start reading"),
        (LoadJob, "give_head_start", "wait for pages"),
        (LoadJob, "wait", "wait for pages"),
    ]


@contextmanager
def part_clocks() -> Iterator[Callable[[float], dict[str, float]]]:
    """Time the parts of the turn that runs inside.

    Yields a function: the seconds of the whole turn → the seconds of each part, which add up to the whole.
    """
    seconds: dict[str, float] = defaultdict(float)
    inside = [0.0]  # seconds of the calls inside each of the running ones
    main = threading.current_thread()

    def clocked(call: Callable[..., Any], part: str) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is not main:
                return call(*args, **kwargs)
            started = time.perf_counter()
            inside.append(0.0)
            try:
                return call(*args, **kwargs)
            finally:
                taken = time.perf_counter() - started
                seconds[part] += taken - inside.pop()
                inside[-1] += taken

        return timed

    def parts_of(whole_seconds: float) -> dict[str, float]:
        return {**seconds, REST: whole_seconds - sum(seconds.values())}

    before = [(owner, name, getattr(owner, name)) for owner, name, _ in _clocked()]
    for owner, name, part in _clocked():
        setattr(owner, name, clocked(getattr(owner, name), part))
    try:
        yield parts_of
    finally:
        for owner, name, call in before:
            setattr(owner, name, call)
