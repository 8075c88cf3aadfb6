"""Execute every notebook of this folder in place, and leave only what the next run would write again.

    python notebooks/execute.py [name.ipynb …]

Fails on the first cell that raises, and on output that names folders of this machine. Execution times, kernel versions
and cell ids that change from run to run are removed, so that a notebook changes only when what it shows changes.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
CELL_SECONDS = 900
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


def execute(path: Path) -> None:
    """Run ``path`` in a new kernel and an empty folder, and write it back with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory(prefix="kvtier-notebook-") as folder:
        NotebookClient(
            notebook, timeout=CELL_SECONDS, kernel_name="python3", resources={"metadata": {"path": folder}}
        ).execute()
    _settle(notebook)
    _refuse_own_folders(path, notebook)
    nbformat.validate(notebook)
    nbformat.write(notebook, path)


def _settle(notebook: Any) -> None:
    """Remove what differs between two equal runs."""
    notebook.metadata = nbformat.from_dict({"kernelspec": _KERNEL, "language_info": {"name": "python"}})
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
        cell.metadata = nbformat.from_dict({})
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
        shown = str(cell.get("outputs", ""))
        named = [folder for folder in own if folder in shown]
        if named:
            sys.exit(f"{path.name}, {cell.id}: an output names {', '.join(named)}; the notebook was not written")


def main(names: list[str]) -> None:
    """Execute the named notebooks, or all."""
    os.environ.update(_ENVIRONMENT)
    for path in [HERE / name for name in names] or sorted(HERE.glob("*.ipynb")):
        print(f"executing {path.name} …", flush=True)
        execute(path)


if __name__ == "__main__":
    main(sys.argv[1:])
