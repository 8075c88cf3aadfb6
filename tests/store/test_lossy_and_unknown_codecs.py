"""A store with a lossy codec never takes its prefixes for exact ones, and files of unknown codecs stay."""

from __future__ import annotations

import pytest

from kvtier import PrefixStore, TieredCache
from kvtier.errors import BlockError, ConfigurationError
from tests.support.int8_codec import Int8
from tests.support.stores import block, count


def test_prefixes_of_a_lossy_codec_are_reused_only_with_that_codec(make_model, generate, tokens, tmp_path):
    model = make_model("llama")

    def turn(**options):
        with TieredCache(PrefixStore(tmp_path, block_size=8, **options)) as cache:
            generate(model, tokens(32), cache)
            cache.store.flush()
            return cache.last_turn

    assert turn().cached_tokens == 0
    assert turn().cached_by_tier["disk"] == 31
    lossy = turn(compression=Int8())
    assert lossy.cached_tokens == 0
    assert turn(compression=Int8()).cached_by_tier["disk"] == 31
    assert turn(compression="zstd").cached_by_tier["disk"] == 31  # zstd is lossless: the same prefix
    with PrefixStore(compression=Int8()) as store:
        assert store.lossy_codec is None  # nothing is encoded in RAM


@pytest.mark.parametrize(
    "wrong",
    [
        object(),
        type("Nameless", (Int8,), {"name": None})(),
        type("Shouting", (Int8,), {"name": "INT8"})(),
        type("Silent", (Int8,), {"is_lossless": None})(),
        type("Impostor", (Int8,), {"name": "zstd"})(),
        7,
        "lz4",
    ],
)
def test_invalid_compression_argument_is_refused(wrong):
    with pytest.raises(ConfigurationError, match="compression="):
        PrefixStore(compression=wrong)


def test_block_files_of_an_unknown_codec_are_kept(tmp_path, caplog):
    """Verification, a catalog rebuild and a repair leave them in place."""
    settings = {"block_size": 4}
    tokens = count(8)

    def read(start, stop):
        return block(tokens[start:stop]).pages

    with PrefixStore(tmp_path, compression=Int8(), **settings) as store:
        store.commit("00" * 32, tokens, read)
    files = sorted(tmp_path.rglob("*.safetensors"))
    with PrefixStore(tmp_path, **settings) as store:
        report = store.verify(repair=True)
        assert not report.ok
        assert all(problem.kind == "unreadable" and "int8/1" in problem.text for problem in report.problems)
    (tmp_path / "catalog.sqlite").unlink()
    with PrefixStore(tmp_path, **settings) as store:
        store.commit("00" * 32, count(8, first=50), lambda start, stop: block(count(8, first=50)[start:stop]).pages)
    assert set(files) <= set(tmp_path.rglob("*.safetensors"))
    with PrefixStore(tmp_path, compression=Int8(), **settings) as store:
        store.verify(repair=True)
        assert store.match("00" * 32, tokens).length == 8


def test_block_files_of_a_later_format_are_refused_but_kept(tmp_path):
    tokens = count(4)
    with PrefixStore(tmp_path, block_size=4) as store:
        store.commit("00" * 32, tokens, lambda start, stop: block(tokens).pages)
    (path,) = tmp_path.rglob("*.safetensors")
    path.write_bytes(path.read_bytes().replace(b"kvtier/1", b"kvtier/9"))
    with PrefixStore(tmp_path, block_size=4) as store:
        with pytest.raises(BlockError, match="format 'kvtier/9'"):
            store.restore([store.match("00" * 32, tokens).spans])
        store.verify(repair=True)
    assert path.exists()


def test_block_files_of_a_later_format_with_other_fields_are_kept(tmp_path):
    """Metadata and tensors of a later format may have other names."""
    tokens = count(4)
    with PrefixStore(tmp_path, block_size=4) as store:
        store.commit("00" * 32, tokens, lambda start, stop: block(tokens).pages)
    (path,) = tmp_path.rglob("*.safetensors")
    data = (
        path.read_bytes()
        .replace(b"kvtier/1", b"kvtier/2")
        .replace(b'"dtypes"', b'"dtipes"')
        .replace(b'"k.0"', b'"K.0"')
    )
    path.write_bytes(data)
    with PrefixStore(tmp_path, block_size=4) as store:
        with pytest.raises(BlockError, match="format 'kvtier/2'"):
            store.restore([store.match("00" * 32, tokens).spans])
        store.verify(repair=True)
    (tmp_path / "catalog.sqlite").unlink()
    PrefixStore(tmp_path, block_size=4).close()
    assert path.read_bytes() == data
