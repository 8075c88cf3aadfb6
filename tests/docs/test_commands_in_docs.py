"""Every shell command of the documentation exists: commands of kvtier parse, targets of make and modules are there."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer

from kvtier.cli import app
from tests.support.snippets import CHECKOUT, PAGES, snippets

SHELL = ("console", "sh")
PROMPT = "$ "
USAGE_ERROR = typer.BadParameter.__bases__[0]  # click's; typer has a click of its own since 0.21


def commands(language: str, text: str) -> list[list[str]]:
    """Return the words of each command of a block; in a console block, lines without a prompt are output."""
    text = text.replace("\\\n", " ")
    lines = text.splitlines()
    if language == "console":
        lines = [line.removeprefix(PROMPT) for line in lines if line.startswith(PROMPT)]
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"\w+=.*", words[0]):  # variables of the environment
            words = words[1:]
        if words:
            found.append(words)
    return found


SCRIPTS = {
    snippet.comments["script"]
    for page in PAGES.values()
    for snippet in snippets(page.read_text(encoding="utf-8"))
    if "script" in snippet.comments
}
"""Programs that the documentation shows; tests/docs/test_python_snippets.py runs them."""
COMMANDS = [
    pytest.param(words, id=f"{name}:{snippet.line}: {' '.join(words)}")
    for name, page in PAGES.items()
    for snippet in snippets(page.read_text(encoding="utf-8"))
    if snippet.language in SHELL and "not run" not in snippet.comments
    for words in commands(snippet.language, snippet.text)
]


def parse(command: Any, words: list[str], parent: Any = None) -> None:
    """Parse the words behind a command, and those behind its subcommands, as the command line would."""
    context = command.make_context(command.name or "kvtier", list(words), parent=parent)
    rest = [*context._protected_args, *context.args]
    if hasattr(command, "resolve_command") and rest:
        _, found, arguments = command.resolve_command(context, rest)
        parse(found, arguments, context)


def check(words: list[str]) -> None:
    """Raise if the command does not exist, or does not take these arguments."""
    name = words[0].rsplit("/", 1)[-1]
    for word in words[1:]:
        if word.endswith((".txt", ".json")) and "/" not in word:
            Path(word).touch()  # a file of the reader
    if name == "kvtier":
        parse(typer.main.get_command(app), words[1:])
    elif name == "make":
        targets = set(re.findall(r"^([\w-]+):", (CHECKOUT / "Makefile").read_text(), re.MULTILINE))
        assert {word for word in words[1:] if "=" not in word and not word.startswith(".")} <= targets
    elif name == "python" and words[1] == "-m":
        assert find_spec(words[2]) is not None
    elif name == "python":
        assert (CHECKOUT / words[1]).exists() or words[1] in SCRIPTS
    elif name == "jupyter":
        assert (CHECKOUT / words[2]).exists()
    else:
        assert name in {"pip", "rm", "du", "cat"}, f"say in tests/docs how {name} is checked"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("words", COMMANDS)
def test_the_command_exists(words):
    check(words)


@pytest.mark.parametrize("line", ["kvtier store lss", "kvtier store ls --filtre x", "kvtier plan", "make dosc"])
def test_a_command_that_does_not_exist_is_noticed(line):
    with pytest.raises((AssertionError, USAGE_ERROR)):
        check(line.split())
