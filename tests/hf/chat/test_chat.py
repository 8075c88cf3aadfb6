"""Chat: prompts are those of the template, answers those of plain transformers, and nothing known is computed again."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch
from transformers import TextStreamer

from kvtier import BusyError, Chat, ConfigurationError, PrefixStore, PromptError, TieredCache
from tests.support.chats import CHATML, END, STRICT, TOOLS, chat_model, chat_tokenizer, plain_answer

SHORT = {"do_sample": False, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def speaker():
    return chat_model()


@pytest.fixture
def make(speaker, store):
    def make(chat_template=CHATML, **arguments):
        return Chat(
            speaker, chat_tokenizer(chat_template), cache=arguments.pop("cache", store), **{**SHORT, **arguments}
        )

    return make


@pytest.fixture
def chat(make):
    return make()


def prompt_of(chat):
    return chat.tokens[: chat.last_turn.prompt_tokens]


def assert_as_plain(chat, speaker):
    """The last answer is that of plain transformers, and the prompt has the template's text."""
    prompt = prompt_of(chat)
    assert chat.tokens[len(prompt) :] == plain_answer(speaker, prompt, max_new_tokens=6)
    tokenizer = chat_tokenizer()
    rendered = tokenizer.apply_chat_template(chat.messages[:-1], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(prompt) == rendered


def test_turns_are_those_of_plain_transformers_and_compute_only_the_new_tokens(chat, speaker):
    known = 0
    for text in ("hello there", "and then?", "thanks"):
        answer = chat.say(text)
        assert_as_plain(chat, speaker)
        assert chat.messages[-1] == {"role": "assistant", "content": answer}
        assert chat.last_turn.cached_tokens >= known - 1
        assert chat.last_turn.lost_tokens == chat.last_turn.next_lost_tokens == 0
        known = len(chat.tokens) - 1  # the K and V of the last token are not known
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 3


def test_generated_ids_stay_though_the_tokenizer_would_write_others(make, speaker):
    tokenizer = chat_tokenizer()
    t, h = tokenizer.convert_tokens_to_ids(["t", "h"])
    chat = make(max_new_tokens=2, prefix_allowed_tokens_fn=lambda _, ids: [t if ids[-1] != t else h])
    assert chat.say("one") == "th"
    assert tokenizer("th", add_special_tokens=False).input_ids != [t, h]
    before = chat.tokens
    chat.say("two")
    assert chat.tokens[: len(before)] == before
    assert chat.last_turn.cached_tokens == len(before) - 1


@pytest.mark.parametrize("text", ["end", "cut"])
def test_answer_that_ended_and_answer_that_was_cut_are_continued_alike(make, text):
    tokenizer = chat_tokenizer()
    (a,) = tokenizer("a").input_ids
    script = {"end": [a, END], "cut": [a, a]}[text]
    chat = make(max_new_tokens=2, prefix_allowed_tokens_fn=lambda _, ids: [script[int(ids[-1] == a)]])
    chat.say("one")
    assert chat.tokens[-2:] == script
    chat.say("two")
    shown = "a" if text == "end" else "aa"
    assert f"assistant\n{shown}<|im_end|>\n<|im_start|>user" in tokenizer.decode(prompt_of(chat))


def test_edit_undo_and_retry_compute_only_what_follows(chat, speaker):
    chat.say("hello there")
    chat.say("and then?")
    tokens = chat.tokens
    assert chat.undo() == "and then?"
    assert len(chat.messages) == 2
    chat.say("and then!")
    assert_as_plain(chat, speaker)
    assert chat.last_turn.cached_tokens >= len(tokens) // 2
    assert chat.last_turn.lost_tokens == 0  # the user did that, not the template
    chat.edit(2, "or what?")
    assert [message["content"] for message in chat.messages][2:] == ["or what?"]
    chat.reply()
    assert_as_plain(chat, speaker)
    answer = chat.messages[-1]
    assert chat.retry() == answer["content"]
    assert chat.last_turn.computed_tokens == 1
    chat.edit(1, "my own words")
    chat.say("so?")
    assert_as_plain(chat, speaker)


def test_failed_retry_keeps_the_answer(chat):
    chat.say("hello")
    with pytest.raises(ValueError, match="max_new_tokens"):
        chat.retry(max_new_tokens=0)
    assert len(chat.messages) == 2


def test_branch_goes_its_own_way_and_shares_what_is_known(chat, speaker):
    chat.say("hello there")
    with chat.branch() as branch:
        branch.say("left")
        chat.say("right")
        branch.say("more")
        assert_as_plain(branch, speaker)
        assert branch.last_turn.cached_tokens > 10
    assert_as_plain(chat, speaker)
    assert [message["content"] for message in chat.messages][2] == "right"
    assert len(branch.messages) == 6


def test_messages_are_a_copy(chat):
    chat.say("hello")
    chat.messages[0]["content"] = "changed"
    chat.messages.clear()
    assert chat.messages[0]["content"] == "hello"


# --- streams and interrupts -------------------------------------------------------------------------------------------


def test_answer_is_printed_shown_put_or_iterated(chat, capsys):
    tokenizer = chat_tokenizer()
    answer = chat.say("hello", stream=True)
    assert capsys.readouterr().out == answer + "\n"
    shown = []
    assert chat.say("two", stream=shown.append) == "".join(shown)
    chat.say("three", stream=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out
    pieces = list(chat.stream("four"))
    assert "".join(pieces) == chat.messages[-1]["content"]
    chat.undo()
    chat.add({"role": "user", "content": "five"})
    assert "".join(chat.stream()) == chat.messages[-1]["content"]
    with pytest.raises(ConfigurationError, match="stream=3"):
        chat.say("six", stream=3)


class Interrupting:
    """Sends SIGINT to this process with the piece number ``at``, ``times`` times."""

    def __init__(self, at, times=1):
        self.left, self._times = at, times

    def __call__(self, *_, **__):
        self.left -= 1
        if self.left == 0:
            for _ in range(self._times):
                os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("times", [1, 2])
def test_interrupted_answer_is_kept_as_far_as_it_came(make, speaker, times):
    chat = make(max_new_tokens=60, suppress_tokens=[END])
    with pytest.raises(KeyboardInterrupt):
        chat.say("hello there", stream=Interrupting(2, times))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    partial = chat.messages[-1]
    assert partial["partial"] is True
    assert partial["content"]
    assert len(chat.tokens) - chat.last_turn.prompt_tokens < 60
    answer = chat.tokens[chat.last_turn.prompt_tokens :]
    plain = plain_answer(speaker, prompt_of(chat), max_new_tokens=60, suppress_tokens=[END])
    assert plain[: len(answer)] == answer
    known = len(chat.tokens) - 1 if times == 1 else chat.last_turn.prompt_tokens
    chat.say("go on", max_new_tokens=6, suppress_tokens=None)
    assert_as_plain(chat, speaker)
    assert chat.last_turn.cached_tokens >= known - 1
    assert partial["content"] in chat_tokenizer().decode(prompt_of(chat))


@pytest.mark.filterwarnings("ignore::kvtier.errors.ReuseWarning")  # the model is changed
def test_interrupt_before_the_first_token_takes_the_question_back(chat, monkeypatch, speaker):
    monkeypatch.setattr(speaker.model.layers[0], "forward", Interrupting(1))
    with pytest.raises(KeyboardInterrupt):
        chat.say("hello")
    assert chat.messages == []
    monkeypatch.undo()
    chat.say("hello")
    assert_as_plain(chat, speaker)


def test_program_that_handles_the_signal_itself_keeps_its_handler(make):
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        make(suppress_tokens=[END], max_new_tokens=20).say("hello", stream=Interrupting(1))
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [1]


def test_error_in_the_streamer_is_raised_and_the_answer_so_far_is_kept(make):
    def show(text):
        raise BrokenPipeError

    chat = make(max_new_tokens=60, suppress_tokens=[END])
    with pytest.raises(BrokenPipeError):
        chat.say("hello", stream=show)
    assert chat.messages[-1]["partial"]


def test_loop_that_is_left_stops_the_answer_and_keeps_it(make, speaker):
    chat = make(max_new_tokens=200, suppress_tokens=[END])
    for _ in chat.stream("hello"):
        break
    assert not [thread for thread in threading.enumerate() if thread.name == "kvtier-chat"]
    assert 0 < len(chat.tokens) - chat.last_turn.prompt_tokens < 200
    assert chat.messages[-1]["partial"]
    chat.say("go on", max_new_tokens=6, suppress_tokens=None)
    assert_as_plain(chat, speaker)


def test_error_of_a_stream_is_raised_where_it_is_read(make):
    chat = make(STRICT)
    chat.add({"role": "tool", "content": "x"})
    with pytest.raises(PromptError, match="roles must alternate"):
        list(chat.stream("hello"))
    assert len(chat.messages) == 1


def test_second_call_meanwhile_is_refused(chat):
    refused = []

    def show(text):
        with pytest.raises(BusyError, match="making an answer"):
            chat.say("me too")
        refused.append(1)

    chat.say("hello", stream=show)
    assert refused
    assert len(chat.messages) == 2


# --- templates, tools and settings ------------------------------------------------------------------------------------


def test_system_message_and_document_come_first(make):
    chat = make(system="Be brief.", document="The lamp burns.")
    assert chat.messages == [
        {"role": "system", "content": "Be brief.\n\nAnswer questions about the following text.\n\nThe lamp burns."}
    ]


def test_template_without_system_role_gets_it_in_front_of_the_first_message(make, speaker):
    chat = make(STRICT, system="Be brief.")
    chat.say("hello")
    text = chat_tokenizer().decode(chat.tokens)
    assert text.startswith("<|im_start|>user\nBe brief.\n\nhello<|im_end|>")
    chat.say("more")
    assert chat.last_turn.lost_tokens == 0
    assert chat.messages[0]["role"] == "system"


def test_refused_messages_are_an_error_that_says_why_and_change_nothing(make):
    chat = make(STRICT)
    chat.add({"role": "tool", "content": "x"})
    with pytest.raises(PromptError, match="the chat template refuses these messages: roles must alternate"):
        chat.say("hello")
    assert chat.messages == [{"role": "tool", "content": "x"}]


def test_tools_and_template_arguments_reach_the_template(make):
    def lighthouse(name: str) -> str:
        """Look a lighthouse up.

        Args:
            name: its name.
        """
        return name

    chat = make(TOOLS + "{{ mood }}", tools=[lighthouse], template={"mood": "calm"})
    chat.say("call it")
    chat.add({"role": "tool", "content": "42"})
    chat.reply()
    shown = chat_tokenizer().decode(chat.tokens)
    assert shown.startswith("tool lighthouse\n<|im_start|>user")
    assert "<|im_start|>tool\n42<|im_end|>" in shown
    assert "assistant\ncalm" in shown


def test_warm_computes_what_the_first_prompt_shows_before_the_question(make, speaker):
    chat = make(system="a long and careful description of everything")
    assert chat.warm().generated_tokens == 1
    assert chat.messages == chat.messages[:1]
    chat.say("hello")
    assert chat.last_turn.computed_tokens <= len("hello<|im_end|>\n<|im_start|>assistant\n")
    assert chat.last_turn.lost_tokens == 0
    assert_as_plain(chat, speaker)
    with pytest.raises(ConfigurationError, match="nothing to compute"):
        make().warm()


def test_stop_strings_and_output_objects_pass_through(make):
    chat = make(return_dict_in_generate=True, stop_strings=["zzz"], output_logits=True)
    assert isinstance(chat.say("hello"), str)


@pytest.mark.filterwarnings("ignore::kvtier.errors.ReuseWarning")  # the model is changed
def test_answers_have_at_most_512_tokens_unless_something_says_otherwise(speaker, store, monkeypatch):
    seen = []
    monkeypatch.setattr(type(speaker), "generate", lambda self, **given: seen.append(given) or given["input_ids"])
    chat = Chat(speaker, chat_tokenizer(), cache=store)
    chat.say("one")
    chat.say("two", max_length=90)
    monkeypatch.setattr(speaker.generation_config, "max_new_tokens", 7)
    chat.say("three")
    assert [given.get("max_new_tokens") for given in seen] == [512, None, None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"on_other_model": "maybe"}, "on_other_model='maybe'"),
        ({"name": " x"}, "name=' x'"),
        ({"ttl": -1}, "ttl=-1"),
        ({"template": {"x": 1}, "tokenizer": None}, "has no chat template"),
    ],
)
def test_unusable_arguments_are_named(speaker, store, arguments, message):
    tokenizer = chat_tokenizer(arguments.pop("tokenizer", CHATML))
    with pytest.raises(ConfigurationError, match=message):
        Chat(speaker, tokenizer, cache=store, **arguments)


def test_wrong_calls_are_errors_that_change_nothing(chat):
    for call in (chat.undo, chat.retry, lambda: chat.edit(0, "x"), lambda: chat.add({"content": "x"})):
        with pytest.raises(ConfigurationError):
            call()
    with pytest.raises(ConfigurationError, match="num_return_sequences"):
        chat.say("x", num_return_sequences=2, num_beams=2)
    with pytest.raises(ConfigurationError, match="pass the model's processor"):
        chat.say(["what is this?", torch.zeros(3, 8, 8)])
    assert chat.messages == []
    assert repr(chat) == "<Chat: 0 messages, 0 tokens>"


def test_passed_cache_stays_open_and_own_cache_is_closed(make, store):
    with TieredCache(store) as cache:
        make(cache=cache).close()
        assert not cache.turns.closed
    with make() as own:
        pass
    assert own.cache.turns.closed


def test_beams_and_prompt_lookup_answer_too(chat, speaker):
    chat.say("hello", num_beams=2)
    prompt = prompt_of(chat)
    assert chat.tokens[len(prompt) :] == plain_answer(speaker, prompt, max_new_tokens=6, num_beams=2)
    chat.say("hello", prompt_lookup_num_tokens=2)
    assert_as_plain(chat, speaker)


def test_every_kind_of_store_serves(make, tmp_path):
    for cache in (None, tmp_path, PrefixStore()):
        with make(cache=cache) as chat:
            chat.say("hello")
