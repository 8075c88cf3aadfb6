"""A chat is resumed by its name, in any process, or refused with the reason; nothing of it is lost or left behind."""

from __future__ import annotations

import json
import stat

import pytest
import torch

from kvtier import Chat, ConfigurationError, PrefixStore, StoreError, TieredCache
from kvtier.hf.chat.saved import Conversation
from kvtier.hf.not_reusable import NotReusable
from kvtier.testing.faults import Deed, Fault, Faults, FaultyFilesystem
from tests.support.chats import END, chat_model, chat_tokenizer, plain_answer
from tests.support.stores import run_python

SHORT = {"do_sample": False, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def speaker():
    return chat_model()


@pytest.fixture(params=["ram", "disk"])
def kept(request, tmp_path):
    """A function that opens the same store again; in RAM it stays open."""
    if request.param == "disk":
        yield lambda: PrefixStore(tmp_path, block_size=8)
        return
    with PrefixStore(block_size=8) as store:
        store.close, close = lambda: None, store.close
        yield lambda: store
        store.close = close


def chat_on(store, speaker, name="x", **arguments):
    return Chat(speaker, chat_tokenizer(), cache=store, name=name, **{**SHORT, **arguments})


def test_resumed_chat_goes_on_where_it_stopped(kept, speaker):
    with kept() as store, chat_on(store, speaker, system="Be brief.") as chat:
        chat.say("hello there")
        chat.say("and then?")
        messages, tokens = chat.messages, chat.tokens
    with kept() as store, chat_on(store, speaker) as resumed:
        assert (resumed.messages, resumed.tokens) == (messages, tokens)
        resumed.say("so?")
        assert resumed.last_turn.cached_tokens == len(tokens) - 1
        prompt = resumed.tokens[: resumed.last_turn.prompt_tokens]
        assert resumed.tokens[len(prompt) :] == plain_answer(speaker, prompt, max_new_tokens=6)
        assert prompt[: len(tokens) - 1] == tokens[:-1]
        assert [each.name for each in store.names()] == ["x"]


def test_saved_root_is_the_root_of_the_turns(store, speaker):
    chat = chat_on(store, speaker)
    chat.say("hello")
    assert store.chats.read("x").content["root"] == chat.cache.turns.kept_row(0)[0]


def test_edits_undos_and_added_messages_are_saved_at_once(store, speaker):
    chat = chat_on(store, speaker)
    chat.say("hello there")
    chat.say("more")
    for change in (chat.undo, lambda: chat.add({"role": "tool", "content": "4"}), lambda: chat.edit(0, "hi")):
        change()
        assert chat_on(store, speaker).messages == chat.messages


def test_partial_answer_is_saved(store, speaker):
    chat = chat_on(store, speaker, max_new_tokens=60, suppress_tokens=[END])
    for _ in chat.stream("hello"):
        break
    resumed = chat_on(store, speaker)
    assert resumed.messages == chat.messages
    assert resumed.messages[-1]["partial"]
    assert resumed.tokens == chat.tokens


def test_another_process_resumes_it(tmp_path, speaker):
    with chat_on(tmp_path / "store", speaker) as chat:
        chat.say("hello there")
        known = len(chat.tokens)
    code = (
        "import sys; from kvtier import Chat; from tests.support.chats import chat_model, chat_tokenizer\n"
        "chat = Chat(chat_model(), chat_tokenizer(), cache=sys.argv[1], name='x', max_new_tokens=3, do_sample=False)\n"
        "chat.say('more'); print(chat.last_turn.cached_tokens, chat.last_turn.cached_by_tier['disk'])"
    )
    done = run_python(code, tmp_path / "store")
    assert done.stdout.split() == [str(known - 1)] * 2, done.stderr


def test_files_are_private_and_hold_messages_and_tokens(tmp_path, speaker):
    with chat_on(tmp_path / "store", speaker) as chat:
        chat.say("hello there")
        (file,) = (tmp_path / "store" / "chats").iterdir()
        saved = json.loads(file.read_text())["chat"]
        assert saved["messages"] == chat.messages
        assert [token for segment in saved["segments"] for token in segment[1]] == chat.tokens
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_another_model_is_refused_or_goes_on_from_the_messages(store, speaker):
    chat = chat_on(store, speaker)
    chat.say("hello there")
    other = chat_model(seed=1)
    with pytest.raises(ConfigurationError, match=r"'x' was held with another model .*on_other_model='render'"):
        chat_on(store, other)
    rendered = chat_on(store, other, on_other_model="render")
    assert rendered.messages == chat.messages
    assert rendered.tokens == []
    rendered.say("more")
    assert rendered.last_turn.cached_tokens == 0
    prompt = rendered.tokens[: rendered.last_turn.prompt_tokens]
    assert rendered.tokens[len(prompt) :] == plain_answer(other, prompt, max_new_tokens=6)
    assert chat_on(store, other).messages == rendered.messages  # it is that model's now


def test_same_model_computed_in_another_way_goes_on_with_its_tokens(store, speaker):
    chat = chat_on(store, speaker)
    chat.say("hello there")
    same = chat_model()
    same.set_attn_implementation("sdpa")
    resumed = chat_on(store, same)
    assert resumed.tokens == chat.tokens
    resumed.say("more")
    assert resumed.last_turn.cached_tokens == 0


def test_other_system_message_is_refused(store, speaker):
    chat_on(store, speaker, system="Be brief.").say("hello")
    assert len(chat_on(store, speaker).messages) == 3
    assert len(chat_on(store, speaker, system="Be brief.").messages) == 3
    for other in ({"system": "Be long."}, {"document": "Be brief."}):
        with pytest.raises(ConfigurationError, match="another system message or document; leave system and"):
            chat_on(store, speaker, **other)


@pytest.mark.parametrize(
    "content", [{}, {"messages": [{"x": 1}]}, {"messages": 3}, {"segments": [["a", ["b"], None, 0]]}]
)
def test_damaged_content_is_an_error_that_names_the_chat(store, speaker, content):
    store.chats.write("x", {**({} if not content else Conversation([]).to_json()), **content}, after=None)
    with pytest.raises(StoreError, match="the chat 'x' cannot be resumed: it is no conversation"):
        chat_on(store, speaker)


# --- several chats ----------------------------------------------------------------------------------------------------


def test_chat_that_another_writer_continued_goes_on_under_a_new_name(store, speaker, warned):
    first = chat_on(store, speaker)
    first.say("hello there")
    second = chat_on(store, speaker)
    second.say("from elsewhere")
    first.say("from here")
    assert first.name == "x (2)"
    assert "'x' was continued elsewhere meanwhile, which stays; this one goes on as 'x (2)'" in warned()[0]
    first.say("and on")
    assert warned() == []
    assert chat_on(store, speaker).messages == second.messages
    assert chat_on(store, speaker, name="x (2)").messages == first.messages
    assert {each.name for each in store.names()} == {"x", "x (2)"}


def test_forgotten_chat_is_not_saved_again(store, speaker, warned):
    chat = chat_on(store, speaker)
    chat.say("hello there")
    store.forget("x")
    chat.say("more")
    assert chat.name is None
    assert "was forgotten" in warned()[0]
    chat.say("and more")
    assert store.chats.names() == ()
    assert store.names() == ()


def test_branch_is_saved_under_its_own_name(store, speaker):
    chat = chat_on(store, speaker)
    chat.say("hello there")
    with pytest.raises(ConfigurationError, match="'x' is the name of something else"):
        chat.branch("x")
    branch = chat.branch("y")
    branch.say("other")
    assert chat_on(store, speaker, name="y").messages == branch.messages
    assert chat_on(store, speaker).messages == chat.messages
    assert len(chat.messages) == 2


def test_forget_removes_messages_files_and_blocks(kept, speaker):
    with kept() as store:
        chat = chat_on(store, speaker)
        chat.say("hello there")
        chat.forget()
        assert (chat.messages, chat.tokens, store.chats.names(), store.names()) == ([], [], (), ())
        assert store.chains() == ()
        chat.say("hello again")
        assert chat.last_turn.cached_tokens == 0
        assert chat_on(store, speaker).messages == chat.messages


def test_pin_and_ttl_are_those_of_the_name(store, speaker):
    chat_on(store, speaker, pin=True, ttl=60).say("hello")
    (named,) = store.names()
    assert named.pinned
    assert named.expires_at is not None


def test_exported_chat_is_resumed_from_another_store(tmp_path, speaker, store):
    chat = chat_on(store, speaker)
    chat.say("hello there")
    store.export("x", tmp_path / "x.safetensors")
    with PrefixStore(block_size=8) as other:
        other.import_(tmp_path / "x.safetensors")
        resumed = chat_on(other, speaker)
        assert resumed.messages == chat.messages
        resumed.say("more")
        assert resumed.last_turn.cached_tokens == len(chat.tokens) - 1


# --- what cannot be saved ---------------------------------------------------------------------------------------------


def test_failing_disk_costs_one_warning_and_no_answer(tmp_path, speaker, warned):
    faults = Faults()
    with PrefixStore(tmp_path, block_size=8, filesystem=FaultyFilesystem(faults)) as store:
        chat = chat_on(store, speaker)
        chat.say("hello there")
        faults.plan(Fault(Deed.FAIL, times=None, call="rename", subject="*/chats/*"))
        for text in ("one", "two"):
            chat.say(text)
        assert len([text for text in warned() if "the chat 'x' is not saved" in text]) == 1
        assert len(chat.messages) == 6
        faults.plan()
        chat.say("three")
        assert chat_on(store, speaker).messages == chat.messages


def test_message_that_is_not_json_costs_one_warning(store, speaker, warned):
    chat = chat_on(store, speaker)
    chat.add({"role": "user", "content": "see", "image": torch.zeros(2)})
    chat.reply()
    chat.say("more")
    assert len(warned()) == 1
    assert store.chats.names() == ()


def test_chat_of_a_model_that_is_not_reused_is_saved_and_resumed(store, speaker, monkeypatch, warned):
    monkeypatch.setattr("kvtier.hf.turn.manager.identify", lambda *_, **__: NotReusable("a test says so"))
    chat = chat_on(store, speaker)
    chat.say("hello there")
    assert chat.last_turn.miss_reason == "a test says so"
    resumed = chat_on(store, speaker)
    assert (resumed.messages, resumed.tokens) == (chat.messages, chat.tokens)
    assert store.names() == ()
    assert warned() == []


def test_cache_that_two_chats_share_serves_both(store, speaker):
    with TieredCache(store) as cache:
        one, two = chat_on(cache, speaker, "one"), chat_on(cache, speaker, "two")
        for chat in (one, two, one, two):
            chat.say("hello there")
            prompt = chat.tokens[: chat.last_turn.prompt_tokens]
            assert chat.tokens[len(prompt) :] == plain_answer(speaker, prompt, max_new_tokens=6)
        assert chat_on(store, speaker, "one").messages == one.messages


def test_short_turns_write_the_last_block_when_it_is_full_or_the_chat_is_closed(tmp_path, speaker):
    with PrefixStore(tmp_path, block_size=512) as store:
        with chat_on(store, speaker) as chat:
            chat.say("hello there")
            first = store.named("x").tokens
            written = store.stats().tiers[1].blocks
            for text in ("one", "two", "three"):
                chat.say(text)
            assert store.named("x").tokens == first
            assert written == store.stats().tiers[1].blocks == 1
        assert store.named("x").tokens == store.named("x").kept_tokens == len(chat.tokens) - 1
        assert store.forget("x").blocks == 1
        assert store.chains() == ()


def test_name_of_an_unclosed_chat_covers_the_longer_tail(tmp_path, speaker):
    with PrefixStore(tmp_path, block_size=512) as store:
        chat = chat_on(store, speaker)
        for text in ("hello", "one", "two"):
            chat.say(text)
        store.forget("x")
        assert store.chains() == ()


@pytest.mark.parametrize("block_size", [8, 512])
def test_undone_turn_moves_the_name(tmp_path, speaker, block_size):
    with PrefixStore(tmp_path, block_size=block_size) as store:
        chat = chat_on(store, speaker)
        chat.say("hello there")
        chat.undo()
        chat.say("hullo there")
        assert list(store.tokens_of("x")) == chat.tokens[:-1]
