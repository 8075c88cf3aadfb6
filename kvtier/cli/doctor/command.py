"""``kvtier doctor``: hardware and transfer speeds of this machine, and a test of offloading.

Every finding comes from a trial: memory is pinned, bytes are copied and files written, and a tiny random model answers
under several budgets, bit for bit as with a DynamicCache. All files are removed, even after an interrupt.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from kvtier.cli.doctor import devices, spill
from kvtier.cli.doctor.findings import Finding, as_json, has_problem, print_finding
from kvtier.cli.doctor.selftest import SelfTest
from kvtier.offload.manager import default_spill_folder
from kvtier.transfer import MakeEngine, engine_for

Check = Callable[[], Finding | Iterable[Finding]]


def doctor(
    spill_dir: Annotated[
        Path | None,
        typer.Option(help="Where cold pages would go. Default: in the user's cache folder."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0, help="How long to look for races, on all devices together.")] = 10,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write all findings here as JSON; - is standard output.")
    ] = None,
) -> None:
    """Report the hardware of this machine, and test offloading. Exit code 1 if there is a problem."""
    on_stdout = json_path == Path("-")
    console = Console(stderr=on_stdout)
    findings: list[Finding] = []
    folder = (spill_dir or default_spill_folder(None)).expanduser()
    with closing(examine(folder, seconds, engine_for)) as examination:  # an interrupt may come between two findings
        for finding in examination:
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


def examine(folder: Path, seconds: float, engine: MakeEngine) -> Generator[Finding, None, None]:
    """Yield every finding, one by one.

    Args:
        folder: folder for cold pages.
        seconds: how long to look for races.
        engine: ``device`` → its copy engine.
    """
    found = devices.accelerators()
    yield from _tried("versions", devices.versions)
    yield from _tried("cpu", devices.processor)
    yield from _tried("memory", devices.memory_copies)
    if found:
        yield from _tried("pinned", devices.pinned_memory)
    else:
        text = "none that PyTorch can use: models compute on the CPU, and cold layers go from RAM to files"
        yield Finding("ok", "accelerator", text)
    for device in found:
        yield from _tried("accelerator", partial(devices.accelerator, device))
        yield from _tried("streams", partial(devices.side_streams, device, engine))
        yield from _tried("link", partial(devices.link, device, engine))
    spilling = list(spill.check_spill_folder(folder))
    yield from spilling
    if has_problem(spilling):
        yield Finding("problem", "self-test", "not run: it needs a folder for cold pages")
        return
    computing = found or [torch.device("cpu")]
    with spill.made_inside(folder) as scratch:
        for device in computing:
            yield from _tried("self-test", partial(SelfTest(device, scratch, engine).run, seconds / len(computing)))


def _tried(subject: str, check: Check) -> Iterator[Finding]:
    """Yield the findings of ``check``; a check that fails is a finding too."""
    try:
        found = check()
        yield from (found,) if isinstance(found, Finding) else found
    except Exception as error:
        yield Finding("problem", subject, f"could not be looked at: {type(error).__name__}: {error}")
