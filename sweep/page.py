"""``docs/models.md``: what the sweep found, as a page."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version

import kvtier
from sweep.outcome import Outcome, Row

_SIGNS = {"yes": "yes", "draw": "yes", "no": "no", "refused": "no cache", "wrong": "**wrong**", "failed": "**failed**"}
_COLUMNS = {
    "generates": "generates",
    "reuses": "reuses",
    "ram": "RAM",
    "disk": "disk",
    "streams": "streams",
    "edited": "edited",
    "padded": "padded",
}
_HEAD = """# Models

Which models work with `TieredCache`, and how far. This page is written by a program. Do not edit it: run `make sweep`.

The program takes every architecture that transformers lists as a causal language model, shrinks its config to a few
layers with at least one of each kind, gives it random weights in fp32, and holds one conversation of two turns with
it: a prompt of {prompt} tokens, an answer of {answer}, {question} tokens more, an answer of {answer}. Multimodal
models get text only. Every answer is compared with the one of a fresh `DynamicCache`: the tokens, and the logits.

| column | what was checked |
|---|---|
| generates | the first turn: the tokens of `DynamicCache` |
| reuses | the second turn on the same cache; in brackets how many of its {second} tokens were not computed again |
| RAM | the same on a new cache, from the store's memory |
| disk | the same with a new store on the same folder, from its files |
| streams | both turns with a `device_budget` so small that some layers are cold |
| edited | the second turn after one token in the middle of the first was changed |
| padded | the second turn in a batch, behind padding, of what was known without; and then alone again |

*yes*: right, and it happened. *no*: right, but nothing was reused, or nothing was cold; the last column says why.
*no cache*: the model takes none, neither a `DynamicCache` nor a `TieredCache`. **wrong** and **failed** are bugs.

## In numbers

| | |
|---|---|
{numbers}

Found with {versions}.

## Every architecture

"""
_TABLE_HEAD = (
    f"| model type | layers | {' | '.join(_COLUMNS.values())} | why not all |\n|---|---|{'---|' * len(_COLUMNS)}---|\n"
)


def versions() -> dict[str, str]:
    """Return the versions of what decides the outcomes."""
    return {
        "kvtier": kvtier.__version__,
        "transformers": version("transformers"),
        "torch": version("torch").split("+")[0],
        "Python": platform.python_version(),
    }


def page(rows: Sequence[Row], of: Mapping[str, str], sizes: Mapping[str, int]) -> str:
    """Return the page for ``rows``, found with the versions ``of`` in a conversation of ``sizes``."""
    head = _HEAD.format(
        numbers="\n".join(f"| {name} | {count} |" for name, count in numbers(rows).items()),
        versions=", ".join(f"{name} {number}" for name, number in of.items()),
        **sizes,
    )
    made = [row for row in rows if row.not_made is None]
    others = [row for row in rows if row.not_made is not None]
    lines = [head, _TABLE_HEAD, *(_line(row) for row in made)]
    if others:
        lines += ["\n## Not examined\n\n| model type | why |\n|---|---|\n"]
        lines += [f"| {row.model_type} | {_cell(row.not_made or '')} |\n" for row in others]
    return "".join(lines)


def numbers(rows: Sequence[Row]) -> dict[str, str]:
    """Return the page's counts, in words."""
    run = [row for row in rows if row.not_made is None]
    keeping = [row for row in run if row.keeps]

    def share(check: str, among: Sequence[Row]) -> str:
        count = sum(check in row.outcomes and row.outcomes[check].verdict in ("yes", "draw") for row in among)
        return f"{count} of {len(among)}, {count / max(1, len(among)):.1%}"

    return {
        "architectures that transformers lists": str(len(rows)),
        "run tiny where this page was made": str(len(run)),
        "generate the tokens of `DynamicCache`": share("generates", run),
        "answer an edited history as a fresh cache does": share("edited", run),
        "reuse on the second turn, with equal tokens": share("reuses", run),
        "reuse in a padded batch what they know without padding": share("padded", run),
        "keep their K, V and states in a `DynamicCache`": str(len(keeping)),
        "of those, reuse on the second turn": share("reuses", keeping),
        "of those, restore from RAM": share("ram", keeping),
        "of those, restore from disk": share("disk", keeping),
        "of those, stream cold layers": share("streams", keeping),
        "all of it": str(sum(row.green for row in run)),
        "wrong tokens or exceptions": str(sum(bool(row.bad) for row in run)),
    }


def _line(row: Row) -> str:
    cells = [_sign(row, check) for check in _COLUMNS]
    return f"| {row.model_type} | {row.layers} | {' | '.join(cells)} | {_cell(reasons(row))} |\n"


def _sign(row: Row, check: str) -> str:
    outcome = row.outcomes.get(check)
    if outcome is None:
        return ""
    counted = check in ("reuses", "ram", "disk") and outcome.verdict in ("yes", "draw") and outcome.cached
    return f"{_SIGNS[outcome.verdict]} ({outcome.cached})" if counted else _SIGNS[outcome.verdict]


def reasons(row: Row) -> str:
    """Return why a row is not all yes, each reason once, and what transformers alone does where it is wrong."""
    checks: dict[str, list[str]] = {}
    for check in _COLUMNS:
        outcome = row.outcomes.get(check)
        if outcome is not None and outcome.reason:
            checks.setdefault(outcome.reason, []).append(_COLUMNS[check])
    found = [f"{', '.join(names)}: {reason}" for reason, names in checks.items()]
    return "; ".join([*found, *_control(row.control, bool(found))])


def _control(control: Outcome | None, mentioned: bool) -> list[str]:
    if not mentioned or control is None or control.verdict not in ("wrong", "failed"):
        return []
    return [f"transformers, continuing its own cache: {control.verdict}, {control.reason}"]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;").replace("\n", " ")
