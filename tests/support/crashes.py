"""Processes that are killed at random moments while they use a store, and checks of the folder they leave.

It must run in a separate interpreter that starts no thread. It forks a worker for each life, so that torch is imported
once, and another child for each check of the folder. ``python -c "from tests.support import crashes; …"``.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import random
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kvtier import PrefixStore
from kvtier.platform.filesystem import LOCAL
from tests.support.stores import ROOT, block_files, commit, ids, leftovers, restored_length, restored_length_at_last

SETTINGS: dict[str, Any] = {"block_size": 4, "host_budget": 20_000, "free_space_floor": 0}
BUDGETS = {"roomy": 2**30, "tight": 20 * 4096}
KILLS_A_FOLDER = 10
LONGEST_LIFE_SECONDS = 0.3
HUNG_SECONDS = 120
DESCRIPTORS = 64  # file descriptors that a worker may open


@contextlib.contextmanager
def quick_folder() -> Iterator[Path]:
    """A new folder, in RAM if the system supports it: these tests are about dying processes, not about drives."""
    ram = Path("/dev/shm")
    usable = ram.is_dir() and os.access(ram, os.W_OK) and LOCAL.free_bytes(ram) > 2**26
    with tempfile.TemporaryDirectory(prefix="store-of-tests-", dir=ram if usable else None) as folder:
        yield Path(folder)


# --- children ---------------------------------------------------------------------------------------------------------


def fork(task: Callable[..., object], *arguments: object, hung_seconds: float | None = HUNG_SECONDS) -> int:
    """Run ``task`` in a child that exits with 0, or with 1 and a traceback. Returns its process id.

    A child that takes ``hung_seconds`` ends with a traceback of all its threads. A child of such a child needs None: it
    would wait forever on its parent's watchdog, which it lacks.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about threads that a child lacks: stores handle theirs
        pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if hung_seconds is not None:
            faulthandler.dump_traceback_later(hung_seconds, exit=True)
        task(*arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int) -> int:
    """Wait for a child; return its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# --- checking a store -------------------------------------------------------------------------------------------------


def accounted_bytes(folder: Path) -> int:
    """Return the size of the block files in whole allocation units of their drive, counted from scratch."""
    return sum(LOCAL.allocated_bytes(folder, path.stat().st_size) for path in block_files(folder))


def bytes_on_drive(folder: Path) -> int:
    """Return the size of the block files as the drive reports it, including half-written files."""
    return sum(path.stat().st_blocks * 512 for path in (folder / "blocks").rglob("*") if path.is_file())


def assert_sound(store: PrefixStore) -> None:
    """Assert that the folder of ``store``, which has no other user, has no problem, and that every byte is counted."""
    store.flush()
    report = store.verify()
    assert report.problems == (), report.problems
    assert report.blocks == len(block_files(store.path))
    (disk,) = (tier for tier in store.stats().tiers if tier.tier == "disk")
    assert disk.nbytes == accounted_bytes(store.path) <= disk.budget_bytes
    assert disk.blocks == report.blocks
    assert leftovers(store.path) == []


# --- the life of a worker ---------------------------------------------------------------------------------------------


def some_chain(dice: random.Random, known: list[list[int]]) -> list[int]:
    """Return a sequence that often shares its beginning with a known one."""
    begin = dice.choice(known) if known and dice.random() < 0.7 else []
    return (begin[: dice.randint(0, len(begin))] + [dice.randint(1, 2) for _ in range(dice.randint(1, 12))])[:28]


def live(folder: Path, seed: int, tell: int, settings: dict[str, Any]) -> None:
    """Use a store until killed. Write one line per event to ``tell``, for ``Told`` to read."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
    dice, known, roomy = random.Random(seed), [], settings["disk_budget"] == BUDGETS["roomy"]

    def say(word: str, name: str = "", tokens: list[int] | None = None) -> None:
        os.write(tell, json.dumps([word, name, tokens]).encode() + b"\n")

    with PrefixStore(folder, **settings) as store:
        say("opened")
        while True:
            tokens = some_chain(dice, known)
            deed = dice.random()
            if deed < 0.5:
                commit(store, ids(*tokens))
                known.append(tokens)
                if dice.random() < 0.5:
                    store.flush()
                    say("kept", "", tokens)
            elif deed < 0.75:
                restored_length_at_last(store, ids(*tokens))
            elif deed < 0.95:
                name = f"{seed} {len(known)} ✓"
                mine = [10 + seed * 10_000 + len(known), *tokens]  # no other sequence begins like this
                known.append([])
                commit(store, ids(*mine))
                store.flush()
                if store.name(name, ROOT, ids(*mine), pin=True).kept_tokens == len(mine):
                    say("pinned", name, mine)
                if not roomy or dice.random() < 0.3:  # otherwise pins would fill the drive
                    say("forgetting", name, mine)
                    store.forget(name)
                    say("forgotten", name, mine)
            elif roomy:
                store.verify()
            else:
                store.prune(to_bytes=dice.randint(0, settings["disk_budget"]))


@dataclass
class Told:
    """Reports of dead workers: ``kept`` chains were flushed, ``pinned`` chains too, ``forgotten`` chains are gone.

    A chain that was in ``forgetting`` when its process died may exist or not.
    """

    kept: list[list[int]] = field(default_factory=list)
    pinned: dict[str, list[int]] = field(default_factory=dict)
    forgotten: dict[str, list[int]] = field(default_factory=dict)
    opened: int = 0
    words: int = 0

    def hear(self, line: bytes) -> None:
        word, name, tokens = json.loads(line)
        self.words += 1
        if word == "opened":
            self.opened += 1
        elif word == "kept":
            self.kept.append(tokens)
        elif word == "pinned":
            self.pinned[name] = tokens
        elif word == "forgetting":
            self.pinned.pop(name, None)
        else:
            self.forgotten[name] = tokens


def look(folder: Path, settings: dict[str, Any], told: Told) -> None:
    """Open the folder that dead processes left, as the next process does, and compare it with their reports."""
    assert bytes_on_drive(folder) <= settings["disk_budget"]
    with PrefixStore(folder, **settings) as store:
        assert_sound(store)
        names = {named.name: named for named in store.names()}
        for name, tokens in told.pinned.items():
            assert names[name].pinned
            assert store.tokens_of(name).tolist() == tokens
            assert restored_length(store, ids(*tokens)) == len(tokens), (name, tokens)
        for name, tokens in told.forgotten.items():
            assert name not in names
            assert restored_length(store, ids(*tokens)) == 0, (name, tokens)
        for tokens in told.kept:
            length = restored_length(store, ids(*tokens))
            assert length == len(tokens) or settings["disk_budget"] == BUDGETS["tight"], (length, tokens)
        commit(store, ids(*[9] * 6))
        store.flush()
        assert restored_length(store, ids(*[9] * 6)) == 6
        assert_sound(store)


# --- killing ----------------------------------------------------------------------------------------------------------


def lines_until(fd: int, end: float, rest: bytearray) -> Iterator[bytes]:
    """Yield the lines from ``fd`` until ``end`` on the monotonic clock, or until all writers have closed it.

    ``rest`` keeps the beginning of a line for the next call.
    """
    while select.select([fd], [], [], max(0.0, end - time.monotonic()))[0]:
        data = os.read(fd, 65536)
        if not data:
            return
        rest += data
        *whole, last = bytes(rest).split(b"\n")
        rest[:] = last
        yield from whole


def kill_some(folder: Path, dice: random.Random, settings: dict[str, Any], told: Told, workers: int) -> None:
    """Run ``workers`` workers in ``folder`` at once, and kill each at some moment."""
    hear, tell = os.pipe()
    rest = bytearray()
    try:
        living = {}
        for _ in range(workers):
            seconds = dice.random() * (LONGEST_LIFE_SECONDS if dice.random() < 0.7 else LONGEST_LIFE_SECONDS / 8)
            chosen = {**settings, "durability": dice.choice(["lazy", "lazy", "full"])}
            living[fork(live, folder, dice.randrange(10**6), tell, chosen)] = time.monotonic() + seconds
        os.close(tell)
        tell = -1
        for pid, end in sorted(living.items(), key=lambda item: item[1]):
            for line in lines_until(hear, end, rest):
                told.hear(line)
            os.kill(pid, signal.SIGKILL)
            code = ended(pid)
            assert code == -signal.SIGKILL, f"a worker ended by itself: {code}"
        for line in lines_until(hear, time.monotonic() + HUNG_SECONDS, rest):
            told.hear(line)
        assert not rest
    finally:
        os.close(hear)
        if tell >= 0:
            os.close(tell)


def main(place: str, room: str, kills: int, seed: int) -> None:
    """Kill ``kills`` workers in folders below ``place``, and check each folder afterwards. Prints the counts."""
    torch.set_num_threads(1)
    dice = random.Random(seed)
    settings = {**SETTINGS, "disk_budget": BUDGETS[room]}
    killed = folders = opened = words = 0
    while killed < kills:
        folder, told = Path(place) / f"{room}-{folders}", Told()
        folders += 1
        for _ in range(KILLS_A_FOLDER):
            workers = min(dice.choice([1, 2, 2, 3, 4]), kills - killed)
            kill_some(folder, dice, settings, told, workers)
            killed += workers
            if ended(fork(look, folder, settings, told)):
                raise SystemExit(f"what {killed} kills with seed {seed} left in {folder} is not what it should be")
            if killed >= kills:
                break
        opened += told.opened
        words += told.words
    print(json.dumps({"killed": killed, "opened": opened, "words": words}))
