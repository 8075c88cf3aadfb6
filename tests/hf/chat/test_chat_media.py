"""A chat with pictures: its prompts are the processor's, and a picture that is known is not computed again."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtier import Chat
from kvtier.hf.compat.names import MEDIA_CONTINUE
from tests.support.chats import PictureProcessor
from tests.support.media import END, PLACE, START, answer, seeing

pytestmark = pytest.mark.skipif(not MEDIA_CONTINUE, reason="such inputs turn reuse off in this transformers")

SETTINGS = {"do_sample": False, "max_new_tokens": 4, "suppress_tokens": [0, 1, 2, START, END, 198, PLACE]}


@pytest.fixture
def make(store):
    def make(**arguments):
        return Chat(seeing("llava"), PictureProcessor(), cache=store, **{**SETTINGS, **arguments})

    return make


def assert_as_plain(chat):
    """The last answer is that of plain transformers to what the processor makes of the messages."""
    given = PictureProcessor().apply_chat_template(chat.messages[:-1], tokenize=True, add_generation_prompt=True)
    plain = answer(seeing("llava"), given, **SETTINGS).sequences[0].tolist()
    assert chat.tokens == plain


def test_pictures_go_through_the_processor_and_are_computed_once(make):
    chat = make()
    chat.say(["what is this?", 10])
    assert_as_plain(chat)
    known = len(chat.tokens)
    chat.say("and its colour?")
    assert_as_plain(chat)
    assert chat.last_turn.cached_tokens >= known - 1 - 4  # an answer may be tokenized in another way
    assert chat.last_turn.cached_tokens + chat.last_turn.lost_tokens >= known - 1
    chat.say([11, "this one?"])
    assert_as_plain(chat)
    assert chat.last_turn.cached_tokens > known
    chat.edit(0, ["what is this?", 12])
    chat.reply()
    assert_as_plain(chat)


def test_text_alone_needs_no_media_inputs(make):
    chat = make(system="Be brief.")
    chat.say("hello")
    known = len(chat.tokens)
    chat.say("more")
    assert chat.last_turn.cached_tokens == known - 1
    assert chat.messages[1] == {"role": "user", "content": [{"type": "text", "text": "hello"}]}


def test_system_message_is_a_list_of_parts_for_a_processor(make):
    chat = make(system="Be brief.", name="x")
    assert chat.messages == [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}]
    chat.say(["what is this?", Path("10")])
    assert chat.warm() is not None
    chat.say("more")
    assert_as_plain(chat)
    assert make(system="Be brief.", name="x").messages == chat.messages


def test_chat_with_paths_of_pictures_is_resumed(make):
    chat = make(name="x")
    text = chat.say(["what is this?", Path("10")])
    resumed = make(name="x")
    assert resumed.messages[0]["content"][1] == {"type": "image", "path": "10"}
    assert resumed.messages[1]["content"] == [{"type": "text", "text": text}]
    known = len(chat.tokens)
    resumed.say("more")
    assert resumed.last_turn.cached_tokens >= known - 1 - 4
    assert_as_plain(resumed)


def test_chat_with_pictures_in_memory_says_once_that_it_is_not_saved(make, store, warned):
    class InMemory:
        def __int__(self):
            return 10

    chat = make(name="x")
    chat.say(["what is this?", InMemory()])
    chat.say("more")
    assert len(warned()) == 1
    assert store.chats.names() == ()
    assert_as_plain(chat)
