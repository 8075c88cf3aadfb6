"""Many processes and threads use one store folder, while an outside observer measures its size.

Like ``crashes``, it must run in a separate interpreter, which forks the workers.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import select
import signal
import sqlite3
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kvtier import PrefixStore, StoreError
from tests.support.crashes import DESCRIPTORS, HUNG_SECONDS, assert_sound, ended, fork, some_chain
from tests.support.stores import ROOT, commit, ids, restored_length_at_last

UNIT = 4096
SECONDS_A_TURN = 2
BOUND_SECONDS = 2.0  # longest time that a turn waits for others
SLACK_SECONDS = 4.0  # for its own work, on a busy machine
SETTINGS: dict[str, Any] = {
    "block_size": 4,
    "host_budget": 3_000,  # a few blocks, so that most come from files
    "disk_budget": 40 * UNIT,
    "free_space_floor": 0,
    "durability": "lazy",
}


# --- measuring from outside -------------------------------------------------------------------------------------------


def files_now(folder: Path) -> dict[tuple[int, int], int]:
    """Return the size on the drive of each block file, keyed by properties that a rename keeps."""
    found = {}
    for path in (folder / "blocks").rglob("*"):
        try:
            state = path.lstat()
        except FileNotFoundError:  # deleted since it was listed
            continue
        if path.suffix in (".safetensors", ".tmp"):
            found[state.st_ino, state.st_mtime_ns] = state.st_blocks * 512
    return found


def weighed(folder: Path) -> int:
    """Return a lower bound of the bytes that block files took at one moment.

    A walk through the folder takes time, and files disappear and appear meanwhile. A file seen by two successive walks
    existed between them, together with all other such files.
    """
    before, after = files_now(folder), files_now(folder)
    return sum(min(nbytes, after[file]) for file, nbytes in before.items() if file in after)


# --- working ----------------------------------------------------------------------------------------------------------


def turn(store: PrefixStore, dice: random.Random, known: list[list[int]], mine: str) -> int:
    """Run a turn or a manual operation; return the number of restored tokens. Wrong bytes raise."""
    tokens = some_chain(dice, known)
    back = restored_length_at_last(store, ids(*tokens))
    deed = dice.random()
    if deed < 0.7:
        commit(store, ids(*tokens))
        known.append(tokens)
        del known[:-20]
    elif deed < 0.76:
        commit(store, ids(*tokens))
        store.flush()
        name_and_pin(store, f"{mine} {dice.randint(0, 1)}", tokens, dice.random() < 0.2)
    elif deed < 0.8:
        for named in store.names():
            if named.name.startswith(f"{mine} "):
                store.forget(named.name)
    elif deed < 0.82:
        store.prune(to_bytes=dice.randint(0, SETTINGS["disk_budget"]))
    elif deed < 0.83:
        store.verify(repair=dice.random() < 0.5)
    elif deed < 0.88:
        store.flush()
        store.stats()
    return back


def name_and_pin(store: PrefixStore, name: str, tokens: list[int], pin: bool) -> None:
    """Name ``tokens`` unless some of them were evicted; a pinned prefix that was complete stays complete."""
    try:
        named = store.name(name, ROOT, ids(*tokens), pin=pin)
    except StoreError as error:
        if "does not have all" in str(error):
            return
        raise
    assert named.kept_tokens <= named.tokens == len(tokens)
    if pin:
        if named.kept_tokens == named.tokens:
            assert restored_length_at_last(store, store.tokens_of(name)) == named.tokens
        store.unpin(name)


def work(folder: Path, seed: int, turns: int) -> None:
    """Run ``turns`` turns with a private store."""
    dice, known = random.Random(seed), []
    with PrefixStore(folder, **SETTINGS) as store:
        for _ in range(turns):
            turn(store, dice, known, f"process {seed}")


def work_in_hardship(folder: Path, seed: int, turns: int) -> None:
    """Run ``turns`` turns with few file descriptors and a locked catalog at times, and fork now and then."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
    dice, known = random.Random(seed), []
    with PrefixStore(folder, **SETTINGS) as store:
        for _ in range(turns):
            deed = dice.random()
            if deed < 0.2:
                with contextlib.suppress(StoreError):  # the catalog is locked: unlike a turn, a manual operation raises
                    turn(store, dice, known, f"process {seed}")
                continue
            tokens = some_chain(dice, known)
            began = time.monotonic()
            restored_length_at_last(store, ids(*tokens))
            commit(store, ids(*tokens))
            seconds = time.monotonic() - began
            assert seconds < BOUND_SECONDS + SLACK_SECONDS, f"a turn took {seconds:.1f} s"
            known.append(tokens)
            del known[:-20]
            if deed < 0.3:
                assert ended(fork(one_turn, store, tokens, hung_seconds=None)) == 0


def one_turn(store: PrefixStore, tokens: list[int]) -> None:
    """Continue, in a child, with a store that its parent may be using in any way."""
    restored_length_at_last(store, ids(*tokens))
    commit(store, ids(*tokens, 7, 7, 7))
    store.close()


def lock_now_and_then(folder: Path, seed: int, parent: int) -> None:
    """Lock the catalog for a while, repeatedly, like a process that is stopped while it writes.

    The first lock waits for the first block on disk: in a short race, the workers might write none otherwise.
    """
    dice = random.Random(seed)
    uri = f"{(folder / 'catalog.sqlite').as_uri()}?mode=rw"
    has_blocks = False
    while os.getppid() == parent:
        # The file does not exist yet, or another process has it locked.
        with contextlib.suppress(sqlite3.OperationalError), contextlib.closing(sqlite3.connect(uri, uri=True)) as held:
            held.execute("BEGIN IMMEDIATE")
            has_blocks = has_blocks or held.execute("SELECT ready FROM total").fetchone()[0] > 0
            time.sleep(dice.random() * 2 * BOUND_SECONDS if has_blocks else 0)
        time.sleep(dice.random() * BOUND_SECONDS if has_blocks else 0.01)


def work_in_threads(folder: Path, seed: int, threads: int, turns: int) -> None:
    """Run ``turns`` turns in each of ``threads`` threads that share a store."""
    failures: list[str] = []

    def one(number: int) -> None:
        dice, known = random.Random(seed + number), []
        try:
            for _ in range(turns):
                turn(store, dice, known, f"thread {number}")
                if failures:
                    return
        except BaseException:
            failures.append(traceback.format_exc())

    with PrefixStore(folder, **SETTINGS) as store:
        working = [threading.Thread(target=one, args=(number,)) for number in range(threads)]
        for thread in working:
            thread.start()
        for thread in working:
            thread.join()
    assert not failures, failures[0]


def end(folder: Path) -> None:
    """Check the remaining folder."""
    with PrefixStore(folder, **SETTINGS) as store:
        assert_sound(store)


# --- the race ---------------------------------------------------------------------------------------------------------


def race(
    folder: Path,
    workers: list[tuple[Any, ...]],
    turns: int,
    seed: int,
    before_the_end: Callable[[], None] = lambda: None,
) -> None:
    """Fork workers, measure the folder at random moments until all have ended, and check it. Prints the results."""
    torch.set_num_threads(1)
    dice = random.Random(seed)
    (folder / "blocks").mkdir(parents=True, mode=0o700)
    began = time.monotonic()
    all_ended, held = os.pipe()  # each worker holds it while it lives
    living = [fork(*worker, hung_seconds=HUNG_SECONDS + SECONDS_A_TURN * turns) for worker in workers]
    os.close(held)
    weights = []
    while not select.select([all_ended], [], [], dice.random() * 0.02)[0]:
        weights.append(weighed(folder))
    os.close(all_ended)
    codes = [ended(pid) for pid in living]
    before_the_end()
    if any(codes) or ended(fork(end, folder)):
        sys.exit(f"the workers ended with {codes}; see above for what went wrong")
    print(json.dumps({"weighings": len(weights), "heaviest": max(weights), "seconds": time.monotonic() - began}))


def processes(folder: str, number: int, turns: int, seed: int) -> None:
    """Race ``number`` processes."""
    race(Path(folder), [(work, Path(folder), seed + n, turns) for n in range(number)], turns, seed)


def hardship(folder: str, number: int, turns: int, seed: int) -> None:
    """Race ``number`` processes with few descriptors, beside a process that locks the catalog for seconds."""
    locker = fork(lock_now_and_then, Path(folder), seed, os.getpid(), hung_seconds=None)

    def stop_locking() -> None:
        os.kill(locker, signal.SIGKILL)
        ended(locker)

    workers = [(work_in_hardship, Path(folder), seed + n, turns) for n in range(number)]
    race(Path(folder), workers, turns, seed, stop_locking)


def threads(folder: str, number: int, turns: int, seed: int) -> None:
    """Race ``number`` threads of one process."""
    race(Path(folder), [(work_in_threads, Path(folder), seed, number, turns)], turns, seed)
