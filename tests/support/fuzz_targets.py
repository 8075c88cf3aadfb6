"""Both readers open bytes that may be hostile, and read everything that they accept.

Either the reader refuses with its own exception, or all its results are consistent. Anything else is a bug.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from kvtier.errors import ArchiveError, BlockError
from kvtier.kv.page import Page, PageView
from kvtier.kv.spec import KVSpec
from kvtier.store.format.archive import Archive
from kvtier.store.format.block_file import BlockFile
from kvtier.store.format.header import MAX_TOKENS

MOST_PAGE_BYTES = 2**26  # larger pages are not read here: the result would be right, but slow


@dataclass(frozen=True)
class Outcome:
    """The outcome of some bytes: the reason of a refusal (None if accepted), and the bytes of the largest page."""

    refusal: str | None
    page_bytes: int = 0


def read_as_block(path: Path) -> Outcome:
    """Read a file as a block."""
    page_bytes = 0
    try:
        file = BlockFile(str(path))
    except BlockError as error:
        return Outcome(_sentence(error, path))
    try:
        check_ids(file.id.tokens, file.id.root)
        for layer in range(len(file.spec.layers)):
            n, g = len(file.id.tokens), file.spec.layers[layer]
            page_bytes = max(page_bytes, g.token_bytes * n)
            if g.token_bytes * n > MOST_PAGE_BYTES:
                continue
            page = file.page(layer)
            check_page(page, file.spec, layer, n)
            landed = Page(torch.zeros_like(page.k_htd), torch.zeros_like(page.v_htd))
            if page.nbytes:
                file.landing(layer, 0, n, PageView.on(landed.k_htd, landed.v_htd))()
                assert landed.k_htd.view(torch.uint8).equal(page.k_htd.view(torch.uint8))
        file.check()
    except BlockError as error:
        return Outcome(_sentence(error, path), page_bytes)
    finally:
        file.close()
    return Outcome(None, page_bytes)


def read_as_archive(path: Path) -> Outcome:
    """Read a file as an archive."""
    try:
        with Archive(path) as archive:
            n = len(archive.tokens)
            check_ids(archive.tokens, archive.root)
            assert isinstance(archive.manifest, dict)
            assert archive.block_size > 0
            assert archive.name is None or 1 <= len(archive.name) <= 200
            archive.check()
            if archive.spec.token_bytes * n <= MOST_PAGE_BYTES:
                for start, stop in ((0, n), (n // 2, n)):
                    for layer, page in enumerate(archive.pages(start, stop)):
                        check_page(page, archive.spec, layer, stop - start)
            return Outcome(None, archive.spec.token_bytes * n)
    except ArchiveError as error:
        return Outcome(_sentence(error, path))


def _sentence(error: Exception, path: Path) -> str:
    text = str(error)
    assert text.startswith(str(path)), f"{text!r} does not name the file"
    assert len(text) < len(str(path)) + 400, f"a message of {len(text)} characters"
    text.encode()  # it can be printed
    return text.removeprefix(str(path))


def check_ids(tokens, root: str) -> None:
    """Assert that accepted ids are valid ids."""
    assert 0 < len(tokens) <= MAX_TOKENS
    assert tokens.min() >= 0
    assert len(bytes.fromhex(root)) == 32


def check_page(page: Page, spec: KVSpec, layer: int, tokens: int) -> None:
    """Assert that a page has the shape and dtype that the file declared."""
    g = spec.layers[layer]
    assert page.k_htd.shape == (g.k_heads, tokens, g.k_dim)
    assert page.v_htd.shape == (g.v_heads, tokens, g.v_dim)
    assert page.k_htd.dtype == page.v_htd.dtype == g.dtype
    assert page.k_htd.is_contiguous()
    assert page.v_htd.is_contiguous()
