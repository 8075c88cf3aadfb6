"""Answers at the level of tokens, always greedy and timed: what the demo compares a chat with."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, TextStreamer
from transformers.utils import logging as transformers_logging

from kvtier.hf.chat.prompt import Prompter
from kvtier.hf.chat.template import ChatTemplate, Message
from kvtier.hf.chat.transcript import Transcript
from kvtier.hf.compat.names import passed


def _question(text: str) -> Message:
    return {"role": "user", "content": text}


@dataclass(frozen=True, slots=True)
class Answer:
    """The whole sequence after one call, how much of it is new, and how long the first new token took."""

    sequence: tuple[int, ...]
    prompt_tokens: int
    first_token_seconds: float

    @property
    def new_tokens(self) -> tuple[int, ...]:
        """The generated tokens alone."""
        return self.sequence[self.prompt_tokens :]


class Clock(TextStreamer):
    """Prints an answer as it is made and notes when its first token came."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show
        self._puts = 0
        self.first_token_at: float | None = None

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then one token at a time."""
        self._puts += 1
        if self._puts == 2:  # generate() puts the prompt first
            self.first_token_at = time.perf_counter()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Show a piece of the answer."""
        self._show(text + ("\n" if stream_end else ""))


class ChatModel:
    """A model and its tokenizer, always decoding greedily."""

    def __init__(self, folder: str | Path) -> None:
        transformers_logging.disable_progress_bar()  # it would mix with the answers
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        # The first calls of a process include thread pool setup and kernel selection; no timing here should.
        self.answer(tuple(self.tokenizer("Hello there.").input_ids), DynamicCache(config=self.model.config), 4)
        gc.collect()  # else the garbage of loading would be collected in the middle of a timed turn

    def first_prompt(self, text: str) -> tuple[int, ...]:
        """Return the prompt of a conversation that starts with ``text``."""
        return self._prompter().next([_question(text)]).ids

    def next_prompt(self, text: str, answer: Answer, next_text: str) -> tuple[int, ...]:
        """Return the prompt that continues the ``answer`` to ``text`` when the user says ``next_text``."""
        prompter, messages = self._prompter(), [_question(text)]
        message = prompter.answered(prompter.next(messages), answer.new_tokens)
        return prompter.next([*messages, message, _question(next_text)]).ids

    def _prompter(self) -> Prompter:
        return Prompter(ChatTemplate(self.tokenizer, None, {}), self.model.device, Transcript())

    def answer(
        self, prompt: tuple[int, ...], cache: Any, max_new_tokens: int, show: Callable[[str], None] = lambda _: None
    ) -> Answer:
        """Generate on ``cache``. The clock runs from the call of ``generate()``, so all work of the cache counts."""
        input_ids = torch.tensor([prompt], device=self.model.device)
        clock = Clock(self.tokenizer, show)
        started_at = time.perf_counter()
        sequences = self.model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            **passed(cache),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            streamer=clock,
        )
        assert clock.first_token_at is not None
        return Answer(tuple(sequences[0].tolist()), len(prompt), clock.first_token_at - started_at)


class PlainReference:
    """One transformers ``DynamicCache`` kept through a conversation and fed the same forward calls as another cache.

    The same calls matter: computing a prompt in other chunks selects other kernels, whose last bits differ.
    """

    def __init__(self, chat: ChatModel) -> None:
        self._chat = chat
        self._cache = DynamicCache(config=chat.model.config)

    def answer(self, prompt: tuple[int, ...], cached_tokens: int, max_new_tokens: int) -> Answer:
        """Answer ``prompt`` with exactly its first ``cached_tokens`` tokens taken from the cache."""
        if self._cache.get_seq_length() < cached_tokens:
            # The other cache loaded more from an existing store: compute it here as it was computed there.
            self._chat.answer(prompt, self._cache, 1)
        surplus = self._cache.get_seq_length() - cached_tokens
        if surplus > 0:
            self._cache.crop(-surplus)
        return self._chat.answer(prompt, self._cache, max_new_tokens)

    def cold(self, prompt: tuple[int, ...]) -> float:
        """Return the seconds to the first token of ``prompt`` on a fresh cache."""
        return self._chat.answer(prompt, DynamicCache(config=self._chat.model.config), 1).first_token_seconds
