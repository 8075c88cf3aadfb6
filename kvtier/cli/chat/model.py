"""The model, tokenizer and store of the chat commands, and their failures as one line and an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from kvtier.cli.store.output import plain
from kvtier.errors import ConfigurationError, KvtierError
from kvtier.platform.filesystem import folder_path

if TYPE_CHECKING:
    from kvtier.hf.chat.conversation import Chat

FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130
DEMO = "demo"

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A chat model: a folder, a name on the hub, or demo for the demo's model."),
]
Device = Annotated[
    str, typer.Option(metavar="here|cpu", help="here: the accelerator of this machine, or its CPU; cpu: its CPU.")
]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="The system message.")]


def fail(command: str, code: int, error: object) -> NoReturn:
    """End ``command`` with ``code`` and one line on standard error."""
    typer.echo(f"kvtier {command}: {plain(' '.join(str(error).split()))}", err=True)
    raise typer.Exit(code) from None


@contextmanager
def failures_of(command: str) -> Iterator[None]:
    """Turn failures of ``command`` into one line and an exit code."""
    try:
        yield
    except ConfigurationError as error:
        fail(command, WRONG_USAGE, error)
    except KvtierError as error:
        fail(command, FAILED, error)
    except KeyboardInterrupt:
        fail(command, INTERRUPTED, "interrupted")


def open_chat(model: str, device: str, store: Path, **arguments: Any) -> Chat:
    """Load the model and return a chat of it over the store in a folder, which is made if it is missing.

    Raises:
        ConfigurationError: the model cannot be loaded or does not chat, or an argument cannot be used.
        DemoModelError: the demo's model cannot be fetched.
        StoreError: the folder cannot be used, or a saved chat cannot be read.
    """
    # Imported here: `kvtier --help` need not wait for transformers.
    from transformers import AutoTokenizer

    from kvtier.cli.bench.command import device_called
    from kvtier.cli.bench.turns import load_model
    from kvtier.hf.chat.conversation import Chat
    from kvtier.hf.demo_model import demo_model

    console = Console(stderr=True)
    with console.status("loading the model") if console.is_terminal else nullcontext():
        name = str(demo_model()) if model == DEMO else model
        loaded = load_model(name, device_called(device))
        folder = folder_path(name, "model")
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder) if folder.is_dir() else name)
        except Exception as error:  # of the hub's client, the file system or a parser
            text = " ".join(str(error).split())
            raise ConfigurationError(
                f"model={model!r:.200} has no tokenizer that can be loaded: {text:.300}"
            ) from error
    return Chat(loaded, tokenizer, cache=store, **arguments)


def text_in(document: Path) -> str:
    """Return the text of a document, without white space around it.

    Raises:
        ConfigurationError: it cannot be read, is not UTF-8, or has no text.
    """
    try:
        text = document.expanduser().read_text(encoding="utf-8").strip()
    except (OSError, RuntimeError, UnicodeDecodeError) as error:  # RuntimeError: ~ of an unknown user
        raise ConfigurationError(f"{document} cannot be read as a text: {error}") from error
    if not text:
        raise ConfigurationError(f"{document} has no text; name another file.")
    return text
