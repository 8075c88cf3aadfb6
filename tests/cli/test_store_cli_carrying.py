"""``kvtier store export`` and ``import``; foreign files cannot control the terminal."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from safetensors import safe_open
from typer.testing import CliRunner

from kvtier.cli import app
from kvtier.cli.store import common
from kvtier.cli.store.roots import RootFile
from kvtier.store import PrefixStore
from tests.support.stores import ROOT, block_files, commit, count, restored_length, truth

TOKENS = count(10)
OTHER = count(6, 50)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "store"
    with PrefixStore(path, block_size=4) as store:
        manifest = {"model": "TinyForCausalLM", "block_size": 4}
        store.commit(ROOT, TOKENS, lambda start, stop: truth(ROOT, TOKENS, start, stop), manifest)
        commit(store, OTHER)
        store.flush()
        store.name("letter", ROOT, TOKENS)
        store.name("note", ROOT, OTHER)
    return path


@pytest.fixture
def file(folder, tmp_path):
    path = tmp_path / "letter.safetensors"
    assert run(folder, "export", "letter", path).exit_code == 0
    return path


def run(folder, *words):
    arguments = ["store", *map(str, words), "--store", str(folder)]
    return CliRunner().invoke(app, arguments, catch_exceptions=False, env={"COLUMNS": "200"})


def data(folder, *words):
    result = run(folder, *words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refusal(folder, *words, code):
    result = run(folder, *words)
    assert (result.exit_code, result.stdout) == (code, "")
    (line,) = result.stderr.splitlines()
    return line


def names_in(folder):
    with PrefixStore(folder) as store:
        return {each.name: each.tokens for each in store.names()}


def rewritten(file, **changes):
    """Change metadata of an archive; None removes an entry."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    metadata = {**header["__metadata__"], **changes}
    header["__metadata__"] = {key: value for key, value in metadata.items() if value is not None}
    new = json.dumps(header).encode()
    new = new.ljust(-len(new) % 8 + len(new))
    file.write_bytes(len(new).to_bytes(8, "little") + new + content[8 + length :])


def test_export_reports_the_size_and_tokens_of_its_file(folder, tmp_path):
    path = tmp_path / "letter.safetensors"
    found = data(folder, "export", "letter", path)
    assert (found["file"], found["file_bytes"], found["tokens"]) == (str(path), path.stat().st_size, 10)
    with safe_open(path, "np") as archive:
        assert archive.get_tensor("tokens").tolist() == TOKENS.tolist()


def test_export_replaces_a_file_only_with_overwrite(folder, file):
    file.write_text("precious")
    assert "--overwrite" in refusal(folder, "export", "letter", file, code=2)
    assert file.read_text() == "precious"
    assert run(folder, "export", "letter", file, "--overwrite").exit_code == 0
    assert file.read_bytes() != b"precious"


def test_failed_export_leaves_no_file(folder, tmp_path):
    refusal(folder, "export", "letter", tmp_path / "no" / "x.safetensors", code=1)
    refusal(folder, "export", "nothing", tmp_path / "x.safetensors", code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_import_creates_a_store_that_restores_every_byte(file, tmp_path):
    there = tmp_path / "there"
    found = data(there, "import", file)
    assert (found["store"], found["name"], found["root"], found["tokens"]) == (str(there), "letter", ROOT, 10)
    with PrefixStore(there, block_size=4) as store:
        assert restored_length(store, TOKENS) == 10
    assert data(there, "show", "letter")["manifest"]["model"] == "TinyForCausalLM"


def test_import_refuses_the_name_of_another_prefix(folder, file):
    assert "--name" in refusal(folder, "import", file, "--name", "note", code=2)
    assert names_in(folder) == {"letter": 10, "note": 6}
    assert run(folder, "import", file).exit_code == 0  # the same prefix under the same name
    assert run(folder, "import", file, "--name", "copy").exit_code == 0
    assert names_in(folder) == {"copy": 10, "letter": 10, "note": 6}


@pytest.mark.parametrize("content", [b"", b"hello", None])
def test_import_of_an_invalid_archive_creates_no_store(folder, tmp_path, content):
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(block_files(folder)[0].read_bytes() if content is None else content)
    assert str(junk) in refusal(tmp_path / "there", "import", junk, code=1)
    assert not (tmp_path / "there").exists()


def test_import_of_a_damaged_archive_leaves_an_empty_store(file, tmp_path):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    refusal(tmp_path / "there", "import", file, code=1)
    assert names_in(tmp_path / "there") == {}
    assert block_files(tmp_path / "there") == []


def test_import_of_an_unnamed_archive_requires_a_name(file, tmp_path):
    rewritten(file, name=None)
    assert "--name" in refusal(tmp_path / "there", "import", file, code=2)
    assert not (tmp_path / "there").exists()
    assert run(tmp_path / "there", "import", file, "--name", "x").exit_code == 0


@pytest.mark.parametrize(
    "manifest",
    [
        {"adapters": 3},
        {"adapters": [3]},
        {"adapters": {"a": 1}},
        {"config": [], "model": 5},
        {"config": {"text_config": 3, "dtype": {"x": 1}}},
        {"model": {"a": "\x1b[31m"}, "namespace": ["\u202e"], "block_size": None},
    ],
    ids=str,
)
def test_odd_archive_manifest_neither_fails_commands_nor_controls_the_terminal(file, tmp_path, manifest):
    rewritten(file, manifest=json.dumps(manifest))
    there = tmp_path / "there"
    assert run(there, "import", file).exit_code == 0
    for command in (["ls"], ["show", "letter"], ["du"]):
        result = run(there, *command)
        assert result.exit_code == 0
        assert "\x1b" not in result.stdout
        assert "\u202e" not in result.stdout


def test_root_title_describes_a_nested_text_model(tmp_path):
    inner = {"text_config": {"num_hidden_layers": 7, "dtype": "float32"}, "dtype": "bfloat16"}
    (tmp_path / "roots").mkdir()
    (tmp_path / "roots" / f"{ROOT}.json").write_text(json.dumps({"model": "SeeingModel", "config": inner}))
    assert RootFile.read(tmp_path, ROOT).title == "SeeingModel, 7 layers, bfloat16"


def test_error_messages_contain_no_escape_characters(folder, tmp_path, monkeypatch):
    # With color=True nothing is stripped on the way to a terminal.
    for words in (["ls"], ["import", str(tmp_path / "\x1b[31mx")]):
        place = tmp_path / "\x1b[31mfolder" if words == ["ls"] else folder
        arguments = ["store", *words, "--store", str(place)]
        result = CliRunner().invoke(app, arguments, color=True)
        assert result.exit_code == 2
        assert "\x1b" not in result.stderr


def test_file_name_that_looks_like_markup_is_used_literally(folder, tmp_path, monkeypatch):
    screen = io.StringIO()

    class Terminal(Console):
        def __init__(self, **how):
            super().__init__(file=screen, force_terminal=True, width=200)

    monkeypatch.setattr(common, "Console", Terminal)
    monkeypatch.chdir(tmp_path)
    assert run(folder, "export", "letter", "[").exit_code == 0
    assert run(folder, "export", "letter", "[bold]x[").exit_code == 0
    assert run(folder, "import", "[bold]x[", "--name", "y").exit_code == 0
    assert "Writing [bold]x[" in screen.getvalue()
    assert "Checking" in screen.getvalue()
