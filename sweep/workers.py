"""Architectures examined in processes of their own, a few at a time: one that hangs or crashes costs its own row."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from sweep.models import architectures, brief
from sweep.outcome import Outcome, Row

Examine = Callable[[str], Row]
"""``model type`` → its row."""


def examine_all(names: Sequence[str], examine: Examine, workers: int, limit_seconds: float) -> Iterator[Row]:
    """Yield the row of each architecture, as they come.

    Args:
        names: model types.
        examine: makes a row.
        workers: processes at a time.
        limit_seconds: after which an architecture is given up.
    """
    waiting = list(reversed(names))
    running: dict[Connection, _Started] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                started = _Started(waiting.pop(), examine)
                running[started.pipe] = started
            nearest = min(started.begun for started in running.values()) + limit_seconds
            ready = wait(list(running), timeout=max(0.0, nearest - time.monotonic()))
            late = [pipe for pipe, started in running.items() if time.monotonic() - started.begun > limit_seconds]
            for pipe in {*(pipe for pipe in ready if isinstance(pipe, Connection)), *late}:
                yield running.pop(pipe).row(limit_seconds)
    finally:
        for started in running.values():
            started.end()


class _Started:
    """One architecture in a process that is running."""

    def __init__(self, name: str, examine: Examine) -> None:
        # A fork has transformers imported already; where there is none, each process imports it anew.
        context: Any = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
        self.name, self.begun = name, time.monotonic()
        self.pipe: Connection
        self.pipe, theirs = context.Pipe(duplex=False)
        self._process: BaseProcess = context.Process(target=_report, args=(name, examine, theirs))
        self._process.start()
        theirs.close()

    def row(self, limit_seconds: float) -> Row:
        """Return what it found, or why it found nothing; end it."""
        row: Row | None = None
        with contextlib.suppress(EOFError):
            row = self.pipe.recv() if self.pipe.poll() else None
        self._process.join(timeout=1.0 if row is None else 5.0)
        code = self._process.exitcode
        self.end()
        if row is not None:
            return row
        reason = f"took longer than {limit_seconds:g} s" if code is None else f"its process ended with status {code}"
        return _failed(self.name, reason)

    def end(self) -> None:
        """Let the process be gone."""
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self.pipe.close()


def _report(name: str, examine: Examine, pipe: Connection) -> None:
    torch.set_num_threads(1)  # tiny matrices: threads would only wait for each other
    with contextlib.redirect_stdout(io.StringIO()):  # some models print
        try:
            row = examine(name)
        except Exception as error:  # of the checks themselves, or of closing what they opened
            row = _failed(name, f"the checks raised {brief(error)}")
        pipe.send(row)
    pipe.close()


def _failed(name: str, reason: str) -> Row:
    return Row(name, architectures()[name], outcomes={"generates": Outcome("failed", reason)})
