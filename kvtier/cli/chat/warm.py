"""``kvtier warm``: compute the prompt of a document once, so that every chat about it begins at once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from kvtier.cli.chat.model import Device, Model, System, failures_of, open_chat, text_in
from kvtier.cli.store.common import DEFAULT_FOLDER, AsJson, Folder
from kvtier.cli.store.output import print_result
from kvtier.errors import StoreError, UnknownNameError
from kvtier.units import parse_seconds


def warm(
    model: Model,
    document: Annotated[Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False, help="A text file.")],
    name: Annotated[
        str, typer.Option("--name", metavar="NAME", help="The name of the prompt, and of the chat about it.")
    ],
    system: System = None,
    pin: Annotated[bool, typer.Option("--pin", help="Never evict it.")] = False,
    ttl: Annotated[
        str | None, typer.Option("--ttl", metavar="DURATION", help="Forget it when unused for so long, e.g. 30d.")
    ] = None,
    store: Folder = DEFAULT_FOLDER,
    device: Device = "here",
    as_json: AsJson = False,
) -> None:
    """Compute the prompt of a document once. Later, chat --document FILE and chat --resume NAME begin at once."""
    with failures_of("warm"):
        seconds = None if ttl is None else parse_seconds(ttl, "--ttl")
        text = text_in(document)
        with open_chat(model, device, store, name=name, system=system, document=text, pin=pin, ttl=seconds) as talk:
            began = time.perf_counter()
            turn = talk.warm()
            took = time.perf_counter() - began
            assert turn is not None
            try:
                kept = talk.cache.store.named(name).kept_tokens
            except UnknownNameError:
                raise StoreError(
                    f"nothing of {name!r} is kept: {turn.miss_reason or 'see the warning above'}"
                ) from None
    record = {
        "name": name,
        "tokens": turn.prompt_tokens,
        "known_tokens": turn.cached_tokens,
        "computed_tokens": turn.computed_tokens,
        "kept_tokens": kept,
        "seconds": took,
        "miss_reason": turn.miss_reason,
    }
    line = (
        f"{name}: {turn.prompt_tokens} tokens, {turn.cached_tokens} of them known, {turn.computed_tokens} computed in "
        f"{took:.1f} s; {kept} are kept."
    )
    print_result(record, line, as_json)
