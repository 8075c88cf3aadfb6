"""Block files: readable by any safetensors reader, and never a source of wrong values."""

import json
import os
import struct
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from kvtier.errors import BlockError
from kvtier.kv.codecs import BUILT_IN
from kvtier.kv.page import Page
from kvtier.store.block import Block
from kvtier.store.chain import BlockId, block_key
from kvtier.store.format.block_file import BlockFile, encode_block
from kvtier.store.format.header import MAX_HEADER_BYTES
from tests.support.stores import LAYERS, ROOT, block, chain, count, ids, same_bits


def write(path, block, codec):
    path.write_bytes(b"".join(encode_block(block, BUILT_IN[codec])))
    return path


def split(data):
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(header, payload):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


def refused_or_equal(path, original):
    """Return whether the file is refused; if it is not, assert that it holds what was written."""
    try:
        file = BlockFile(str(path))
    except BlockError:
        return True
    try:
        assert file.id.key == original.id.key
        assert file.id.tokens.tolist() == original.id.tokens.tolist()
        assert len(file.spec.layers) == len(original.pages)
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


def test_block_file_round_trip_is_exact(tmp_path, codec):
    original = chain(count(7), 4)[1]
    file = BlockFile(str(write(tmp_path / "block", original, codec)))
    assert (file.id.key, file.id.parent, file.id.root) == (original.id.key, original.id.parent, original.id.root)
    assert file.id.tokens.tolist() == [4, 5, 6]
    assert file.spec.token_bytes * 3 == original.nbytes
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


def test_encoding_an_unsupported_dtype_raises_block_error():
    pages = (Page(torch.zeros(1, 2, 3, dtype=torch.int32), torch.zeros(1, 2, 3, dtype=torch.int32)),)
    with pytest.raises(BlockError, match="int32"):
        encode_block(Block(block(ids(1, 2)).id, pages))


def test_every_truncation_of_a_block_file_is_refused(tmp_path, codec):
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


@pytest.mark.sample(1)  # of 2
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


def test_token_ids_that_do_not_hash_to_the_key_are_refused(tmp_path):
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


def told(name: str, value: object):
    """Return a function that changes the metadata entry ``name`` of one tensor."""

    def change(h, tensor="k.0"):
        of_all = json.loads(h["__metadata__"][name])
        of_all[tensor] = value
        h["__metadata__"][name] = json.dumps(of_all)

    return change


def moved(name, begin, end):
    return lambda h: h[name].update(data_offsets=[h[name]["data_offsets"][0] + begin, h[name]["data_offsets"][1] + end])


def swapped(h):
    h["k.0"]["data_offsets"], h["v.0"]["data_offsets"] = h["v.0"]["data_offsets"], h["k.0"]["data_offsets"]


def reordered(h):
    h["v.1"] = h.pop("v.1")
    h["tokens"] = h.pop("tokens")


def more_tensors_than_any_model(h):
    h.update({f"k.{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(2, 2_500)})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (moved("k.0", -4, 0), "does not lie where"),  # overlaps
        (moved("k.0", 4, 0), "does not lie where"),  # a gap
        (moved("v.1", 0, 4), "does not lie where"),
        (swapped, "does not lie where"),
        (reordered, "does not lie where"),
        (lambda h: h["k.0"].update(data_offsets=[True, False]), "natural number"),
        (lambda h: h["k.0"].update(data_offsets=[32.0, 160.0]), "where no such number belongs"),
        (lambda h: h["k.0"].update(data_offsets=[10**40, 10**41]), "too many digits"),
        (lambda h: h["k.0"].update(data_offsets=[1, 2, 3]), "type, shape and place"),
        (lambda h: h["k.0"].update(data_offsets={"0": 1, "1": 2}), "type, shape and place"),
        (lambda h: h["k.0"].update(shape=[2, -4, -4]), "natural number"),
        (lambda h: h["k.0"].update(shape=[2, 4, None]), "natural number"),
        (lambda h: h["k.0"].update(shape=[2**40, 2**40, 2**40]), "does not lie where"),  # wraps to 0 in 64 bits
        (lambda h: h["k.0"].update(shape=[1] * 9 + [32]), "type, shape and place"),
        (lambda h: h["k.0"].update(shape=[32]), "do not have the shapes"),
        (lambda h: h["k.0"].update(shape=32), "type, shape and place"),
        (lambda h: h["k.0"].update(dtype="I32"), "type, shape and place"),
        (lambda h: h["k.0"].update(dtype=["F32"]), "type, shape and place"),
        (lambda h: h["k.0"].update(dtype="U8", shape=[2, 4, 16]), "do not have the shapes"),
        (lambda h: h["k.0"].update(more=1), "type, shape and place"),
        (lambda h: h.update({"k.2": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}), "does not lie where"),
        (more_tensors_than_any_model, "more than 1024 layers"),
        (lambda h: h["tokens"].update(dtype="F64"), "row of ids"),
        (lambda h: h["tokens"].update(shape=[2, 2]), "row of ids"),
        (lambda h: h.update({"../k": h.pop("k.0")}), "does not lie where"),
        (lambda h: h["__metadata__"].update(codec=["raw"]), "not strings"),
        (lambda h: h["__metadata__"].update(codec=None), "not strings"),
        (lambda h: h["__metadata__"].update(codec=float("nan")), "NaN where no such number"),
        (lambda h: h["__metadata__"].pop("root"), "no 'root'"),
        (lambda h: h["__metadata__"].update(root="../../etc"), "root .* is not 64 hex digits"),
        (lambda h: h["__metadata__"].update(key=h["__metadata__"]["key"].upper()), "key .* is not 64 hex digits"),
        (lambda h: h["__metadata__"].update(parent=ROOT[:62] + "  "), "parent .* is not 64 hex digits"),
        (lambda h: h["__metadata__"].update(codec="\ud800"), "no codec has the name"),
        (lambda h: h["__metadata__"].update(codec="raw" * 10_000), "no codec has the name"),
        (lambda h: h["__metadata__"].update(shapes="[" * 20_000), "recursion|nested"),
        (lambda h: h["__metadata__"].update(shapes="[" * 33_000), "more brackets"),
        (told("shapes", [2, 4, True]), "does not fit"),
        (told("shapes", [2, 4, 4.0]), "where no such number"),
        (told("shapes", [2**30, 4, 2**30]), "more heads"),
        (told("shapes", [2**16, 4, 2**16]), "bytes a token"),
        (told("shapes", [1, 4, 8]), "do not have the shapes"),
        (told("shapes", "244"), "no shape"),
        (told("shapes", [2, 4]), "does not fit"),
        (told("dtypes", "I64"), "not of one type"),
        (told("dtypes", ["F32"]), "not of one type"),
        (told("crc32", -1), "one number for each"),
        (told("crc32", 2**32), "one number for each"),
        (told("crc32", True), "one number for each"),
        (told("crc32", "7"), "one number for each"),
        (lambda h: told("crc32", 7)(h, "k.7"), "one number for each"),
    ],
)
def test_hostile_header_is_refused_with_its_path_and_a_short_reason(tmp_path, change, match):
    path = write(tmp_path / "block", block(count(4)), "raw")
    header, payload = split(path.read_bytes())
    change(header)
    path.write_bytes(join(header, payload))
    with pytest.raises(BlockError, match=match) as caught:
        BlockFile(str(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < len(str(path)) + 300


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        (b'"codec":"raw"', b'"codec":"raw","codec":"raw"', "twice"),
        (b'"tokens":{', b'"k.0":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"tokens":{', "twice"),
        (b'"dtype":"I64"', b'"dtype":"I64","dtype":"I64"', "twice"),
        (b'\\"k.0\\": [2', b'\\"k.0\\": [2, 4, 4], \\"k.0\\": [2', "twice"),
        (b'"data_offsets":[0,', b'"data_offsets":[-0.0,', "where no such number"),
        (b'"data_offsets":[0,', b'"data_offsets":[0e1,', "where no such number"),
        (b'"data_offsets":[0,', b'"data_offsets":[1e400,', "where no such number"),
        (b'"data_offsets":[0,', b'"data_offsets":[NaN,', "where no such number"),
        (b'"data_offsets":[0,', b'"data_offsets":[' + b"9" * 4000 + b",", "too many digits"),
        (b'{"__metadata__":', b'{"first":0,"__metadata__":', "does not begin with metadata"),
        (b'},"tokens":', b'},,"tokens":', "no tensors"),
    ],
)
def test_header_json_that_parsers_read_differently_is_refused(tmp_path, old, new, match):
    path = write(tmp_path / "block", block(count(4)), "raw")
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    assert old in data[8 : 8 + size]
    header = data[8 : 8 + size].replace(old, new, 1)
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + size :])
    with pytest.raises(BlockError, match=match):
        BlockFile(str(path))


def test_compressed_block_with_other_header_whitespace_is_read(tmp_path):
    """Another writer may put other spaces into the header; the content is the same."""
    path = write(tmp_path / "block", block(count(4)), "zstd")
    header, payload = split(path.read_bytes())
    assert not refused_or_equal(path, block(count(4)))
    path.write_bytes(join(header, payload))
    assert not refused_or_equal(path, block(count(4)))


@pytest.mark.parametrize(
    "change",
    [
        moved("k.1", -1, 0),
        moved("v.1", 0, 1),
        reordered,
        lambda h: h["v.0"].update(dtype="I64"),
        lambda h: h.pop("v.1"),
    ],
)
def test_compressed_file_with_wrong_tensor_entries_is_refused(tmp_path, change):
    path = write(tmp_path / "block", block(count(4)), "zstd")
    header, payload = split(path.read_bytes())
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + payload)
    with pytest.raises(BlockError):
        BlockFile(str(path))


def test_tensors_with_unknown_names_are_refused(tmp_path):
    path = write(tmp_path / "block", block(count(4)), "raw")
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"k.0":', b'"q.0":', 1).replace(b'\\"k.0\\":', b'\\"q.0\\":'))
    with pytest.raises(BlockError, match="not tokens, and K and V"):
        BlockFile(str(path))


def test_header_above_the_size_limit_is_refused(tmp_path):
    path = write(tmp_path / "block", block(count(4)), "raw")
    header, payload = split(path.read_bytes())
    text = json.dumps(header).encode() + b" " * 2**20
    path.write_bytes(struct.pack("<Q", len(text)) + text + payload)
    with pytest.raises(BlockError, match="longer than 524288 bytes"):
        BlockFile(str(path))


def test_the_header_of_two_hundred_layers_is_far_below_the_limit():
    page = Page(torch.zeros(2, 1, 4), torch.zeros(2, 1, 4))
    header = encode_block(Block(block(ids(1)).id, (page,) * 200))[0]
    assert 7 * len(header) < MAX_HEADER_BYTES


@pytest.mark.parametrize(
    ("tokens", "layers", "match"), [((), 1, "0 tokens"), ((3, -1), 1, "-1 is no token id"), ((1,), 1025, "1025 layers")]
)
def test_encoding_refuses_invalid_tokens_and_layer_counts(tokens, layers, match):
    page = Page(torch.zeros(1, len(tokens), 1), torch.zeros(1, len(tokens), 1))
    with pytest.raises(BlockError, match=match):
        encode_block(Block(BlockId.of(ROOT, ROOT, ids(*tokens)), (page,) * layers))


def test_negative_token_ids_are_refused(tmp_path):
    """Even if their checksum and key are right."""
    path = write(tmp_path / "block", block(ids(1, 2)), "raw")
    header, payload = split(path.read_bytes())
    tokens = ids(1, -2)
    checksums = json.loads(header["__metadata__"]["crc32"]) | {"tokens": zlib.crc32(tokens.tobytes())}
    header["__metadata__"].update(crc32=json.dumps(checksums), key=block_key(ROOT, tokens))
    path.write_bytes(join(header, tokens.tobytes() + payload[16:]))
    with pytest.raises(BlockError, match="-2 is no token id"):
        BlockFile(str(path))


def test_pipe_is_refused_without_waiting_for_its_writer(tmp_path):
    os.mkfifo(tmp_path / "block")
    with pytest.raises(BlockError, match="no ordinary file"):
        BlockFile(str(tmp_path / "block"))


def test_check_finds_a_flipped_bit_in_the_payload(tmp_path, codec):
    path = write(tmp_path / "block", block(count(4)), codec)
    data = path.read_bytes()
    file = BlockFile(str(path))
    file.check()
    file.close()
    for at in range(len(data) - 300, len(data), 7):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        file = BlockFile(str(path))
        with pytest.raises(BlockError, match="checksum"):
            file.check()
        file.close()


@pytest.mark.parametrize("text", [b"[]", b"null", b"7", b'""', b"{}", b"{", b"\xff\xfe", b"[" * 100_000])
def test_invalid_header_text_is_refused(tmp_path, text):
    (tmp_path / "block").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(BlockError):
        BlockFile(str(tmp_path / "block"))


def test_missing_file_folder_and_link_are_refused_as_blocks(tmp_path):
    write(tmp_path / "block", block(count(4)), "raw")
    (tmp_path / "link").symlink_to(tmp_path / "block")
    for name in ("missing", ".", "link"):
        with pytest.raises(BlockError):
            BlockFile(str(tmp_path / name))
