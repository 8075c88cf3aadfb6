"""The committed notebooks: executed in order without errors, small, and written with public names alone."""

from __future__ import annotations

import ast
import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.support.snippets import CHECKOUT

FOLDER = CHECKOUT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MOST_BYTES = 300_000
NEW_KERNEL = "new-kernel"
OWN_FOLDER = re.compile(r"(?<![\w.])/(home|root|Users|tmp|var|work|opt|mnt)/\w")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells_of(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def code_of(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [cell for cell in cells if cell["cell_type"] == "code"]


def faults(cells: list[dict[str, Any]]) -> list[str]:
    """Return what shows that cells were not executed from first to last, without errors."""
    found, expected = [], 1
    for number, cell in enumerate(code_of(cells)):
        if NEW_KERNEL in cell["metadata"].get("tags", []):
            expected = 1
        if cell["execution_count"] != expected:
            found.append(f"code cell {number} has the number {cell['execution_count']}, not {expected}")
        expected += 1
        kinds = {output["output_type"] for output in cell["outputs"]}
        if "error" in kinds or any(output.get("name") == "stderr" for output in cell["outputs"]):
            found.append(f"code cell {number} failed or warned")
    return found


def not_public(source: str) -> list[str]:
    """Return private names, and names that kvtier does not have, in the code of a cell."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.ImportFrom):
            names = [*str(node.module).split("."), *(alias.name for alias in node.names)]
            if names[0] == "kvtier":
                module = import_module(str(node.module))
                found += [alias.name for alias in node.names if not hasattr(module, alias.name)]
        found += [name for name in names if name.startswith("_")]
    return found


def cell(number: int | None, *kinds: str, tags: tuple[str, ...] = ()) -> dict[str, Any]:
    outputs = [{"output_type": kind, "name": "stderr"} if kind == "stream" else {"output_type": kind} for kind in kinds]
    return {"cell_type": "code", "execution_count": number, "outputs": outputs, "metadata": {"tags": list(tags)}}


def test_there_are_notebooks():
    assert {"quickstart", "many_questions", "branches", "long_context", "measure"} <= {path.stem for path in NOTEBOOKS}


@each_notebook
def test_notebook_was_executed_in_order_without_errors(path):
    assert faults(cells_of(path)) == []


@pytest.mark.parametrize(
    ("cells", "count"),
    [
        ([cell(1), cell(2, "display_data")], 0),
        ([cell(1), cell(2), cell(1, tags=(NEW_KERNEL,)), cell(2)], 0),
        ([cell(1), cell(1)], 1),
        ([cell(2)], 1),
        ([cell(None)], 1),
        ([cell(1, "error")], 1),
        ([cell(1, "stream")], 1),
    ],
)
def test_faults_of_an_execution_are_found(cells, count):
    assert len(faults(cells)) == count


@each_notebook
def test_cells_compile_and_use_public_names(path):
    for number, each in enumerate(code_of(cells_of(path))):
        source = "".join(each["source"])
        compile(source, f"{path.name}, code cell {number}", "exec")
        assert not_public(source) == []


@pytest.mark.parametrize(
    "source",
    ["cache._container", "from kvtier import Tiered", "from kvtier.plots import _axes", "import kvtier._plots"],
)
def test_private_and_missing_names_are_found(source):
    assert not_public(source) != []


@each_notebook
def test_notebook_is_small_and_names_no_folder_of_a_machine(path):
    assert path.stat().st_size < MOST_BYTES
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    for each in notebook["cells"]:
        for output in each.get("outputs", []):
            output.get("data", {}).pop("image/png", None)
        assert not OWN_FOLDER.search(json.dumps(each))


@each_notebook
def test_notebook_begins_with_a_title_and_ends_with_more_to_read(path):
    cells = cells_of(path)
    assert "".join(cells[0]["source"]).startswith("# ")
    last = "".join(cells[-1]["source"])
    assert last.startswith("## What to read next")
    links = re.findall(r"\]\(([^)#]+)", last)
    assert links
    assert [link for link in links if not (FOLDER / link).exists()] == []


@pytest.mark.parametrize("page", ["README.md", "docs/notebooks.md"])
def test_every_notebook_is_linked(page):
    text = (CHECKOUT / page).read_text(encoding="utf-8")
    assert [path.name for path in NOTEBOOKS if f"notebooks/{path.name})" not in text] == []


def test_the_quickstart_has_eight_lines_before_and_after_the_restart():
    """The lines of a reader: the same before and after the restart, but for the question."""
    both = [
        "".join(each["source"])
        for each in code_of(cells_of(FOLDER / "quickstart.ipynb"))
        if "Chat(" in "".join(each["source"])
    ]
    lines = [[line for line in source.splitlines() if line.strip()] for source in both]
    assert [len(each) for each in lines] == [8, 8]
    asked = [n for n, (before, after) in enumerate(zip(*lines, strict=True)) if before != after]
    assert [lines[0][n].startswith("answer = chat.say(") for n in asked] == [True]
