"""ChatTemplate: messages → the text, token ids or media inputs of a prompt, by a tokenizer or a processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kvtier.errors import ConfigurationError, PromptError
from kvtier.hf.chat.arguments import check_template
from kvtier.hf.chat.transcript import Segment
from kvtier.hf.compat.names import parsed_answer

Message = dict[str, Any]
PARTIAL = "partial"
"""Key of a message that was not finished; no template sees it."""

# Stands for the next message while a template is rendered up to it.
_NEXT = "\N{OBJECT REPLACEMENT CHARACTER}next message\N{OBJECT REPLACEMENT CHARACTER}"


class ChatTemplate:
    """The chat template of a tokenizer, or of a processor for models that see or hear.

    Args:
        tokenizer: the tokenizer or processor.
        tools: functions or schemas, as ``apply_chat_template`` takes them.
        arguments: further arguments for the template, e.g. ``enable_thinking``.

    Attributes:
        tokenizer: the tokenizer, also where a processor was given.

    Raises:
        ConfigurationError: there is no chat template, or its arguments cannot be used.
    """

    def __init__(self, tokenizer: Any, tools: Sequence[Any] | None, arguments: Mapping[str, Any]) -> None:
        check_template(tools, arguments)
        inner = getattr(tokenizer, "tokenizer", None)
        self._processor = tokenizer if inner is not None else None
        self._owner = tokenizer
        self.tokenizer: Any = tokenizer if inner is None else inner
        self._arguments = {**arguments, **({"tools": list(tools)} if tools else {})}
        self._folds_system = False
        if not hasattr(tokenizer, "apply_chat_template") or not (
            getattr(tokenizer, "chat_template", None) or arguments.get("chat_template")
        ):
            raise ConfigurationError(
                f"tokenizer={type(tokenizer).__name__} has no chat template: the model was not made to chat. Use its "
                "instruct version, set tokenizer.chat_template, or call model.generate() with a TieredCache"
            )

    # --- contents ---------------------------------------------------------------------------------------------------

    def content(self, given: Any) -> Any:
        """Return the content of a message from a text, or a list of texts, images and content parts.

        Raises:
            ConfigurationError: it is no text, and there is no processor to see or hear it, or no Unicode text.
        """
        given = given if isinstance(given, (list, tuple)) else [given]
        if self._processor is not None:
            return [_part(each) for each in given]
        return "".join(_text(each) for each in given)

    def has_media(self, messages: Sequence[Message]) -> bool:
        """Return whether images, sounds or videos are among the messages."""
        contents = [message.get("content") for message in messages]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        return any(isinstance(part, dict) and part.get("type") != "text" for part in parts)

    # --- texts ------------------------------------------------------------------------------------------------------

    def prompt(self, messages: Sequence[Message]) -> str:
        """Return the text of the prompt that asks for an answer to ``messages``.

        Raises:
            PromptError: the template refuses these messages.
        """
        return str(self._apply(messages, tokenize=False, add_generation_prompt=True))

    def until_next(self, messages: Sequence[Message]) -> str | None:
        """Return what the prompt will show before the content of the user's next message; None if that is unknown."""
        following = {"role": "user", "content": self.content(_NEXT)}
        try:
            text = self.prompt([*messages, following])
        except PromptError:
            return None
        before, found, _ = text.rpartition(_NEXT)
        return before if found else None

    def _apply(self, messages: Sequence[Message], **how: Any) -> Any:
        """Apply the template. A system message that it refuses goes to the front of the first user message."""
        shown = [{key: value for key, value in each.items() if key != PARTIAL} for each in messages]
        folded = self._folded(shown)
        try:
            return self._owner.apply_chat_template(folded if self._folds_system else shown, **how, **self._arguments)
        except Exception as error:  # whatever a template raises
            if folded is not shown and not self._folds_system:
                try:
                    rendered = self._owner.apply_chat_template(folded, **how, **self._arguments)
                except Exception:
                    raise _refused(error) from error
                self._folds_system = True  # from now on, so that all prompts of the conversation agree
                return rendered
            raise _refused(error) from error

    def _folded(self, messages: list[Message]) -> list[Message]:
        if [message.get("role") for message in messages[:2]] != ["system", "user"]:
            return messages
        if not all("content" in message for message in messages[:2]):
            return messages  # the template tells
        system, first = messages[0]["content"], messages[1]["content"]
        if isinstance(system, str) and isinstance(first, str):
            both: Any = f"{system}\n\n{first}"
        else:
            both = [*self._parts(system), {"type": "text", "text": "\n\n"}, *self._parts(first)]
        return [{**messages[1], "content": both}, *messages[2:]]

    @staticmethod
    def _parts(content: Any) -> list[Any]:
        return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)

    # --- ids --------------------------------------------------------------------------------------------------------

    def encode(self, text: str, start: int = 0) -> tuple[int, ...]:
        """Return the ids of ``text[start:]`` as they are within ``text``.

        Encoded alone, a text may begin with other ids: some tokenizers put a space before it.
        """
        rest = text[start:]
        is_whole = not start or rest.startswith(tuple(self.tokenizer.get_added_vocab()))
        if not is_whole and getattr(self.tokenizer, "is_fast", False):
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            spans = encoded["offset_mapping"]
            for i, (begin, _) in enumerate(spans):
                if begin == start and (not i or spans[i - 1][1] <= start):
                    return tuple(encoded["input_ids"][i:])
        return tuple(self.tokenizer(rest, add_special_tokens=False, verbose=False)["input_ids"])

    def media_inputs(self, messages: Sequence[Message], *, ask: bool = True) -> dict[str, torch.Tensor]:
        """Return the inputs of a prompt with media, for ``generate``: ``input_ids [1, tokens]`` and what goes with it.

        Raises:
            PromptError: the template or the processor refuses these messages.
        """
        how = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": ask}
        return dict(self._apply(messages, **how))

    # --- answers ----------------------------------------------------------------------------------------------------

    def answer(self, ids: Sequence[int], prompt: str) -> tuple[Segment, Message]:
        """Return the segment and the message of generated ``ids`` after the text ``prompt``."""
        special = set(self.tokenizer.all_special_ids)
        kept = len(ids)
        while kept and ids[kept - 1] in special:
            kept -= 1
        text, ended = self._decoded(ids), self._decoded(ids[:kept])
        plain = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        message = parsed_answer(self._owner, text, prompt) or {"content": plain}
        if isinstance(message.get("content"), str) and self._processor is not None:
            message["content"] = self.content(message["content"])
        return Segment(text, tuple(ids), ended, kept), {"role": "assistant", **message}

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _part(given: Any) -> Message:
    if given is None:
        raise ConfigurationError("content=None is no content; pass a text, or a list of texts and images.")
    if isinstance(given, str):
        return {"type": "text", "text": _unicode(given)}
    if isinstance(given, Mapping):
        return dict(given)
    if hasattr(given, "__fspath__"):
        return {"type": "image", "path": str(given)}
    return {"type": "image", "image": given}


def _text(given: Any) -> str:
    """Return a text, or that of a text part."""
    text = given.get("text") if isinstance(given, Mapping) and given.get("type") == "text" else given
    if not isinstance(text, str):
        raise ConfigurationError(
            f"content={given!r:.80} is no text. A tokenizer takes no images or sounds; for these, pass the model's "
            "processor to Chat."
        )
    return _unicode(text)


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigurationError(
            f"content: character {error.start} is half of a surrogate pair, which no tokenizer takes; decode the text "
            "with errors='replace'."
        ) from error
    return text


def _refused(error: Exception) -> PromptError:
    said = str(error).strip().partition("\n")[0] or type(error).__name__
    return PromptError(f"the chat template refuses these messages: {said}")


def text_of(message: Message) -> str:
    """Return the text of a message, without its media."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""
