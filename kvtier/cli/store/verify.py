"""``verify``: a check of every byte of a store."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from kvtier.cli.store import records
from kvtier.cli.store.common import DEFAULT_FOLDER, FAILED, AsJson, Folder, Yes, confirm, opened, progress_bar
from kvtier.cli.store.output import Column, make_console, print_line, print_table, size
from kvtier.store.manage.verify import Problem, VerifyReport

_COLUMNS = (
    Column("problem", "left"),
    Column("state", "left"),
    Column("what", "left", folds=True),
)


def verify(
    repair: Annotated[
        bool, typer.Option("--repair", help="Put right what can be; damaged blocks are deleted, and recomputed later.")
    ] = False,
    yes: Yes = False,
    store: Folder = DEFAULT_FOLDER,
    as_json: AsJson = False,
) -> None:
    """Read every file and compare it with its checksum and with the catalog. Exit code 1 when something is wrong."""
    with opened(store) as open_store:
        if repair:
            confirm("Delete what is damaged, and put right what can be?", yes)
        with progress_bar("Verifying") as progress:
            report = open_store.verify(repair=repair, progress=progress)
        folder = str(open_store.path)
    if as_json:
        records.print_json(records.of_verification(report))
    else:
        _print(report, repair, folder)
    raise typer.Exit(0 if report.ok else FAILED)


def _print(report: VerifyReport, repair: bool, folder: str) -> None:
    console = make_console()
    if report.problems:
        rows = [
            (problem.kind, "repaired" if problem.repaired else "open", _what(problem, folder))
            for problem in report.problems
        ]
        print_table(console, _COLUMNS, rows)
        console.print()
    found = f"{report.blocks} blocks, {size(report.nbytes)}, are whole ({report.seconds:.1f} s)."
    open_problems = sum(not problem.repaired for problem in report.problems)
    if not report.problems:
        print_line(console, f"Nothing is wrong. {found}")
    elif not open_problems:
        print_line(console, f"All problems were repaired. {found}")
    else:
        hint = "" if repair else " kvtier store verify --repair puts right what can be."
        print_line(console, f"{open_problems} problem{'' if open_problems == 1 else 's'} left. {found}{hint}")


def _what(problem: Problem, folder: str) -> str:
    text = problem.text if problem.subject in problem.text else f"{problem.subject}: {problem.text}"
    return text.replace(f"{folder}{os.sep}", "")
