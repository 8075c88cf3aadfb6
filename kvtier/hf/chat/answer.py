"""One answer of a model: its streamers, its interruption, the tokens that there are when it ends, one at a time."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList, TextStreamer
from transformers.generation.streamers import BaseStreamer

from kvtier.errors import BusyError, ConfigurationError
from kvtier.hf.compat.names import passed

DEFAULT_NEW_TOKENS = 512
_LENGTHS = ("max_new_tokens", "max_length", "generation_config", "max_time")
_PIECES_END = None

Show = Callable[[str], Any]


class AnswerControl(StoppingCriteria):
    """Notes the tokens of a running answer, and can stop it after its current token. Thread-safe."""

    def __init__(self) -> None:
        self._sequences: torch.Tensor | None = None
        self._stop = threading.Event()
        self.interrupts = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Note ``input_ids [rows, columns]``; return ``[rows]``, true when the answer must stop."""
        self._sequences = input_ids
        return torch.full((len(input_ids),), self._stop.is_set(), dtype=torch.bool, device=input_ids.device)

    def stop(self) -> None:
        """Stop the answer after its current token."""
        self._stop.set()

    @property
    def stopped(self) -> bool:
        """Whether the answer was stopped."""
        return self._stop.is_set()

    def interrupt(self, signum: int, frame: Any) -> None:
        """Handle Ctrl-C: stop the answer after its current token, so that all its tokens are kept.

        Raises:
            KeyboardInterrupt: there is no token yet, or this is not the first time.
        """
        self.interrupts += 1
        if self._sequences is None or self.interrupts > 1:
            raise KeyboardInterrupt
        self.stop()

    def new_ids(self, prompt_columns: int) -> list[int]:
        """Return the tokens of the answer so far; none of beams, which have no one answer before they end."""
        if self._sequences is None or len(self._sequences) != 1:
            return []
        return [int(each) for each in self._sequences[0, prompt_columns:]]


@dataclass(frozen=True, slots=True)
class Answer:
    """The generated ids, and the exception that ended the answer before its end, if there was one."""

    ids: tuple[int, ...]
    error: BaseException | None
    is_partial: bool


def run_answer(
    model: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor],
    cache: Any,
    arguments: Mapping[str, Any],
    tokenizer: Any,
    streamer: BaseStreamer | None,
    control: AnswerControl,
) -> Answer:
    """Generate an answer to ``inputs``, whose ``input_ids`` are ``[1, columns]``. Exceptions are returned."""
    columns = inputs["input_ids"].shape[1]
    settings = dict(arguments)
    if not any(settings.get(name) is not None for name in _LENGTHS) and model.generation_config.max_new_tokens is None:
        settings["max_new_tokens"] = DEFAULT_NEW_TOKENS
    if settings.get("stop_strings"):
        settings.setdefault("tokenizer", tokenizer)
    settings["stopping_criteria"] = StoppingCriteriaList([*(settings.pop("stopping_criteria", None) or ()), control])
    if streamer is not None:
        settings["streamer"] = streamer
    try:
        output = model.generate(**inputs, **passed(cache), **settings)
    except BaseException as error:
        return Answer(tuple(control.new_ids(columns)), error, is_partial=True)
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    ids = tuple(int(each) for each in sequences[0, columns:])
    return Answer(ids, KeyboardInterrupt() if control.interrupts else None, is_partial=control.stopped)


@contextlib.contextmanager
def stopped_by_interrupts(control: AnswerControl) -> Iterator[None]:
    """Let Ctrl-C stop the answer between two tokens, in the main thread of a program that leaves the signal to Python.

    After the last token, Ctrl-C is only noted in ``control``, so that the whole answer is kept and saved.
    """
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT) if is_main else None
    if before is not signal.default_int_handler:
        yield
        return
    try:
        signal.signal(signal.SIGINT, control.interrupt)  # within: the first interrupt may come before it returns
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """A call that changes a chat, and its thread."""

    thread: threading.Thread


class OneAtATime:
    """Lets one call at a time change a chat; no call waits for another.

    After a fork, a call of another thread of the parent never ends in the child. Its messages are half changed and its
    cache is in the middle of a turn, so the chat stays refused there, with that reason.
    """

    def __init__(self) -> None:
        self._calls: dict[str, _Call] = {}  # at most one: ``setdefault`` is atomic, and no fork can leave it locked

    @property
    def is_busy(self) -> bool:
        """Whether a call is running."""
        return bool(self._calls)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Refuse other calls within the context.

        Raises:
            BusyError: another call is running.
        """
        mine = _Call(threading.current_thread())
        try:
            running = self._calls.setdefault("running", mine)
            if running is mine:
                yield
            elif running.thread in threading.enumerate():
                raise BusyError(
                    "this chat is making an answer; wait for it; for answers at the same time, use branch() before"
                )
            else:
                raise BusyError(
                    "this chat was making an answer on another thread when this process was forked; make a new Chat "
                    "here, e.g. of the same store and name"
                )
        finally:
            if self._calls.get("running") is mine:
                del self._calls["running"]


# --- streams ----------------------------------------------------------------------------------------------------------


class _Pieces(TextStreamer):
    """Calls ``show`` with each piece of the text."""

    def __init__(self, tokenizer: Any, show: Show) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._show(text)


def streamer_for(stream: Any, tokenizer: Any) -> BaseStreamer | None:
    """Return the streamer for ``stream``: a streamer, a function of text, True to print, or False.

    Raises:
        ConfigurationError: it is none of these.
    """
    if isinstance(stream, bool) or stream is None:
        return _Printed(tokenizer) if stream else None
    if isinstance(stream, BaseStreamer):
        return stream
    if callable(stream):
        return _Pieces(tokenizer, stream)
    raise ConfigurationError(f"stream={stream!r:.80} is neither True, nor a function of text, nor a streamer.")


class _Printed(_Pieces):
    """Prints the text to standard output, and a line end after it."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, self._print)

    @staticmethod
    def _print(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def end(self) -> None:
        super().end()
        self._print("\n")


def iterate(say: Callable[[Show], object], control: AnswerControl) -> Iterator[str]:
    """Yield the pieces of text that ``say`` shows, which runs on a thread of its own until this iterator is closed.

    An exception of ``say`` is raised after the last piece. Closing stops the answer after its current token, and waits.
    """
    pieces: SimpleQueue[str | None] = SimpleQueue()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            say(pieces.put)
        except BaseException as error:
            errors.append(error)
        finally:
            pieces.put(_PIECES_END)

    thread = threading.Thread(target=run, name="kvtier-chat")
    thread.start()
    try:
        while (piece := pieces.get()) is not _PIECES_END:
            yield piece
    except BaseException:  # closed, or interrupted: the answer so far is kept
        control.stop()
        raise
    finally:
        if thread is not threading.current_thread():  # which may collect this iterator as garbage
            thread.join()
    if errors:
        raise errors[0]
