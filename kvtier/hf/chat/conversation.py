"""Chat: a conversation with a model that computes only what is new, and can be resumed by its name."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from kvtier.errors import ConfigurationError
from kvtier.hf.cache import TieredCache
from kvtier.hf.chat.answer import AnswerControl, OneAtATime, iterate, stopped_by_interrupts, streamer_for
from kvtier.hf.chat.arguments import check_model, check_settings
from kvtier.hf.chat.generation import Generation
from kvtier.hf.chat.prompt import History, Prompter
from kvtier.hf.chat.report import ChatReport
from kvtier.hf.chat.resume import begun_or_resumed, identity_of, opening_messages
from kvtier.hf.chat.saved import Conversation, SavedConversation
from kvtier.hf.chat.template import ChatTemplate, Message
from kvtier.store import PrefixStore
from kvtier.store.names import checked_name


def _nothing() -> None:
    """Change no message."""


class Chat:
    """A conversation. Each turn computes only the tokens that the cache does not know.

    Guarantees: a prompt has the text that the chat template gives it, up to white space around answers; earlier answers
    keep the ids that the model generated where the template repeats their text. Messages and tokens are saved after
    each turn, together or not at all, readable by the user alone (0600). A failing disk costs a warning. One answer at
    a time: a second call meanwhile raises ``BusyError``.

    Args:
        model: the model.
        tokenizer: its tokenizer; the processor for a model that takes images.
        cache: a folder, a ``PrefixStore`` or a ``TieredCache``; None: the folder in the environment variable
            ``KVTIER_STORE``, or without it, the process-wide store in RAM.
        name: 1 to 200 printable characters, under which the chat is saved in the store and resumed. None: not saved.
        system: the system message. Templates without one get it in front of the first message.
        document: a text to talk about, at the end of the system message.
        tools: functions or schemas for the template, as ``apply_chat_template`` takes them. Not saved.
        template: further arguments of the chat template, e.g. ``{"enable_thinking": False}``. Not saved.
        on_other_model: for a saved chat with another model: ``"refuse"`` raises; ``"render"`` goes on from its
            messages, which are rendered and computed again.
        rewarm: after an answer, compute at once what the next prompt will show otherwise (see ``warm``).
        pin: never evict K and V of the chat.
        ttl: seconds after its last use at which a saved chat is forgotten, pinned or not.
        settings: arguments of ``generate`` for all answers, e.g. ``max_new_tokens``; by default at most 512 new tokens.

    Raises:
        ConfigurationError: an argument cannot be used, or the saved chat has another system message or another model.
        StoreError: the folder cannot be used, or the saved chat cannot be read.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        cache: str | os.PathLike[str] | PrefixStore | TieredCache | None = None,
        name: str | None = None,
        system: str | None = None,
        document: str | None = None,
        tools: Sequence[Any] | None = None,
        template: Mapping[str, Any] | None = None,
        on_other_model: str = "refuse",
        rewarm: bool = False,
        pin: bool = False,
        ttl: float | None = None,
        **settings: Any,
    ) -> None:
        if on_other_model not in ("refuse", "render"):
            raise ConfigurationError(f"on_other_model={on_other_model!r} is unknown; pass 'refuse' or 'render'.")
        check_model(model)
        check_settings(settings)
        chat_template = ChatTemplate(tokenizer, tools, template or {})
        is_own = not isinstance(cache, TieredCache)
        used = cache if isinstance(cache, TieredCache) else TieredCache(cache, tokenizer=chat_template.tokenizer)
        try:
            saved = SavedConversation(used, name, pin, ttl)
            identity = identity_of(model, used, chat_template.tokenizer)
            opening = opening_messages(chat_template, system, document)
            conversation = begun_or_resumed(saved, opening, identity, on_other_model)
        except BaseException:
            if is_own:
                used.close()
            raise
        generation = Generation(model, used, chat_template, settings, rewarm)
        history = History(conversation.messages, Prompter(chat_template, model.device, conversation.transcript))
        self._consist_of(generation, history, saved, conversation, is_own)

    def _consist_of(
        self,
        generation: Generation,
        history: History,
        saved: SavedConversation,
        conversation: Conversation,
        is_own_cache: bool,
        last_turn: ChatReport | None = None,
    ) -> None:
        """Take all parts: of a new chat, or of a branch."""
        self._generation = generation
        self._history = history
        self._saved = saved
        self._conversation = conversation  # as it was saved last
        self._is_own_cache = is_own_cache
        self._last_turn = last_turn
        self._calls = OneAtATime()

    # --- what there is ----------------------------------------------------------------------------------------------

    @property
    def model(self) -> PreTrainedModel:
        """The model."""
        return self._generation.model

    @property
    def cache(self) -> TieredCache:
        """The cache."""
        return self._generation.cache

    @property
    def name(self) -> str | None:
        """The name under which the chat is saved; None when it is not saved."""
        return self._saved.name

    @property
    def messages(self) -> list[Message]:
        """A copy of all messages. An answer that was stopped has ``"partial": True``."""
        return self._history.copied_messages()

    @property
    def tokens(self) -> list[int]:
        """The token ids of the conversation up to the last answer; for media, with the placeholders of the model."""
        return list(self._history.prompter.ids)

    @property
    def last_turn(self) -> ChatReport | None:
        """The report of the last turn; None before the first."""
        return self._last_turn

    def __repr__(self) -> str:
        name = f" {self.name!r}" if self.name is not None else ""
        return f"<Chat{name}: {len(self._history.messages)} messages, {len(self.tokens)} tokens>"

    # --- to talk ----------------------------------------------------------------------------------------------------

    def say(self, content: Any, *, stream: bool | Callable[[str], Any] | BaseStreamer = False, **settings: Any) -> str:
        """Say ``content`` as the user, and return the answer's text.

        Ctrl-C stops an answer that has begun; its tokens are kept as a message, and ``KeyboardInterrupt`` is raised.
        Before the first token, the user's message is taken back. So it is with other exceptions.

        Args:
            content: a text; for a processor, or a list of texts, images, paths of images and content parts.
            stream: True to print the answer as it is made; a function of each piece of text; or a streamer.
            settings: arguments of ``generate`` for this answer.

        Raises:
            BusyError: another answer is being made.
            ConfigurationError: an argument cannot be used.
            PromptError: the template refuses these messages.
        """
        return self._turn(self._adding(content), stream, settings, AnswerControl())

    def reply(self, *, stream: bool | Callable[[str], Any] | BaseStreamer = False, **settings: Any) -> str:
        """Answer the messages as they are, e.g. after ``edit`` or ``add``.

        Arguments and errors are those of ``say``.
        """
        return self._turn(_nothing, stream, settings, AnswerControl())

    def retry(self, *, stream: bool | Callable[[str], Any] | BaseStreamer = False, **settings: Any) -> str:
        """Remove what follows the last message of the user, and answer that again, as ``reply`` does.

        Raises:
            ConfigurationError: the user has said nothing.
        """
        return self._turn(self._history.remove_answer, stream, settings, AnswerControl())

    def stream(self, content: Any = None, **settings: Any) -> Iterator[str]:
        """Say ``content`` (None: ``reply``) and yield the answer piece by piece, as a thread makes it.

        The answer begins when its first piece is asked for. Leaving the loop stops the answer after its current token;
        what there is of it is kept as a message. Exceptions are those of ``say``.
        """
        control = AnswerControl()
        change = self._adding(content) if content is not None else _nothing
        return iterate(lambda show: self._turn(change, show, settings, control), control)

    def _adding(self, content: Any) -> Callable[[], None]:
        message = {"role": "user", "content": self._generation.template.content(content)}
        return partial(self._history.add, message)

    def _turn(
        self, change: Callable[[], None], stream: Any, settings: Mapping[str, Any], control: AnswerControl
    ) -> str:
        """Answer the messages after a ``change`` of them, which is undone when there is no answer."""
        check_settings(settings)
        streamer = streamer_for(stream, self._generation.template.tokenizer)
        with self._calls.alone():
            with stopped_by_interrupts(control):
                answered = self._generation.answer(self._history, change, streamer, settings, control)
                self._last_turn = answered.report or self._last_turn
                self._save(after_turn=True)
            if (
                self._generation.rewarm
                and answered.next_lost_tokens
                and answered.error is None
                and not control.interrupts
            ):
                self._last_turn = self._generation.warm(self._history) or self._last_turn
        if answered.error is not None:
            raise answered.error
        if control.interrupts:  # after the last token
            raise KeyboardInterrupt
        return answered.text

    def warm(self) -> ChatReport | None:
        """Compute what the next prompt will show before the user's message, so that its answer begins at once.

        Of use after ``system=`` or ``document=``, after ``edit``, and where ``last_turn.next_lost_tokens`` says that
        the template has rewritten an answer. Returns the report of that pass.

        Raises:
            BusyError: an answer is being made.
            ConfigurationError: there is nothing to compute yet.
        """
        with self._calls.alone():
            self._last_turn = self._generation.warm(self._history) or self._last_turn
            self._save(after_turn=True)
            return self._last_turn

    # --- to change it -----------------------------------------------------------------------------------------------

    def add(self, message: Mapping[str, Any]) -> None:
        """Add a message without an answer, e.g. ``{"role": "tool", "content": …}``.

        Raises:
            BusyError: an answer is being made.
            ConfigurationError: it has no role.
        """
        with self._calls.alone():
            self._history.add(message)
            self._save(after_turn=False)

    def edit(self, index: int, content: Any) -> None:
        """Give message ``index`` another content, and remove all messages after it.

        ``reply`` then answers an edited message of the user; only what follows the edit is computed.

        Raises:
            BusyError: an answer is being made.
            ConfigurationError: there is no such message.
        """
        with self._calls.alone():
            self._history.edit(index, self._generation.template.content(content))
            self._save(after_turn=False)

    def remove(self, index: int = -1) -> list[Message]:
        """Remove message ``index`` and all messages after it; return them.

        Of use after ``add``, where the template refuses the message.

        Raises:
            BusyError: an answer is being made.
            ConfigurationError: there is no such message.
        """
        with self._calls.alone():
            removed = self._history.remove(index)
            self._save(after_turn=False)
        return removed

    def undo(self) -> str:
        """Remove the user's last message and everything after it; return its text.

        Raises:
            BusyError: an answer is being made.
            ConfigurationError: the user has said nothing.
        """
        with self._calls.alone():
            text = self._history.undo()
            self._save(after_turn=False)
        return text

    def branch(self, name: str | None = None) -> Chat:
        """Return a second chat with the same messages, which shares what is computed; both then go their own way.

        Args:
            name: the name under which the branch is saved; None to save nothing.

        Raises:
            BusyError: an answer is being made.
            ConfigurationError: ``name`` cannot be used, or is the name of something else.
        """
        with self._calls.alone():
            cache = self.cache.fork()
            try:
                saved = self._saved.branch(cache, name)
            except BaseException:
                cache.close()
                raise
            twin = object.__new__(type(self))
            twin._consist_of(
                replace(self._generation, cache=cache),
                self._history.branch(),
                saved,
                replace(self._conversation, created_at=time.time()),
                is_own_cache=True,
                last_turn=self._last_turn,
            )
            for attribute, value in vars(self).items():  # of a subclass
                vars(twin).setdefault(attribute, value)
            twin._save(after_turn=False)
        return twin

    def __copy__(self) -> Chat:
        """Do as ``branch`` does."""
        return self.branch()

    def __deepcopy__(self, memo: dict[int, Any]) -> Chat:
        """Do as ``branch`` does."""
        return self.branch()

    def __reduce__(self) -> Any:
        """Refuse to be pickled, with a ``TypeError``."""
        raise TypeError(
            "a Chat cannot be pickled: give it a folder and a name, Chat(…, cache=folder, name=…), close it, and make "
            "the same Chat in the other process"
        )

    # --- to keep it -------------------------------------------------------------------------------------------------

    def _save(self, *, after_turn: bool) -> None:
        messages, transcript = self._history.messages, self._history.prompter.transcript
        self._conversation = replace(self._conversation, messages=messages, transcript=transcript)
        self._saved.save(self._conversation, after_turn=after_turn)

    def save_as(self, name: str) -> None:
        """Save the chat under ``name`` from now on; what is saved under an earlier name stays as it is.

        Raises:
            BusyError: an answer is being made.
            ConfigurationError: ``name`` cannot be used, or is the name of something else.
        """
        with self._calls.alone():
            if checked_name(name) != self.name:
                self._saved = self._saved.branch(self.cache, name)
            self._save(after_turn=self._last_turn is not None)
            self._saved.close()

    def forget(self) -> None:
        """Forget the conversation: its messages, its saved form, and its K and V in the store.

        Raises:
            BusyError: an answer is being made.
            StoreError: the disk fails.
        """
        with self._calls.alone():
            self._history.forget()
            self.cache.reset()
            self._saved.forget()

    def close(self) -> None:
        """Write what is queued, and release the cache if the chat has made it. May be called more than once."""
        self._saved.close()
        if self._is_own_cache:
            self.cache.close()

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
