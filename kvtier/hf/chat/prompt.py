"""The messages of a conversation, its next prompt as inputs of ``generate``, and what the template rewrites in it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from kvtier.errors import ConfigurationError
from kvtier.hf.chat.template import PARTIAL, ChatTemplate, Message, text_of
from kvtier.hf.chat.transcript import Transcript, common_length


@dataclass(frozen=True, slots=True)
class NextPrompt:
    """A prompt.

    Attributes:
        inputs: arguments of ``generate``: ``input_ids`` and ``attention_mask``, ``[1, tokens]``, and media.
        ids: its token ids.
        transcript: its text with its ids; None for a prompt with media, whose text is not enough to tell its ids.
        lost_tokens: tokens of earlier turns that the template rewrote.
        lost_reason: what it rewrote; None for nothing.
    """

    inputs: Mapping[str, torch.Tensor]
    ids: tuple[int, ...]
    transcript: Transcript | None
    lost_tokens: int
    lost_reason: str | None


class Prompter:
    """Makes the prompts of one conversation, each from the one before.

    Args:
        template: the chat template.
        device: where the inputs of the model are.
        transcript: the conversation so far; empty where only its messages are known.

    Attributes:
        transcript: the text and ids of the conversation up to the last answer.
    """

    def __init__(self, template: ChatTemplate, device: torch.device, transcript: Transcript) -> None:
        self._template = template
        self._device = device
        self.transcript = transcript
        self.ids: tuple[int, ...] = transcript.ids
        self._computed = transcript.ids_without_end
        self._is_edited = False

    def next(self, messages: Sequence[Message]) -> NextPrompt:
        """Return the prompt that asks for an answer to ``messages``.

        Raises:
            PromptError: the template refuses these messages.
        """
        if self._template.has_media(messages):
            return self._with_media(messages)
        text = self._template.prompt(messages)
        transcript, difference = self.transcript.continued(text, self._template.encode)
        ids = transcript.ids
        lost = self._lost(ids)
        return NextPrompt(self._inputs(ids), ids, transcript, lost, difference if lost else None)

    def _with_media(self, messages: Sequence[Message]) -> NextPrompt:
        inputs = {
            name: value.to(self._device) if isinstance(value, torch.Tensor) else value
            for name, value in self._template.media_inputs(messages).items()
        }
        ids = tuple(int(each) for each in inputs["input_ids"][0])
        lost = self._lost(ids)
        reason = "a prompt with media has the ids that the processor makes of the text" if lost else None
        return NextPrompt(inputs, ids, None, lost, reason)

    def _lost(self, ids: Sequence[int]) -> int:
        return 0 if self._is_edited else len(self._computed) - common_length(self._computed, ids)

    def _inputs(self, ids: Sequence[int]) -> dict[str, torch.Tensor]:
        input_ids = torch.tensor([list(ids)], dtype=torch.long, device=self._device)
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}

    def answered(self, prompt: NextPrompt, ids: Sequence[int]) -> Message:
        """Go on with the answer ``ids`` to ``prompt``; return its message."""
        before = prompt.transcript or Transcript()
        segment, message = self._template.answer(ids, before.text)
        self.transcript = before.and_then(segment) if prompt.transcript is not None else Transcript()
        self.ids = (*prompt.ids, *ids)
        self._computed = (*prompt.ids, *segment.without_end.ids)
        self._is_edited = False
        return message

    def edited(self) -> None:
        """Note that messages were changed: what the next prompt no longer shows is not lost by the template."""
        self._is_edited = True

    def forget(self) -> None:
        """Go on with nothing."""
        self.transcript, self.ids, self._computed = Transcript(), (), ()

    def preview(self, messages: Sequence[Message]) -> tuple[int, str | None]:
        """Return how many tokens the next prompt will not show as they are, and what it shows instead."""
        if self._template.has_media(messages):
            return 0, None
        text = self._template.until_next(messages)
        if text is None:
            return 0, None
        transcript, difference = self.transcript.continued(text, self._template.encode)
        lost = self._lost(transcript.ids)
        return lost, difference if lost else None

    def warmed(self, messages: Sequence[Message]) -> Mapping[str, torch.Tensor] | None:
        """Return the inputs of the next prompt, up to the user's message, and take them for computed.

        None where nothing is known of it.
        """
        if self._template.has_media(messages):
            return {
                name: value.to(self._device) if isinstance(value, torch.Tensor) else value
                for name, value in self._template.media_inputs(messages, ask=False).items()
            }
        text = self._template.until_next(messages)
        ids = self.transcript.continued(text, self._template.encode)[0].ids if text and messages else ()
        if not ids:
            return None
        self._computed = ids[:-1]  # the last id may be another one before a message
        return self._inputs(ids)


class History:
    """The messages of a conversation and their prompter, which is told of every change.

    Args:
        messages: the messages so far; copied.
        prompter: makes the prompts of the conversation.

    Attributes:
        messages: the messages; an answer that was stopped has ``"partial": True``.
        prompter: makes the prompts.
    """

    def __init__(self, messages: Sequence[Message], prompter: Prompter) -> None:
        self.messages: list[Message] = _copied([dict(message) for message in messages])
        self.prompter = prompter

    def branch(self) -> History:
        """Return a copy that changes on its own."""
        return History(self.messages, copy.copy(self.prompter))

    def copied_messages(self) -> list[Message]:
        """Return a copy of the messages; images, which may be large, are shared."""
        return [_copied(message) for message in self.messages]

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """Bring the messages back to what they are now if the context raises."""
        before = list(self.messages)
        try:
            yield
        except BaseException:
            self.messages[:] = before
            raise

    def add(self, message: Mapping[str, Any]) -> None:
        """Add a copy of a message.

        Raises:
            ConfigurationError: it has no role.
        """
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ConfigurationError(f"message={message!r:.80} has no role; pass {{'role': …, 'content': …}}.")
        self.messages.append(_copied(dict(message)))

    def edit(self, index: int, content: Any) -> None:
        """Give a message another content, and remove all messages after it.

        Raises:
            ConfigurationError: there is no such message.
        """
        message = self.messages[self._checked(index)]
        changed = {key: value for key, value in message.items() if key != PARTIAL}
        self.messages[index:] = [{**changed, "content": content}]
        self.prompter.edited()

    def remove(self, index: int) -> list[Message]:
        """Remove a message and all messages after it; return them.

        Raises:
            ConfigurationError: there is no such message.
        """
        self._checked(index)
        removed = self.messages[index:]
        del self.messages[index:]
        self.prompter.edited()
        return removed

    def undo(self) -> str:
        """Remove the user's last message and all messages after it; return its text.

        Raises:
            ConfigurationError: the user has said nothing.
        """
        return text_of(self.remove(self._last_of_user())[0])

    def remove_answer(self) -> None:
        """Remove all messages after the user's last one.

        Raises:
            ConfigurationError: the user has said nothing.
        """
        del self.messages[self._last_of_user() + 1 :]
        self.prompter.edited()

    def forget(self) -> None:
        """Go on with nothing."""
        self.messages.clear()
        self.prompter.forget()

    def _checked(self, index: int) -> int:
        if not isinstance(index, int) or not -len(self.messages) <= index < len(self.messages):
            raise ConfigurationError(f"index={index!r}: the chat has {len(self.messages)} messages.")
        return index

    def _last_of_user(self) -> int:
        found = [index for index, message in enumerate(self.messages) if message.get("role") == "user"]
        if not found:
            raise ConfigurationError("the user has said nothing yet; remove() takes back other messages.")
        return found[-1]


def _copied(value: Any) -> Any:
    """Return a copy of the lists and dicts of messages; images, which may be large, are shared."""
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    return [_copied(each) for each in value] if isinstance(value, list) else value
