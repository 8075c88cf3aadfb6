"""``python -m sweep``: run every causal language model tiny with kvtier; write what was found as JSON and as a page."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import transformers
import typer

from sweep.checks import examine
from sweep.models import architectures
from sweep.outcome import read_json, write_json
from sweep.page import page, versions
from sweep.turns import ANSWER, PROMPT, QUESTION
from sweep.workers import examine_all

CHECKOUT = Path(__file__).resolve().parent.parent
RESULTS = CHECKOUT / "build" / "sweep.json"
PAGE = CHECKOUT / "docs" / "models.md"
SIZES = {"prompt": PROMPT, "answer": ANSWER, "question": QUESTION, "second": PROMPT + ANSWER + QUESTION}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    names: Annotated[list[str] | None, typer.Argument(help="Model types, such as llama. Default: all.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes at a time.")] = 2,
    limit: Annotated[float, typer.Option(min=1, help="Seconds after which an architecture is given up.")] = 120,
    output: Annotated[Path, typer.Option(dir_okay=False, help="The JSON file.")] = RESULTS,
    from_json: Annotated[bool, typer.Option("--from-json", help="Run nothing; write the page from the file.")] = False,
) -> None:
    """Check every causal language model of the installed transformers; all of them also write docs/models.md."""
    known = architectures()
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise typer.BadParameter(f"transformers lists no causal language model {', '.join(unknown)}")
    if from_json:
        rows, of = read_json(output)
    else:
        transformers.logging.set_verbosity_error()
        logging.getLogger("kvtier").setLevel(logging.ERROR)  # what it warns of is in the rows
        rows, of = [], versions()
        wanted = names or list(known)
        for row in examine_all(wanted, examine, workers, limit):
            rows.append(row)
            verdicts = " ".join(f"{check} {outcome.verdict}" for check, outcome in row.outcomes.items())
            sys.stderr.write(f"{len(rows)}/{len(wanted)} {row.model_type}: {row.not_made or verdicts}\n")
        rows.sort(key=lambda row: row.model_type)
        write_json(rows, of, output)
    if not names:
        PAGE.write_text(page(rows, of, SIZES), encoding="utf-8")
    bad = [line for row in rows for line in row.bad]
    for line in bad:
        sys.stdout.write(line + "\n")
    raise typer.Exit(1 if bad else 0)


if __name__ == "__main__":
    app(prog_name="python -m sweep")
