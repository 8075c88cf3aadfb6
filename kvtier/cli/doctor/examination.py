"""The checks of ``kvtier doctor``, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch

from kvtier.cli.doctor import devices, spill
from kvtier.cli.doctor.findings import Finding, has_problem
from kvtier.cli.doctor.selftest import SelfTest
from kvtier.offload.manager import default_spill_folder
from kvtier.transfer.accelerator import engine_for
from kvtier.transfer.engines import MakeEngine

Check = Callable[[], Finding | Iterable[Finding]]


def examine(spill_dir: Path | None, seconds: float, engine: MakeEngine | None = None) -> Generator[Finding, None, None]:
    """Yield every finding, one by one.

    Args:
        spill_dir: folder for cold pages; by default in the user's cache folder.
        seconds: how long to look for races.
        engine: ``device`` → its copy engine; by default the one that a cache would use.
    """
    folder = (spill_dir or default_spill_folder(None)).expanduser()
    engine = engine or engine_for
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
