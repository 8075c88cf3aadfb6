"""House rules: small folders with a stated purpose, and no private name used across modules."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import kvtier

PACKAGE = Path(kvtier.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = sorted({module.parent for module in MODULES})
MOST_MODULES = 10


def private_names(tree: ast.AST) -> set[str]:
    """Return the private names that a module defines: functions, classes, variables, attributes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


def crossings(trees: dict[str, ast.AST]) -> list[str]:
    """Return the places where a module uses a private name that only other modules define."""
    defined = {name: private_names(tree) for name, tree in trees.items()}
    found = []
    for name, tree in trees.items():
        others = set().union(*(names for other, names in defined.items() if other != name)) - defined[name]
        for node in ast.walk(tree):
            used = [node.attr] if isinstance(node, ast.Attribute) else []
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("kvtier"):
                used = [alias.name for alias in node.names]
            found += [f"{name}:{node.lineno}: {each}" for each in used if each in others]
    return found


def test_no_module_uses_a_private_name_of_another():
    trees = {str(module.relative_to(PACKAGE)): ast.parse(module.read_text()) for module in MODULES}
    assert crossings(trees) == []


def test_crossings_finds_a_private_name_used_in_another_module():
    trees = {"one.py": ast.parse("class A:\n    def __init__(self):\n        self._x = 1\n")}
    trees["other.py"] = ast.parse("from kvtier.one import A\n\nprint(A()._x, A()._torch_thing)\n")
    assert crossings(trees) == ["other.py:3: _x"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(PACKAGE.parent)))
def test_folder_is_small_and_has_a_docstring(folder):
    modules = [module.name for module in folder.glob("*.py") if module.name != "__init__.py"]
    assert len(modules) <= MOST_MODULES, modules
    assert "utils.py" not in modules
    assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
