"""Random conversations: whatever was said, edited, undone, branched or resumed, answers are plain transformers' own."""

from __future__ import annotations

import functools
import tempfile

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from kvtier import Chat, ConfigurationError, PrefixStore
from tests.support.chats import CHATML, END, NO_THOUGHTS, START, TRIMMED, chat_model, chat_tokenizer, plain_answer

TEXTS = st.sampled_from(["hi", "the other thing", " so? ", "\n", "aa</think>b"])
LENGTHS = st.integers(1, 9)
# Letters only: special tokens inside an answer are not in its message.
SETTINGS = {"do_sample": False, "suppress_tokens": [0, START], "eos_token_id": END}


@functools.cache
def speaker():
    return chat_model()


class Conversations(RuleBasedStateMachine):
    """Chats over one folder; beside each chat stand the messages that it must have."""

    @initialize(template=st.sampled_from([CHATML, TRIMMED, NO_THOUGHTS]), on_disk=st.booleans())
    def begin(self, template, on_disk):
        self.template = template
        self.folder = tempfile.TemporaryDirectory() if on_disk else None
        self.store = PrefixStore(self.folder and self.folder.name, block_size=4)
        self.chats, self.expected = {}, {}
        self.open("a")

    def open(self, name):
        self.chats[name] = Chat(speaker(), chat_tokenizer(self.template), cache=self.store, name=name, **SETTINGS)
        self.expected.setdefault(name, [])

    def chat(self, data):
        name = data.draw(st.sampled_from(sorted(self.chats)))
        return name, self.chats[name], self.expected[name]

    def check_answer(self, name, before, text, tokens):
        chat, tokenizer = self.chats[name], chat_tokenizer(self.template)
        prompt = chat.tokens[: chat.last_turn.prompt_tokens]
        assert chat.tokens[len(prompt) :] == plain_answer(speaker(), prompt, max_new_tokens=tokens, **SETTINGS)
        rendered = tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
        shown = tokenizer.decode(prompt)
        if self.template == TRIMMED:  # white space around an answer stays as the model wrote it
            rendered, shown = "".join(rendered.split()), "".join(shown.split())
        assert shown == rendered
        self.expected[name] = [*before, {"role": "assistant", "content": text}]
        assert chat.messages == self.expected[name]

    @rule(data=st.data(), text=TEXTS, tokens=LENGTHS)
    def say(self, data, text, tokens):
        name, chat, messages = self.chat(data)
        answer = chat.say(text, max_new_tokens=tokens)
        self.check_answer(name, [*messages, {"role": "user", "content": text}], answer, tokens)

    @rule(data=st.data(), text=TEXTS, tokens=LENGTHS)
    def stream(self, data, text, tokens):
        name, chat, messages = self.chat(data)
        answer = "".join(chat.stream(text, max_new_tokens=tokens))
        self.check_answer(name, [*messages, {"role": "user", "content": text}], answer, tokens)

    @rule(data=st.data(), tokens=LENGTHS)
    def retry(self, data, tokens):
        name, chat, messages = self.chat(data)
        users = [i for i, message in enumerate(messages) if message["role"] == "user"]
        if not users:
            return
        self.check_answer(name, messages[: users[-1] + 1], chat.retry(max_new_tokens=tokens), tokens)

    @rule(data=st.data(), text=TEXTS)
    def edit(self, data, text):
        name, chat, messages = self.chat(data)
        if messages:
            at = data.draw(st.integers(0, len(messages) - 1))
            chat.edit(at, text)
            self.expected[name] = [*messages[:at], {**messages[at], "content": text}]

    @rule(data=st.data())
    def undo(self, data):
        name, chat, messages = self.chat(data)
        users = [i for i, message in enumerate(messages) if message["role"] == "user"]
        if not users:
            with pytest.raises(ConfigurationError):
                chat.undo()
        else:
            assert chat.undo() == messages[users[-1]]["content"]
            self.expected[name] = messages[: users[-1]]

    @rule(data=st.data())
    def warm(self, data):
        _, chat, messages = self.chat(data)
        if messages:
            chat.warm()

    @precondition(lambda self: len(self.chats) < 3)
    @rule(data=st.data())
    def branch(self, data):
        _, chat, messages = self.chat(data)
        name = "abc"[len(self.chats)]
        self.chats[name] = chat.branch(name)
        self.expected[name] = list(messages)

    @rule(data=st.data())
    def resume(self, data):
        name, chat, messages = self.chat(data)
        chat.close()
        self.open(name)
        assert self.chats[name].messages == messages
        assert self.chats[name].tokens == chat.tokens

    @precondition(lambda self: self.folder is not None)
    @rule()
    def resume_all_from_files(self):
        for chat in self.chats.values():
            chat.close()
        self.store.close()
        self.store = PrefixStore(self.folder.name, block_size=4)
        for name in sorted(self.chats):
            self.open(name)
            assert self.chats[name].messages == self.expected[name]

    def teardown(self):
        if hasattr(self, "chats"):
            for chat in self.chats.values():
                chat.close()
            self.store.close()
            if self.folder is not None:
                self.folder.cleanup()


TestConversations = Conversations.TestCase
TestConversations.settings = settings(stateful_step_count=25)
