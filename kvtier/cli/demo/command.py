"""``kvtier demo``: a conversation about a long document, in three turns and two processes.

Turn 1 is cold, turn 2 continues it from memory, turn 3 resumes the chat in a new process that has only the store's
files. Every turn is repeated with plain transformers: on a fresh cache, for its time, and on a cache that is fed
the same forward calls, for the expected tokens.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from kvtier.cli.demo.results import Row, TurnResult, print_results
from kvtier.cli.store.output import make_console

if TYPE_CHECKING:
    from kvtier.cli.demo.conversation import ChatModel

_LIGHTHOUSE_QUESTIONS = (
    "When was the lamp lit for the first time?",
    "Who was the principal keeper when the great wave put out the light?",
    "What does the card in the museum say?",
)
_CHAT = "kvtier demo"
_ANY_QUESTIONS = ("What is this text about?", "Which names does it mention?", "How does it end?")


def demo(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="A chat model: folder or hub name. Default: SmolLM2-135M-Instruct, fetched once."
        ),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Where the files go, to be kept. Default: a folder that is removed at the end."
        ),
    ] = None,
    document: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", exists=True, dir_okay=False, help="A text file to talk about instead of the shipped one."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=2, help="Longest answer, in tokens.")] = 48,
    worker: Annotated[Path | None, typer.Option(hidden=True, help="Run the turn described in this file.")] = None,
) -> None:
    """Talk about a long document in three turns; the last one in a new process, from disk."""
    if worker is not None:
        _run_worker(worker)
        return
    console = make_console()
    with ExitStack() as stack:
        if store is None:
            store = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvtier-demo-")))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvtier-demo-")))
        rows = _converse(console, _model_folder(console, model), store, scratch, document, max_new_tokens)
    console.print()
    print_results(console, rows)
    if not all(row.equal for row in rows):
        console.print("[bold red]The tokens differ from plain transformers. This is a bug in kvtier.[/]")
        raise typer.Exit(1)
    console.print("Every answer has the tokens that plain transformers gives for the same forward calls.")


def _model_folder(console: Console, model: str | None) -> str:
    if model is not None:
        return model
    from kvtier.errors import DemoModelError
    from kvtier.hf.demo_model import demo_model, demo_model_folder

    if not demo_model_folder().exists():
        console.print("[dim]Fetching the demo model (once; 100 to 270 MB) …[/]")
    try:
        return str(demo_model())
    except DemoModelError as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(2) from None


def _converse(
    console: Console, model_folder: str, store: Path, scratch: Path, document: Path | None, max_new_tokens: int
) -> list[Row]:
    # Imported here: `kvtier --help` need not wait for transformers.
    from kvtier.cli.demo.conversation import ChatModel, PlainReference

    if document is None:
        text = resources.files("kvtier.cli.demo").joinpath("lighthouse.txt").read_text(encoding="utf-8")
        questions = _LIGHTHOUSE_QUESTIONS
    else:
        text, questions = document.read_text(encoding="utf-8"), _ANY_QUESTIONS
    model = ChatModel(model_folder)
    reference = PlainReference(model)
    rows: list[Row] = []

    def turn(title: str, row: str, question: str, said: str, run: Callable[[str], TurnResult]) -> None:
        console.print(f"\n[bold]Turn {title}[/]\n[cyan]> {question}[/]")
        result = run(said)
        prompt = result.sequence[: result.prompt_tokens]
        plain = reference.answer(prompt, result.cached_tokens, max_new_tokens)
        rows.append(Row(row, result, reference.cold(prompt), plain.sequence == result.sequence))

    first, second, third = questions
    with closing(_LocalTurns(model, store, max_new_tokens, is_new=True)) as turns:
        turn("1  this process, first time", "1  first time", first, f"{text.strip()}\n\n{first}", turns.run)
        turn("2  this process, from memory", "2  from memory", second, second, turns.run)
    # From here on, only the files are left: another process resumes the chat by its name.
    in_new_process = partial(_run_in_new_process, model_folder, store, scratch, max_new_tokens)
    turn("3  a new process, from disk", "3  new process", third, third, in_new_process)
    return rows


class _LocalTurns:
    """Turns of a saved chat in this process, printed as they come.

    Args:
        model: the model.
        store: the folder of the chat.
        max_new_tokens: longest answer.
        is_new: begin the chat anew; otherwise it is resumed.
    """

    def __init__(self, model: ChatModel, store: Path, max_new_tokens: int, *, is_new: bool) -> None:
        from kvtier import Chat, PrefixStore

        self._model = model
        self._store = PrefixStore(store, progress=True)
        if is_new:
            self._store.chats.remove(_CHAT)  # the chat of an earlier demo; its K and V may be known
        how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
        self._chat = Chat(model.model, model.tokenizer, cache=self._store, name=_CHAT, **how)

    def run(self, said: str) -> TurnResult:
        from kvtier.cli.demo.conversation import Clock

        clock = Clock(self._model.tokenizer, partial(typer.echo, nl=False))
        started_at = time.perf_counter()
        self._chat.say(said, stream=clock)
        report = self._chat.last_turn
        assert report is not None
        assert clock.first_token_at is not None
        return TurnResult(
            sequence=tuple(self._chat.tokens),
            prompt_tokens=report.prompt_tokens,
            cached_tokens=report.cached_tokens,
            computed_tokens=report.computed_tokens,
            cached_by_tier=dict(report.cached_by_tier),
            first_token_seconds=clock.first_token_at - started_at,
        )

    def close(self) -> None:
        """Write all blocks and close the store."""
        self._chat.close()
        self._store.close()


def _run_in_new_process(model_folder: str, store: Path, scratch: Path, max_new_tokens: int, said: str) -> TurnResult:
    task, result = scratch / "task.json", scratch / "result.json"
    fields = {"model": model_folder, "store": str(store), "said": said, "max_new_tokens": max_new_tokens}
    task.write_text(json.dumps(fields | {"result": str(result)}), encoding="utf-8")
    # Only a path is passed, and the answer streams through the inherited standard output.
    done = subprocess.run([sys.executable, "-m", "kvtier", "demo", "--worker", str(task)], check=False)
    if done.returncode != 0:
        raise typer.Exit(done.returncode)
    fields = json.loads(result.read_text(encoding="utf-8"))
    return TurnResult(**fields | {"sequence": tuple(fields["sequence"])})


def _run_worker(task: Path) -> None:
    from kvtier.cli.demo.conversation import ChatModel

    fields = json.loads(task.read_text(encoding="utf-8"))
    model, store = ChatModel(fields["model"]), Path(fields["store"])
    with closing(_LocalTurns(model, store, fields["max_new_tokens"], is_new=False)) as turns:
        result = turns.run(fields["said"])
    Path(fields["result"]).write_text(json.dumps(asdict(result)), encoding="utf-8")
