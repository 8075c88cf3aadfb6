"""Files of a store are damaged in any way: restored K and V are exact, or are recomputed.

Each round damages a copy of a healthy folder and opens it. Opening may fail only if ``kvtier.json`` is damaged.
Everything else works, with every byte compared.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sqlite3
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from kvtier import PrefixStore, StoreError, StoreVersionError, TieredCache
from tests.support.stores import ROOT, commit, count, ids, restored_length, restored_length_at_last

SETTINGS = {"block_size": 4, "host_budget": 1}  # no block fits into RAM: every cache hit comes from files
PARTS = 10 if settings().max_examples <= 100 else 21  # rounds are split, so that a failing round is found fast
ROUNDS = 100 * PARTS
SEQUENCES = (count(11), ids(*range(6), *range(50, 57)))  # both begin with the same tokens


@pytest.fixture(autouse=True)
def _no_power_cuts(monkeypatch):
    """No power fails in these tests: waiting for the drive would only cost time."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory) -> Path:
    """A store of two sequences, the first as raw files; its catalog has a write-ahead log, as after a crash."""
    folder, crashed = tmp_path_factory.mktemp("healthy") / "store", tmp_path_factory.mktemp("crashed") / "store"
    with PrefixStore(folder, **SETTINGS, compression="raw") as store:
        commit(store, SEQUENCES[0])
    with PrefixStore(folder, **SETTINGS, compression="zstd") as store:
        for tokens in SEQUENCES:
            commit(store, tokens)
        store.flush()
        shutil.copytree(folder, crashed)
    assert (crashed / "catalog.sqlite-wal").stat().st_size > 0
    return crashed


@dataclass(frozen=True)
class Damage:
    """The kind of damage, and the damaged file."""

    how: str
    path: Path


def _flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 3, 20)) if data else 0):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size + 1))


def _zero(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data) + 1)
    stop = min(len(data), at + rng.choice((1, 16, 512, 4096)))
    data[at:stop] = bytes(stop - at)
    path.write_bytes(data)


def _grow(path: Path, rng: random.Random) -> None:
    with path.open("ab") as file:
        file.write(rng.randbytes(rng.choice((1, 8, 4096))))


def _garble(path: Path, rng: random.Random) -> None:
    path.write_bytes(rng.randbytes(rng.choice((0, 1, 100, 5000))))


def _delete(path: Path, rng: random.Random) -> None:
    path.unlink()


ALONE = {f.__name__.strip("_"): f for f in (_flip, _truncate, _zero, _grow, _garble, _delete)}


def damage_one(folder: Path, rng: random.Random) -> Damage:
    """Damage one file below ``folder``: block files as often as all other files together."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    blocks = [path for path in files if path.suffix == ".safetensors"]
    others = [path for path in files if path.suffix != ".safetensors" and path.suffix != ".lock"]
    path = rng.choice(blocks if blocks and (rng.random() < 0.5 or not others) else others)
    how = rng.choice(["flip", "flip", "truncate", "zero", "grow", "garble", "delete", "swap", "swap"])
    if how == "swap":
        other = rng.choice(blocks if rng.random() < 0.8 and blocks else files)
        mine, theirs = path.read_bytes(), other.read_bytes()
        path.write_bytes(theirs)
        other.write_bytes(mine)
        if other.name == "kvtier.json":
            path = other
    else:
        ALONE[how](path, rng)
    return Damage(how, path)


def used_again(folder: Path, *, check: bool) -> int:
    """Use a folder as turns do, compare every restored byte, and return the number of restored tokens.

    With ``check``, also compare the blocks that were stored again.
    """
    found = 0
    with PrefixStore(folder, **SETTINGS) as store:
        for tokens in SEQUENCES:
            found += restored_length_at_last(store, tokens)
            commit(store, tokens)
        if check:
            store.flush()
            for tokens in SEQUENCES:
                restored_length_at_last(store, tokens)
    return found


def refusal(error: Exception, folder: Path, damages: list[Damage]) -> bool:
    """Whether opening may fail with this error."""
    marker = any(damage.path.name == "kvtier.json" for damage in damages)
    return marker and type(error) in (StoreError, StoreVersionError) and str(folder) in str(error)


@pytest.mark.sample(2, of="damaged stores")  # of 22
@pytest.mark.parametrize("part", range(PARTS))
def test_restored_bytes_are_exact_after_any_damage(tmp_path, healthy, part):
    seen, found = set(), []
    whole = sum(map(len, SEQUENCES))
    for round_ in range(part, ROUNDS, PARTS):
        rng = random.Random(round_)
        folder = tmp_path / f"store-{round_}"
        shutil.copytree(healthy, folder)
        damages = [damage_one(folder, rng) for _ in range(rng.choice((1, 1, 1, 2, 4)))]
        try:
            found.append(used_again(folder, check=round_ % 4 == 0))
        except Exception as error:
            if not refusal(error, folder, damages):
                raise AssertionError(f"round {round_}: {damages}") from error
        seen.update(damage.how for damage in damages)
        shutil.rmtree(folder)
    assert len(seen) == len(ALONE) + 1
    assert sum(found) > len(found) * whole / 2  # most tokens were restored
    assert min(found) < whole  # and not all of them


@pytest.mark.parametrize("damage", ["flip", "truncate", "zero", "swap"])
def test_damaged_blocks_are_written_again_and_restored_afterwards(tmp_path, healthy, damage):
    """Damaged blocks are written again once they are found, and are restored from then on."""
    for round_ in range(8):
        rng = random.Random(round_)
        folder = tmp_path / f"store-{round_}"
        shutil.copytree(healthy, folder)
        one, other = rng.sample(sorted(folder.rglob("*.safetensors")), 2)
        if damage == "swap":
            one.write_bytes(other.read_bytes())
        else:
            ALONE[damage](one, rng)
        used_again(folder, check=False)
        with PrefixStore(folder, **SETTINGS) as store:
            assert [restored_length(store, tokens) for tokens in SEQUENCES] == [len(tokens) for tokens in SEQUENCES]


ANYTHING = (None, 7, -1, 2**62, 1.5, "text", "", b"", bytes(5), bytes(32), b"\xff" * 40)


@pytest.mark.sample(2, of="damaged stores")  # of 22
@pytest.mark.parametrize("value", ANYTHING, ids=lambda value: repr(value)[:12])
def test_any_value_in_any_catalog_column_is_treated_as_damage(tmp_path, healthy, value):
    """A flipped bit may change the type of a value, or the value itself."""
    names = tmp_path / "names"
    shutil.copytree(healthy, names)
    with PrefixStore(names, **SETTINGS) as store:
        store.name("a talk", ROOT, SEQUENCES[0], pin=True)
    with contextlib.closing(sqlite3.connect(names / "catalog.sqlite")) as catalog:
        tables = [name for (name,) in catalog.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        columns = [(table, row[1]) for table in tables for row in catalog.execute(f"PRAGMA table_info({table})")]
    assert len(columns) > 20
    for table, column in columns:
        folder = tmp_path / f"{table}-{column}"
        shutil.copytree(names, folder)
        with contextlib.closing(sqlite3.connect(folder / "catalog.sqlite", isolation_level=None)) as catalog:
            catalog.execute("PRAGMA ignore_check_constraints = ON")
            with contextlib.suppress(sqlite3.IntegrityError):  # some columns reject NULL or duplicate values
                catalog.execute(f"UPDATE {table} SET {column} = ?", (value,))
        used_again(folder, check=True)
        with PrefixStore(folder, **SETTINGS) as store, contextlib.suppress(StoreError):  # the only error it may raise
            assert len(store.names()) <= 1
        shutil.rmtree(folder)


@pytest.mark.sample(2, of="damaged stores")
def test_generate_gives_the_same_tokens_with_a_damaged_store(tmp_path, make_model, generate, tokens):
    model = make_model("llama")
    prompt = tokens(30)
    plain = generate(model, prompt).sequences
    longer = torch.cat([plain, tokens(5, seed=1)], 1)
    plain_longer = generate(model, longer).sequences
    settings = {"block_size": 8, "host_budget": 1}
    healthy = tmp_path / "healthy"
    with PrefixStore(healthy, **settings) as store, TieredCache(store) as cache:
        generate(model, prompt, cache)
    reused = []
    for round_ in range(30):
        rng = random.Random(round_)
        folder = tmp_path / f"store-{round_}"
        shutil.copytree(healthy, folder)
        marker = (folder / "kvtier.json").read_bytes()
        for _ in range(rng.choice((1, 2, 3))):
            damage_one(folder, rng)
        (folder / "kvtier.json").write_bytes(marker)  # opening may refuse only this file
        with PrefixStore(folder, **settings) as store, TieredCache(store) as cache:
            assert torch.equal(generate(model, longer, cache).sequences, plain_longer), f"round {round_}"
            reused.append(cache.last_turn.cached_by_tier["disk"])
            assert torch.equal(generate(model, plain_longer, cache).sequences[:, : plain_longer.shape[1]], plain_longer)
        shutil.rmtree(folder)
    assert len(set(reused)) >= 4  # nothing, everything, and parts
