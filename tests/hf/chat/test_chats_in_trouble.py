"""Chats beside failing drives, killed and forked processes, other writers of a store, and models that wrap a model."""

from __future__ import annotations

import multiprocessing
import os
import threading
import warnings

import pytest

from kvtier import BusyError, Chat, ConfigurationError, PrefixStore, PromptError
from kvtier.testing.faults import Deed, Fault, Faults, FaultyFilesystem
from tests.support.chats import END, STRICT, chat_model, chat_tokenizer, plain_answer
from tests.support.drive_faults import faulty_database
from tests.support.stores import run_python

SHORT = {"do_sample": False, "max_new_tokens": 4}


@pytest.fixture(scope="module")
def speaker():
    return chat_model()


def chat_on(store, speaker, template=None, **arguments):
    tokenizer = chat_tokenizer() if template is None else chat_tokenizer(template)
    return Chat(speaker, tokenizer, cache=store, **{"name": "x", **SHORT, **arguments})


# --- messages that the template refuses -------------------------------------------------------------------------------


def test_message_that_the_template_refuses_is_taken_back_alone(store, speaker):
    chat = chat_on(store, speaker, STRICT)
    chat.say("hello")
    kept = chat.messages
    refused = {"role": "assistant", "content": "I again"}
    chat.add(refused)
    with pytest.raises(PromptError, match="roles must alternate"):
        chat.reply()
    assert chat.remove() == [refused]
    assert chat.messages == kept
    assert chat_on(store, speaker, STRICT).messages == kept
    chat.say("more")
    assert chat.last_turn.lost_tokens == 0


def test_first_message_that_the_template_refuses_is_taken_back(store, speaker):
    chat = chat_on(store, speaker, STRICT)
    chat.add({"role": "assistant", "content": "I first"})
    with pytest.raises(ConfigurationError, match="the user has said nothing yet; remove"):
        chat.undo()
    chat.remove(0)
    with pytest.raises(ConfigurationError, match="the chat has 0 messages"):
        chat.remove()
    chat.say("hello")


# --- other processes --------------------------------------------------------------------------------------------------


def in_a_fork(task):
    """Return the exit code of a child that runs ``task``: 0 unless it raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about the threads that the child lacks
        pid = os.fork()
    if not pid:
        try:
            task()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def refused(chat, reason):
    with pytest.raises(BusyError, match=reason):
        chat.say("more")


def test_chat_that_a_thread_uses_says_in_a_fork_that_it_never_ends_there(store, speaker):
    chat = chat_on(store, speaker, max_new_tokens=200, suppress_tokens=[END])
    goes_on, began = threading.Event(), threading.Event()

    def show(_):
        began.set()
        goes_on.wait()

    thread = threading.Thread(target=chat.say, args=("hello",), kwargs={"stream": show, "max_new_tokens": 20})
    thread.start()
    began.wait()
    assert in_a_fork(lambda: refused(chat, "when this process was forked")) == 0
    refused(chat, "making an answer; wait for it")
    goes_on.set()
    thread.join()
    chat.say("more", max_new_tokens=2)


def test_fork_in_the_middle_of_an_answer_goes_on_with_it(store, speaker):
    """The thread that makes the answer is the one that forks, so the child has it."""
    chat, codes = chat_on(store, speaker, suppress_tokens=[END]), []

    def show(_):
        if not codes:
            codes.append(in_a_fork(lambda: refused(chat, "wait for it")))

    chat.say("hello", stream=show)
    assert codes == [0]


def talk(folder):
    chat_on(folder, chat_model()).say("and more")  # not closed: the end of the process writes


def test_spawned_process_resumes_the_chat_and_its_parent_sees_that(tmp_path, speaker):
    with chat_on(tmp_path / "kv", speaker) as chat:
        chat.say("hello")
    child = multiprocessing.get_context("spawn").Process(target=talk, args=(tmp_path / "kv",))
    child.start()
    child.join()
    assert child.exitcode == 0
    with chat_on(tmp_path / "kv", speaker) as resumed:
        assert len(resumed.messages) == 4
        known = len(resumed.tokens)
        resumed.say("so?")
        assert resumed.last_turn.cached_tokens == known - 1


def test_two_stores_of_one_folder_keep_both_chats_of_a_name(tmp_path, speaker, warned):
    with PrefixStore(tmp_path, block_size=8) as ours, PrefixStore(tmp_path, block_size=8) as theirs:
        first, second = chat_on(ours, speaker), chat_on(theirs, speaker)
        first.say("from here")
        second.say("from there")
        assert (first.name, second.name) == ("x", "x (2)")
        assert "continued elsewhere" in warned()[0]
        assert chat_on(theirs, speaker).messages == first.messages
        assert chat_on(ours, speaker, name="x (2)").messages == second.messages


def test_cleared_store_goes_on_without_the_saved_chat(tmp_path, speaker, warned):
    with PrefixStore(tmp_path, block_size=8) as ours:
        chat = chat_on(ours, speaker)
        chat.say("hello")
        with PrefixStore(tmp_path, block_size=8) as theirs:
            theirs.clear()
        chat.say("more")
        assert "was forgotten" in warned()[0]
        assert (chat.name, ours.chats.names(), len(chat.messages)) == (None, (), 4)
        prompt = chat.tokens[: chat.last_turn.prompt_tokens]
        assert chat.tokens[len(prompt) :] == plain_answer(speaker, prompt, max_new_tokens=4)


# --- drives -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lasts", [1, None], ids=["one call", "all calls"])
def test_drive_that_fails_at_any_call_costs_no_answer_and_no_message(tmp_path, speaker, lasts):
    """Each chat begins on a sound drive. The calls of its second turn fail, from the first, the second, … on."""
    for at in range(1, 1000, 13):
        faults = Faults()
        with (
            faulty_database(faults),
            PrefixStore(tmp_path / str(at), block_size=8, filesystem=FaultyFilesystem(faults)) as store,
            chat_on(store, speaker) as chat,
        ):
            chat.say("hello")
            store.flush()
            before = chat.messages
            faults.plan(Fault(Deed.FAIL, at=at, times=lasts))
            chat.say("more")
            store.flush()
            met = len(faults.met) >= at
            faults.plan()
            assert len(chat.messages) == 4
            with PrefixStore(tmp_path / str(at), block_size=8) as other:
                saved = other.chats.read("x").content["messages"]
            assert saved in (before, chat.messages)
            chat.say("and more")
            assert chat.name is not None
            assert store.chats.read(chat.name).content["messages"] == chat.messages
        if not met:
            return
    raise AssertionError("the turn has more calls than were tried")


KILLED = """
import sys
from kvtier import Chat, PrefixStore
from kvtier.testing.faults import Deed, Fault, Faults, FaultyFilesystem
from tests.support import crashes
from tests.support.chats import chat_model, chat_tokenizer
from tests.support.drive_faults import faulty_database
import torch

torch.set_num_threads(1)
model, folder, settings = chat_model(), sys.argv[1], {"max_new_tokens": 4, "do_sample": False}

def on(store):
    return Chat(model, chat_tokenizer(), cache=store, name="x", **settings)

def live(at):
    faults = Faults()
    with faulty_database(faults), PrefixStore(folder, block_size=8, filesystem=FaultyFilesystem(faults)) as store:
        with on(store) as chat:
            known = len(chat.messages)
            faults.plan(Fault(Deed.KILL, at=at))
            chat.say("more")

def check(known):
    with PrefixStore(folder, block_size=8) as store:
        with on(store) as chat:
            said = len(chat.messages)
            assert said in (known, known + 2), (said, known)
            assert [each["role"] for each in chat.messages] == ["user", "assistant"] * (said // 2)
        assert store.verify().problems == ()
    open(folder + ".known", "w").write(str(said))

known, killed = 0, 0
for at in range(1, int(sys.argv[2]), int(sys.argv[3])):
    code = crashes.ended(crashes.fork(live, at))
    assert code in (0, -9), code
    killed += code == -9
    assert crashes.ended(crashes.fork(check, known)) == 0, at
    known = int(open(folder + ".known").read())
    if code == 0:
        break
print(killed)
"""


def test_process_killed_at_any_call_of_a_turn_leaves_the_chat_before_or_after_it(tmp_path):
    done = run_python(KILLED, tmp_path / "kv", 300, 17, timeout_seconds=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 10


# --- models that wrap a model -----------------------------------------------------------------------------------------


class Wrapper:
    """Like a model with adapters: its ``generate`` calls that of the model inside."""

    def __init__(self, model):
        self.base_model, self.config, self.device = model, model.config, model.device
        self.generation_config = model.generation_config

    def generate(self, *args, **kwargs):
        return self.base_model.generate(*args, **kwargs)


def test_wrapped_model_chats_is_saved_and_resumed(store, speaker, warned):
    chat = chat_on(store, Wrapper(speaker))
    chat.say("hello there")
    chat.say("more")
    prompt = chat.tokens[: chat.last_turn.prompt_tokens]
    assert chat.tokens[len(prompt) :] == plain_answer(speaker, prompt, max_new_tokens=4)
    assert chat.last_turn.cached_tokens > 0
    resumed = chat_on(store, Wrapper(speaker))
    assert resumed.messages == chat.messages
    resumed.say("so?")
    assert resumed.last_turn.cached_tokens == len(chat.tokens) - 1
    assert warned() == []
