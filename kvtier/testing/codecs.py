"""CodecChecks: what every codec must do, as a class to subclass in a test."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch

from kvtier.errors import BlockError
from kvtier.kv.codecs import BUILT_IN, Codec
from kvtier.kv.codecs.base import as_bytes, check_codec
from kvtier.kv.page import Page, PageView
from kvtier.kv.safetensors_header import ITEM_BYTES, dtype_named
from kvtier.kv.spec import KVSpec, LayerSpec
from kvtier.offload.accounting import MemoryBudget
from kvtier.offload.storage.encoded_pages import EncodedPages, HostPayloads
from kvtier.store.block import Block
from kvtier.store.chain import BlockId
from kvtier.store.format.block_file import BlockFile, encode_block
from kvtier.store.store import PrefixStore

_ROOT = "00" * 32
_SHAPES = ((2, 7, 8), (1, 256, 64), (8, 1, 3), (0, 5, 4), (3, 4, 0))


class CodecChecks:
    """Subclass it as ``Test…`` and define the fixture ``codec``, which returns a codec.

    ``tmp_path`` is the fixture of pytest.
    """

    def test_it_says_what_it_is(self, codec: Codec) -> None:
        """A name that stands in files, and whether it keeps every bit."""
        assert check_codec(codec, "compression") is codec

    def test_tensors_come_back(self, codec: Codec) -> None:
        """Of every type that K and V can have, any shape, and strides of a view: every bit, if it is lossless."""
        for name in ITEM_BYTES:
            dtype = dtype_named(name)
            for shape in _SHAPES:
                for tensor in (_tensor(shape, dtype), _tensor(shape[::-1], dtype).permute(2, 1, 0)):
                    payload = codec.encode(tensor)
                    assert payload.dtype == np.uint8
                    assert codec.encoded_nbytes(shape, dtype) in (None, payload.nbytes)
                    found = codec.decode(payload.copy(), shape, dtype)
                    assert (tuple(found.shape), found.dtype) == (shape, dtype), name
                    if codec.is_lossless:
                        _assert_same_bytes(found, tensor)

    def test_values_of_every_kind_come_back(self, codec: Codec) -> None:
        """Infinities, NaN and the sign of zero, if it is lossless; from one that is not, numbers stay near."""
        special = torch.tensor([[[0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-30, -1.5, 65504.0]]])
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            tensor = special.to(dtype)
            if codec.is_lossless:
                _assert_same_bytes(_round_trip(codec, tensor), tensor)
            usual = torch.linspace(-3, 3, 64).reshape(1, 8, 8).to(dtype)
            assert (_round_trip(codec, usual).float() - usual.float()).abs().max() <= 0.1

    def test_nothing_but_a_block_error_comes_of_other_payloads(self, codec: Codec) -> None:
        """Cut short, grown, or with other bytes in it: an error, or some tensor of the right shape."""
        drawn = random.Random(5)
        whole = codec.encode(_tensor((2, 16, 8), torch.float32))
        for _ in range(300):
            payload = bytearray(whole.tobytes())
            at = drawn.randrange(len(payload))
            change = drawn.choice(["cut", "grow", "byte", "bytes", "nothing left"])
            if change == "cut":
                del payload[at:]
            elif change == "grow":
                payload += drawn.randbytes(at + 1)
            elif change == "byte":
                payload[at] ^= 1 << drawn.randrange(8)
            elif change == "bytes":
                payload[at : at + 16] = drawn.randbytes(min(16, len(payload) - at))
            else:
                payload.clear()
            try:
                found = codec.decode(np.frombuffer(payload, dtype=np.uint8), (2, 16, 8), torch.float32)
            except BlockError:
                continue
            assert change not in ("cut", "nothing left")
            assert (tuple(found.shape), found.dtype) == ((2, 16, 8), torch.float32)

    def test_a_block_file_gives_back_its_pages(self, codec: Codec, tmp_path: Path) -> None:
        """Layer by layer, with layers of different types and sizes."""
        tokens = np.arange(5, dtype=np.int64)
        pages = [
            Page(_tensor((heads, 5, dim), dtype), _tensor((heads, 5, 2 * dim), dtype))
            for heads, dim, dtype in ((2, 8, torch.float32), (1, 4, torch.bfloat16))
        ]
        block = Block(BlockId.of(_ROOT, _ROOT, tokens), tuple(pages))
        path = tmp_path / "block.safetensors"
        path.write_bytes(b"".join(encode_block(block, codec)))
        file = BlockFile(str(path), codecs={codec.name: codec})
        try:
            file.check()
            assert file.spec == KVSpec(tuple(page.spec for page in pages))
            for layer, page in enumerate(pages):
                found = file.page(layer)
                for mine, theirs in ((found.k_htd, page.k_htd), (found.v_htd, page.v_htd)):
                    _assert_same_bytes(mine, _round_trip(codec, theirs))
        finally:
            file.close()

    def test_cold_pages_come_back(self, codec: Codec) -> None:
        """Those of a layer on a device, from host memory: any part of them, in the buffer of the layer."""
        page_tokens, columns = 4, 10
        budget = MemoryBudget(2**20)
        for dtype in (torch.float32, torch.bfloat16):
            k, v = _tensor((2, columns, 8), dtype)[None], _tensor((1, columns, 4), dtype)[None]
            payloads = HostPayloads(budget, k.nbytes + v.nbytes)
            pages = EncodedPages(1, columns, LayerSpec.of(k, v), codec, page_tokens, payloads)
            pages.write(0, k, v)
            for first, last in ((0, columns), (3, 9), (5, 6)):
                found = tuple(torch.zeros_like(tensor[0, :, first:last]).contiguous() for tensor in (k, v))
                pages.read(0, first, last, PageView.on(*found))
                for mine, theirs in zip(found, (k, v), strict=True):
                    cut = [theirs[0, :, at : at + page_tokens] for at in range(0, columns, page_tokens)]
                    expected = torch.cat([_cold_page(codec, page) for page in cut], dim=1)
                    assert torch.equal(mine, expected[:, first:last])
            del pages, payloads
        assert budget.used_bytes == 0

    def test_a_store_keeps_blocks_in_it(self, codec: Codec, tmp_path: Path) -> None:
        """Another store on the same folder reads them; one without the codec finds nothing, and deletes nothing."""
        tokens = np.arange(8, dtype=np.int64)
        k = _tensor((2, 8, 4), torch.float32)

        def read(start: int, stop: int) -> tuple[Page, ...]:
            return (Page(k[:, start:stop].clone(), k[:, start:stop].clone()),)

        with PrefixStore(tmp_path, block_size=4, compression=codec) as store:
            assert store.lossy_codec == (None if codec.is_lossless else codec.name)
            assert store.commit(_ROOT, tokens, read) == 8
        with PrefixStore(tmp_path, block_size=4) as store:
            match = store.match(_ROOT, tokens)
            try:
                store.restore([match.spans]).close()
                is_read = True
            except BlockError:
                is_read = False
            assert is_read == (codec.name in BUILT_IN)
        with PrefixStore(tmp_path, block_size=4, compression=codec) as store:
            match = store.match(_ROOT, tokens)
            assert match.length == 8
            load = store.restore([match.spans])
            page = load.reader(match.spans[0].block.key).page(0)
            assert torch.equal(page.k_htd, _round_trip(codec, k[:, :4].contiguous()))
            load.close()
            assert store.verify().ok


def _tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return values as they are usual for K and V, the same each time."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(3), device="cpu")
    return values.to(dtype)


def _round_trip(codec: Codec, tensor: torch.Tensor) -> torch.Tensor:
    return codec.decode(codec.encode(tensor).copy(), tuple(tensor.shape), tensor.dtype)


def _cold_page(codec: Codec, page_htd: torch.Tensor) -> torch.Tensor:
    """Return what a cold page holds: the decoded payload, or the page itself where the payload is larger."""
    return page_htd if codec.encode(page_htd).nbytes > page_htd.nbytes else _round_trip(codec, page_htd)


def _assert_same_bytes(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    assert np.array_equal(as_bytes(mine.contiguous()), as_bytes(theirs.contiguous())), mine.dtype
