"""Every Python snippet of the documentation runs, page by page, and prints what its page says."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kvtier import PrefixStore, TieredCache
from kvtier.hf.demo_model import HUB_NAME, demo_model_folder
from tests.support.snippets import CHECKOUT, PAGES, SETUPS, Snippet, save_tiny_model, setup_of, snippets

pytestmark = [
    pytest.mark.skipif("KVTIER_TRANSFORMERS" in os.environ, reason="the documentation is for the newest transformers"),
    pytest.mark.cpu_only("the documentation describes the devices that people have"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # PEFT asks for it
]
WITH_PYTHON = [name for name, page in PAGES.items() if any(s.language == "python" for s in snippets(page.read_text()))]
# Pages that run with the demo model too, where it is cached; KVTIER_SNIPPETS=demo runs all.
WITH_DEMO_MODEL = (
    WITH_PYTHON if os.environ.get("KVTIER_SNIPPETS") == "demo" else ["README.md", "docs/getting-started.md"]
)
DEMO = demo_model_folder()
_ASKS = "You: "
_NUMBER = re.compile(r"\d[\d,.]*")
_SECONDS = re.compile(r"\d[\d,.]* (ms|s)\b")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-model")
    save_tiny_model(folder)
    return folder


@pytest.fixture
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, which is the current folder too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answer_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``demo_model``, and ``from_pretrained`` of its name on the hub, find the model in ``folder``."""
    place = demo_model_folder()
    place.parent.mkdir(parents=True)
    place.symlink_to(folder)

    def found_here(original: Callable[..., Any]) -> Callable[..., Any]:
        def from_pretrained(name: object, *args: Any, **kwargs: Any) -> Any:
            return original(folder if name == HUB_NAME else name, *args, **kwargs)

        return from_pretrained

    for each in (AutoConfig, AutoModelForCausalLM, AutoTokenizer):
        monkeypatch.setattr(each, "from_pretrained", found_here(each.from_pretrained))


def run_page(name: str, given: dict[str, Any], same: Callable[[str, str], bool], *, demo: bool) -> None:
    """Run the Python snippets of a page, one after the other with the same names, and compare what they print."""
    page = PAGES[name]
    names: dict[str, Any] = {"__name__": "snippet", **given}
    printed = ""
    try:
        for snippet in snippets(page.read_text(encoding="utf-8")):
            if snippet.language == "python" and not {"not run", "script"} & snippet.comments.keys():
                printed = run(snippet, page, names)
            expected = snippet.comments.get("prints")
            if snippet.language != "console" and (expected == "" or (expected and demo)):
                assert same(printed, snippet.text), f"{name}:{snippet.line} prints\n{printed}"
    finally:
        for value in names.values():
            if isinstance(value, (TieredCache, PrefixStore)) or type(value).__name__ == "Chat":
                value.close()


def run(snippet: Snippet, page: Path, names: dict[str, Any]) -> str:
    """Run one snippet, and return what it prints."""
    code = compile("\n" * (snippet.line - 1) + snippet.text, str(page), "exec")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, names)
    return printed.getvalue()


def run_script(code: str, name: str, shown: str) -> tuple[list[str], list[str]]:
    """Run a program in a new process for each command of a console block. Return what they printed, and what it shows.

    Lines of the block that begin as the program asks hold what the user types behind it.
    """
    script = Path(name)
    script.write_text(code, encoding="utf-8")
    printed, expected = [], []
    for run in shown.split(f"$ python {name}\n")[1:]:
        typed = "".join(line.removeprefix(_ASKS) + "\n" for line in run.splitlines() if line.startswith(_ASKS))
        environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
        done = subprocess.run([sys.executable, name], input=typed, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
        expected.append(re.sub(rf"^{_ASKS}.*\n", _ASKS, run, flags=re.MULTILINE))
    return printed, expected


def alike(printed: str, expected: str) -> bool:
    """Whether two outputs are the same but for numbers."""
    return _NUMBER.sub("#", printed).strip() == _NUMBER.sub("#", expected).strip()


def same_but_for_time(printed: str, expected: str) -> bool:
    """Whether two outputs are the same but for durations."""
    return _SECONDS.sub("#", printed).strip() == _SECONDS.sub("#", expected).strip()


@pytest.mark.parametrize("name", WITH_PYTHON)
def test_snippets_of_the_page_run(name, tiny_folder, at_home, monkeypatch):
    answer_from(tiny_folder, monkeypatch)
    setup = setup_of(PAGES[name].read_text())
    run_page(name, SETUPS[setup](tiny_folder) if setup else {}, alike, demo=False)


def scripts() -> list[Any]:
    """Return each program of the documentation as its page, its code, its name, and the console block that shows it."""
    found = []
    for name, page in PAGES.items():
        on_page = list(snippets(page.read_text(encoding="utf-8")))
        for snippet, shown in itertools.pairwise(on_page):
            if file := snippet.comments.get("script"):
                assert shown.language == "console", f"{name}:{shown.line} does not show how {file} is run"
                found.append(pytest.param(snippet.text, file, shown.text, id=f"{name}: {file}"))
    return found


@pytest.mark.parametrize(("code", "name", "shown"), scripts())
def test_a_program_that_is_run_twice_resumes_from_files(code, name, shown, tiny_folder, at_home, monkeypatch):
    answer_from(tiny_folder, monkeypatch)
    printed, _ = run_script(code, name, shown)
    assert len(printed) == 2
    reused = [int(re.search(r"(\d+) of \d+ prompt tokens reused", each)[1]) for each in printed]
    from_disk = [int(re.search(r"disk (\d+)", each)[1]) for each in printed]
    assert reused[0] == 0 < reused[1] == from_disk[1]


@pytest.mark.real_model
@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("KVTIER_SNIPPETS") != "demo", reason="minutes; KVTIER_SNIPPETS=demo runs it")
@pytest.mark.parametrize(("code", "name", "shown"), scripts())
def test_a_program_prints_what_its_page_says(code, name, shown, at_home, monkeypatch):
    monkeypatch.setenv("KVTIER_REUSE", "auto")
    answer_from(DEMO, monkeypatch)
    printed, expected = run_script(code, name, shown)
    assert [same_but_for_time(p, e) for p, e in zip(printed, expected, strict=True)] == [True] * 2, printed


@pytest.mark.real_model
@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("KVTIER_SNIPPETS") != "demo", reason="minutes; KVTIER_SNIPPETS=demo runs it")
@pytest.mark.parametrize("name", WITH_PYTHON)
def test_snippets_of_the_page_print_what_it_says(name, at_home, monkeypatch):
    monkeypatch.setenv("KVTIER_REUSE", "auto")
    answer_from(DEMO, monkeypatch)
    setup = setup_of(PAGES[name].read_text())
    run_page(name, SETUPS[setup](DEMO) if setup else {}, same_but_for_time, demo=True)


def test_each_snippet_that_is_not_run_says_why():
    found = [(name, s) for name, page in PAGES.items() for s in snippets(page.read_text()) if "not run" in s.comments]
    assert all(len(s.comments["not run"]) > 10 for _, s in found), found


def test_another_output_than_the_page_says_is_noticed():
    assert alike("12 of 13 known\n", "664 of 666 known")
    assert not alike("12 of 13 lost\n", "664 of 666 known")
    assert not same_but_for_time("12 of 13", "12 of 14")
