"""Vocabularies: text of token ids, their files, and how a store keeps and forgets them."""

from __future__ import annotations

import stat
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier import PrefixStore
from kvtier.errors import ArchiveError
from kvtier.store.format import archive as archive_format
from kvtier.store.format import vocabulary as vocabulary_format
from kvtier.store.format.vocabulary import Vocabulary
from tests.support.stores import OTHER_ROOT, ROOT, commit, count, ids

WORDS = Vocabulary.of({index: f" w{index}".encode() for index in range(100)} | {100: b"<end>"}, specials=[100])

texts = st.dictionaries(st.integers(0, 2**31 - 1), st.binary(max_size=6), max_size=20)


@given(texts, st.sets(st.integers(0, 2**31 - 1)), st.booleans(), st.lists(st.integers(0, 50), max_size=8))
def test_vocabulary_comes_back_from_its_file(texts, specials, is_whole, tokens):
    made = Vocabulary.of(texts, specials, is_whole=is_whole)
    read = Vocabulary.decode(made.encode())
    assert (len(read), read.is_whole) == (len(texts), is_whole)
    tokens = np.array([*tokens, *texts], dtype=np.int64)
    expected = b"".join(texts.get(int(token), "\ufffd".encode()) for token in tokens)
    assert read.text(tokens) == expected.decode("utf-8", "replace")
    plain = b"".join(b" " if int(t) in specials & set(texts) else texts.get(int(t), b"\xef\xbf\xbd") for t in tokens)
    assert read.text(tokens, specials=False) == plain.decode("utf-8", "replace")
    assert read.only(tokens).text(tokens) == read.text(tokens)


def test_ids_that_no_tokenizer_has_are_unknown():
    assert WORDS.text(ids(-5, 1, 2**40)) == "\ufffd w1\ufffd"
    assert Vocabulary.of({-1: b"x", 2**31: b"y"}).text(ids(-1, 2**31)) == "\ufffd\ufffd"


def test_parts_are_united():
    first, second = WORDS.only(ids(1, 2, 100)), WORDS.only(ids(2, 3))
    both = second.with_all_of(first)
    assert both.text(ids(1, 2, 3, 4)) == " w1 w2 w3\ufffd"
    assert both.text(ids(100), specials=False) == " "
    assert not both.is_whole


def _file(*parts):
    return b"kvtier-vocabulary/1\n" + zlib.compress(b"".join(parts))


def _numbers(*values):
    return np.array(values, dtype="<u4").tobytes()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"kvtier-vocabulary/2\n" + WORDS.encode()[20:],
        WORDS.encode()[:-1],
        WORDS.encode() + b"x",
        b"kvtier-vocabulary/1\nnot zlib",
        _file(b"short"),
        _file(_numbers(2**31, 1)),
        _file(_numbers(1, 2, 7, 1), b"\0x"),
        _file(_numbers(2, 1, 7, 7, 0, 1), b"\0\0x"),
        _file(_numbers(2, 1, 7, 8, 1, 0), b"\0\0"),
        _file(_numbers(1, 1, 7, 2), b"\0x"),
    ],
)
def test_damaged_files_are_refused(data):
    with pytest.raises(ValueError, match="vocabulary"):
        Vocabulary.decode(data)


def test_file_that_would_take_much_memory_is_refused(monkeypatch):
    monkeypatch.setattr(vocabulary_format, "_MAX_BYTES", 500)
    with pytest.raises(ValueError, match="too large"):
        Vocabulary.decode(WORDS.encode())


# --- in a store -------------------------------------------------------------------------------------------------------


def new_store(path):
    return PrefixStore(path, block_size=4)


def test_store_keeps_one_private_file_for_each_root(tmp_path):
    with new_store(tmp_path) as store:
        commit(store, count(6))
        assert store.vocabulary(ROOT) is None
        assert store.lacks_vocabulary(ROOT)
        store.keep_vocabulary(ROOT, lambda: WORDS)
        store.keep_vocabulary(ROOT, lambda: pytest.fail("a second time"))
        assert not store.lacks_vocabulary(ROOT)
        store.flush()
        file = tmp_path / "roots" / f"{ROOT}.vocabulary"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert store.verify().ok
    with new_store(tmp_path) as store:
        assert not store.lacks_vocabulary(ROOT)
        assert store.vocabulary(ROOT).text(count(2)) == " w0 w1"
        file.write_bytes(b"torn")
        assert store.vocabulary(ROOT) is None
    with new_store(tmp_path) as store:
        assert store.lacks_vocabulary(ROOT)  # so that it is written anew
    with PrefixStore() as store:
        assert not store.lacks_vocabulary(ROOT)
        store.keep_vocabulary(ROOT, lambda: pytest.fail("there is no folder"))


def test_vocabulary_that_cannot_be_kept_costs_one_line(tmp_path, warned):
    def broken():
        raise ZeroDivisionError("odd tokenizer")

    with new_store(tmp_path) as store:
        store.keep_vocabulary(ROOT, broken)
        store.flush()
        assert [text for text in warned() if "odd tokenizer" in text] != []
        assert not store.lacks_vocabulary(ROOT)
        commit(store, count(6))
        (tmp_path / "roots" / f"{OTHER_ROOT}.vocabulary").mkdir()
        store.keep_vocabulary(OTHER_ROOT, lambda: WORDS)
        store.flush()
        assert len(warned()) == 1
        assert store.vocabulary(OTHER_ROOT) is None


def test_vocabulary_goes_with_the_last_block_of_its_root(tmp_path):
    with new_store(tmp_path) as store:
        commit(store, count(6))
        commit(store, count(6, 50))
        commit(store, count(6), OTHER_ROOT)
        for root in (ROOT, OTHER_ROOT):
            store.keep_vocabulary(root, lambda: WORDS)
        store.flush()
        store.name("one", ROOT, count(6))
        store.forget("one")
        assert store.vocabulary(ROOT) is not None
        store.forget(count(6, 50))
        assert store.vocabulary(ROOT) is None
        assert store.vocabulary(OTHER_ROOT) is not None
        store.prune(to_bytes=0)
        assert store.vocabulary(OTHER_ROOT) is None
        assert store.lacks_vocabulary(OTHER_ROOT)


def test_export_and_import_carry_the_needed_part(tmp_path):
    with new_store(tmp_path / "a") as store:
        for first in (0, 50):
            commit(store, count(6, first))
            store.flush()
            store.name(f"from {first}", ROOT, count(6, first))
        store.keep_vocabulary(ROOT, lambda: WORDS)
        store.flush()
        for first in (0, 50):
            store.export(f"from {first}", tmp_path / f"{first}.kvt")
    with new_store(tmp_path / "b") as store:
        store.import_(tmp_path / "0.kvt")
        assert store.vocabulary(ROOT).text(ids(0, 5, 6)) == " w0 w5\ufffd"
        store.import_(tmp_path / "50.kvt")
        assert store.vocabulary(ROOT).text(ids(0, 50, 6)) == " w0 w50\ufffd"
        assert store.lacks_vocabulary(ROOT)  # it is not the whole one
        store.keep_vocabulary(ROOT, lambda: WORDS)
        store.flush()
        store.import_(tmp_path / "0.kvt", name="again")
        assert store.vocabulary(ROOT).text(ids(6)) == " w6"


def test_long_vocabulary_is_left_out_of_an_archive(tmp_path, monkeypatch):
    monkeypatch.setattr(archive_format, "_MAX_VOCABULARY_BYTES", 10)
    with new_store(tmp_path / "a") as store:
        commit(store, count(6))
        store.keep_vocabulary(ROOT, lambda: WORDS)
        store.flush()
        store.name("one", ROOT, count(6))
        store.export("one", tmp_path / "one.kvt")
    with new_store(tmp_path / "b") as store:
        store.import_(tmp_path / "one.kvt")
        assert store.vocabulary(ROOT) is None


@pytest.mark.parametrize("text", ["", "~", "eHg=", "A" * 200_000])
def test_archive_with_another_text_for_a_vocabulary_is_refused(tmp_path, monkeypatch, text):
    with new_store(tmp_path) as store:
        commit(store, count(6))
        store.flush()
        store.name("one", ROOT, count(6))
        whole = archive_format.encode_header
        monkeypatch.setattr(
            archive_format,
            "encode_header",
            lambda tensors, metadata, **more: whole(tensors, {**metadata, "vocabulary": text}, **more),
        )
        store.export("one", tmp_path / "one.kvt")
        with pytest.raises(ArchiveError):
            store.import_(tmp_path / "one.kvt", name="two")


# --- the last tokens --------------------------------------------------------------------------------------------------


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 40))
def test_last_tokens_of_a_name_and_of_a_chain_are_its_last_tokens(tokens, more, last):
    with PrefixStore(block_size=4) as store:
        commit(store, count(tokens + more))
        store.name("whole", ROOT, count(tokens + more))
        store.name("part", ROOT, count(tokens))  # may end within a block
        for name, n in (("whole", tokens + more), ("part", tokens)):
            found = store.tokens_of(name, last=last)
            assert found.tolist() == store.tokens_of(name).tolist()[max(0, n - last) :]
        (chain,) = store.chains()
        for key in (chain.key, chain.key[:20]):
            assert store.tokens_of_chain(key).tolist() == list(range(tokens + more))
            assert (
                store.tokens_of_chain(key, last=last).tolist()
                == list(range(tokens + more))[max(0, tokens + more - last) :]
            )


def test_last_tokens_of_a_cut_chain_are_those_that_are_left(tmp_path):
    with new_store(tmp_path) as store:
        commit(store, count(11))
        store.flush()
        store.name("cut", ROOT, count(11))
        last = store.chains()[0].key
    next((tmp_path / "blocks").rglob(f"{last}.safetensors")).unlink()
    with new_store(tmp_path) as store:
        store.verify(repair=True)
        assert store.tokens_of("cut", last=3).tolist() == [5, 6, 7]
