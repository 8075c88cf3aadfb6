"""Saved chats: whole or absent, private, never replaced unseen, and gone with their names."""

from __future__ import annotations

import json
import stat

import pytest

from kvtier.errors import ArchiveError, ChangedError, ConfigurationError, StoreError, StoreVersionError
from kvtier.store import PrefixStore
from tests.support.odd_files import a_folder, a_link, a_pipe, nothing
from tests.support.stores import ROOT, commit, count

CHAT = {"messages": [{"role": "user", "content": "Grüße, \N{GRINNING FACE}"}], "ids": [1, 2, 3]}
TOKENS = count(12)


@pytest.fixture(params=["ram", "disk"])
def chats(request, tmp_path):
    with PrefixStore(tmp_path / "store" if request.param == "disk" else None, block_size=4) as store:
        yield store


@pytest.fixture
def folder(tmp_path):
    """A store with the named chain and the chat ``letter``."""
    with PrefixStore(tmp_path / "store", block_size=4) as store:
        commit(store, TOKENS)
        store.name("letter", ROOT, TOKENS)
        store.chats.write("letter", CHAT, after=None)
    return tmp_path / "store"


def chat_file(folder):
    (path,) = (folder / "chats").iterdir()
    return path


def test_chat_is_read_as_written(chats):
    assert chats.chats.read("a letter") is None
    chats.chats.write("a letter", CHAT, after=None)
    assert chats.chats.read("a letter").content == CHAT
    assert chats.chats.names() == ("a letter",)


def test_writer_that_has_not_seen_the_last_revision_is_refused(chats):
    first = chats.chats.write("x", {"n": 1}, after=None)
    chats.chats.write("x", {"n": 2}, after=first)
    for stale in (first, None, "0"):
        with pytest.raises(ChangedError, match="'x' was changed elsewhere"):
            chats.chats.write("x", {"n": 3}, after=stale)
    assert chats.chats.read("x").content == {"n": 2}
    chats.chats.remove("x")
    with pytest.raises(ChangedError):
        chats.chats.write("x", {"n": 3}, after=first)


def test_later_changes_of_the_written_object_do_not_reach_a_store_in_ram():
    with PrefixStore() as store:
        content = {"messages": [1]}
        store.chats.write("x", content, after=None)
        content["messages"].append(2)
        assert store.chats.read("x").content == {"messages": [1]}


@pytest.mark.parametrize("content", [{"x": object()}, {"x": float("nan")}, {"x": "\ud800"}])
def test_content_that_is_not_json_is_refused_and_nothing_is_written(chats, content):
    with pytest.raises(ConfigurationError, match="cannot be saved as JSON"):
        chats.chats.write("x", content, after=None)
    assert chats.chats.read("x") is None


def test_other_processes_see_a_chat_and_only_the_user_can_read_it(folder):
    with PrefixStore(folder, block_size=4) as store:
        assert store.chats.read("letter").content == CHAT
    assert stat.S_IMODE(chat_file(folder).stat().st_mode) == 0o600
    assert "letter" not in chat_file(folder).name


def test_forget_unname_and_forget_by_tokens_remove_the_chat(chats):
    removals = [lambda: chats.forget("x"), lambda: chats.unname("x"), lambda: chats.forget(TOKENS[:5])]
    for remove in removals:
        commit(chats, TOKENS)
        chats.name("x", ROOT, TOKENS)
        chats.chats.write("x", CHAT, after=None)
        remove()
        assert chats.chats.names() == ()


def test_clear_removes_all_chats_damaged_ones_too(folder):
    with PrefixStore(folder, block_size=4) as store:
        store.chats.write("other", CHAT, after=None)
        (folder / "chats" / f"{'0' * 64}.json").write_text("{")
        store.clear()
        assert store.chats.names() == ()
    assert list((folder / "chats").iterdir()) == []


def test_chat_without_a_named_chain_is_forgotten_unnamed_and_renamed(chats):
    chats.chats.write("x", CHAT, after=None)
    chats.rename("x", "y")
    assert chats.chats.names() == ("y",)
    assert chats.forget("y").blocks == 0
    chats.chats.write("x", CHAT, after=None)
    chats.unname("x")
    assert chats.chats.names() == ()


def test_expired_name_takes_its_chat_with_it(tmp_path):
    now = [1000.0]
    with PrefixStore(tmp_path, block_size=4, clock=lambda: now[0]) as store:
        commit(store, TOKENS)
        store.name("x", ROOT, TOKENS, ttl=60)
        store.chats.write("x", CHAT, after=None)
        now[0] += 61
        assert store.names() == ()
        assert store.chats.read("x") is None


def test_renamed_chain_keeps_its_chat_and_takes_no_name_of_another(chats):
    commit(chats, TOKENS)
    chats.name("x", ROOT, TOKENS)
    revision = chats.chats.write("x", CHAT, after=None)
    chats.chats.write("other", {}, after=None)
    with pytest.raises(ConfigurationError, match="'other' is the name of something else"):
        chats.rename("x", "other")
    chats.rename("x", "y")
    assert [each.name for each in chats.names()] == ["y"]
    assert chats.chats.read("y").content == CHAT
    chats.chats.write("y", {}, after=revision)


def test_exported_chat_comes_with_its_prefix(folder, tmp_path):
    file = tmp_path / "letter.safetensors"
    with PrefixStore(folder, block_size=4) as store:
        store.export("letter", file)
        store.import_(file)  # again: nothing changes
        assert store.chats.read("letter").content == CHAT
        revision = store.chats.read("letter").revision
        store.chats.write("letter", {"other": 1}, after=revision)
        with pytest.raises(ConfigurationError, match="something else already"):
            store.import_(file)
    with PrefixStore(tmp_path / "other", block_size=4) as other:
        other.import_(file, name="from elsewhere")
        assert other.chats.read("from elsewhere").content == CHAT


@pytest.mark.parametrize(
    ("packed", "message"),
    [("!", "base64|Non-base64|Only base64"), ("AAAA", "cannot be unpacked"), ("eJw=", "cut short")],
)
def test_archive_with_a_broken_chat_is_refused(folder, tmp_path, monkeypatch, packed, message):
    file = tmp_path / "letter.safetensors"
    monkeypatch.setattr("kvtier.store.format.archive._packed", lambda chat: packed)
    with PrefixStore(folder, block_size=4) as store:
        store.export("letter", file)
        with pytest.raises(ArchiveError, match=message):
            store.import_(file, name="other")


@pytest.mark.parametrize("put", [a_pipe, a_folder, a_link, nothing])
@pytest.mark.parametrize("by", ["forget", "unname", "clear", "verify"])
def test_chat_whose_file_is_something_else_can_be_forgotten(folder, put, by):
    put(chat_file(folder))
    removals = {
        "forget": lambda store: store.forget("letter"),
        "unname": lambda store: store.unname("letter"),
        "clear": lambda store: store.clear(),
        "verify": lambda store: store.verify(repair=True),
    }
    with PrefixStore(folder, block_size=4) as store:
        removals[by](store)
        assert not [path for path in (folder / "chats").iterdir() if path.name != "moved"]
        store.chats.write("letter", CHAT, after=None)


def test_folder_with_files_in_place_of_a_chat_is_named_and_nothing_is_forgotten(folder):
    path = chat_file(folder)
    a_folder(path)
    (path / "thesis.txt").write_text("three years")
    with PrefixStore(folder, block_size=4) as store:
        with pytest.raises(StoreError, match=f"holds files that kvtier did not write; move them away.*{path.name}"):
            store.forget("letter")
        assert [each.name for each in store.names()] == ["letter"]
    assert (path / "thesis.txt").exists()


def test_damaged_chat_is_an_error_and_verify_reports_it(folder):
    chat_file(folder).write_text("{")
    with PrefixStore(folder, block_size=4) as store:
        with pytest.raises(StoreError, match="cannot be read from"):
            store.chats.read("letter")
        assert [problem.kind for problem in store.verify().problems] == ["chat"]
        assert store.verify(repair=True).ok
        assert store.verify().problems == ()


def test_chat_of_a_newer_version_is_left_alone(folder):
    record = json.loads(chat_file(folder).read_text())
    chat_file(folder).write_text(json.dumps({**record, "format": 2}))
    with PrefixStore(folder, block_size=4) as store:
        with pytest.raises(StoreVersionError, match="update kvtier"):
            store.chats.read("letter")
        assert store.verify(repair=True).problems == ()
        assert chat_file(folder).exists()


def test_verify_reports_a_chat_that_others_can_read(folder):
    chat_file(folder).chmod(0o644)
    with PrefixStore(folder, block_size=4) as store:
        assert [problem.kind for problem in store.verify(repair=True).problems] == ["permissions"]
    assert stat.S_IMODE(chat_file(folder).stat().st_mode) == 0o600


def test_unfinished_file_of_a_dead_writer_is_removed_at_the_next_open(folder):
    left = folder / "chats" / f".{chat_file(folder).name}-999999999-{'0' * 32}.tmp"
    left.write_text("{")
    PrefixStore(folder, block_size=4).close()
    assert not left.exists()
