"""TokenTrace: the token in each column of a cache, recorded from forward passes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from kvtier.hf.compat.names import CACHE_ARGUMENTS
from kvtier.hf.inputs.prompt import Prompt
from kvtier.store.chain import TokenIds

_CHECKED = frozenset({"input_ids", "attention_mask", "position_ids"})
# Arguments of a forward pass that change no K and V.
_HARMLESS = frozenset({*CACHE_ARGUMENTS, "use_cache", "logits_to_keep", "num_logits_to_keep", "return_dict"})
# Arguments of ``generate`` that a custom generate function may pass on to the model.
_OF_GENERATE = frozenset({"logits_processor", "stopping_criteria", "generation_config", "synced_gpus", "streamer"})
_EXPECTED = _CHECKED | _HARMLESS | _OF_GENERATE


class TokenTrace:
    """The tokens of each row of a cache, recorded from the forward passes of one model.

    Guarantees: tokens that ``rows`` returns were fed at the same positions, and saw the same tokens, as in a prompt.
    Every change of the cache is reported to ``appended``, ``cut`` or ``move``; other changes are detected by counting.

    Args:
        prompt: prompt of the turn.
        columns: columns of the prompt that the cache holds already.
    """

    def __init__(self, prompt: Prompt, columns: int = 0) -> None:
        self._prompt = prompt
        self._row_of: torch.Tensor | None = None
        ids, real = prompt.table()
        self._real = torch.from_numpy(real)
        self._pads = torch.tensor(prompt.pads, device="cpu")
        self._early = torch.tensor([prompt.ends_early(row) for row in range(len(prompt.rows))], device="cpu")
        self._ids = torch.from_numpy(ids[:, :columns].copy())
        self._passing: tuple[int, torch.Tensor] | None = None
        self._checks: list[torch.Tensor] = []  # evaluated at the end: reading each from the device would stall it
        self.trouble: str | None = None

    def passing(self, arguments: Mapping[str, Any], begin: int, takes_positions: bool) -> None:
        """Note that the model is about to be called with ``arguments``; the cache has ``begin`` columns."""
        ids = arguments.get("input_ids")
        others = [
            name
            for name, value in arguments.items()
            if value is not None and name not in _EXPECTED and not name.startswith("output_")
        ]
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or others:
            self._doubt(f"it was fed {', '.join(sorted(others)) or 'no ids'}")
            return
        rows = ids.shape[0]
        if self._row_of is None and rows % len(self._prompt.rows) == 0:
            self._row_of = torch.arange(len(self._prompt.rows), device="cpu").repeat_interleave(
                rows // len(self._prompt.rows)
            )
            self._ids = self._ids[self._row_of]
        if self._row_of is None or rows != len(self._row_of) or begin > self._ids.shape[1]:
            self._doubt("rows or columns of the cache came from elsewhere")
            return
        self.cut(begin)
        end = begin + ids.shape[1]
        self._check_mask(arguments.get("attention_mask"), end)
        self._check_positions(arguments.get("position_ids"), begin, end, takes_positions)
        self._passing = begin, ids.detach()

    def _check_mask(self, mask: Any, end: int) -> None:
        assert self._row_of is not None
        real = self._real[self._row_of, :end]
        if mask is None:
            if not bool(real.all()):
                self._doubt("padding was not masked")
            return
        if not isinstance(mask, torch.Tensor) or tuple(mask.shape) != (len(real), end):
            self._doubt("the attention mask is not one of rows and columns")
            return
        expected = torch.cat([real, real.new_ones(len(real), end - real.shape[1])], 1).to(mask.device)
        self._checks.append(((mask != 0) == expected).all())

    def _check_positions(self, positions: Any, begin: int, end: int, takes_positions: bool) -> None:
        assert self._row_of is not None
        pads, early = self._pads[self._row_of], self._early[self._row_of]
        if positions is None:
            if takes_positions and bool(pads.any()):
                self._doubt("positions counted padding")
            return
        if not isinstance(positions, torch.Tensor) or positions.ndim != 2 or positions.shape[1] != end - begin:
            self._doubt("positions are not one for each token")
            return
        columns = torch.arange(begin, end, device="cpu")
        real = self._real[self._row_of, begin:end]
        matters = torch.cat([real, ~early[:, None].expand(-1, end - begin - real.shape[1])], 1)
        matters = matters.to(positions.device)
        expected = (columns - pads[:, None]).to(positions.device)
        self._checks.append(((positions == expected) | ~matters).all())

    def passed(self) -> None:
        """Note that the call has ended."""
        if self._passing is not None:
            _, ids = self._passing
            self._ids = torch.cat([self._ids.to(ids.device), ids], 1)
        self._passing = None

    def appended(self, begin: int, columns: int) -> None:
        """Note that ``columns`` columns are appended to a layer that has ``begin``."""
        if self._passing is None or self._passing[0] != begin or self._passing[1].shape[1] != columns:
            self._doubt("K and V came from elsewhere")

    def cut(self, columns: int) -> None:
        """Note that the cache now holds at most its first ``columns`` columns."""
        self._ids = self._ids[:, :columns]

    def move(self, rows: Sequence[int]) -> None:
        """Note that row ``i`` of the cache is its former row ``rows[i]``."""
        if self._row_of is None or (rows and max(rows) >= len(self._row_of)):
            self._doubt("rows of the cache came from elsewhere")
            return
        self._row_of = self._row_of[list(rows)]
        self._ids = self._ids[torch.tensor(rows, device=self._ids.device)]

    def _doubt(self, trouble: str) -> None:
        self.trouble = self.trouble or trouble
        self._passing = None

    def rows(self, row_of: Sequence[int], columns: int) -> list[TokenIds] | None:
        """Return the tokens of each row within the first ``columns`` columns; None when they are not known.

        ``row_of``: the prompt row that each row of the cache continues.
        """
        if self.trouble is None and self._checks and not all(bool(check) for check in self._checks):
            self._doubt("masks or positions do not fit a prompt")
        self._checks = []
        known = self._row_of.tolist() if self._row_of is not None else None
        if self.trouble is not None or known != list(row_of) or columns > self._ids.shape[1]:
            return None
        ids = self._ids[:, :columns].to("cpu", torch.int64).numpy()
        found = []
        for row, of in zip(ids, row_of, strict=True):
            pad = self._prompt.pads[of]
            end = pad + len(self._prompt.rows[of]) if self._prompt.ends_early(of) else columns
            found.append(row[pad : max(pad, end)].copy())
        return found


@contextmanager
def watching(model: torch.nn.Module, cache: Any, current: Callable[[], TokenTrace | None]) -> Iterator[None]:
    """Report every forward pass of ``model`` with ``cache`` to the ``current`` trace."""
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    takes_positions = "position_ids" in names

    # PyTorch registers a hook before it notes that the hook takes keyword arguments: a pass on another thread may call
    # the hook without them in between.
    def given(args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> dict[str, Any] | None:
        arguments = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        return arguments if any(arguments.get(name) is cache for name in CACHE_ARGUMENTS) else None

    def before(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        arguments, trace = given(args, kwargs), current()
        if arguments is not None and trace is not None:
            trace.passing(arguments, cache.get_seq_length(), takes_positions)

    def after(_: torch.nn.Module, args: tuple[Any, ...], kwargs: Any, *output: Any) -> None:
        trace = current()
        if output and trace is not None and given(args, kwargs) is not None:
            trace.passed()

    hooks = (
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, with_kwargs=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
