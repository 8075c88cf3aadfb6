"""Several processes share one folder, and processes end in every way there is."""

from __future__ import annotations

import multiprocessing
import os
import random
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from kvtier import PrefixStore, TieredCache
from tests.support import samples, stores
from tests.support.stores import (
    block_files,
    bytes_on_disk,
    commit,
    count,
    ids,
    leftovers,
    restored_length,
    restored_length_at_last,
)

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="processes end in other ways here"),
    pytest.mark.sample(2, of="processes"),  # of 19
]


# --- code that runs in other processes: importable, and without fixtures ----------------------------------------------


def work(folder: str, seed: int, rounds: int, settings: dict[str, Any]) -> list[list[int]]:
    """Commit and read random chains; return the committed chains. Wrong bytes raise."""
    dice, committed = random.Random(seed), []
    with PrefixStore(folder, **settings) as store:
        for _ in range(rounds):
            begin = dice.choice(committed) if committed and dice.random() < 0.7 else []
            tokens = begin[: dice.randint(0, len(begin))] + [dice.randint(1, 2) for _ in range(dice.randint(1, 9))]
            tokens = tokens[:24]
            if dice.random() < 0.6:
                commit(store, ids(*tokens))
                committed.append(tokens)
            restored_length_at_last(store, ids(*tokens))
    return committed


def model_of_two_layers() -> PreTrainedModel:
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.generation_config.pad_token_id = 0
    return model


def say(folder: str, prompt: list[int]) -> tuple[list[int], dict[str, int], int]:
    """Run a turn of a conversation; return its tokens, the cached tokens by tier, and the process id."""
    torch.set_num_threads(1)
    with TieredCache(folder) as cache:
        found = model_of_two_layers().generate(
            torch.tensor([prompt]), past_key_values=cache, max_new_tokens=6, do_sample=False, suppress_tokens=[0]
        )
        return found[0].tolist(), dict(cache.last_turn.cached_by_tier), os.getpid()


@pytest.fixture(scope="module")
def others():
    """Two other processes."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


# Runs a script in a new interpreter, where an unclosed resource is an error.
script = partial(stores.run_python, options=("-W", "error::ResourceWarning"))


# --- at the same time -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"host_budget": 1}, {"compression": "zstd"}], ids=["warm", "cold", "zstd"])
def test_two_processes_commit_and_read_at_the_same_time(tmp_path, others, settings):
    settings = {"block_size": 4, **settings}
    working = [others.submit(work, str(tmp_path), seed, 120, settings) for seed in (1, 2)]
    committed = [tokens for each in working for tokens in each.result()]
    assert leftovers(tmp_path) == []
    with PrefixStore(tmp_path, **settings) as store:
        for tokens in committed:
            assert restored_length(store, ids(*tokens)) == len(tokens)


def test_two_processes_share_a_disk_budget(tmp_path, others):
    settings = {"block_size": 4, "disk_budget": 6 * stores.UNIT, "host_budget": 500}
    working = [others.submit(work, str(tmp_path), seed, 120, settings) for seed in (1, 2)]
    committed = [tokens for each in working for tokens in each.result()]
    assert leftovers(tmp_path) == []
    assert 0 < bytes_on_disk(tmp_path) <= 6 * stores.UNIT
    files = block_files(tmp_path)
    with PrefixStore(tmp_path, **settings) as store:
        assert block_files(tmp_path) == files, "files that no catalog knows"
        known = [restored_length_at_last(store, ids(*tokens)) for tokens in committed]
    assert 0 < sum(known) < sum(map(len, committed))


def test_commits_of_one_process_are_visible_in_another_at_once(tmp_path, others):
    chain = count(10).tolist()
    with PrefixStore(tmp_path, block_size=4) as store:
        assert others.submit(stores.commit_in_another_process, str(tmp_path), chain).result() == 10
        assert restored_length(store, ids(*chain)) == 10
        assert commit(store, count(14)) == 6  # the tail block of 2 grows to a block of 4, and 2 more tokens
        store.flush()
        assert others.submit(stores.read_in_another_process, str(tmp_path), count(14).tolist()).result() == 14
        assert others.submit(stores.commit_in_another_process, str(tmp_path), count(14).tolist()).result() == 0


def test_second_store_in_this_process_takes_no_lock_from_the_first(tmp_path, others):
    """File locks belong to a process. Without them, another process that ends would delete the catalog's log."""
    first, theirs, last = (count(8, first=n).tolist() for n in (0, 100, 200))
    with PrefixStore(tmp_path, block_size=4) as store:
        commit(store, ids(*first))
        store.flush()
        PrefixStore(tmp_path, block_size=4).close()
        others.submit(stores.commit_in_another_process, str(tmp_path), theirs).result()
        commit(store, ids(*last))
        store.flush()
        assert others.submit(stores.read_in_another_process, str(tmp_path), last).result() == 8
        assert restored_length(store, ids(*theirs)) == 8
    with PrefixStore(tmp_path, block_size=4) as store:
        assert [restored_length(store, ids(*tokens)) for tokens in (first, theirs, last)] == [8, 8, 8]


# --- one after the other ----------------------------------------------------------------------------------------------


def test_conversation_continues_exactly_in_another_process(tmp_path, others):
    said, reused, _ = say(str(tmp_path), list(range(1, 21)))
    assert reused == {"device": 0, "host": 0, "disk": 0}
    for turn in range(2):
        prompt = [*said, 7, 8, 9 + turn]
        (expected,) = model_of_two_layers().generate(
            torch.tensor([prompt]), max_new_tokens=6, do_sample=False, suppress_tokens=[0]
        )
        said, reused, process = others.submit(say, str(tmp_path), prompt).result()
        assert process != os.getpid()
        assert said == expected.tolist()
        assert reused == {"device": 0, "host": 0, "disk": len(prompt) - 4}


FORGETFUL = """
import sys
from tests.support.stores import commit, count
from kvtier import PrefixStore
store = PrefixStore(sys.argv[1], block_size=4)
commit(store, count(400))  # a hundred blocks: most are still to be written when the script ends
{ending}
"""


@pytest.mark.parametrize(
    ("ending", "code"),
    [("", 0), ("raise RuntimeError('the end')", 1)],
    ids=["end", "exception"],
)
def test_process_that_ends_without_close_loses_no_blocks(tmp_path, ending, code):
    done = script(FORGETFUL.format(ending=ending), tmp_path)
    assert done.returncode == code, done.stderr
    with PrefixStore(tmp_path, block_size=4) as store:
        assert restored_length(store, count(400)) == 400


# Forked children: none of them closes its store, and each ends in another way.
FORKED = """
import multiprocessing, os, signal, sys
from tests.support.stores import commit, count
from kvtier import PrefixStore
from kvtier.store.tiers.disk.tier import DiskTier

os.fsync = lambda fd: None
folder, whose, log = sys.argv[1:4]
put = DiskTier.put

def logged(tier, block, **how):
    with open(log, "a") as file:
        print(os.getpid(), block.id.key, file=file)
    return put(tier, block, **how)

DiskTier.put = logged
settings = {"block_size": 4, "host_budget": 200_000}
store = PrefixStore(folder, **settings)

def child():
    signal.alarm(60)  # a child that hangs is a failure, not a test that never ends
    if whose == "its own":
        child.store = PrefixStore(folder, **settings)
    commit(child.store, count(200, first=1000))

child.store = store
commit(store, count(200))  # fifty blocks: most are still to be written when the process forks
"""
BY_MULTIPROCESSING = """
process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join()
assert process.exitcode == 0, process.exitcode
"""
BY_OS = """
pid = os.fork()
if pid == 0:
    child()
    sys.exit()
assert os.waitpid(pid, 0)[1] == 0
"""


@pytest.mark.parametrize("whose", ["its own", "its parent's"])
@pytest.mark.parametrize("fork", [BY_MULTIPROCESSING, BY_OS], ids=["multiprocessing", "os.fork"])
def test_forked_child_that_ends_without_close_loses_no_blocks_and_writes_none_twice(tmp_path, fork, whose):
    log = tmp_path / "log"
    done = script(FORKED + fork, tmp_path / "store", whose, log)
    assert done.returncode == 0, done.stderr
    with PrefixStore(tmp_path / "store", block_size=4) as store:
        assert restored_length(store, count(200)) == 200
        assert restored_length(store, count(200, first=1000)) == 200
    written = [line.split() for line in log.read_text().splitlines()]
    assert len({process for process, _ in written}) == 2
    assert len({key for _, key in written}) == len(written) == 100, "a child that wrote what its parent had queued"


# A thread is in the middle of an operation when another thread forks.
BUSY = """
import os, signal, sys, threading
from functools import partial
from tests.support.stores import commit, count, restored_length
from kvtier import PrefixStore
from kvtier.store.tiers.disk.catalog.ranking import Session
from kvtier.store.tiers.disk.folder import StoreFolder
from kvtier.store.open_stores import StoreHandle

folder = sys.argv[1]
busy, go_on = threading.Event(), threading.Event()

def hold_up(owner, name):
    original = getattr(owner, name)
    def held_up(*arguments):
        busy.set()
        assert go_on.wait(60)
        return original(*arguments)
    setattr(owner, name, held_up)

# What a fork waits for goes on just before it; what it does not wait for, after.
when = ("after_in_parent", "after_in_child") if sys.argv[2] == "the start of a writer" else ("before",)
os.register_at_fork(**dict.fromkeys(when, go_on.set))
store = PrefixStore(folder, block_size=4)
if sys.argv[2] == "a transaction":
    hold_up(Session, "entered")
    commit(store, count(4))
elif sys.argv[2] == "the start of a writer":
    committing = threading.Thread(target=commit, args=(store, count(4)))
    committing.start = partial(committing.start)  # itself, not the one that is held up
    hold_up(threading.Thread, "start")
    committing.start()
else:
    hold_up(StoreFolder, "_check_version")
    threading.Thread(target=StoreHandle, args=(folder,)).start()
assert busy.wait(60)
pid = os.fork()
if pid == 0:
    signal.alarm(60)
    commit(StoreHandle(folder).store, count(20, first=2000))
    commit(store, count(20, first=1000))
    sys.exit()
assert os.waitpid(pid, 0)[1] == 0
"""


@pytest.mark.parametrize("what", ["a transaction", "the start of a writer", "the making of a shared store"])
def test_child_forked_while_a_thread_is_busy_can_commit(tmp_path, what):
    done = script(BUSY, tmp_path, what)
    assert done.returncode == 0, done.stderr
    with PrefixStore(tmp_path, block_size=4) as store:
        assert restored_length(store, count(20, first=1000)) == 20
    with PrefixStore(tmp_path) as store:  # with the block size of a shared store
        assert restored_length(store, count(20, first=2000)) == 20


# SQLite must not mistake the parent's locks for the child's: closing last, the parent would delete the log.
OUTLIVED = """
import multiprocessing, sys
from tests.support.stores import commit, count
from kvtier import PrefixStore

context = multiprocessing.get_context("fork")
began, alone = context.Event(), context.Event()

def child(whose, store):
    if whose == "its own":
        store = PrefixStore(sys.argv[1], block_size=4)
    commit(store, count(20, first=1000))
    store.flush()
    began.set()
    assert alone.wait(60)
    commit(store, count(20, first=2000))

store = PrefixStore(sys.argv[1], block_size=4)
commit(store, count(20))
process = context.Process(target=child, args=(sys.argv[2], store))
process.start()
assert began.wait(60)
store.close()
with PrefixStore(sys.argv[1], block_size=4) as store:
    commit(store, count(20, first=3000))
    store.flush()
    alone.set()
    process.join()
    assert process.exitcode == 0, process.exitcode
    commit(store, count(20, first=4000))
"""


@pytest.mark.parametrize("whose", ["its own", "its parent's"])
def test_forked_child_keeps_committing_after_its_parent_closes_the_store(tmp_path, whose):
    done = script(OUTLIVED, tmp_path, whose)
    assert done.returncode == 0, done.stderr
    with PrefixStore(tmp_path, block_size=4) as store:
        assert [restored_length(store, count(20, first=n)) for n in range(0, 5000, 1000)] == [20] * 5


# Each call that changes a file or a folder is the last call of a process, every fifth of them in a usual run.
STRIDE = 1 if samples.seed() == "all" else 5
MORTAL = """
import os, signal, sys
from pathlib import Path
from tests.support.stores import UNIT, commit, count
from kvtier import PrefixStore

os.fsync = lambda fd: None  # a killed process is no power cut: what was written is there

def live(folder, budget, last, after):
    calls = 0
    def mortal(call):
        def called(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == last and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*args, **kwargs)
            if calls == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return called
    for name in ("open", "mkdir", "fsync", "replace", "unlink"):
        setattr(os, name, mortal(getattr(os, name)))
    with PrefixStore(folder, block_size=4, disk_budget=budget) as store:
        for tokens in (count(6), count(10), count(9, first=50)):
            commit(store, tokens)
            store.flush()

for budget, after in ((10**9, False), (3 * UNIT, False), (3 * UNIT, True)):
    stride, status = int(sys.argv[2]), signal.SIGKILL
    last = 1 + 2 * after % stride
    while status == signal.SIGKILL:
        folder = Path(sys.argv[1]) / f"{budget}-{after}-{last}"
        pid = os.fork()
        if pid == 0:
            try:
                live(folder, budget, last, after)
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitpid(pid, 0)[1]
        last += stride
    assert status == 0, status
"""


def test_store_survives_a_process_killed_at_any_file_system_call(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    done = script(MORTAL, tmp_path, STRIDE)
    assert done.returncode == 0, done.stderr
    folders = sorted(tmp_path.iterdir())
    assert len(folders) > 90 / STRIDE
    chains = (count(6), count(10), count(9, first=50))
    for folder in folders:
        budget = int(folder.name.split("-")[0])
        settings = {"block_size": 4, "disk_budget": budget}
        with PrefixStore(folder, **settings) as store:
            assert leftovers(folder) == [], folder.name
            assert bytes_on_disk(folder) <= budget
            for tokens in chains:
                restored_length_at_last(store, tokens)  # all restored bytes are right
            for tokens in chains:
                commit(store, tokens)
                store.flush()
                assert bytes_on_disk(folder) <= budget
        with PrefixStore(folder, **settings) as store:
            found = [restored_length_at_last(store, tokens) for tokens in chains]
            assert found[-1] == 9
            assert budget < 10**9 or found == [6, 10, 9]
