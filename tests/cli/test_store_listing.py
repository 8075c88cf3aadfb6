"""``kvtier store ls`` and ``show`` with text: order, filters, limits, formats, and what a terminal is spared."""

from __future__ import annotations

import csv
import io
import json

import pytest
from rich.cells import cell_len
from typer.testing import CliRunner

from kvtier.cli import app
from kvtier.cli.store.output import Column, make_console, print_table
from kvtier.store import PrefixStore
from kvtier.store.format.vocabulary import Vocabulary
from tests.support.stores import OTHER_ROOT, ROOT, block_files, commit, count, ids

# Token n is the word wn; 90 is special; 91 tries to clear the screen; 92 is half of a character.
VOCABULARY = Vocabulary.of(
    {**{n: f" w{n}".encode() for n in range(90)}, 90: b"<end>", 91: b"\x1b[2J\x07\nlast", 92: b"\xc3"}, specials=[90]
)


@pytest.fixture
def folder(tmp_path):
    """Three names and a chain; all but ``other`` have text."""
    path, now = tmp_path / "store", iter(range(1_000_000, 2_000_000, 10_000))
    time = [0.0]
    with PrefixStore(path, block_size=4, clock=lambda: time[0]) as store:
        for name, tokens, root in (
            ("beta", count(40), ROOT),
            ("alpha", ids(90, 7, 8, 91), ROOT),
            ("other", count(12), OTHER_ROOT),
            (None, ids(92, 5, 6), ROOT),
        ):
            time[0] = float(next(now))
            commit(store, tokens, root)
            store.flush()
            if name is not None:
                store.name(name, root, tokens, pin=name == "beta")
        store.keep_vocabulary(ROOT, lambda: VOCABULARY)
    manifest = {"model": "LlamaForCausalLM", "config": {"_name_or_path": "someone/Tiny-Llama"}}
    (path / "roots" / f"{ROOT}.json").write_text(json.dumps(manifest))
    return path


def run(folder, *arguments, width=200, code=0):
    env = {"COLUMNS": str(width), "KVTIER_STORE": str(folder)}
    result = CliRunner().invoke(app, ["store", *map(str, arguments)], env=env)
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


def names(folder, *arguments):
    return run(folder, "ls", "-q", *arguments).split()


# --- order, filters, limits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("name", "alpha beta other"),
        ("used", "other alpha beta"),
        ("created", "other alpha beta"),
        ("size", "beta other alpha"),
        ("own", "beta other alpha"),
        ("tokens", "beta other alpha"),
        ("hits", "alpha beta other"),
        ("expires", "alpha beta other"),
        ("model", "alpha beta other"),
    ],
)
def test_ls_sorts_by_every_key_and_the_other_way_round(folder, order, expected):
    assert names(folder, "--sort", order) == expected.split()
    if order not in ("hits", "expires", "model"):  # where all differ
        assert names(folder, "--sort", order, "--reverse") == expected.split()[::-1]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (["name=*a"], "alpha beta"),
        (["model=tiny"], "alpha beta"),
        (["model=ForCausal"], "alpha beta"),
        (["model=gemma"], ""),
        ([f"root={OTHER_ROOT[:8]}"], "other"),
        (["text=w8"], "alpha beta"),
        (["text=LAST"], "alpha"),
        (["pinned=yes"], "beta"),
        (["pinned=no", "name=a*"], "alpha"),
        (["unused-for=30d"], "alpha beta other"),
        (["larger=8KiB"], "beta other"),
        (["smaller=8KiB"], "alpha"),
        (["w39"], "beta"),
        (["BETA"], "beta"),
        (["nothing"], ""),
    ],
)
def test_ls_filters(folder, filters, expected):
    assert names(folder, *(f"--filter={text}" for text in filters)) == expected.split()


@pytest.mark.parametrize("wrong", ["size=3", "pinned=maybe", "larger=much", "unused-for=5"])
def test_ls_refuses_unknown_filters_in_one_line(folder, wrong):
    (line,) = run(folder, "ls", "--filter", wrong, code=2).splitlines()
    assert line.startswith("kvtier store: --filter ")


def test_ls_limits_and_says_so(folder):
    assert names(folder, "--limit", 2) == ["alpha", "beta"]
    assert names(folder, "-n", 0) == []
    assert "2 of 3 are shown." in run(folder, "ls", "--limit", 2)
    assert "are shown" not in run(folder, "ls")
    assert "0 of 3 are shown." in run(folder, "ls", "-f", "nothing")


def test_quiet_lists_whole_keys_of_chains(folder):
    with PrefixStore(folder) as store:
        (key,) = [chain.key for chain in store.chains() if not chain.names]
    assert names(folder, "--unnamed") == [key]
    assert "--format" in run(folder, "ls", "-q", "--json", code=2)


# --- formats ----------------------------------------------------------------------------------------------------------


def test_all_formats_tell_the_same(folder):
    whole = json.loads(run(folder, "ls", "--json"))
    assert json.loads(run(folder, "ls", "--format", "json")) == whole
    lines = [json.loads(line) for line in run(folder, "ls", "--format", "jsonl").splitlines()]
    assert lines == whole["names"]
    rows = list(csv.DictReader(io.StringIO(run(folder, "ls", "--format", "csv"))))
    assert [list(row) for row in rows] == [list(record) for record in lines]
    assert [(row["name"], int(row["tokens"]), row["text"]) for row in rows] == [
        (record["name"], record["tokens"], record["text"]) for record in lines
    ]
    chains = json.loads(run(folder, "ls", "--unnamed", "--json"))["chains"]
    (row,) = csv.DictReader(io.StringIO(run(folder, "ls", "--unnamed", "--format", "csv")))
    assert list(row) == list(chains[0])


@pytest.mark.parametrize("width", [40, 80, 200])
def test_table_fits_the_terminal_at_every_width(folder, width):
    table = run(folder, "ls", width=width).split("\n\n")[0].splitlines()
    assert all(cell_len(line) <= width for line in table if not line.startswith("Too narrow"))
    assert [line.split()[0] for line in table[1:4]] == ["alpha", "beta", "other"]
    assert ("…" in table[2]) == (width > 40)  # the text of beta is cut at its beginning
    assert table[2].rstrip().endswith("w39") == (width > 40)


def test_text_takes_the_width_that_is_left_and_is_cut_at_its_beginning(capsys, monkeypatch):
    for width, shown in ((60, 51), (30, 21), (24, None)):
        monkeypatch.setenv("COLUMNS", str(width))
        columns = (Column("name", "left"), Column("text", "left", dispensable=1, fills=True))
        print_table(make_console(), columns, [("abcdefg", "字" * 30 + "end")])
        line = capsys.readouterr().out.splitlines()[1].rstrip()
        assert line.startswith("abcdefg")
        assert ("end" in line) == (shown is not None)
        assert cell_len(line) <= width


# --- text -------------------------------------------------------------------------------------------------------------


def test_ls_shows_models_and_the_end_of_texts(folder):
    table = run(folder, "ls").splitlines()
    assert table[0].split()[-2:] == ["model", "text"]
    assert "Tiny-Llama" in table[1]
    assert table[1].rstrip().endswith("w7 w8\ufffd[2J\ufffd last")
    found = json.loads(run(folder, "ls", "--unnamed", "--json"))["chains"]
    assert found[0]["text"] == "w5 w6"  # the half character is left out


@pytest.mark.parametrize(
    "command",
    [
        ("ls",),
        ("ls", "--json"),
        ("ls", "--format", "csv"),
        ("ls", "--format", "jsonl"),
        ("show", "alpha"),
        ("show", "alpha", "--text"),
        ("show", "alpha", "--json"),
    ],
    ids=" ".join,
)
def test_terminal_escapes_of_a_prompt_do_not_reach_the_terminal(folder, command):
    text = run(folder, *command)
    assert "last" in text
    assert not any(letter in text for letter in "\x1b\x07\r")


def test_show_prints_the_text(folder):
    facts = dict(line.split("  ", 1) for line in run(folder, "show", "alpha").splitlines())
    assert facts["begins"].strip() == "w7 w8\ufffd[2J\ufffd last"
    assert run(folder, "show", "alpha", "--text") == "<end> w7 w8\ufffd[2J\ufffd\nlast\n"
    found = json.loads(run(folder, "show", "beta", "--json", "--text"))
    assert found["whole_text"].split() == [f"w{n}" for n in range(40)]
    assert found["first_text"] == found["last_text"]
    assert "no text of 'other' is known" in run(folder, "show", "other", "--text", code=1)


def test_show_takes_a_key_instead_of_a_name(folder):
    key = run(folder, "ls", "-q", "--unnamed").strip()
    found = json.loads(run(folder, "show", "--key", key[:9], "--json"))
    assert (found["key"], found["first_token_ids"]) == (key, [92, 5, 6])
    assert run(folder, "show", "--key", key).splitlines()[0].split() == ["key", key]
    for wrong in ([], ["alpha", "--key", key]):
        assert "takes a name, or" in run(folder, "show", *wrong, code=2)


# --- dry runs and clear -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        ("rm", "alpha", "beta"),
        ("rm", "--key", "KEY"),
        ("prune", "--unused-for", "1d"),
        ("prune", "--to", "5KiB"),
        ("clear",),
    ],
    ids=" ".join,
)
def test_dry_run_tells_what_the_command_then_removes(folder, command):
    key = run(folder, "ls", "-q", "--unnamed").strip()
    command = [key if word == "KEY" else word for word in command]
    before = run(folder, "ls", "--json")
    told = json.loads(run(folder, *command, "--dry-run", "--json"))
    assert run(folder, "ls", "--json") == before
    assert "Would remove" in run(folder, *command, "-n")
    done = json.loads(run(folder, *command, "--yes", "--json"))
    assert told == {**done, "dry_run": True}
    assert done["removed_blocks"] > 0


def test_dry_run_of_repair_repairs_nothing(folder):
    block_files(folder)[0].write_bytes(b"damaged")
    result = CliRunner().invoke(app, ["store", "verify", "--repair", "--dry-run", "--store", str(folder)])
    assert result.exit_code == 1
    assert "damaged" in result.stdout
    assert any(file.read_bytes() == b"damaged" for file in block_files(folder))


def test_clear_asks_and_empties_the_store(folder):
    assert "pass --yes" in run(folder, "clear", code=2)
    assert len(names(folder)) == 3
    run(folder, "clear", "--yes")
    assert run(folder, "ls") == "The store is empty.\n"


# --- the shell --------------------------------------------------------------------------------------------------------


def completions(folder, *words):
    """Return what a shell offers after ``kvtier store <words>``; the last word is incomplete."""
    line = " ".join(["kvtier", "store", *words])
    env = {"_KVTIER_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) + 1)}
    result = CliRunner().invoke(app, [], prog_name="kvtier", env={**env, "KVTIER_STORE": str(folder)})
    return result.stdout.split()


def test_shell_completes_names_keys_filters_and_roots(folder):
    key = run(folder, "ls", "-q", "--unnamed").strip()
    assert completions(folder, "show", "a") == ["alpha"]
    assert completions(folder, "pin", "") == ["alpha", "beta", "other"]
    assert completions(folder, "name", key[:2]) == [key[:12]]
    assert completions(folder, "rm", "--key", key[:15]) == [key[:15]]
    assert completions(folder, "ls", "--filter", "pin") == ["pinned="]
    assert completions(folder, "ls", "--filter", f"root={ROOT[:3]}") == [f"root={ROOT[:12]}"]
    assert completions(folder, "ls", "--filter", "name=o") == ["name=other"]
    assert completions(folder, "ls", "--sort", "si") == ["size"]


def test_completion_makes_no_store_and_shows_no_error(tmp_path):
    assert completions(tmp_path / "none", "show", "") == []
    assert not (tmp_path / "none").exists()
    (tmp_path / "kvtier.json").write_text('{"format_version": 999}')
    assert completions(tmp_path, "show", "") == []


def test_version_is_printed():
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout.startswith("kvtier ")
