"""What commands import: torch and transformers take seconds, and a store is looked after without them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kvtier.store import PrefixStore
from tests.support.stores import commit, count

_HEAVY = ("torch", "transformers", "accelerate", "safetensors", "peft", "psutil", "matplotlib")
_COMMANDS = (
    ("store", "ls"),
    ("store", "ls", "--unnamed"),
    ("store", "ls", "--json"),
    ("store", "show", "letter"),
    ("store", "du"),
    ("store", "stats"),
    ("store", "stats", "--format", "prometheus"),
    ("store", "verify"),
    ("store", "name", "KEY", "other"),
    ("store", "rename", "other", "new"),
    ("store", "pin", "new"),
    ("store", "unpin", "new"),
    ("store", "prune", "--unused-for", "9w", "--yes"),
    ("store", "rm", "new", "--yes"),
)
_SCRIPT = """
import sys
from typer.testing import CliRunner
from kvtier.cli import app

def heavy():
    return sorted({name.split(".")[0] for name in sys.modules} & set(HEAVY))

assert not heavy(), ("kvtier.cli", heavy())
for command in COMMANDS:
    done = CliRunner().invoke(app, command, env={"KVTIER_STORE": STORE})
    assert done.exit_code == 0, (command, done.output)
    assert not heavy(), (command, heavy())
"""


def run(script):
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("module", ["kvtier", "kvtier.store", "kvtier.cli"])
def test_import_needs_neither_torch_nor_transformers(module):
    done = run(f"import sys, {module}; print(*sorted({{n.split('.')[0] for n in sys.modules}} & set({_HEAVY})))")
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")


def test_store_commands_need_neither_torch_nor_transformers(tmp_path):
    with PrefixStore(tmp_path, block_size=4) as store:
        commit(store, count(12))
        commit(store, count(12, 100))
        store.flush()
        store.name("letter", "a1" * 32, count(12))
        key = next(chain.key for chain in store.chains() if not chain.names)
    commands = [[key if word == "KEY" else word for word in command] for command in _COMMANDS]
    commands += [["--help"], ["--version"], ["store", "--help"], ["plan", "--help"], ["bench", "--help"]]
    commands += [["doctor", "--help"], ["demo", "--help"]]
    done = run(f"HEAVY = {_HEAVY!r}; COMMANDS = {commands!r}; STORE = {str(tmp_path)!r}\n{_SCRIPT}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["ReuseWarning", "errors.GoneError", "progress.ProgressEvent", "report"])
def test_public_names_and_modules_are_there_after_one_import(name):
    code = f"import kvtier; assert {name.split('.')[0]!r} in dir(kvtier); kvtier.{name}"
    subprocess.run([sys.executable, "-c", code], check=True)
