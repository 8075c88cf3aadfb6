"""Findings of ``kvtier doctor``: one line each, for people and for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from kvtier.cli.store.output import print_below

Level = Literal["ok", "note", "problem"]

_STYLES: Mapping[Level, str] = {"ok": "green", "note": "yellow", "problem": "bold red"}
_LEVEL_WIDTH, _SUBJECT_WIDTH = 7, 12


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check.

    Attributes:
        level: ``ok``; ``note``, worth knowing but nothing is wrong; ``problem``, something does not work.
        subject: subject of the check, in a word or two.
        text: the result, and advice where it is not obvious.
        facts: the same as numbers and names, ready for JSON; units are in their names.
    """

    level: Level
    subject: str
    text: str
    facts: Mapping[str, Any] = field(default_factory=dict)


def print_finding(console: Console, finding: Finding) -> None:
    """Print one line, whose text wraps below itself in a narrow terminal."""
    level = Text(f"{finding.level:<{_LEVEL_WIDTH}}", style=_STYLES[finding.level])
    print_below(console, [level, Text(f"{finding.subject:<{_SUBJECT_WIDTH}}")], finding.text)


def has_problem(findings: Sequence[Finding]) -> bool:
    """Whether any finding is a problem."""
    return any(finding.level == "problem" for finding in findings)


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """Return ``findings`` ready for ``json.dumps``."""
    return {"ok": not has_problem(findings), "findings": [asdict(finding) for finding in findings]}


def gigabytes(nbytes: float) -> str:
    """Return a byte count in GB, or in MB below one."""
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"
