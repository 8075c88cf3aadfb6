"""The fuzz targets on some thousand reproducible mutations, with limits on memory and time.

``make fuzz`` runs the same targets for any length of time, guided by code coverage.
"""

from __future__ import annotations

import struct
import time
import tracemalloc
from pathlib import Path

import pytest

from tests.support.fuzz_mutations import mutate
from tests.support.fuzz_targets import MOST_PAGE_BYTES, read_as_archive, read_as_block

CORPUS = {path.name: path.read_bytes() for path in sorted((Path(__file__).parents[1] / "fuzz" / "corpus").iterdir())}
MUTATIONS = 600  # of each file of the corpus
READERS = (read_as_block, read_as_archive)
MOST_SECONDS = 5.0  # far above the usual time, so that a busy machine causes no failure


@pytest.mark.parametrize("name", CORPUS)
def test_corpus_files_are_accepted_or_refused_by_the_right_reader(tmp_path, name):
    path = tmp_path / "input"
    path.write_bytes(CORPUS[name])
    wanted = {"block": [True, False], "archive": [False, True]}.get(name.split("-")[0], [False, False])
    assert [read(path).refusal is None for read in READERS] == wanted


@pytest.mark.sample(2)  # of 6
@pytest.mark.parametrize("name", CORPUS)
def test_mutated_files_are_read_or_refused_within_memory_and_time_limits(tmp_path, name):
    path = tmp_path / "input"
    refusals, read_well = set(), 0
    for read in READERS:  # a first read creates objects that are made only once
        path.write_bytes(CORPUS[name])
        read(path)
    tracemalloc.start()
    try:
        for seed in range(MUTATIONS):
            data = mutate(CORPUS[name], seed)
            path.write_bytes(data)
            for read in READERS:
                tracemalloc.reset_peak()
                before, began = tracemalloc.get_traced_memory()[0], time.monotonic()
                outcome = read(path)
                peak = tracemalloc.get_traced_memory()[1] - before
                assert time.monotonic() - began < MOST_SECONDS, f"mutation {seed} takes long"
                # A parsed header takes some ten times its bytes; pages are decoded in a few steps.
                most = 2**18 + 40 * len(data) + 12 * min(outcome.page_bytes, MOST_PAGE_BYTES)
                assert peak < most, f"mutation {seed}: {peak} bytes for a file of {len(data)}"
                refusals.add(outcome.refusal)
                read_well += outcome.refusal is None
    finally:
        tracemalloc.stop()
    assert len(refusals) > 50  # mutations get far, and fail at different checks
    assert read_well > 0 or not name.startswith(("block", "archive"))


SIZE = 2**19  # length of the longest header that is parsed
FILLINGS = {
    "brackets": b"[" * SIZE,
    "braces": b'{"a":' * (SIZE // 5),
    "brackets, as many as there may be": b"[" * 32_000,
    "small arrays": b'"a":[1],' * (SIZE // 8),
    "small arrays, as many as there may be": b'"a":[1],' * 32_000,
    "empty objects": b'"":{},' * 32_000,
    "spaces": b" " * SIZE,
    "a number": b'"a":' + b"9" * SIZE,
    "small numbers": b'"a":[' + b"0," * (SIZE // 2),
    "long numbers": b'"a":[' + (b"9" * 4000 + b",") * (SIZE // 4001),
    "escapes": b'"a":"' + rb"\u00e9" * (SIZE // 6),
    "arrays within one": b'"a":[' + b"[]," * 32_000,
    "the same tensor": b'"k.0":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},' * (SIZE // 54),
    "strings": b'"":"",' * (SIZE // 6),
}


@pytest.mark.sample(26)  # of 42
@pytest.mark.parametrize("filling", FILLINGS)
@pytest.mark.parametrize("start", ["", '{"__metadata__":{"format":"kvtier/1"},', '{"__metadata__":{"a":"b",'])
def test_worst_case_headers_are_refused_within_memory_and_time_limits(tmp_path, start, filling):
    path = tmp_path / "input"
    header = (start.encode() + FILLINGS[filling])[:SIZE]
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    for read in READERS:
        tracemalloc.start()
        began = time.monotonic()
        try:
            assert read(path).refusal
            assert time.monotonic() - began < MOST_SECONDS
            assert tracemalloc.get_traced_memory()[1] < 40 * SIZE
        finally:
            tracemalloc.stop()


def test_sparse_file_claiming_up_to_a_tebibyte_is_refused_without_using_memory(tmp_path):
    """A sparse file takes no space, and its header may claim any size."""
    path = tmp_path / "input"
    data = CORPUS["block-raw-bf16"]
    for claimed in (8 * 2**24, 2**33, 2**40):
        header = data[8 : 8 + int.from_bytes(data[:8], "little")].replace(
            b'"shape":[4]', b'"shape":[%d]' % (claimed // 8)
        )
        header = header.replace(b'"data_offsets":[0,32]', b'"data_offsets":[0,%d]' % claimed)
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        with path.open("r+b") as file:
            file.truncate(8 + len(header) + claimed)
        tracemalloc.start()
        try:
            for read in READERS:
                assert read(path).refusal
            assert tracemalloc.get_traced_memory()[1] < 2**20
        finally:
            tracemalloc.stop()
