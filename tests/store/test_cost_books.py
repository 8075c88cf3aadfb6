"""Costs beside a root: shared by caches, kept for other processes, and never in the way."""

from __future__ import annotations

import json
import os

import pytest

from kvtier import PrefixStore
from kvtier.costs.prefill import PrefillCost, PrefillSample

ROOT = "ab" * 32
COST = PrefillCost(0.01, 1e-3, 1e-7, 1e-6)


def learn(store, machine="here", *, factor=1.0):
    book = store.costs(ROOT, machine)
    for tokens in (1, 64, 4096):
        book.note_pass(PrefillSample(tokens, 0, factor * COST.seconds(tokens)))
    book.token_bytes = 100.0
    return book


def test_caches_of_one_store_share_a_book():
    with PrefixStore() as store:
        assert store.costs(ROOT, "here") is store.costs(ROOT, "here")
        assert store.costs(ROOT, "here") is not store.costs(ROOT, "there")
        assert store.costs(ROOT, "here") is not store.costs("cd" * 32, "here")


def test_costs_are_kept_beside_the_root_for_the_next_process(tmp_path):
    with PrefixStore(tmp_path) as store:
        expected = learn(store).prefill()
    with PrefixStore(tmp_path) as store:
        assert store.costs(ROOT, "here").prefill() == expected
        assert not store.costs(ROOT, "here").news


def test_other_machines_have_costs_of_their_own_and_share_the_bytes_of_a_token(tmp_path):
    for machine, factor in (("one", 1.0), ("two", 5.0)):
        with PrefixStore(tmp_path) as store:
            learn(store, machine, factor=factor)
    with PrefixStore(tmp_path) as store:
        assert store.costs(ROOT, "two").prefill().seconds(64) > 4 * store.costs(ROOT, "one").prefill().seconds(64)
        assert store.costs(ROOT, "three").prefill() is None
        assert store.costs(ROOT, "three").token_bytes == 100.0


def test_costs_of_only_so_many_machines_are_kept(tmp_path):
    for n in range(12):
        with PrefixStore(tmp_path) as store:
            learn(store, f"machine {n}")
    kept = json.loads((tmp_path / "roots" / f"{ROOT}.costs.json").read_text())
    assert list(kept) == [f"machine {n}" for n in range(4, 12)]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"here": 5}', '{"here": {"passes": {"a": 1}}}', "\x00" * 9])
def test_a_damaged_file_is_no_file(tmp_path, text, warned):
    with PrefixStore(tmp_path) as store:
        learn(store)
    (tmp_path / "roots" / f"{ROOT}.costs.json").write_text(text)
    with PrefixStore(tmp_path) as store:
        assert store.costs(ROOT, "here").prefill() is None
        learn(store)
    with PrefixStore(tmp_path) as store:
        assert store.costs(ROOT, "here").prefill() is not None
    assert warned() == []


def test_nothing_learnt_writes_nothing(tmp_path):
    with PrefixStore(tmp_path) as store:
        store.costs(ROOT, "here")
    assert not list((tmp_path / "roots").iterdir())


def test_costs_that_cannot_be_written_are_warned_of_once(tmp_path, warned):
    with PrefixStore(tmp_path) as store:
        learn(store)
        (tmp_path / "roots" / f"{ROOT}.costs.json").mkdir()
    assert len(warned()) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_learns_for_itself(tmp_path):
    with PrefixStore(tmp_path) as store:
        book = learn(store)
        pid = os.fork()
        if not pid:
            store.costs(ROOT, "here").note_pass(PrefillSample(99, 0, 1.0))
            os._exit(0 if store.costs(ROOT, "here").prefill() is not None else 1)
        assert os.waitpid(pid, 0)[1] == 0
        assert book.prefill() is not None
