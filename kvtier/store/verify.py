"""Verification: every file read, every row compared, every byte of the accounting counted anew."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is not as it should be.

    Attributes:
        kind: ``damaged`` (a block's bytes), ``missing`` (a row without its file), ``orphan`` (a file without its row),
            ``unreachable`` (a block whose parent is gone), ``accounting``, ``leftover`` (of a writer that died),
            ``name`` (its file is damaged), ``permissions`` (others can read), ``catalog`` (SQLite finds it damaged).
        subject: the file, or what else it is about.
        text: what is wrong.
        repaired: whether it was put right.
    """

    kind: str
    subject: str
    text: str
    repaired: bool = False


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What ``PrefixStore.verify`` found.

    Attributes:
        blocks: block files that were read.
        nbytes: their bytes.
        seconds: how long it took.
        problems: what is wrong, or was.
    """

    blocks: int
    nbytes: int
    seconds: float
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong (any more)."""
        return all(problem.repaired for problem in self.problems)
