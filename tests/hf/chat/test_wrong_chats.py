"""Chats that are made, called, copied and left in wrong ways: each error names the argument, and changes nothing."""

from __future__ import annotations

import copy
import operator
import os
import pickle
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from kvtier import Chat, ConfigurationError, PrefixStore, PromptError, StoreError
from kvtier.hf.chat.saved import Conversation
from kvtier.hf.chat.transcript import Segment, Transcript
from tests.support.chats import END, chat_model, chat_tokenizer, plain_answer

SHORT = {"do_sample": False, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def speaker():
    return chat_model()


def chat_on(store, speaker, **arguments):
    return Chat(speaker, chat_tokenizer(), cache=store, **{**SHORT, **arguments})


@pytest.fixture
def chat(store, speaker):
    return chat_on(store, speaker)


def test_model_and_tokenizer_in_the_wrong_order_are_named(store, speaker):
    for model in (chat_tokenizer(), "a name"):
        with pytest.raises(ConfigurationError, match="pass the model first, then its tokenizer"):
            Chat(model, speaker, cache=store)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"system": 3}, "system is a int, no text"),
        ({"document": Path("report.txt")}, r"document is a \w+Path, no text; of a file, pass path.read_text"),
        ({"document": " \n"}, "document has no text"),
        ({"template": "{{ messages }}"}, "no dict of arguments"),
        ({"template": {"tokenize": True}}, "a chat sets tokenize itself"),
        ({"tools": print}, "tools=.* is no list"),
        ({"tools": "weather"}, "tools='weather' is no list"),
        ({"system": "\ud800"}, "half of a surrogate pair"),
        ({"past_key_values": None}, "past_key_values: a chat passes its own"),
    ],
)
def test_wrong_arguments_of_a_chat_are_named(store, speaker, arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        chat_on(store, speaker, **arguments)


@pytest.mark.parametrize("content", [None, 42, b"x", {"type": "text"}, {"type": "text", "text": 3}, ["a", None]])
def test_content_that_is_no_text_is_shown(chat, content):
    for call in (chat.say, lambda given: chat.stream([given])):
        with pytest.raises(ConfigurationError, match="is no text"):
            call(content)
    assert chat.messages == []


@pytest.mark.parametrize(
    "settings",
    [
        {"input_ids": torch.ones(1, 2, dtype=torch.long)},
        {"inputs": torch.ones(1, 2, dtype=torch.long)},
        {"inputs_embeds": torch.zeros(1, 2, 8)},
        {"attention_mask": torch.ones(1, 2)},
        {"past_key_values": None},
        {"cache": None},
        {"num_return_sequences": 2, "do_sample": True},
        {"num_return_sequences": "2"},
        {"generation_config": GenerationConfig(num_return_sequences=2, do_sample=True)},
        {"stopping_criteria": lambda ids, scores: torch.zeros(1, dtype=torch.bool)},
    ],
)
def test_arguments_of_generate_that_a_chat_sets_itself_are_refused(chat, settings):
    named = next(iter(settings)).replace("generation_config", "num_return_sequences")
    with pytest.raises(ConfigurationError, match=named):
        chat.say("hello", **settings)
    assert chat.messages == []


@pytest.mark.parametrize("index", ["0", None, 1.0, 7])
def test_edit_of_no_message_is_an_error(chat, index):
    chat.say("hello")
    with pytest.raises(ConfigurationError, match="index="):
        chat.edit(index, "x")


def test_message_without_content_is_refused_by_the_template_with_the_reason(chat):
    chat.add({"role": "system"})
    with pytest.raises(PromptError, match="the chat template refuses"):
        chat.say("hello")


def test_messages_share_nothing_with_their_copies(chat):
    added = {"role": "user", "content": "x", "parts": [{"a": 1}]}
    chat.add(added)
    added["parts"][0]["a"] = 2
    chat.messages[0]["parts"].append(3)
    assert chat.messages[0]["parts"] == [{"a": 1}]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copy_is_a_branch(chat, speaker, copied):
    chat.say("hello there")
    with copied(chat) as twin:
        twin.say("left")
        chat.say("right")
        assert [each["content"] for each in twin.messages][2] == "left"
        prompt = chat.tokens[: chat.last_turn.prompt_tokens]
        assert chat.tokens[len(prompt) :] == plain_answer(speaker, prompt, max_new_tokens=6)


def test_pickle_is_refused_with_the_way_to_go(chat):
    with pytest.raises(TypeError, match="cannot be pickled: give it a folder and a name"):
        pickle.dumps(chat)


def test_report_keeps_user_text_to_itself(chat):
    chat.say("hello")
    report = replace(chat.last_turn, lost_reason="a secret")
    assert "secret" not in f"{report!r}{report}{report.to_json()}{report._repr_html_()}"


# --- names ------------------------------------------------------------------------------------------------------------


def test_name_of_a_prefix_is_not_taken_from_it(store, speaker):
    with chat_on(store, speaker) as first:
        first.say("hello there")
        store.name("docs", *first.cache.turns.kept_row(0))
    with pytest.raises(ConfigurationError, match="'docs' is the name of something else already"):
        chat_on(store, speaker, name="docs")


def test_save_as_the_same_name_saves_and_as_no_name_is_an_error(store, speaker):
    chat = chat_on(store, speaker, name="x")
    chat.say("hello")
    chat.save_as("x")
    for name in (None, "", 3):
        with pytest.raises(ConfigurationError, match="cannot be a name"):
            chat.save_as(name)
    assert chat.name == "x"


@pytest.mark.parametrize("block_size", [8, 512])
def test_chat_that_was_forgotten_elsewhere_leaves_nothing_when_it_is_closed(tmp_path, speaker, warned, block_size):
    with PrefixStore(tmp_path, block_size=block_size) as store:
        with chat_on(store, speaker, name="x") as chat:
            chat.say("hello there")
            chat.say("and then?")
            store.forget("x")
        assert (store.names(), store.chats.names(), warned()) == ((), (), [])


def test_closed_store_costs_a_warning_and_no_message(speaker, warned):
    with PrefixStore(block_size=8) as store:
        chat = chat_on(store, speaker, name="x")
        chat.say("hello there")
    assert chat.undo() == "hello there"
    chat.add({"role": "user", "content": "again"})
    assert len(warned()) == 1
    assert [each["content"] for each in chat.messages] == ["again"]
    chat.close()


def test_saved_ids_that_the_model_does_not_have_are_an_error(store, speaker):
    chat = chat_on(store, speaker, name="x")
    chat.say("hello there")
    saved = store.chats.read("x")
    content = Conversation.from_json(saved.content)
    for token in (200, 2**80):
        damaged = replace(content, transcript=Transcript((Segment("a", (token,)),)))
        store.chats.remove("x")
        store.chats.write("x", damaged.to_json(), after=None)
        with pytest.raises(StoreError, match="token ids that the model does not have"):
            chat_on(store, speaker, name="x")


# --- interrupts and streams -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["_history.prompter.preview", "_saved._write", "_saved._name"])
def test_interrupt_while_an_answer_is_saved_loses_nothing_of_it(store, speaker, monkeypatch, step):
    chat = chat_on(store, speaker, name="x")
    part, _, method = step.rpartition(".")
    owner = operator.attrgetter(part)(chat)
    original = getattr(owner, method)

    def interrupted(*given):
        os.kill(os.getpid(), signal.SIGINT)
        return original(*given)

    monkeypatch.setattr(owner, method, interrupted)
    with pytest.raises(KeyboardInterrupt):
        chat.say("hello there")
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert [each["role"] for each in chat.messages] == ["user", "assistant"]
    assert "partial" not in chat.messages[-1]
    assert chat_on(store, speaker, name="x").messages == chat.messages
    assert list(store.tokens_of("x")) == chat.tokens[: len(store.tokens_of("x"))]


def test_answer_that_cannot_be_read_takes_the_question_back(chat, monkeypatch):
    def failing(*_):
        raise ValueError("no such token")

    monkeypatch.setattr(chat._generation.template, "answer", failing)
    with pytest.raises(ValueError, match="no such token"):
        chat.say("hello")
    assert chat.messages == []
    monkeypatch.undo()
    chat.say("hello")


def test_stream_that_its_own_thread_collects_stops(store, speaker):
    closed = []

    def collect(ids, scores):
        if ids.shape[1] > 30 and not closed:
            closed.append(pieces.close())
        return torch.zeros(1, dtype=torch.bool)

    chat = chat_on(store, speaker, max_new_tokens=200, suppress_tokens=[END])
    pieces = chat.stream("hello", stopping_criteria=[collect])
    next(pieces)
    while chat._calls.is_busy:
        pass
    assert closed == [None]
    assert chat.messages[-1]["partial"]
