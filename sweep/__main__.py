"""``python -m sweep``: run every causal language model tiny with kvtier; write what was found as JSON and as a page."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import transformers
import typer
from packaging.version import Version

from sweep.checks import examine
from sweep.losses import Difference, difference
from sweep.models import architectures, listed
from sweep.outcome import Row, Run, read_json, write_json
from sweep.page import page, versions
from sweep.workers import examine_all

CHECKOUT = Path(__file__).resolve().parent.parent
RESULTS = CHECKOUT / "build" / "sweep.json"
PAGES = CHECKOUT / "docs"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    names: Annotated[list[str] | None, typer.Argument(help="Architectures, such as llama. Default: all.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes at a time.")] = 2,
    limit: Annotated[float, typer.Option(min=1, help="Seconds after which an architecture is given up.")] = 120,
    output: Annotated[Path, typer.Option(dir_okay=False, help="The JSON file of this run.")] = RESULTS,
    pages: Annotated[Path, typer.Option(file_okay=False, help="The folder of models.md and models.json.")] = PAGES,
    from_json: Annotated[bool, typer.Option("--from-json", help="Run nothing; take the run from its file.")] = False,
    accept_losses: Annotated[
        bool, typer.Option("--accept-losses", help="Write the page although columns of it lose rows.")
    ] = False,
) -> None:
    """Check every causal language model of the installed transformers; all of them also write docs/models.md.

    The exit status is 1 when an answer was wrong, a check failed, or a row lost a column that the page has.
    """
    unknown = sorted(set(names or ()) - set(architectures()))
    if unknown:
        raise typer.BadParameter(f"transformers lists no causal language model {', '.join(unknown)}")
    if from_json:
        run = read_json(output)
    else:
        run = Run(_examined(names or list(architectures()), workers, limit), versions())
        write_json(run, output)
    before = _before(pages / "models.json")
    compared = [row for row in before.rows if not names or row.model_type in names]
    found = difference(compared, run.rows, listed())
    if not names:
        run = _recorded(run, before, found, pages, accept_losses=accept_losses)
    bad = [line for row in run.rows for line in row.bad]
    for line in _summary(bad, found, accept_losses=accept_losses):
        sys.stdout.write(line + "\n")
    raise typer.Exit(1 if bad or (found.lost and not accept_losses) else 0)


def _examined(names: Sequence[str], workers: int, limit: float) -> list[Row]:
    transformers.logging.set_verbosity_error()
    logging.getLogger("kvtier").setLevel(logging.ERROR)  # what it warns of is in the rows
    rows = []
    for row in examine_all(names, examine, workers, limit):
        rows.append(row)
        verdicts = " ".join(f"{check} {outcome.verdict}" for check, outcome in row.outcomes.items())
        sys.stderr.write(f"{len(rows)}/{len(names)} {row.model_type}: {row.not_made or verdicts}\n")
    return sorted(rows, key=lambda row: row.model_type)


def _before(path: Path) -> Run:
    return read_json(path) if path.exists() else Run([], {})


def _recorded(run: Run, before: Run, found: Difference, pages: Path, *, accept_losses: bool) -> Run:
    """Write the page and the file behind it, unless columns lost rows or the page is of a newer transformers.

    A page with fewer rows would be what the next run is compared with.
    """
    if found.lost and not accept_losses:
        sys.stdout.write(f"{pages / 'models.md'} stays as it was: columns lost rows\n")
        return run
    ours, theirs = run.versions["transformers"], before.versions.get("transformers", "0")
    if Version(ours) < Version(theirs):
        sys.stdout.write(
            f"{pages / 'models.md'} stays as it was: found with transformers {theirs}, newer than {ours}\n"
        )
        return run
    same = run.versions == before.versions
    run = replace(run, accepted=[*(before.accepted if same else ()), *found.lost])
    write_json(run, pages / "models.json", measured=False)
    (pages / "models.md").write_text(page(run), encoding="utf-8")
    return run


def _summary(bad: Sequence[str], found: Difference, *, accept_losses: bool) -> list[str]:
    lines = list(bad)
    lines += [f"{'lost, accepted' if accept_losses else 'lost'}: {line}" for line in found.lost]
    lines += [f"new: {name}" for name in found.new]
    lines += [f"gone from transformers: {name}" for name in found.gone]
    if found.lost and not accept_losses:
        lines.append("--accept-losses accepts what was lost; with --from-json, without another run")
    return lines


if __name__ == "__main__":
    app(prog_name="python -m sweep")
