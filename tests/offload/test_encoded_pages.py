"""Cold pages that go through a codec: their bits, the budget that they count against, and what fails with them."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier import ConfigurationError, PrefixStore, StreamError, TieredCache
from kvtier.kv.codecs import ExponentZstd, Raw
from kvtier.kv.page import PageView
from kvtier.kv.spec import LayerSpec
from kvtier.offload.accounting import MemoryBudget
from kvtier.offload.storage.encoded_pages import EncodedPages, FilePayloads, HostPayloads
from kvtier.offload.storage.spill_folder import SpillFolder
from kvtier.transfer.base import InlineEngine
from tests.support.int8_codec import Int8

PAGE = 4


class Growing(Raw):
    """Makes every payload larger than its tensor."""

    name = "growing"

    def encode(self, tensor):
        return np.concatenate([super().encode(tensor), np.zeros(9, dtype=np.uint8)])

    def decode(self, payload, shape, dtype):
        raise AssertionError("no page was kept in this codec")


class Failing(Raw):
    """Fails as a custom codec may."""

    name = "failing"

    def __init__(self, encodes=False, result=None):
        self.encodes, self.result = encodes, result

    def encode(self, tensor):
        if not self.encodes:
            raise ZeroDivisionError("no scale")
        return super().encode(tensor)

    def decode(self, payload, shape, dtype):
        if self.result is None:
            raise ZeroDivisionError("no scale")
        return self.result(super().decode(payload, shape, dtype))


def on_host(*shape: int) -> torch.Tensor:
    """Return K or V as they are when pages are written: on the host."""
    return torch.randn(shape, device="cpu")


def read_back(pages: EncodedPages, row: int, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = pages.spec
    k = torch.full((g.k_heads, last - first, g.k_dim), 7, device="cpu").to(g.dtype)
    v = torch.full((g.v_heads, last - first, g.v_dim), 7, device="cpu").to(g.values_dtype)
    pages.read(row, first, last, PageView.on(k, v))
    return k, v


@settings(max_examples=max(1, settings().max_examples // 2))
@given(
    codec=st.sampled_from([ExponentZstd(), Growing(), Int8()]),
    in_file=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64]),
    rows=st.integers(1, 3),
    tokens=st.integers(1, 4 * PAGE),
    ends=st.sets(st.integers(1, 4 * PAGE)),
    order=st.randoms(use_true_random=False),
    data=st.data(),
)
def test_encoded_pages_return_what_was_written(
    codec, in_file, dtype, rows, tokens, ends, order, data, tmp_path_factory
):
    """Written in pieces of any size and order; read in others. Only floats in a lossy codec may differ, and little."""
    folder = SpillFolder(tmp_path_factory.getbasetemp() / "spill")
    spec = LayerSpec(2, 8, 1, 4, dtype)
    k, v = (on_host(rows, heads, tokens, dim).mul(9).to(dtype) for heads, dim in ((2, 8), (1, 4)))
    raw_nbytes = k.nbytes + v.nbytes
    budget = MemoryBudget(raw_nbytes)
    payloads = FilePayloads(folder) if in_file else HostPayloads(budget, raw_nbytes)
    pages = EncodedPages(rows, tokens, spec, codec, PAGE, payloads)
    bounds = sorted({0, tokens, *(end for end in ends if end < tokens)})
    pieces = list(itertools.pairwise(bounds))
    order.shuffle(pieces)
    for first, last in pieces:
        staged = k[:, :, first:last].clone(), v[:, :, first:last].clone()
        pages.write(first, *staged)
        for tensor in staged:
            tensor.zero_()  # staging memory is used again
        assert budget.used_bytes <= raw_nbytes
    first = data.draw(st.integers(0, tokens - 1))
    last = data.draw(st.integers(first + 1, tokens))
    for row in range(rows):
        for found, wanted in zip(read_back(pages, row, first, last), (k, v), strict=True):
            wanted = wanted[row, :, first:last]
            if codec.is_lossless or not dtype.is_floating_point:
                assert torch.equal(found, wanted)
            else:
                assert (found.float() - wanted.float()).abs().max() <= wanted.float().abs().max() / 100
    del pages, payloads
    gc.collect()
    assert budget.used_bytes == 0
    assert not list(folder.parent.glob("*/*.pages"))
    folder.close()


def test_host_budget_counts_the_encoded_size():
    k = on_host(1, 2, 4 * PAGE, 64).to(torch.bfloat16)
    raw_nbytes = 2 * k.nbytes
    budget = MemoryBudget(raw_nbytes)
    pages = EncodedPages(1, 4 * PAGE, LayerSpec.of(k, k), Int8(), PAGE, HostPayloads(budget, raw_nbytes))
    assert budget.used_bytes == raw_nbytes
    pages.write(0, k, k)
    assert budget.used_bytes == 2 * Int8().encoded_nbytes(k.shape, k.dtype) < 0.6 * raw_nbytes


def test_a_codec_that_fails_to_encode_is_a_stream_error():
    k = on_host(1, 2, PAGE, 8)
    pages = EncodedPages(1, PAGE, LayerSpec.of(k, k), Failing(), PAGE, HostPayloads(MemoryBudget(None), 2 * k.nbytes))
    with pytest.raises(StreamError, match="cannot keep cold pages with the codec failing: no scale"):
        pages.write(0, k, k)


@pytest.mark.parametrize("result", [None, lambda found: found[:1, :1], lambda found: found.to(torch.float64)])
def test_a_codec_that_decodes_something_else_is_a_stream_error(result):
    k = on_host(1, 2, PAGE, 8)
    codec = Failing(encodes=True, result=result)
    pages = EncodedPages(1, PAGE, LayerSpec.of(k, k), codec, PAGE, HostPayloads(MemoryBudget(None), 2 * k.nbytes))
    pages.write(0, k, k)
    with pytest.raises(StreamError, match=r"cannot read cold pages with the codec failing.*K and V are lost"):
        read_back(pages, 0, 0, PAGE)


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_a_lost_or_shortened_file_is_a_stream_error(tmp_path, damage):
    k = on_host(1, 2, PAGE, 8)
    payloads = FilePayloads(SpillFolder(tmp_path))
    pages = EncodedPages(1, PAGE, LayerSpec.of(k, k), ExponentZstd(), PAGE, payloads)
    pages.write(0, k, k)
    damage(Path(payloads.path))
    with pytest.raises(StreamError, match="their K and V are lost"):
        read_back(pages, 0, 0, PAGE)


# --- a cache with such pages ------------------------------------------------------------------------------------------

ENGINES = {
    "device": lambda device: InlineEngine(),
    "cpu": lambda device: InlineEngine(device_is_host=True),
    "threads": None,
}
_CPU_ONLY = pytest.mark.cpu_only("this engine takes the memory of the device for the host's")
MARKED_ENGINES = [pytest.param(name, marks=_CPU_ONLY if name == "cpu" else ()) for name in ENGINES]


@pytest.mark.parametrize("engine", MARKED_ENGINES)
@pytest.mark.parametrize("host_budget", ["1MiB", "20KiB"])
def test_compressed_pages_give_the_same_answer(make_model, generate, tokens, tmp_path, engine, host_budget):
    model, prompt = make_model("llama"), tokens(64)
    options = {"device_budget": "52KiB", "host_budget": host_budget, "spill_dir": tmp_path, "page_compression": "zstd"}
    if ENGINES[engine] is not None:
        options["engine"] = ENGINES[engine]
    expected = generate(model, prompt)
    with PrefixStore(block_size=8) as store, TieredCache(store, **options) as cache:
        found = generate(model, prompt, cache)
        assert torch.equal(found.sequences, expected.sequences)
        assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits, strict=True))
        assert cache.last_turn.cold_layers > 0
        assert cache.transfers.bytes_down > 0
        with cache.fork() as twin:
            generate(model, found.sequences, twin)
            assert twin.last_turn.cached_tokens == found.sequences.shape[1] - 1
    assert not list(tmp_path.glob("*/*"))


def test_lossy_pages_are_part_of_the_root(make_model, generate, tokens, tmp_path):
    """Prefixes from lossy pages are never taken for exact ones, nor the other way round."""
    model, prompt = make_model("llama"), tokens(64)
    with PrefixStore(tmp_path / "kv", block_size=8) as store:

        def reused(**options):
            with TieredCache(store, spill_dir=tmp_path / "spill", **options) as cache:
                generate(model, prompt, cache)
                return cache.last_turn.cached_tokens

        cold = {"device_budget": "52KiB", "page_compression": Int8()}
        assert reused() == 0
        assert reused(device_budget="52KiB", page_compression="zstd") == 63
        assert reused(page_compression=Int8()) == 63, "without a budget, no layer is cold"
        assert reused(**cold) == 0
        assert reused(**cold) == 63
        assert reused() == 63


@pytest.mark.parametrize("wrong", [object(), 7, None, "lz4", "auto", type("Silent", (Int8,), {"is_lossless": None})()])
def test_an_unknown_page_compression_is_refused(wrong):
    with pytest.raises(ConfigurationError, match="page_compression="):
        TieredCache(page_compression=wrong)
