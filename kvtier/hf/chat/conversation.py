"""Chat: a conversation with a model that computes only what is new, and can be resumed by its name."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from kvtier.errors import BusyError, ConfigurationError, StoreError
from kvtier.hf.cache import TieredCache
from kvtier.hf.chat.answer import Answer, AnswerControl, iterate, run_answer, stopped_by_interrupts, streamer_for
from kvtier.hf.chat.arguments import check_model, check_settings, opening_text
from kvtier.hf.chat.prompt import Prompter
from kvtier.hf.chat.report import ChatReport, chat_report
from kvtier.hf.chat.saved import Conversation, SavedConversation
from kvtier.hf.chat.template import PARTIAL, ChatTemplate, Message, text_of
from kvtier.hf.compat.names import passed
from kvtier.hf.not_reusable import NotReusable
from kvtier.hf.turn.exclusive_use import exclusively
from kvtier.store import PrefixStore
from kvtier.store.names import checked_name


def _copied(value: Any) -> Any:
    """Return a copy of the lists and dicts of messages; images, which may be large, are shared."""
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    return [_copied(each) for each in value] if isinstance(value, list) else value


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

    Attributes:
        model: the model.
        cache: the cache.

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
        self._template = ChatTemplate(tokenizer, tools, template or {})
        self.model = model
        self._is_own_cache = not isinstance(cache, TieredCache)
        self.cache = cache if isinstance(cache, TieredCache) else TieredCache(cache, tokenizer=self._template.tokenizer)
        self._settings, self._rewarm = settings, rewarm
        self._answering = threading.Lock()
        self._last_turn: ChatReport | None = None
        try:
            self._saved = SavedConversation(self.cache, name, pin, ttl)
            self._identify()
            opening = self._opening(system, document)
            found = self._saved.load()
            self._conversation = found or Conversation(opening, model=self._model, root=self._root)
            if found is not None:
                self._check_resumed(found, opening, on_other_model)
        except BaseException:
            self.close()
            raise
        self._messages: list[Message] = [dict(message) for message in self._conversation.messages]
        self._prompter = Prompter(self._template, model.device, self._conversation.transcript)

    def _opening(self, system: str | None, document: str | None) -> list[Message]:
        text = opening_text(system, document)
        return [] if text is None else [{"role": "system", "content": self._template.content(text)}]

    def _identify(self) -> None:
        turns = self.cache.turns
        identity = exclusively(turns, "Chat()", partial(turns.identity_of, self.model))
        config = self.model.config
        self._root = None if isinstance(identity, NotReusable) else identity.root
        manifest = {} if isinstance(identity, NotReusable) else identity.manifest
        self._model: dict[str, Any] = {
            "class": type(self.model).__name__,
            "name": str(getattr(config, "_name_or_path", "")),
            "vocabulary": len(self._template.tokenizer),
            "weights": manifest.get("weights"),
            "adapters": manifest.get("adapters"),
        }

    def _check_resumed(self, found: Conversation, opening: Sequence[Message], on_other_model: str) -> None:
        if opening and list(found.messages[:1]) != list(opening):
            raise ConfigurationError(
                f"the chat {self.name!r:.80} was begun with another system message or document; leave system and "
                "document out to resume it, pass another name, or forget it first (store.forget(name))."
            )
        ours = {key: self._model[key] for key in self._model if key != "name"}
        if {key: found.model.get(key) for key in ours} == ours:
            known = getattr(self.model.config.get_text_config(), "vocab_size", None)
            if isinstance(known, int) and max(found.transcript.ids, default=0) >= known:
                raise StoreError(
                    f"the chat {self.name!r:.80} cannot be resumed: it has token ids that the model does not have; "
                    "forget it, or use another name"
                )
            return
        if on_other_model == "refuse":
            saved = found.model.get("name") or found.model.get("class")
            raise ConfigurationError(
                f"the chat {self.name!r:.80} was held with another model ({saved}): its tokens mean nothing to this "
                "one. Pass that model, another name, or on_other_model='render' to go on from its messages."
            )
        self._conversation = Conversation(found.messages, model=self._model, created_at=found.created_at)

    # --- what there is ----------------------------------------------------------------------------------------------

    @property
    def name(self) -> str | None:
        """The name under which the chat is saved; None when it is not saved."""
        return self._saved.name

    @property
    def messages(self) -> list[Message]:
        """A copy of all messages. An answer that was stopped has ``"partial": True``."""
        return [_copied(message) for message in self._messages]

    @property
    def tokens(self) -> list[int]:
        """The token ids of the conversation up to the last answer; for media, with the placeholders of the model."""
        return list(self._prompter.ids)

    @property
    def last_turn(self) -> ChatReport | None:
        """The report of the last turn; None before the first."""
        return self._last_turn

    def __repr__(self) -> str:
        name = f" {self.name!r}" if self.name is not None else ""
        return f"<Chat{name}: {len(self._messages)} messages, {len(self._prompter.ids)} tokens>"

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

        def without_answer() -> None:
            del self._messages[self._last_of_user() + 1 :]
            self._prompter.edited()

        return self._turn(without_answer, stream, settings, AnswerControl())

    def stream(self, content: Any = None, **settings: Any) -> Iterator[str]:
        """Say ``content`` (None: ``reply``) and yield the answer piece by piece, as a thread makes it.

        The answer begins when its first piece is asked for. Leaving the loop stops the answer after its current token;
        what there is of it is kept as a message. Exceptions are those of ``say``.
        """
        control = AnswerControl()
        change = self._adding(content) if content is not None else _nothing
        return iterate(lambda show: self._turn(change, show, settings, control), control)

    def _adding(self, content: Any) -> Callable[[], None]:
        message = {"role": "user", "content": self._template.content(content)}
        return lambda: self._messages.append(message)

    def _turn(
        self, change: Callable[[], None], stream: Any, settings: Mapping[str, Any], control: AnswerControl
    ) -> str:
        """Answer the messages after a ``change`` of them, which is undone when there is no answer."""
        check_settings(settings)
        streamer = streamer_for(stream, self._template.tokenizer)
        with self._alone():
            with stopped_by_interrupts(control):
                answer, text, next_lost = self._answered(change, streamer, settings, control)
            if self._rewarm and next_lost and answer.error is None and not control.interrupts:
                self._warm()
        if answer.error is not None:
            raise answer.error
        if control.interrupts:  # after the last token
            raise KeyboardInterrupt
        return text

    def _answered(
        self,
        change: Callable[[], None],
        streamer: BaseStreamer | None,
        settings: Mapping[str, Any],
        control: AnswerControl,
    ) -> tuple[Answer, str, int]:
        """Make and save an answer; return it, its text, and how many tokens the next prompt will show otherwise."""
        before = list(self._messages)
        try:
            change()
            prompt = self._prompter.next(self._messages)
            run = partial(run_answer, self.model, prompt.inputs, self.cache, {**self._settings, **settings})
            answer = run(self._template.tokenizer, streamer, control)
            if answer.error is not None and not answer.ids:
                raise answer.error
            turn = self.cache.last_turn
            message = self._prompter.answered(prompt, answer.ids)
        except BaseException:
            self._messages[:] = before
            raise
        self._messages.append({**message, PARTIAL: True} if answer.is_partial else message)
        next_lost, reason = self._prompter.preview(self._messages)
        if turn is not None:
            self._last_turn = chat_report(turn, prompt.lost_tokens, next_lost, reason or prompt.lost_reason)
        self._save(after_turn=True)
        return answer, text_of(message), next_lost

    def warm(self) -> ChatReport | None:
        """Compute what the next prompt will show before the user's message, so that its answer begins at once.

        Of use after ``system=`` or ``document=``, after ``edit``, and where ``last_turn.next_lost_tokens`` says that
        the template has rewritten an answer. Returns the report of that pass.

        Raises:
            BusyError: an answer is being made.
            ConfigurationError: there is nothing to compute yet.
        """
        with self._alone():
            report = self._warm()
            self._save(after_turn=True)
        return report

    def _warm(self) -> ChatReport | None:
        inputs = self._prompter.warmed(self._messages)
        if inputs is None:
            raise ConfigurationError("there is nothing to compute before the first message of this chat.")
        self.model.generate(**inputs, **passed(self.cache), max_new_tokens=1, do_sample=False)
        turn = self.cache.last_turn
        if turn is not None:
            self._last_turn = chat_report(turn, 0, 0, None)
        return self._last_turn

    # --- to change it -----------------------------------------------------------------------------------------------

    def add(self, message: Mapping[str, Any]) -> None:
        """Add a message without an answer, e.g. ``{"role": "tool", "content": …}``.

        Raises:
            BusyError: an answer is being made.
            ConfigurationError: it has no role.
        """
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ConfigurationError(f"message={message!r:.80} has no role; pass {{'role': …, 'content': …}}.")
        with self._alone():
            self._messages.append(_copied(dict(message)))
            self._save(after_turn=False)

    def edit(self, index: int, content: Any) -> None:
        """Give message ``index`` another content, and remove all messages after it.

        ``reply`` then answers an edited message of the user; only what follows the edit is computed.

        Raises:
            BusyError: an answer is being made.
            ConfigurationError: there is no such message.
        """
        with self._alone():
            if not isinstance(index, int) or not -len(self._messages) <= index < len(self._messages):
                raise ConfigurationError(f"index={index!r}: the chat has {len(self._messages)} messages.")
            message = self._messages[index]
            changed = {key: value for key, value in message.items() if key != PARTIAL}
            self._messages[index:] = [{**changed, "content": self._template.content(content)}]
            self._edited()

    def undo(self) -> str:
        """Remove the user's last message and everything after it; return its text.

        Raises:
            BusyError: an answer is being made.
            ConfigurationError: the user has said nothing.
        """
        with self._alone():
            at = self._last_of_user()
            text = text_of(self._messages[at])
            del self._messages[at:]
            self._edited()
        return text

    def _last_of_user(self) -> int:
        found = [index for index, message in enumerate(self._messages) if message.get("role") == "user"]
        if not found:
            raise ConfigurationError("the user has said nothing yet.")
        return found[-1]

    def _edited(self) -> None:
        self._prompter.edited()
        self._save(after_turn=False)

    def branch(self, name: str | None = None) -> Chat:
        """Return a second chat with the same messages, which shares what is computed; both then go their own way.

        Args:
            name: the name under which the branch is saved; None to save nothing.

        Raises:
            BusyError: an answer is being made.
            ConfigurationError: ``name`` cannot be used, or is the name of something else.
        """
        with self._alone():
            twin = object.__new__(type(self))
            vars(twin).update(vars(self))
            twin.cache, twin._is_own_cache = self.cache.fork(), True
            try:
                twin._saved = self._saved.branch(twin.cache, name)
            except BaseException:
                twin.cache.close()
                raise
            twin._answering = threading.Lock()
            twin._messages = _copied(self._messages)
            twin._prompter = copy.copy(self._prompter)
            twin._conversation = replace(self._conversation, created_at=Conversation([]).created_at)
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
        self._conversation = Conversation(
            self._messages, self._prompter.transcript, self._model, self._root, self._conversation.created_at
        )
        self._saved.save(self._conversation, after_turn=after_turn)

    def save_as(self, name: str) -> None:
        """Save the chat under ``name`` from now on; what is saved under an earlier name stays as it is.

        Raises:
            BusyError: an answer is being made.
            ConfigurationError: ``name`` cannot be used, or is the name of something else.
        """
        with self._alone():
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
        with self._alone():
            self._messages.clear()
            self._prompter.forget()
            self.cache.reset()
            self._saved.forget()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._answering.acquire(blocking=False):
            raise BusyError("this chat is making an answer; wait for it, or use branch()")
        try:
            yield
        finally:
            self._answering.release()

    def close(self) -> None:
        """Write what is queued, and release the cache if the chat has made it. May be called more than once."""
        if hasattr(self, "_saved"):  # else a constructor has failed
            self._saved.close()
        if self._is_own_cache:
            self.cache.close()

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
