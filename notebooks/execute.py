"""Execute every notebook of this folder in place, and leave only what the next run would write again.

    python notebooks/execute.py [name.ipynb …]

A cell with the tag ``new-kernel`` begins in a new process, as after a restart of the kernel; files stay. Fails on the
first cell that raises, and on output that names folders of this machine. Execution times, kernel versions and cell ids
that change from run to run are removed, so that a notebook changes only when what it shows changes.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
CELL_SECONDS = 900
NEW_KERNEL = "new-kernel"
_KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
# What a kernel inherits: no progress bars, no telemetry, no warnings about the machine, no random seed of hash().
_ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
    "PYTHONHASHSEED": "0",
    "PYTHONWARNINGS": "ignore:IProgress not found",  # there is no widget to draw progress bars on, and none is wanted
}
# A reader's own settings would change what the notebooks show.
_OWN_SETTINGS = ("KVTIER_STORE", "KVTIER_REUSE", "MPLBACKEND", "MATPLOTLIBRC")


def execute(path: Path) -> None:
    """Run ``path`` in new kernels and an empty folder, and write it back with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory(prefix="kvtier-notebook-") as folder:
        for cells in _by_kernel(notebook.cells):
            NotebookClient(
                nbformat.v4.new_notebook(cells=cells),
                timeout=CELL_SECONDS,
                kernel_name="python3",
                record_timing=False,
                resources={"metadata": {"path": folder}},
            ).execute()
    _settle(notebook)
    _refuse_own_folders(path, notebook)
    nbformat.validate(notebook)
    nbformat.write(notebook, path)


def _by_kernel(cells: list[Any]) -> Iterator[list[Any]]:
    """Yield the cells of each kernel: one ends before a cell with the tag ``new-kernel``."""
    starts = [n for n, cell in enumerate(cells) if n == 0 or NEW_KERNEL in cell.metadata.get("tags", ())]
    for start, end in zip(starts, [*starts[1:], len(cells)], strict=True):
        yield cells[start:end]


def _settle(notebook: Any) -> None:
    """Remove what differs between two equal runs."""
    notebook.metadata = nbformat.from_dict({"kernelspec": _KERNEL, "language_info": {"name": "python"}})
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
        tags = cell.metadata.get("tags", [])
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type == "code":
            cell.outputs = _joined(cell.outputs)


def _joined(outputs: list[Any]) -> list[Any]:
    """Join neighbouring pieces of one stream: how a kernel cuts them up is chance."""
    joined: list[Any] = []
    for output in outputs:
        last = joined[-1] if joined else None
        if last is not None and output.output_type == last.output_type == "stream" and output.name == last.name:
            last.text += output.text
        else:
            joined.append(output)
    return joined


def _refuse_own_folders(path: Path, notebook: Any) -> None:
    """Exit when an output names a folder that only this machine has."""
    own = (str(Path.home()), sys.prefix, str(HERE.resolve().parent), tempfile.gettempdir())
    for cell in notebook.cells:
        lines = "\n".join(_texts(cell.get("outputs", []))).splitlines()
        named = [line for line in lines if any(folder in line for folder in own)]
        if named:
            sys.exit(f"{path.name}, {cell.id}: an output names a folder of this machine; not written: {named[0]:.500}")


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts of outputs. Encoded pictures are none: their letters spell anything."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)
    elif isinstance(value, dict):
        for key, each in value.items():
            if not key.startswith("image/png"):
                yield from _texts(each)


def main(names: list[str]) -> None:
    """Execute the named notebooks, or all."""
    os.environ.update(_ENVIRONMENT)
    for name in _OWN_SETTINGS:
        os.environ.pop(name, None)
    for path in [HERE / name for name in names] or sorted(HERE.glob("*.ipynb")):
        print(f"executing {path.name} …", end="", flush=True)
        begun = time.monotonic()
        execute(path)
        print(f" {time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
