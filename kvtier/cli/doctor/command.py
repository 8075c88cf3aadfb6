"""``kvtier doctor``: hardware and transfer speeds of this machine, and a test of offloading.

Every finding comes from a trial: memory is pinned, bytes are copied and files written, and a tiny random model answers
under several budgets, bit for bit as with a DynamicCache. All files are removed, even after an interrupt.
"""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from kvtier.cli.doctor.findings import Finding, as_json, has_problem, print_finding
from kvtier.cli.store.output import make_console


def doctor(
    spill_dir: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where cold pages would go. Default: in the user's cache folder."),
    ] = None,
    seconds: Annotated[
        float, typer.Option(metavar="N", min=0, help="Seconds of race tests, on all devices together.")
    ] = 10,
    json_path: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write all findings here as JSON; - is standard output."),
    ] = None,
) -> None:
    """Report the hardware of this machine, and test offloading. Exit code 1 if there is a problem."""
    from kvtier.cli.doctor import examination  # here: it imports torch and transformers, which --help does not need

    on_stdout = json_path == Path("-")
    console = make_console(stderr=on_stdout)
    findings: list[Finding] = []
    with closing(examination.examine(spill_dir, seconds)) as found:  # an interrupt may come between two findings
        for finding in found:
            print_finding(console, finding)
            findings.append(finding)
    if json_path is not None:
        text = json.dumps(as_json(findings), indent=1) + "\n"
        if on_stdout:
            sys.stdout.write(text)
        else:
            json_path.write_text(text, encoding="utf-8")
    problem = has_problem(findings)
    console.print("Something does not work: see the problems above." if problem else "Streaming works here.")
    raise typer.Exit(1 if problem else 0)
