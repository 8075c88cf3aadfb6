"""LayerMemoryChecks: what every memory of a layer must do, as a class to subclass in a test."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

from kvtier.kv.base import LayerMemory

_HEADS, _K_DIM, _V_DIM = 2, 4, 6
Make = Callable[[torch.Tensor, torch.Tensor], LayerMemory]
"""K ``[rows, heads, columns, dim]`` and V like those to come → an empty memory for them."""


class LayerMemoryChecks:
    """Subclass it as ``Test…`` and define the fixture ``make``, which returns a ``Make``.

    Attributes:
        device: where attention reads.
    """

    device = torch.device("cpu")

    def test_it_gives_back_what_was_appended(self, make: Make) -> None:
        """From any column on, whether columns are appended one by one or many at once, and after columns were cut."""
        for seed in range(8):
            drawn = random.Random(seed)
            k, v = self._kv(2, 0, drawn)
            memory = make(*self._kv(2, 1, drawn))
            for _ in range(20):
                begin = drawn.randint(max(0, k.shape[2] - 6), k.shape[2])
                new_k, new_v = self._kv(2, drawn.choice([1, 1, 2, 9]), drawn)
                k, v = torch.cat([k[:, :, :begin], new_k], 2), torch.cat([v[:, :, :begin], new_v], 2)
                first = drawn.randint(0, begin)
                found_k, found_v = memory.append(begin, new_k, new_v, first)
                assert torch.equal(found_k, k[:, :, first:])
                assert torch.equal(found_v, v[:, :, first:])
            memory.close()

    def test_contents_and_pages_are_what_was_appended(self, make: Make) -> None:
        """Pages are copies on the host: appending changes none of them."""
        drawn = random.Random(1)
        k, v = self._kv(2, 23, drawn)
        memory = make(k[:, :, :1], v[:, :, :1])
        memory.append(0, k, v, 0)
        found_k, found_v = memory.contents(17)
        assert torch.equal(found_k, k[:, :, :17])
        assert torch.equal(found_v, v[:, :, :17])
        page = memory.page(1, 3, 20)
        memory.append(5, *self._kv(2, 9, drawn), 0)
        assert page.k_htd.device.type == "cpu"
        assert torch.equal(page.k_htd, k[1, :, 3:20].cpu())
        assert torch.equal(page.v_htd, v[1, :, 3:20].cpu())
        memory.close()

    def test_rows_are_selected_repeated_and_dropped(self, make: Make) -> None:
        """By index, as beams do, and by truth values; what is appended afterwards goes on from there."""
        drawn = random.Random(2)
        k, v = self._kv(3, 19, drawn)
        for rows in (torch.tensor([2, 0, 0, 1]), torch.tensor([1]), torch.tensor([True, False, True])):
            memory = make(k[:, :, :1], v[:, :, :1])
            memory.append(0, k, v, 0)
            memory.select(rows.to(self.device), 18)
            kept_k, kept_v = k[rows][:, :, :18], v[rows][:, :, :18]
            assert memory.rows == len(kept_k)
            new_k, new_v = self._kv(len(kept_k), 2, drawn)
            found_k, found_v = memory.append(18, new_k, new_v, 0)
            assert torch.equal(found_k, torch.cat([kept_k, new_k], 2))
            assert torch.equal(found_v, torch.cat([kept_v, new_v], 2))
            memory.close()

    def test_it_forgets_the_columns_before_its_base_alone(self, make: Make) -> None:
        """A sliding layer drops columns as others arrive, may be cropped behind them, and goes on from there."""
        for seed in range(8):
            drawn = random.Random(100 + seed)
            base = drawn.randint(0, 9)
            k, v = self._kv(2, base, drawn)  # columns before the base have any values
            memory = make(*self._kv(2, 1, drawn))
            memory.begin_at(base)
            assert memory.base == base
            for _ in range(25):
                begin = drawn.randint(max(base, k.shape[2] - 4), k.shape[2])
                if drawn.random() < 0.4:
                    base = drawn.randint(base, begin)
                    memory = memory.trim(base, begin)
                    assert memory.base == base
                if drawn.random() < 0.2:
                    rows = torch.tensor([1, 0])
                    memory.select(rows.to(self.device), begin)
                    k, v = k[rows], v[rows]
                new_k, new_v = self._kv(2, drawn.choice([1, 1, 2, 9]), drawn)
                k, v = torch.cat([k[:, :, :begin], new_k], 2), torch.cat([v[:, :, :begin], new_v], 2)
                first = drawn.randint(base, begin)
                found_k, found_v = memory.append(begin, new_k, new_v, first)
                assert torch.equal(found_k, k[:, :, first:])
                assert torch.equal(found_v, v[:, :, first:])
                end = k.shape[2]
                for found, of in zip(memory.contents(end, first), (k, v), strict=True):
                    assert torch.equal(found, of[:, :, first:])
                page = memory.page(1, first, end)
                assert torch.equal(page.k_htd, k[1, :, first:].cpu())
                assert torch.equal(page.v_htd, v[1, :, first:].cpu())
            memory.close()

    def test_it_takes_what_is_like_what_it_holds(self, make: Make) -> None:
        """Other rows, heads, sizes and types of K and V are others."""
        drawn = random.Random(3)
        k, v = self._kv(2, 5, drawn)
        memory = make(k, v)
        memory.append(0, k, v, 0)
        assert memory.takes(*self._kv(2, 3, drawn))
        assert not memory.takes(*self._kv(1, 3, drawn))
        assert not memory.takes(k.double(), v.double())
        assert not memory.takes(k[:, :1], v[:, :1])
        assert not memory.takes(v, k)
        assert memory.device == k.device
        memory.close()
        memory.close()

    def _kv(self, rows: int, columns: int, drawn: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(drawn.randrange(2**31))
        k = torch.randn(rows, _HEADS, columns, _K_DIM, generator=generator, device="cpu")
        v = torch.randn(rows, _HEADS, columns, _V_DIM, generator=generator, device="cpu")
        return k.to(self.device), v.to(self.device)
