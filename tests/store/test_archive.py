"""Prefix archives: bitwise round trips, files that any safetensors reader reads, and refusal of hostile files."""

import contextlib
import json
import os
import stat
import struct
import tracemalloc
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from kvtier.errors import ArchiveError, BlockError, ConfigurationError
from kvtier.kv.codecs import BUILT_IN
from kvtier.kv.page import Page
from kvtier.kv.spec import KVSpec, LayerSpec
from kvtier.store.block import Block
from kvtier.store.chain import BlockId
from kvtier.store.format import archive as archives
from kvtier.store.format.archive import Archive, write_archive
from kvtier.store.format.block_file import BlockFile, encode_block
from tests.support.stores import OTHER_ROOT, ROOT, count, ids, same_bits

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
SMALL = KVSpec((LayerSpec(2, 4, 1, 8, torch.float32), LayerSpec(1, 2, 3, 2, torch.bfloat16)))
MANIFEST = {"model": "a test", "config": {"rope_theta": 10000.0}, "namespace": ""}


def sequence(spec: KVSpec, tokens: int, seed: int = 0) -> tuple[Page, ...]:
    """Return K and V of random bits, which include NaN and infinities."""
    generator = torch.Generator().manual_seed(seed)

    def some(heads, dim, dtype):
        bits = torch.randint(0, 256, (heads, tokens, dim * dtype.itemsize), dtype=torch.uint8, generator=generator)
        return bits.view(dtype) if bits.numel() else torch.empty(heads, tokens, dim, dtype=dtype)

    return tuple(Page(some(g.k_heads, g.k_dim, g.dtype), some(g.v_heads, g.v_dim, g.dtype)) for g in spec.layers)


@contextlib.contextmanager
def chain(folder, whole: tuple[Page, ...], size: int, codec: str = "raw"):
    """Write the blocks of a sequence to files and yield them open for reading."""
    n = whole[0].k_htd.shape[1]
    readers, parent = [], ROOT
    with contextlib.ExitStack() as stack:
        for start in range(0, n, size):
            stop = min(start + size, n)
            pages = tuple(Page(p.k_htd[:, start:stop].contiguous(), p.v_htd[:, start:stop].contiguous()) for p in whole)
            block = BlockId.of(ROOT, parent, count(stop - start, start))
            path = folder / f"block-{start}"
            path.write_bytes(b"".join(encode_block(Block(block, pages), BUILT_IN[codec])))
            readers.append(BlockFile(str(path)))
            stack.callback(readers[-1].close)
            parent = block.key
        yield readers


def exported(folder, whole=None, tokens=None, size=4, codec="raw", **settings):
    """Write an archive of the first ``tokens`` tokens of a sequence; return its path."""
    whole = sequence(SMALL, 10) if whole is None else whole
    settings = {"root": ROOT, "manifest": MANIFEST, "block_size": size, "name": "a talk", **settings}
    with chain(folder, whole, size, codec) as readers:
        tokens = whole[0].k_htd.shape[1] if tokens is None else tokens
        written = write_archive(folder / "archive", readers, tokens, **settings)
    assert written == (folder / "archive").stat().st_size
    return folder / "archive"


def same_pages(found, whole, start, stop) -> bool:
    return len(found) == len(whole) and all(
        same_bits(a.k_htd, b.k_htd[:, start:stop]) and same_bits(a.v_htd, b.v_htd[:, start:stop])
        for a, b in zip(found, whole, strict=True)
    )


@st.composite
def specs(draw):
    sizes = st.integers(0, 3)
    return KVSpec(
        tuple(
            LayerSpec(draw(sizes), draw(sizes), draw(sizes), draw(sizes), draw(st.sampled_from(DTYPES)))
            for _ in range(draw(st.integers(1, 3)))
        )
    )


@given(specs(), st.integers(1, 12), st.integers(1, 5), st.sampled_from(["raw", "zstd"]), st.data())
def test_archive_round_trip_of_any_prefix_is_bitwise(tmp_path_factory, spec, n, size, codec, data):
    folder = tmp_path_factory.mktemp("archive")
    whole = sequence(spec, n)
    tokens = data.draw(st.integers((n - 1) // size * size + 1, n))  # the last block may hold more tokens
    with Archive(exported(folder, whole, tokens, size, codec)) as archive:
        archive.check()
        assert archive.tokens.tolist() == list(range(tokens))
        assert (archive.root, archive.manifest, archive.block_size) == (ROOT, MANIFEST, size)
        assert archive.name == "a talk"
        assert archive.spec == spec
        assert same_pages(archive.pages(0, tokens), whole, 0, tokens)
        start = data.draw(st.integers(0, tokens - 1))
        stop = data.draw(st.integers(start + 1, tokens))
        assert same_pages(archive.pages(start, stop), whole, start, stop)


def test_archive_is_readable_by_safetensors(tmp_path):
    whole = sequence(SMALL, 10)
    with safe_open(exported(tmp_path, whole, 9), framework="pt") as file:
        assert file.metadata()["format"] == "kvtier-prefix/1"
        assert set(file.keys()) == {"tokens", "k.0", "v.0", "k.1", "v.1"}
        assert file.get_tensor("tokens").tolist() == list(range(9))
        for layer, page in enumerate(whole):
            assert same_bits(file.get_tensor(f"k.{layer}"), page.k_htd[:, :9])
            assert same_bits(file.get_tensor(f"v.{layer}"), page.v_htd[:, :9])


def test_archive_pages_are_contiguous_copies(tmp_path):
    with Archive(exported(tmp_path)) as archive:
        pages = archive.pages(2, 7)
        assert all(t.is_contiguous() for p in pages for t in (p.k_htd, p.v_htd))
        pages[0].k_htd.zero_()
        assert same_pages(archive.pages(2, 7), sequence(SMALL, 10), 2, 7)


def test_archive_has_mode_0600_and_no_temporary_file_beside_it(tmp_path):
    path = exported(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.glob(".*")) == []


def test_export_overwrites_an_existing_file_only_with_overwrite_true(tmp_path):
    path = exported(tmp_path)
    before = path.read_bytes()
    with pytest.raises(ArchiveError, match=r"exists already; pass overwrite=True"):
        exported(tmp_path, name="other")
    assert path.read_bytes() == before
    exported(tmp_path, name="other", overwrite=True)
    with Archive(path) as archive:
        assert archive.name == "other"


def test_export_refuses_an_existing_file_before_it_writes(tmp_path, monkeypatch):
    (tmp_path / "archive").write_text("mine")
    monkeypatch.setattr(archives, "_write", lambda *args: pytest.fail("it began to write"))
    with pytest.raises(ArchiveError, match="exists already"):
        exported(tmp_path)


def test_export_keeps_a_file_that_appears_while_it_writes(tmp_path, monkeypatch):
    def slow(*args):
        (tmp_path / "archive").write_text("mine")
        return original(*args)

    original = archives._write
    monkeypatch.setattr(archives, "_write", slow)
    with pytest.raises(ArchiveError, match="exists already"):
        exported(tmp_path)
    assert (tmp_path / "archive").read_text() == "mine"
    assert list(tmp_path.glob(".*")) == []


def test_export_works_on_a_drive_without_hard_links(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with Archive(exported(tmp_path)) as archive:
        archive.check()
    with pytest.raises(ArchiveError, match="exists already"):
        exported(tmp_path)


@pytest.mark.parametrize("call", ["fsync", "open", "link"])
def test_failed_export_leaves_no_file_behind(tmp_path, monkeypatch, call):
    with chain(tmp_path, sequence(SMALL, 10), 4) as readers:

        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(os, call, full)
            if call == "link":
                patched.setattr(type(tmp_path), "replace", full)
            with pytest.raises(ArchiveError, match=r"archive: .*No space left on device.*; pass a file"):
                write_archive(tmp_path / "archive", readers, 10, root=ROOT, manifest=MANIFEST, block_size=4)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith("block-")] == []


def test_a_damaged_block_is_not_exported(tmp_path):
    with chain(tmp_path, sequence(SMALL, 10), 4) as readers:
        data = (tmp_path / "block-4").read_bytes()
        (tmp_path / "block-4").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(BlockError, match=r"block-4.* checksum"):
            write_archive(tmp_path / "archive", readers, 10, root=ROOT, manifest=MANIFEST, block_size=4)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith("block-")] == []


@pytest.mark.parametrize(
    ("tokens", "settings", "match"),
    [
        (8, {}, "10 tokens where the prefix has 8"),  # the last block is not needed
        (11, {}, "10 tokens where the prefix has 11"),
        (10, {"manifest": {"x": "y" * 140_000}}, "takes more than"),
        (10, {"block_size": 0}, "block size of 0"),
        (10, {"block_size": 10**9}, "block size of"),
    ],
)
def test_export_refuses_invalid_token_counts_manifests_and_block_sizes(tmp_path, tokens, settings, match):
    with pytest.raises(ArchiveError, match=match):
        exported(tmp_path, None, tokens, 4, "raw", **settings)
    assert not (tmp_path / "archive").exists()


def test_export_refuses_blocks_of_two_models(tmp_path):
    (tmp_path / "other").mkdir()
    other = KVSpec(SMALL.layers[:1])
    with (
        chain(tmp_path, sequence(SMALL, 4), 4) as these,
        chain(tmp_path / "other", sequence(other, 4), 4) as those,
        pytest.raises(ArchiveError, match="one model"),
    ):
        write_archive(tmp_path / "archive", [*these, *those], 8, root=ROOT, manifest={}, block_size=4)


def test_export_and_check_use_memory_for_few_layers(tmp_path):
    """Counts the memory of NumPy and Python. A layer takes 1 MiB, the prefix 24 MiB."""
    layer = LayerSpec(2, 64, 2, 64, torch.float32)
    with chain(tmp_path, sequence(KVSpec((layer,) * 24), 1024), 256) as readers:
        tracemalloc.start()
        try:
            write_archive(tmp_path / "archive", readers, 1024, root=ROOT, manifest={}, block_size=256)
            _, peak = tracemalloc.get_traced_memory()
            assert peak < 2.5 * 2**20
        finally:
            tracemalloc.stop()
    with Archive(tmp_path / "archive") as archive:
        tracemalloc.start()
        try:
            archive.check()
            _, peak = tracemalloc.get_traced_memory()
            assert peak < 6 * 2**20
        finally:
            tracemalloc.stop()


def test_check_progress_never_decreases_and_ends_at_the_archive_size(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_CHECKED_BYTES", 64)
    with Archive(exported(tmp_path)) as archive:
        said = []
        archive.check(lambda done, of: said.append((done, of)))
        assert said == sorted(said)
        assert said[-1] == (archive.nbytes, archive.nbytes)
        assert len(said) > 10


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 3), (4, 3), (0, 11)])
def test_reading_an_invalid_token_range_of_an_archive_is_refused(tmp_path, start, stop):
    with Archive(exported(tmp_path)) as archive, pytest.raises(ConfigurationError, match="within the 10 tokens"):
        archive.pages(start, stop)


@pytest.mark.parametrize("name", [None, "", " x", "x\n", "x" * 201, "\ud800"])
def test_invalid_stored_name_is_ignored(tmp_path, name):
    path = exported(tmp_path)
    change(path, lambda h: h["__metadata__"].update(name=name) if name is not None else h["__metadata__"].pop("name"))
    with Archive(path) as archive:
        assert archive.name is None


# --- hostile files ----------------------------------------------------------------------------------------------------


def change(path, how) -> None:
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    how(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def told(**values):
    return lambda h: h["__metadata__"].update(values)


def nested(levels):
    return '{"a":' * levels + "1" + "}" * levels


@pytest.mark.parametrize(
    ("how", "match"),
    [
        (told(format="kvtier/1"), "its format is"),
        (told(format="kvtier-prefix/2"), "newer kvtier: update"),
        (told(format="kvtier-prefix/0"), "its format is"),
        (lambda h: h["__metadata__"].pop("root"), "no 'root'"),
        (lambda h: h["__metadata__"].pop("manifest"), "no 'manifest'"),
        (told(root=ROOT[:-1]), "root .* is not 64 hex digits"),
        (told(root=ROOT[:-1] + "\n"), "root .* is not 64 hex digits"),
        (told(root="../" * 21 + "x"), "root .* is not 64 hex digits"),
        (told(root=7), "no such number"),
        (told(root=None), "not strings"),
        (told(block_size="0"), "block size"),
        (told(block_size="-4"), "block size"),
        (told(block_size="4.0"), "block size"),
        (told(block_size="٤"), "block size"),
        (told(block_size="9" * 4000), "block size"),
        (told(manifest="[]"), "manifest is no JSON object"),
        (told(manifest="{"), "Expecting"),
        (told(manifest='{"a": 1, "a": 2}'), "twice"),
        (told(manifest=nested(33)), "nested"),
        (told(manifest="[" * 20_000), "recursion|nested"),
        (told(manifest=json.dumps({"x": "y" * 140_000})), "longer than"),
        (told(manifest='{"a": ' + "9" * 5000 + "}"), "Exceeds the limit|digits"),
        (told(crc32="{}"), "one number for each"),
        (lambda h: [h.pop(name) for name in ("k.0", "v.0", "k.1", "v.1")], "header tells"),
        (lambda h: h["k.0"].update(shape=[1, 20, 4]), "does not fit the 10 tokens"),
        (lambda h: h["k.0"].update(shape=[2, 10, 2], dtype="F64"), "not of one type"),
        (lambda h: h["k.0"].update(shape=[320], dtype="U8"), "not of one type"),
        (lambda h: h["v.1"].update(data_offsets=[0, 120]), "does not lie where"),
    ],
)
def test_hostile_archive_is_refused_with_its_path_and_a_remedy(tmp_path, how, match):
    path = exported(tmp_path)
    change(path, how)
    with pytest.raises(ArchiveError, match=match) as caught:
        Archive(path)
    assert str(caught.value).startswith(str(path))
    assert "export the prefix again" in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 300


def test_an_archive_without_layers_is_refused(tmp_path):
    path = exported(tmp_path)
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    path.write_bytes(data[: 8 + size + 80])
    change(path, lambda h: [h.pop(name) for name in ("k.0", "v.0", "k.1", "v.1")])
    with pytest.raises(ArchiveError, match="no layers"):
        Archive(path)


def test_archive_with_negative_token_ids_is_refused(tmp_path):
    path = exported(tmp_path)
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    tokens = ids(*range(9), -9).tobytes()
    path.write_bytes(data[: 8 + size] + tokens + data[8 + size + 80 :])
    with pytest.raises(ArchiveError, match="checksum of its tokens"):
        Archive(path)

    def checksum(h):
        of_all = json.loads(h["__metadata__"]["crc32"]) | {"tokens": zlib.crc32(tokens)}
        h["__metadata__"]["crc32"] = json.dumps(of_all)

    change(path, checksum)
    with pytest.raises(ArchiveError, match="-9 is no token id"):
        Archive(path)


def test_every_truncation_of_an_archive_is_refused(tmp_path):
    path = exported(tmp_path)
    data = path.read_bytes()
    for n in range(len(data)):
        path.write_bytes(data[:n])
        with pytest.raises(ArchiveError):
            Archive(path)


def test_flipped_bit_in_any_tensor_byte_is_found_by_open_or_check(tmp_path):
    path = exported(tmp_path)
    data = bytearray(path.read_bytes())
    (size,) = struct.unpack("<Q", data[:8])
    for at in range(8 + size, len(data)):
        data[at] ^= 1 << at % 8
        path.write_bytes(data)
        with pytest.raises(ArchiveError, match="checksum"), Archive(path) as archive:
            archive.check()
        data[at] ^= 1 << at % 8


def test_archive_truncated_after_opening_is_reported_as_cut_short(tmp_path):
    path = exported(tmp_path)
    with Archive(path) as archive:
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(ArchiveError, match="cut short"):
            archive.check()
        with pytest.raises(ArchiveError, match="cut short"):
            archive.pages(0, 10)


def test_missing_file_folder_and_pipe_are_refused_as_archives(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("missing", ".", "pipe"):
        with pytest.raises(ArchiveError, match="cannot be imported"):
            Archive(tmp_path / name)


def test_archive_and_block_readers_refuse_each_others_files(tmp_path):
    path = exported(tmp_path)
    with pytest.raises(ArchiveError):
        Archive(tmp_path / "block-0")
    with pytest.raises(BlockError):
        BlockFile(str(path))


def test_archive_reports_the_root_it_was_written_with(tmp_path):
    with Archive(exported(tmp_path, root=OTHER_ROOT)) as archive:
        assert archive.root == OTHER_ROOT
