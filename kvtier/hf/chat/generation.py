"""Generation: answers the messages of a chat, and computes what its next prompt will show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from kvtier.errors import ConfigurationError
from kvtier.hf.cache import TieredCache
from kvtier.hf.chat.answer import AnswerControl, run_answer
from kvtier.hf.chat.prompt import History
from kvtier.hf.chat.report import ChatReport, chat_report
from kvtier.hf.chat.template import PARTIAL, ChatTemplate, text_of
from kvtier.hf.compat.names import passed


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer that is now a message.

    Attributes:
        text: its text.
        error: the exception that ended it before its end; None for none.
        report: the report of the turn; None where the cache has none.
        next_lost_tokens: how many tokens the next prompt will show otherwise.
    """

    text: str
    error: BaseException | None
    report: ChatReport | None
    next_lost_tokens: int


@dataclass(frozen=True, slots=True)
class Generation:
    """The model of a chat, and all that its calls of ``generate`` need besides the messages.

    Attributes:
        model: the model.
        cache: the cache.
        template: the chat template.
        settings: arguments of ``generate`` for all answers.
        rewarm: compute after an answer what the next prompt will show otherwise.
    """

    model: PreTrainedModel
    cache: TieredCache
    template: ChatTemplate
    settings: Mapping[str, Any]
    rewarm: bool

    def answer(
        self,
        history: History,
        change: Callable[[], None],
        streamer: BaseStreamer | None,
        settings: Mapping[str, Any],
        control: AnswerControl,
    ) -> Answered:
        """Answer the messages of ``history`` after a ``change`` of them, which is undone when there is no answer.

        Raises:
            PromptError: the template refuses these messages.
        """
        with history.restored_on_error():
            change()
            prompt = history.prompter.next(history.messages)
            run = partial(run_answer, self.model, prompt.inputs, self.cache, {**self.settings, **settings})
            answer = run(self.template.tokenizer, streamer, control)
            if answer.error is not None and not answer.ids:
                raise answer.error
            turn = self.cache.last_turn
            message = history.prompter.answered(prompt, answer.ids)
        history.messages.append({**message, PARTIAL: True} if answer.is_partial else message)
        next_lost, reason = history.prompter.preview(history.messages)
        report = chat_report(turn, prompt.lost_tokens, next_lost, reason or prompt.lost_reason) if turn else None
        return Answered(text_of(message), answer.error, report, next_lost)

    def warm(self, history: History) -> ChatReport | None:
        """Compute what the next prompt will show before the user's message; return the report of that pass.

        Raises:
            ConfigurationError: there is nothing to compute yet.
        """
        inputs = history.prompter.warmed(history.messages)
        if inputs is None:
            raise ConfigurationError("there is nothing to compute before the first message of this chat.")
        self.model.generate(**inputs, **passed(self.cache), max_new_tokens=1, do_sample=False)
        turn = self.cache.last_turn
        return chat_report(turn, 0, 0, None) if turn is not None else None
