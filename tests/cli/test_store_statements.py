"""Store commands ask the catalog as often for many names and chains as for few."""

from __future__ import annotations

import numpy as np
import pytest
from typer.testing import CliRunner

from kvtier.cli import app
from kvtier.store import PrefixStore
from kvtier.store.format.vocabulary import Vocabulary
from kvtier.store.tiers.disk.catalog.connection import Statements
from tests.support.stores import ROOT, commit, count

FEW, MANY = 3, 15
COMMANDS = (
    ("ls",),
    ("ls", "--json"),
    ("ls", "--quiet"),
    ("ls", "--unnamed"),
    ("ls", "--sort", "size", "--filter", "larger=1KiB"),
    ("show", "name 0"),
    ("du",),
    ("stats",),
    ("pin", "name 0"),
    ("rm", "name 0", "--dry-run"),
    ("prune", "--unused-for", "9w", "--dry-run"),
    ("clear", "--dry-run"),
)


def fill(folder, names):
    """Store names, and as many chains without: some share a beginning, some are short, some neither."""
    with PrefixStore(folder, block_size=4) as store:
        for number in range(2 * names):
            own = count(9, 1000 + 50 * number)
            shared = np.concatenate([count(8), own])
            tokens = (shared, own, own[:2])[number % 3]
            commit(store, tokens)
            store.flush()
            if number < names:
                store.name(f"name {number}", ROOT, tokens)
        store.keep_vocabulary(ROOT, lambda: Vocabulary.of(dict.fromkeys(range(5000), b" w")))


@pytest.fixture
def statements(monkeypatch):
    """The statements that were executed."""
    found, execute = [], Statements.execute

    def counted(self, statement, values=()):
        found.append(statement)
        return execute(self, statement, values)

    monkeypatch.setattr(Statements, "execute", counted)
    return found


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_the_number_of_statements_does_not_grow_with_names_and_chains(command, statements, tmp_path):
    executed = []
    for names in (FEW, MANY):
        fill(tmp_path / str(names), names)
        statements.clear()
        done = CliRunner().invoke(app, ["store", *command], env={"KVTIER_STORE": str(tmp_path / str(names))})
        assert done.exit_code == 0, done.output
        executed.append(list(statements))
    assert len(executed[0]) == len(executed[1])
