"""``docs/models.md``: what the sweep found, as a page."""

from __future__ import annotations

import platform
from collections.abc import Sequence

import torch
import transformers

import kvtier
from sweep.models import base_of
from sweep.outcome import Outcome, Row, Run
from sweep.turns import ANSWER, PROMPT, QUESTION

_SIGNS = {
    "yes": "yes",
    "draw": "yes",
    "no": "no",
    "upstream": "upstream fails",
    "wrong": "**wrong**",
    "failed": "**failed**",
}
_SIZES = {"prompt": PROMPT, "answer": ANSWER, "question": QUESTION, "second": PROMPT + ANSWER + QUESTION}
_COLUMNS = {
    "generates": "generates",
    "reuses": "reuses",
    "ram": "RAM",
    "disk": "disk",
    "streams": "streams",
    "edited": "edited",
    "padded": "padded",
    "names": "names",
}
_HEAD = """# Models

This page says which models work with `TieredCache`, and how far. A program writes it: do not edit it, run `make sweep`.

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
| names | both turns, one with the cache as `past_key_values=` and one as `cache=`, in either order |

*yes*: right, and it happened. *no*: right, but nothing was reused, or nothing was cold; the last column says why.
*upstream fails*: transformers ends in an exception by itself, which the last column names. **wrong** and **failed** are
bugs. A run that finds less than this page fails.

## In numbers

| | |
|---|---|
{numbers}

Found with {versions}.
{accepted}
## Every architecture

"""
_ACCEPTED = """
Columns that the page before this one had, given up on purpose:

{lines}
"""
_TABLE_HEAD = (
    f"| model type | layers | {' | '.join(_COLUMNS.values())} | why not all |\n|---|---|{'---|' * len(_COLUMNS)}---|\n"
)


def versions() -> dict[str, str]:
    """Return the versions of what decides the outcomes."""
    return {
        "kvtier": kvtier.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__.split("+")[0],
        "Python": platform.python_version(),
    }


def page(run: Run) -> str:
    """Return the page for a run."""
    rows = run.rows
    accepted = "\n".join(f"- {line}" for line in run.accepted)
    head = _HEAD.format(
        numbers="\n".join(f"| {name} | {count} |" for name, count in numbers(rows).items()),
        versions=", ".join(f"{name} {number}" for name, number in run.versions.items()),
        accepted=_ACCEPTED.format(lines=accepted) if accepted else "",
        **_SIZES,
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
    made = [row for row in rows if row.not_made is None]
    run = [row for row in made if row.model_type == base_of(row.model_type)]  # a variant is no architecture more
    keeping = [row for row in run if row.keeps]

    def share(check: str, among: Sequence[Row]) -> str:
        count = sum(check in row.outcomes and row.outcomes[check].right for row in among)
        return f"{count} of {len(among)}, {count / max(1, len(among)):.1%}"

    return {
        "architectures that transformers lists": str(len({base_of(row.model_type) for row in rows})),
        "run tiny where this page was made": str(len(run)),
        "generate the tokens of `DynamicCache`": share("generates", run),
        "answer an edited history as a fresh cache does": share("edited", run),
        "reuse on the second turn, with equal tokens": share("reuses", run),
        "take the cache as `past_key_values=` and as `cache=`": share("names", run),
        "reuse in a padded batch what they know without padding": share("padded", run),
        "keep their K, V and states in a `DynamicCache`": str(len(keeping)),
        "of those, reuse on the second turn": share("reuses", keeping),
        "of those, restore from RAM": share("ram", keeping),
        "of those, restore from disk": share("disk", keeping),
        "of those, stream cold layers": share("streams", keeping),
        "all of it": str(sum(row.green for row in run)),
        "transformers itself fails in a column": str(sum(map(_upstream_fails, made))),
        "wrong tokens or exceptions": str(sum(bool(row.bad) for row in made)),
    }


def _upstream_fails(row: Row) -> bool:
    return any(outcome.verdict == "upstream" for outcome in row.outcomes.values())


def _line(row: Row) -> str:
    cells = [_sign(row, check) for check in _COLUMNS]
    return f"| {row.model_type} | {row.layers} | {' | '.join(cells)} | {_cell(reasons(row))} |\n"


def _sign(row: Row, check: str) -> str:
    outcome = row.outcomes.get(check)
    if outcome is None:
        return ""
    counted = check in ("reuses", "ram", "disk") and outcome.right and outcome.cached
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
    if not mentioned or control is None or control.verdict not in ("misnamed", "wrong", "failed"):
        return []
    return [f"transformers, continuing its own cache: {control.verdict}, {control.reason}"]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;").replace("\n", " ")
