"""Block files: safetensors to everybody, and never wrong bytes to us."""

import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from storekit import LAYERS, block, chain, count, ids, same_bits

from kvtier.errors import BlockError
from kvtier.pages import Page
from kvtier.store.base import Block
from kvtier.store.chain import BlockId
from kvtier.store.format import BlockFile, encode_block


def write(path, block, codec):
    path.write_bytes(b"".join(encode_block(block, codec)))
    return path


def split(data):
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(header, payload):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


def refused_or_equal(path, original):
    """Whether the file is refused; if not, everything in it is what was written."""
    try:
        file = BlockFile(str(path))
    except BlockError:
        return True
    try:
        assert file.id.key == original.id.key
        assert file.id.tokens.tolist() == original.id.tokens.tolist()
        assert len(file.geometry.layers) == len(original.pages)
        for layer, page in enumerate(original.pages):
            try:
                read = file.page(layer)
            except BlockError:
                return True
            assert same_bits(read.k_htd, page.k_htd)
            assert same_bits(read.v_htd, page.v_htd)
        return False
    finally:
        file.close()


@pytest.fixture(params=["raw", "zstd"])
def codec(request):
    return request.param


def test_a_block_comes_back_as_it_was(tmp_path, codec):
    original = chain(count(7), 4)[1]
    file = BlockFile(str(write(tmp_path / "block", original, codec)))
    assert (file.id.key, file.id.parent, file.id.root) == (original.id.key, original.id.parent, original.id.root)
    assert file.id.tokens.tolist() == [4, 5, 6]
    assert file.geometry.token_bytes * 3 == original.nbytes
    assert file.nbytes == (tmp_path / "block").stat().st_size
    for layer in reversed(range(LAYERS)):
        assert same_bits(file.page(layer).k_htd, original.pages[layer].k_htd)
        assert same_bits(file.page(layer).v_htd, original.pages[layer].v_htd)
    file.close()
    file.close()


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2],
)
def test_safetensors_reads_raw_files(tmp_path, dtype):
    pages = tuple(
        Page(torch.randn(2, 3, 4).to(dtype), torch.randn(1, 3, 8).to(dtype))  # K and V may differ in shape
        for _ in range(2)
    )
    path = write(tmp_path / "block", Block(block(ids(5, 6, 7)).id, pages), "raw")
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == {"tokens", "k.0", "v.0", "k.1", "v.1"}
        assert file.metadata()["codec"] == "raw"
        assert file.get_tensor("tokens").tolist() == [5, 6, 7]
        for layer, page in enumerate(pages):
            assert same_bits(file.get_tensor(f"k.{layer}"), page.k_htd)
            assert same_bits(file.get_tensor(f"v.{layer}"), page.v_htd)
    assert not refused_or_equal(path, Block(block(ids(5, 6, 7)).id, pages))


def test_safetensors_opens_compressed_files(tmp_path):
    path = write(tmp_path / "block", block(count(4)), "zstd")
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("k.0").dtype == torch.uint8
        assert file.get_tensor("tokens").tolist() == [0, 1, 2, 3]


def test_a_dtype_that_has_no_name_in_files_is_a_block_error():
    pages = (Page(torch.zeros(1, 2, 3, dtype=torch.int32), torch.zeros(1, 2, 3, dtype=torch.int32)),)
    with pytest.raises(BlockError, match="int32"):
        encode_block(Block(block(ids(1, 2)).id, pages), "raw")


def test_every_truncation_is_refused(tmp_path, codec):
    original = block(count(4))
    data = write(tmp_path / "whole", original, codec).read_bytes()
    for n in range(len(data)):
        (tmp_path / "cut").write_bytes(data[:n])
        with pytest.raises(BlockError):
            BlockFile(str(tmp_path / "cut"))


def test_bytes_after_the_end_are_refused(tmp_path, codec):
    path = write(tmp_path / "block", block(count(4)), codec)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(BlockError, match="bytes where the header tells"):
        BlockFile(str(path))


def test_every_flipped_bit_is_refused_or_changes_nothing(tmp_path, codec):
    original = chain(count(7), 4)[1]
    data = bytearray(write(tmp_path / "whole", original, codec).read_bytes())
    path = tmp_path / "flipped"
    payload_begins = 8 + struct.unpack("<Q", data[:8])[0]
    for i in range(len(data)):
        for bit in range(8):
            data[i] ^= 1 << bit
            path.write_bytes(data)
            refused = refused_or_equal(path, original)
            assert refused or i < payload_begins, f"bit {bit} of byte {i} went unnoticed"
            data[i] ^= 1 << bit


@given(st.data())
def test_damage_of_any_kind_is_refused_or_changes_nothing(tmp_path_factory, data):
    original = block(count(4))
    codec = data.draw(st.sampled_from(["raw", "zstd"]))
    path = tmp_path_factory.getbasetemp() / "damaged"
    whole = write(path, original, codec).read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    stop = data.draw(st.integers(at, len(whole)))
    path.write_bytes(whole[:at] + data.draw(st.binary(max_size=64)) + whole[stop:])
    refused_or_equal(path, original)


@pytest.mark.parametrize("size", [2**63, 2**64 - 1, 2**40, 10_000])
def test_a_header_longer_than_the_file_is_refused(tmp_path, size):
    path = write(tmp_path / "block", block(count(4)), "raw")
    path.write_bytes(struct.pack("<Q", size) + path.read_bytes()[8:])
    with pytest.raises(BlockError, match="header is longer than the file"):
        BlockFile(str(path))


def test_ids_that_do_not_give_the_key_are_refused(tmp_path):
    wrong = block(count(4))
    other = BlockId(block(count(4, first=1)).id.key, wrong.id.parent, wrong.id.root, wrong.id.tokens)
    with pytest.raises(BlockError, match="do not give its key"):
        BlockFile(str(write(tmp_path / "block", Block(other, wrong.pages), "raw")))


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.pop("__metadata__"),
        lambda h: h.pop("tokens"),
        lambda h: h.pop("k.1"),
        lambda h: h.pop("v.0"),
        lambda h: h["k.0"].pop("data_offsets"),
        lambda h: h["k.0"].update(data_offsets=[0]),
        lambda h: h["k.0"].update(data_offsets=[]),
        lambda h: h["k.0"].update(data_offsets=[0.5, 32.5]),
        lambda h: h["k.0"].update(data_offsets=[-8, 0]),
        lambda h: h["tokens"].update(data_offsets="ab"),
        lambda h: h.update({"k.0": 7}),
        lambda h: h["__metadata__"].update(format="kvtier/99"),
        lambda h: h["__metadata__"].update(codec="lz4"),
        lambda h: h["__metadata__"].update(codec=["raw"]),
        lambda h: h["__metadata__"].update(key="0" * 64),
        lambda h: h["__metadata__"].update(parent="not hex"),
        lambda h: h["__metadata__"].update(parent=None),
        lambda h: h["__metadata__"].update(crc32="{}"),
        lambda h: h["__metadata__"].update(crc32="nonsense"),
        lambda h: h["__metadata__"].update(shapes="[]"),
        lambda h: h["__metadata__"].update(shapes='{"k.0":[2,4,4],"v.0":[2,4,4]}'),
        lambda h: h["__metadata__"].update(shapes='{"k.0":[2,4,4],"v.0":[2,4,4],"v.1":[2,4,4]}'),
        lambda h: h["__metadata__"].update(shapes="7"),
        lambda h: h["__metadata__"].update(dtypes='{"k.0":"F32"}'),
        lambda h: h["__metadata__"].update(dtypes=h["__metadata__"]["dtypes"].replace("F32", "I32")),
        lambda h: h["__metadata__"].update(shapes=h["__metadata__"]["shapes"].replace("4]", "-4]")),
        lambda h: h["__metadata__"].update(shapes=h["__metadata__"]["shapes"].replace("[2", '["2"')),
        lambda h: h["__metadata__"].update(shapes=h["__metadata__"]["shapes"].replace("[2, 4", "[2, 5")),
    ],
)
def test_headers_that_contradict_themselves_are_refused(tmp_path, change):
    original = block(count(4))
    path = write(tmp_path / "block", original, "raw")
    header, payload = split(path.read_bytes())
    change(header)
    path.write_bytes(join(header, payload))
    assert refused_or_equal(path, original)


@pytest.mark.parametrize("text", [b"[]", b"null", b"7", b'""', b"{}", b"{", b"\xff\xfe", b"[" * 100_000])
def test_headers_that_are_no_headers_are_refused(tmp_path, text):
    (tmp_path / "block").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(BlockError):
        BlockFile(str(tmp_path / "block"))


def test_what_is_no_file_is_refused(tmp_path):
    write(tmp_path / "block", block(count(4)), "raw")
    (tmp_path / "link").symlink_to(tmp_path / "block")
    for name in ("missing", ".", "link"):
        with pytest.raises(BlockError):
            BlockFile(str(tmp_path / name))
