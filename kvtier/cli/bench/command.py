"""``kvtier bench``: time to the first token on this machine, from every place K and V can come from.

Stores lie in a temporary folder that is removed at the end, also after an interrupt. Exit codes: 0 fine; 1 bits differ
from plain transformers for the same calls, or a store fails; 2 called wrongly, or the model cannot be loaded; 130
interrupted.
"""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from kvtier.cli.store.output import make_console
from kvtier.errors import ConfigurationError, KvtierError

if TYPE_CHECKING:
    from kvtier.cli.bench.machine import Machine
    from kvtier.cli.bench.measure import Measured
    from kvtier.cli.bench.output import Subject

_TAIL_TOKENS = 32  # of each prompt, which no store knows


def bench(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model with weights: a folder, or a name on the hub.")
    ],
    tokens: Annotated[
        int, typer.Option(metavar="N", min=2 * _TAIL_TOKENS, help="Length of the prompt, in tokens.")
    ] = 1024,
    new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Length of the compared answers, in tokens.")] = 8,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="How often each way answers.")] = 3,
    seconds: Annotated[
        float, typer.Option(metavar="N", min=0, help="Begin no further round after so many seconds.")
    ] = 120,
    document: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", exists=True, dir_okay=False, help="A text for the prompt instead of the shipped one."
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="here|cpu", help="here: the accelerator of this machine, or its CPU; cpu: its CPU.")
    ] = "here",
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", file_okay=False, help="A folder for bench.json and, with matplotlib, bench.png."
        ),
    ] = None,
    new_process: Annotated[
        bool, typer.Option(help="Also answer in new processes. Each loads the model once more.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs, and nothing else.")] = False,
    worker: Annotated[Path | None, typer.Option(hidden=True, help="Answer the prompt described in this file.")] = None,
) -> None:
    """Measure on this machine what reuse brings, and compare the answers."""
    try:
        if worker is not None:
            from kvtier.cli.bench.places import work

            work(model, worker)
            return
        subject, machine, found = _bench(model, tokens, new_tokens, rounds, seconds, document, device, new_process)
        _write(subject, machine, found, output, as_json)
    except ConfigurationError as error:
        _fail(2, error)
    except KvtierError as error:  # of a store: a full drive, a folder that cannot be written
        _fail(1, error)
    if any(row.is_wrong for row in found.rows):
        raise typer.Exit(1)


def _fail(code: int, error: KvtierError) -> NoReturn:
    typer.echo(f"kvtier bench: {' '.join(str(error).split())}", err=True)
    raise typer.Exit(code) from None


def _bench(
    name: str,
    tokens: int,
    new_tokens: int,
    rounds: int,
    most_seconds: float,
    document: Path | None,
    device: str,
    new_process: bool,
) -> tuple[Subject, Machine, Measured]:
    # Imported here: the other commands need not wait for the models of transformers.
    from kvtier.cli.bench.machine import describe_machine
    from kvtier.cli.bench.measure import measure
    from kvtier.cli.bench.output import Subject
    from kvtier.cli.bench.places import Places, has_room_for_another
    from kvtier.cli.bench.turns import load_model, text_ids
    from kvtier.platform.mounts import mounted_kind

    console = Console(stderr=True)
    with console.status("loading the model") if console.is_terminal else nullcontext() as status:

        def say(what: str) -> None:
            if status is not None:
                status.update(what)

        where = device_called(device)
        machine = describe_machine(where)
        model = load_model(name, where)
        text = model.config.get_text_config(decoder=True)
        _check_length(text, tokens + new_tokens)
        ids, what = text_ids(name, document, text.vocab_size, tokens + rounds)
        prefix, prompts = _prompts(ids, tokens, rounds)
        notes: list[str] = []
        if new_process and not has_room_for_another(model):
            new_process = False
            notes.append("No new process: the model does not fit into memory twice.")
        with ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvtier-bench-")))
            if mounted_kind(scratch) == "tmpfs":
                notes.append(f"Files in {scratch.parent} are in memory: set TMPDIR to a folder on a drive.")
            say("the first prompt, once for each cache")
            places = Places(model, name, prefix, new_tokens, scratch, stack)
            found = measure(places, prompts, new_process, most_seconds, say)
    subject = Subject(
        model=name,
        model_type=text.model_type,
        dtype=str(model.dtype).removeprefix("torch."),
        prompt_tokens=tokens,
        known_tokens=len(prefix),
        new_tokens=new_tokens,
        text=what,
    )
    return subject, machine, replace(found, notes=(*notes, *found.notes))


def device_called(name: str) -> Any:
    """Return the device ``here``, this machine's accelerator if it has one, or ``cpu``.

    Raises:
        ConfigurationError: it is called otherwise.
    """
    import torch

    if name == "cpu":
        return torch.device("cpu")
    if name != "here":
        raise ConfigurationError(f"--device={name!r:.80} must be here or cpu; kvtier plan predicts other devices.")
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found if found is not None else torch.device("cpu")


def _check_length(config: Any, tokens: int) -> None:
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and tokens > longest:
        raise ConfigurationError(
            f"--tokens and --new-tokens are {tokens:,} in all, but the model is made for {longest:,}; pass fewer."
        )


def _prompts(ids: tuple[int, ...], tokens: int, rounds: int) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Return the prefix, and prompts that go on after it, each with another token."""
    prefix = ids[: tokens - _TAIL_TOKENS]
    different = list(dict.fromkeys(ids))
    if len(different) < rounds:
        raise ConfigurationError(
            f"--rounds={rounds}: the text has only {len(different)} different tokens; pass fewer, or another text."
        )
    tail = ids[len(prefix) : tokens - 1]
    return prefix, [(*prefix, first, *tail) for first in different[:rounds]]


def _write(subject: Subject, machine: Machine, found: Measured, output: Path | None, as_json: bool) -> None:
    from kvtier.cli.bench import output as written
    from kvtier.plots import HOW_TO_DRAW

    text = json.dumps(written.as_json(subject, machine, found), indent=1) + "\n"
    if as_json:
        sys.stdout.write(text)
    else:
        written.print_measured(make_console(), subject, machine, found)
    if output is None:
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "bench.json").write_text(text, encoding="utf-8")
        drawn = written.draw(subject, machine, found, output / "bench.png")
    except OSError as error:
        raise ConfigurationError(
            f"--output={str(output)!r:.200} cannot be written: {error}; name another folder."
        ) from error
    typer.echo(f"{output / 'bench.json'}" + (f", {output / 'bench.png'}" if drawn else f" ({HOW_TO_DRAW})"), err=True)
