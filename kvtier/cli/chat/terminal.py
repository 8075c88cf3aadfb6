"""Terminal: questions from standard input, answers to standard output, and everything else to standard error."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from kvtier.cli.store.output import is_shown, make_console, print_line
from kvtier.errors import KvtierError
from kvtier.hf.chat.template import text_of

if TYPE_CHECKING:
    from kvtier.hf.chat.conversation import Chat

_HELP = """\
/undo           take the last question and its answer back
/retry          answer the last question again
/edit TEXT      ask TEXT instead of the last question; /edit N TEXT instead of question N
/branch NAME    go on in a copy called NAME; this chat stays as it is
/save NAME      keep this chat as NAME from now on
/report         what the last turn reused, computed and lost
/help           this list
/quit           end, as Ctrl-D does
A line that ends with \\ goes on in the next one."""
_SHOWN_AT_RESUME = 400  # characters of the last message


class Terminal:
    """A conversation at the terminal, or with the lines of a pipe.

    Args:
        chat: the chat.
        is_interactive: whether a person types the questions.
    """

    def __init__(self, chat: Chat, *, is_interactive: bool) -> None:
        self._chat = chat
        self._is_interactive = is_interactive
        self._notes = make_console(stderr=True)
        self._branches: list[Chat] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "/undo": self._undo,
            "/retry": lambda _: self._answer(self._chat.retry),
            "/edit": self._edit,
            "/branch": self._branch,
            "/save": self._save,
            "/report": lambda _: self._report(),
            "/help": lambda _: self._note(_HELP),
        }

    def run(self) -> None:
        """Ask and answer until the input ends."""
        try:
            if self._is_interactive:
                with suppress(ImportError):
                    import readline  # noqa: F401  (arrow keys and a history)
                self._greet()
            while (line := self._line()) is not None:
                if line.split(maxsplit=1)[:1] == ["/quit"]:
                    break
                if line.strip():
                    self._do(line)
        finally:
            for branch in self._branches:
                branch.close()

    def _greet(self) -> None:
        messages = self._chat.messages
        if not messages:
            self._note("Ctrl-C stops an answer, Ctrl-D ends; /help lists commands.")
            return
        self._note(f"{len(messages)} messages, {len(self._chat.tokens)} tokens so far. The last one:")
        self._note(text_of(messages[-1])[-_SHOWN_AT_RESUME:])

    def _line(self) -> str | None:
        """Return the next question; None when there is none."""
        parts: list[str] = []
        while True:
            try:
                line = input("" if not self._is_interactive else "… " if parts else "> ")
            except UnicodeDecodeError as error:
                self._note(f"a line is left out: it is no text in {error.encoding}", style="red")
                return ""
            except EOFError:
                if self._is_interactive:
                    self._note("")
                return "\n".join(parts) if parts else None
            except KeyboardInterrupt:  # at the prompt: begin the line again
                self._note("")
                return ""
            if not line.endswith("\\"):
                return "\n".join([*parts, line])
            parts.append(line[:-1])

    def _do(self, line: str) -> None:
        """Run a command, or ask a question; failures are told, and the conversation goes on."""
        word, _, rest = line.partition(" ")
        try:
            if word in self._commands:
                self._commands[word](rest.strip())
            elif line.startswith("/"):
                self._note(f"there is no command {word}; /help lists them")
            else:
                self._answer(lambda **how: self._chat.say(line, **how))
        except KvtierError as error:
            self._note(str(error), style="red")
        except OSError:  # of standard output, whose reader has gone
            raise
        except Exception as error:  # of transformers or torch: too long a prompt, too little memory
            self._note(f"{type(error).__name__}: {error}", style="red")

    def _answer(self, ask: Callable[..., str]) -> None:
        before = self._chat.messages
        try:
            ask(stream=_show)
        except KeyboardInterrupt:
            _show("\n")
            is_kept = self._chat.messages != before
            self._note("stopped" if is_kept else "stopped before the answer began; nothing was added")
            return
        _show("\n")
        self._report()

    def _undo(self, _: str) -> None:
        self._note(f"taken back: {self._chat.undo()}")

    def _edit(self, rest: str) -> None:
        number, _, text = rest.partition(" ")
        questions = [i for i, message in enumerate(self._chat.messages) if message["role"] == "user"]
        if not re.fullmatch("[0-9]{1,9}", number) or not text:
            number, text = str(len(questions)), rest
        if not text or not 1 <= int(number) <= len(questions):
            self._note(f"/edit TEXT, or /edit N TEXT with N from 1 to {len(questions)}")
            return
        self._chat.edit(questions[int(number) - 1], text)
        self._answer(self._chat.reply)

    def _branch(self, name: str) -> None:
        self._chat = self._chat.branch(name or None)
        self._branches.append(self._chat)
        self._note(f"this is now {name or 'a chat without a name, which is not saved'}")

    def _save(self, name: str) -> None:
        if not name:
            self._note("/save NAME")
            return
        self._chat.save_as(name)
        self._note(f"saved as {name}; go on with --resume {name!r}")

    def _report(self) -> None:
        report = self._chat.last_turn
        if report is None:
            self._note("there was no turn yet")
            return
        reason = f": {report.lost_reason}" if report.lost_reason is not None else ""
        self._note(f"{report}{reason}")

    def _note(self, text: str, style: str = "dim") -> None:
        for line in text.split("\n"):
            print_line(self._notes, line, style)


def _show(text: str) -> None:
    """Write a piece of an answer; characters that would control the terminal are replaced."""
    sys.stdout.write("".join(each if each in "\n\t" or is_shown(each) else "\ufffd" for each in text))
    sys.stdout.flush()
