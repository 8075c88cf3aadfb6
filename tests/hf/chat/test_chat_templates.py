"""Chat templates that rewrite, trim or refuse; tokenizers that begin a text otherwise; models that see."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvtier import Chat
from kvtier.hf.chat.template import ChatTemplate
from kvtier.hf.chat.transcript import Segment, Transcript
from tests.support.chats import CHATML, DATED, END, NO_THOUGHTS, TRIMMED, chat_model, chat_tokenizer, plain_answer

MAX_NEW = 12


@pytest.fixture(scope="module")
def speaker():
    return chat_model()


def says(*answers):
    """Settings with which a model gives these answers, letter by letter, and ends them."""
    tokenizer = chat_tokenizer()
    scripts = [[*map(tokenizer.convert_tokens_to_ids, answer), END] for answer in answers]
    prompt_columns: dict[int, int] = {}

    def allowed(_, ids):
        turn = sum(ids.tolist()[i] == tokenizer.convert_tokens_to_ids("<|im_start|>") for i in range(len(ids)))
        begin = prompt_columns.setdefault(turn, len(ids))
        index = list(prompt_columns).index(turn)
        return [scripts[index][len(ids) - begin]]

    return {"prefix_allowed_tokens_fn": allowed, "max_new_tokens": 60, "do_sample": False}


def assert_prompt_has_the_text(chat, template):
    tokenizer = chat_tokenizer(template)
    prompt = chat.tokens[: chat.last_turn.prompt_tokens]
    assert tokenizer.decode(prompt) == tokenizer.apply_chat_template(
        chat.messages[:-1], tokenize=False, add_generation_prompt=True
    )


def test_dropped_reasoning_is_reported_and_computed_again(speaker, store):
    chat = Chat(speaker, chat_tokenizer(NO_THOUGHTS), cache=store, **says("<q>hm hm</think>fine", "good", "well"))
    chat.say("how are you?")
    first = chat.last_turn
    assert first.lost_tokens == 0
    assert first.next_lost_tokens == len("<q>hm hm</think>fine")
    assert first.lost_reason == "'fine<|im_end|>\\n<|im_start|>user\\n' where it had '<q>hm hm</think>fine<|im_end|>'"
    chat.say("and now?")
    assert chat.last_turn.lost_tokens == first.next_lost_tokens
    assert chat.last_turn.cached_tokens == first.prompt_tokens
    assert_prompt_has_the_text(chat, NO_THOUGHTS)
    assert chat.last_turn.next_lost_tokens == 0
    chat.say("bye")
    assert chat.last_turn.lost_tokens == 0
    assert_prompt_has_the_text(chat, NO_THOUGHTS)


@pytest.mark.parametrize("how", ["warm", "rewarm"])
def test_warmed_chat_has_computed_the_rewritten_history(speaker, store, how):
    settings = says("<q>hm hm</think>fine and well, thanks a lot", "good")
    chat = Chat(speaker, chat_tokenizer(NO_THOUGHTS), cache=store, rewarm=how == "rewarm", **settings)
    chat.say("how are you?")
    if how == "warm":
        chat.warm()
    chat.say("so")
    assert chat.last_turn.computed_tokens <= len("so<|im_end|>\n<|im_start|>assistant\n")
    assert chat.last_turn.lost_tokens == 0
    assert_prompt_has_the_text(chat, NO_THOUGHTS)


def test_trimmed_answers_stay_as_the_model_wrote_them(speaker, store):
    chat = Chat(speaker, chat_tokenizer(TRIMMED), cache=store, **says("\n hello ", "good"))
    chat.say("hi")
    before = chat.tokens
    assert chat.last_turn.next_lost_tokens == 0
    chat.say("so")
    assert chat.tokens[: len(before) - 1] == before[:-1]
    assert chat.last_turn.lost_tokens == 0


def test_new_date_is_followed_and_its_loss_reported(speaker, store):
    tokenizer = chat_tokenizer(DATED.replace("today", "'monday'"))
    chat = Chat(speaker, tokenizer, cache=store, max_new_tokens=5, do_sample=False)
    chat.say("hello")
    known = len(chat.tokens)
    tokenizer.chat_template = DATED.replace("today", "'tuesday'")
    chat.say("more")
    assert known - 3 <= chat.last_turn.lost_tokens <= known
    assert chat.last_turn.lost_reason.startswith("'tuesday\\n<|im_start|>user")
    assert chat_tokenizer().decode(chat.tokens).startswith("tuesday")
    prompt = chat.tokens[: chat.last_turn.prompt_tokens]
    assert chat.tokens[len(prompt) :] == plain_answer(speaker, prompt, max_new_tokens=5)


def test_answer_with_an_end_of_its_own_goes_on_with_that_of_the_template(speaker, store):
    (pad,) = [chat_tokenizer().pad_token_id]
    chat = Chat(speaker, chat_tokenizer(), cache=store, eos_token_id=pad, max_new_tokens=2, do_sample=False)
    letters = iter([[10], [pad], [10], [pad]])
    chat.say("hello", prefix_allowed_tokens_fn=lambda *_: next(letters))
    chat.say("more", prefix_allowed_tokens_fn=lambda *_: next(letters))
    assert chat.last_turn.lost_tokens == 0
    assert_prompt_has_the_text(chat, CHATML)


# --- the parts --------------------------------------------------------------------------------------------------------


def encode(text, start):
    return tuple(map(ord, text[start:]))


def answer(text, ids, end="."):
    return Segment(text + end, ids + (0,) * len(end), text, len(ids))


def test_transcript_keeps_ids_of_repeated_text_and_encodes_the_rest():
    said = Transcript((Segment("Q:a A:", (1, 2)), answer("ab", (7, 8))))
    continued, difference = said.continued("Q:a A:ab. Q:c", encode)
    assert (continued.ids, difference) == ((1, 2, 7, 8, 0, *encode(" Q:c", 0)), None)
    assert continued.text == "Q:a A:ab. Q:c"


def test_transcript_drops_the_end_that_the_prompt_does_not_repeat():
    said = Transcript((Segment("Q:a A:", (1, 2)), answer("ab", (7, 8))))
    assert said.continued("Q:a A:ab!", encode)[0].ids == (1, 2, 7, 8, ord("!"))
    assert said.ids_without_end == (1, 2, 7, 8)


def test_transcript_with_another_text_keeps_the_segments_before_it():
    said = Transcript((Segment("Q:a A:", (1, 2)), answer("ab", (7, 8)), Segment(" Q:", (3,)), answer("x", (9,))))
    continued, difference = said.continued("Q:a A:ab. Q:y.", encode)
    assert continued.ids == (1, 2, 7, 8, 0, 3, *encode("y.", 0))
    assert difference == "'y.' where it had 'x.'"
    assert said.continued("other", encode)[0].ids == encode("other", 0)
    shorter, difference = said.continued("Q:a A:", encode)
    assert (shorter.ids, difference) == ((1, 2), "'' where it had 'ab.'")


def test_edited_answer_that_begins_like_the_old_one_has_the_text_of_the_edit():
    said = Transcript((Segment("Q A:", (1,)), answer("car", (5,))))
    continued, _ = said.continued("Q A:cart. Q", encode)
    assert continued.text == "Q A:cart. Q"


def spaced_tokenizer():
    """Begins each text with ▁, as SentencePiece does."""
    letters = {letter: i for i, letter in enumerate("▁abcU:B?.\n")}
    core = Tokenizer(models.BPE({**letters, "▁U": len(letters)}, [("▁", "U")], unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    made = PreTrainedTokenizerFast(tokenizer_object=core)
    made.chat_template = "{% for m in messages %}U:{{ m['content'] }}\n{% endfor %}B:"
    return made


@pytest.mark.parametrize("start", range(8))
def test_text_is_encoded_as_it_is_within_its_context(start):
    tokenizer = spaced_tokenizer()
    text = "U:a B:b\nU:c"
    whole = tokenizer(text).input_ids
    ids = ChatTemplate(tokenizer, None, {}).encode(text, start)
    assert tuple(whole[len(whole) - len(ids) :]) == ids
    assert len(ids) == len(text) - start


def test_messages_for_a_template_have_no_keys_of_ours():
    template = ChatTemplate(chat_tokenizer("{% for m in messages %}{{ m | list }}{% endfor %}"), None, {})
    assert template.prompt([{"role": "assistant", "content": "x", "partial": True}]) == "['role', 'content']"


def test_next_message_that_a_template_does_not_show_is_unknown():
    assert ChatTemplate(chat_tokenizer("always the same"), None, {}).until_next([]) is None
