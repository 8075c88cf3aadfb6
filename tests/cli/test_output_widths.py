"""Every listing fits into the terminal: no line of its output or its help is longer than the terminal is wide."""

from __future__ import annotations

import json

import pytest
import torch
from rich.cells import cell_len
from rich.text import Text
from typer.main import get_command
from typer.testing import CliRunner

from kvtier.cli import app
from kvtier.cli.bench.compare import Difference
from kvtier.cli.bench.machine import describe_machine
from kvtier.cli.bench.measure import Measured, Row
from kvtier.cli.bench.output import Subject, print_measured
from kvtier.cli.bench.places import COLD, PROCESS
from kvtier.cli.demo.results import Row as DemoRow
from kvtier.cli.demo.results import TurnResult, print_results
from kvtier.cli.doctor.findings import Finding, print_finding
from kvtier.cli.store.output import make_console, print_below
from kvtier.store import PrefixStore
from kvtier.store.format.vocabulary import Vocabulary
from tests.support.stores import OTHER_ROOT, ROOT, commit, count, ids

WIDTHS = (40, 80, 200)
LONG_NAME = "chat/a long name of a conversation about lighthouses"
LISTINGS = [
    ["ls"],
    ["ls", "--unnamed"],
    ["ls", "--limit", "1"],
    ["ls", "--filter", "nothing"],
    ["show", LONG_NAME],
    ["show", "other"],
    ["du"],
    ["stats"],
    ["verify"],
    ["prune", "--unused-for", "1s", "--dry-run"],
    ["rm", "other", "--dry-run"],
    ["clear", "--dry-run"],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A store with a long name, a name in wide characters, an unnamed chain, a long model name and text."""
    path = tmp_path_factory.mktemp("widths") / "store"
    with PrefixStore(path, block_size=4) as store:
        for name, tokens, root in (
            (LONG_NAME, count(40), ROOT),
            ("灯台の記録", ids(7, 8, 9), ROOT),
            ("other", count(12), OTHER_ROOT),
            (None, ids(92, 5, 6), ROOT),
        ):
            commit(store, tokens, root)
            store.flush()
            if name is not None:
                store.name(name, root, tokens)
        store.keep_vocabulary(ROOT, lambda: Vocabulary.of({n: f" word{n}".encode() for n in range(95)}, specials=[]))
    config = {"_name_or_path": "someone/Tiny-Llama-with-a-rather-long-name-Instruct"}
    (path / "roots" / f"{ROOT}.json").write_text(json.dumps({"model": "LlamaForCausalLM", "config": config}))
    return path


def run(arguments, width, folder=None):
    env = {"COLUMNS": str(width), "TERMINAL_WIDTH": str(width), **({"KVTIER_STORE": str(folder)} if folder else {})}
    result = CliRunner().invoke(app, arguments, env=env)
    assert result.exit_code == 0, result.output
    return result.stdout


def too_long(text, width):
    return [line for line in text.splitlines() if cell_len(line) > width]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("arguments", LISTINGS, ids=" ".join)
def test_no_line_of_a_listing_is_longer_than_the_terminal_is_wide(folder, arguments, width):
    printed = run(["store", *arguments], width, folder)
    assert printed.strip()
    assert too_long(printed, width) == []


def commands(command=None, path=()):
    command = command or get_command(app)
    yield list(path)
    for name, each in getattr(command, "commands", {}).items():
        yield from commands(each, (*path, name))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("path", list(commands()), ids=lambda path: " ".join(path) or "kvtier")
def test_help_fits_the_terminal_and_flags_have_no_type(path, width):
    printed = run([*path, "--help"], width)
    assert too_long(printed, width) == []
    for wrong in ("<bool>", "``", "[["):
        assert wrong not in printed


@pytest.mark.parametrize("width", WIDTHS)
def test_a_finding_goes_on_below_its_text(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    print_finding(
        make_console(), Finding("ok", "disk", "writes 379 MB/s to the disk, reads 8.2 GB/s from the page cache")
    )
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith("ok       disk          writes")
    assert all(line.startswith(" " * 23) and line.strip() for line in others)
    assert too_long("\n".join([first, *others]), width) == []
    assert bool(others) == (width < 200)


def test_without_a_terminal_a_line_stays_one_line(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    print_below(make_console(), [Text("ends")], "word " * 200)
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize("width", WIDTHS)
def test_results_of_a_bench_fit(width, monkeypatch, capsys):
    equal = Difference(equal_bits=True, largest_logit_delta=0.0, flipped_tokens=0, tokens=8)
    drift = Difference(equal_bits=False, largest_logit_delta=0.0123, flipped_tokens=1, tokens=24)
    cold = Row(COLD, (3.5, 3.25, 4.0), {}, None, None, True, None)
    warm = Row(PROCESS, (0.298, 0.25, 0.31), {"disk": 4096}, None, equal, True, drift)
    monkeypatch.setenv("COLUMNS", str(width))
    subject = Subject("someone/Tiny-Llama-with-a-long-name", "llama", "bfloat16", 4131, 4099, 8, "the shipped text")
    print_measured(
        make_console(), subject, describe_machine(torch.device("cpu")), Measured((cold, warm), drift, ("a note",))
    )
    printed = capsys.readouterr().out
    assert too_long(printed, width) == []
    assert "…" not in printed
    assert "298 ms" in printed, "a figure and its unit are together"


@pytest.mark.parametrize("width", WIDTHS)
def test_results_of_the_demo_fit(width, monkeypatch, capsys):
    result = TurnResult((1, 2), 4131, 4105, 26, {"device": 0, "host": 0, "disk": 4105}, 0.81)
    monkeypatch.setenv("COLUMNS", str(width))
    print_results(make_console(), [DemoRow("2  from memory", result, 60.02, True)])
    printed = capsys.readouterr().out
    assert too_long(printed, width) == []
    assert "…" not in printed
    assert {"4131", "4105", "26", "60.02", "0.81", "74.1×", "equal"} <= set(printed.split())
