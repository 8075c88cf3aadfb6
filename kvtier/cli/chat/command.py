"""``kvtier chat``: a conversation in the terminal that goes on tomorrow without computing it again.

Exit codes: 0 it was ended; 1 a store fails; 2 called wrongly, or the model cannot be loaded or does not chat; 130
interrupted before the first question.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kvtier.cli.chat.model import Device, Model, System, failures_of, open_chat, text_in
from kvtier.cli.store.common import DEFAULT_FOLDER, Folder


def chat(
    model: Model,
    resume: Annotated[
        str | None,
        typer.Option("--resume", metavar="NAME", help="Continue the saved chat NAME, or begin it."),
    ] = None,
    document: Annotated[
        Path | None, typer.Option(metavar="FILE", exists=True, dir_okay=False, help="A text file to talk about.")
    ] = None,
    system: System = None,
    store: Folder = DEFAULT_FOLDER,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Longest answer, in tokens.")] = 512,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the likeliest token.")] = False,
    temperature: Annotated[
        float | None, typer.Option(metavar="T", min=0.01, help="Sample tokens; the larger T, the more freely.")
    ] = None,
    other_model: Annotated[
        bool, typer.Option("--render", help="With --resume: continue the messages of a chat that another model held.")
    ] = False,
    device: Device = "here",
) -> None:
    """Chat with a model. Ctrl-C stops an answer, Ctrl-D ends; /help lists commands. Lines of a pipe are questions."""
    with failures_of("chat"):
        text = text_in(document) if document is not None else None
        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens}
        if greedy and temperature is not None:
            raise typer.BadParameter("--greedy and --temperature exclude each other")
        if greedy:
            settings["do_sample"] = False
        elif temperature is not None:
            settings |= {"do_sample": True, "temperature": temperature}
        how = "render" if other_model else "refuse"
        talk = open_chat(
            model, device, store, name=resume, system=system, document=text, on_other_model=how, **settings
        )
        from kvtier.cli.chat.terminal import Terminal

        with talk:
            Terminal(talk, is_interactive=sys.stdin.isatty()).run()
