"""``kvtier chat`` and ``kvtier warm``: questions from a pipe or a person, commands, interrupts, exit codes."""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from kvtier import Chat, PrefixStore
from kvtier.cli import app
from kvtier.cli.chat import terminal
from kvtier.cli.chat.terminal import Terminal
from kvtier.cli.store.output import plain
from kvtier.hf.chat.report import ChatReport
from kvtier.hf.chat.saved import Conversation
from kvtier.hf.not_reusable import NotReusable
from kvtier.report import TurnReport
from tests.support.chats import END, chat_model, chat_tokenizer

DOCUMENT = "the lamp was lit for the first time in the rain, and then every night. " * 4


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    chat_model(max_position_embeddings=1024).save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "lamp.txt"
    path.write_text(DOCUMENT)
    return path


@pytest.fixture
def kvtier(model_folder, tmp_path):
    """``kvtier(command, *arguments, lines)``: run a command with the model and a store."""

    def run(command, *arguments, lines=(), code=0):
        how = ("--max-new-tokens", 4, "--greedy") if command == "chat" else ()
        given = [command, model_folder, *arguments, "--device", "cpu", "--store", tmp_path / "store", *how]
        env = {"COLUMNS": "200", "KVTIER_STORE": None}
        result = CliRunner().invoke(app, list(map(str, given)), input="\n".join(lines), env=env)
        assert result.exit_code == code, result.output
        return result

    return run


def chats_in(folder):
    with PrefixStore(folder / "store") as store:
        return {name: store.chats.read(name).content["messages"] for name in store.chats.names()}


def test_lines_of_a_pipe_are_questions_and_answers_alone_go_to_standard_output(kvtier, tmp_path):
    result = kvtier("chat", "--resume", "x", lines=["hello there", "", "and \\", "then?"])
    messages = chats_in(tmp_path)["x"]
    assert [m["content"] for m in messages if m["role"] == "user"] == ["hello there", "and \nthen?"]
    assert result.stdout == "".join(m["content"] + "\n" for m in messages if m["role"] == "assistant")
    assert len([line for line in result.stderr.splitlines() if "prompt tokens reused" in line]) == 2


def test_resumed_chat_reads_the_conversation_from_the_store(kvtier, tmp_path):
    kvtier("chat", "--resume", "x", lines=["hello there"])
    result = kvtier("chat", "--resume", "x", lines=["more"])
    assert len(chats_in(tmp_path)["x"]) == 4
    assert "(device 0, host 0, disk " in result.stderr


def test_chat_about_a_warmed_document_computes_only_the_question(kvtier, document):
    warmed = json.loads(kvtier("warm", document, "--name", "lamp", "--system", "Be brief.", "--json").stdout)
    assert warmed["computed_tokens"] == warmed["tokens"] == warmed["kept_tokens"] > 100
    tokens = warmed["tokens"]
    for question, *how in (("who?", "--document", document, "--system", "Be brief."), ("name?", "--resume", "lamp")):
        assert kvtier("chat", *how, lines=[question]).stderr.startswith(f"{tokens} of ")
    again = kvtier("warm", document, "--name", "lamp 2", "--system", "Be brief.")
    assert again.stdout.startswith(f"lamp 2: {tokens} tokens, {tokens - 1} of them known, 1 computed")


def test_warm_pins_and_expires(kvtier, document, tmp_path):
    kvtier("warm", document, "--name", "lamp", "--pin", "--ttl", "30d")
    with PrefixStore(tmp_path / "store") as store:
        named = store.named("lamp")
    assert named.pinned
    assert named.expires_at - named.used_at == 30 * 86400


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chat", "--greedy", "--temperature", "1"], "exclude each other"),
        (["chat", "--resume", " x"], "name=' x' cannot be a name"),
        (["chat", "--device", "moon"], "--device='moon' must be here or cpu"),
        (["warm", "EMPTY", "--name", "x"], "has no text"),
        (["warm", "BINARY", "--name", "x"], "cannot be read as a text"),
        (["warm", "EMPTY", "--name", "x", "--ttl", "soon"], "--ttl"),
    ],
)
def test_wrong_calls_end_with_code_2_and_one_line(kvtier, tmp_path, model_folder, arguments, message):
    (tmp_path / "EMPTY").write_text(" \n")
    (tmp_path / "BINARY").write_bytes(b"\xff\xfe")
    given = [str(tmp_path / each) if each in ("EMPTY", "BINARY") else each for each in arguments]
    given[1:1] = [str(model_folder)]
    if "--device" not in given:
        given += ["--device", "cpu"]
    result = CliRunner().invoke(app, [*given, "--store", str(tmp_path / "store")], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize("missing", ["model", "tokenizer", "template"])
def test_model_that_cannot_chat_is_named(tmp_path, model_folder, missing):
    folder = tmp_path / "model"
    if missing != "model":
        chat_model().save_pretrained(folder)
    if missing == "template":
        chat_tokenizer(None).save_pretrained(folder)
    arguments = ["chat", str(folder), "--device", "cpu", "--store", str(tmp_path / "store")]
    result = CliRunner().invoke(app, arguments, input="hello")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("kvtier chat: ")
    assert {"model": str(folder), "tokenizer": "tokenizer", "template": "no chat template"}[missing] in line


def test_another_model_is_refused_or_rendered(kvtier, tmp_path):
    kvtier("chat", "--resume", "x", lines=["hello there"])
    other = tmp_path / "other"
    chat_model(seed=1).save_pretrained(other)
    chat_tokenizer().save_pretrained(other)
    common = ["--resume", "x", "--device", "cpu", "--store", str(tmp_path / "store"), "--max-new-tokens", "3"]
    refused = CliRunner().invoke(app, ["chat", str(other), *common], input="more")
    assert refused.exit_code == 2
    assert "was held with another model" in refused.stderr
    done = CliRunner().invoke(app, ["chat", str(other), *common, "--render"], input="more")
    assert done.exit_code == 0
    assert len(chats_in(tmp_path)["x"]) == 4


# --- the terminal -----------------------------------------------------------------------------------------------------


@pytest.fixture
def talk(store, monkeypatch, capsys):
    """``talk(*lines)``: a person types ``lines``; returns the chat that the terminal ends with, and the output."""
    chat = Chat(chat_model(), chat_tokenizer(), cache=store, name="x", max_new_tokens=4, do_sample=False)

    def run(*lines, is_interactive=True, chat=chat):
        asked = []
        typed = iter(lines)

        def read(prompt):
            asked.append(prompt)
            line = next(typed, EOFError)
            if line in (EOFError, KeyboardInterrupt):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)
        Terminal(chat, is_interactive=is_interactive).run()
        return asked, capsys.readouterr()

    run.chat = chat
    yield run
    chat.close()


def questions(chat):
    return [message["content"] for message in chat.messages if message["role"] == "user"]


def test_commands_change_the_conversation(talk, store):
    _, shown = talk("one", "two", "/undo", "/edit three", "four", "/edit 1 five", "/retry", "/report", "/help", "/what")
    assert questions(talk.chat) == ["five"]
    assert "taken back: two" in shown.err
    assert "/branch NAME" in shown.err
    assert "there is no command /what" in shown.err
    assert len([line for line in shown.err.splitlines() if "prompt tokens reused" in line]) == 7


def test_wrong_commands_are_told_and_the_conversation_goes_on(talk):
    _, shown = talk("/undo", "/retry", "/report", "/edit x", "/save", "one", "/edit 7 x", "/branch x", "two")
    assert questions(talk.chat) == ["one", "two"]
    for text in ("the user has said nothing yet", "there was no turn yet", "N from 1 to 0", "N from 1 to 1"):
        assert text in shown.err
    assert "'x' is the name of something else" in shown.err


def test_branch_and_save_keep_chats_under_their_names(talk, store):
    talk("one", "/branch y", "two", "/save z", "three", "/quit", "four")
    saved = {name: store.chats.read(name).content["messages"] for name in store.chats.names()}
    assert {name: len(messages) for name, messages in saved.items()} == {"x": 2, "y": 4, "z": 6}
    assert {each.name for each in store.names()} == {"x", "y", "z"}


def test_ctrl_c_at_the_prompt_begins_the_line_again_and_ctrl_d_ends(talk):
    asked, shown = talk("one \\", KeyboardInterrupt, "two", EOFError, "three")
    assert questions(talk.chat) == ["two"]
    assert asked == ["> ", "… ", "> ", "> "]
    assert "Ctrl-D ends" in shown.err


def test_ctrl_c_in_an_answer_keeps_it_and_the_conversation_goes_on(talk, monkeypatch):
    show = terminal._show

    def interrupted(text):
        show(text)
        if text != "\n":
            monkeypatch.setattr(terminal, "_show", show)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(terminal, "_show", interrupted)
    monkeypatch.setitem(talk.chat._generation.settings, "max_new_tokens", 90)
    monkeypatch.setitem(talk.chat._generation.settings, "suppress_tokens", [END])
    _, shown = talk("one")
    assert "stopped" in shown.err
    assert talk.chat.messages[-1]["partial"]
    monkeypatch.setitem(talk.chat._generation.settings, "max_new_tokens", 3)
    _, shown = talk("two")
    assert "4 messages" not in shown.err
    assert "2 messages" in shown.err
    assert questions(talk.chat) == ["one", "two"]


def test_control_characters_of_an_answer_do_not_reach_the_terminal(monkeypatch):
    monkeypatch.setattr("sys.stdout", io.StringIO())
    terminal._show("a\x1b[31mb\n\tc")
    assert terminal.sys.stdout.getvalue() == "a\ufffd[31mb\n\tc"


def test_letters_and_spaces_of_all_languages_reach_the_terminal(monkeypatch):
    text = (
        "\u00ab\u00a0oui\u202f\u00bb \u3000\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \U0001f468\u200d\U0001f469"
    )
    monkeypatch.setattr("sys.stdout", io.StringIO())
    terminal._show(text)
    assert terminal.sys.stdout.getvalue() == text
    assert plain(text) == text
    assert plain("\u202e\u2066\u2028\u200b\ufeff\x9b") == "\ufffd" * 6


def test_failing_answer_is_told_and_the_conversation_goes_on(talk, monkeypatch):
    def failing(**_):
        raise RuntimeError("too little memory")

    monkeypatch.setattr(talk.chat, "retry", failing)
    _, shown = talk("one", "/retry", "two")
    assert "RuntimeError: too little memory" in shown.err
    assert questions(talk.chat) == ["one", "two"]


def test_reader_of_the_answers_that_has_gone_ends_the_conversation(talk, monkeypatch):
    def broken(text):
        raise BrokenPipeError

    monkeypatch.setattr(terminal, "_show", broken)
    with pytest.raises(BrokenPipeError):
        talk("one", "two")


def test_edit_of_a_number_that_no_list_has_is_told(talk):
    _, shown = talk("one", f"/edit {'9' * 5000} x")
    assert questions(talk.chat) == [f"{'9' * 5000} x"]
    assert "Traceback" not in shown.err


def test_line_that_is_no_text_is_left_out(talk, monkeypatch):
    error = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    lines = iter(["one", error, "two"])

    def read(prompt):
        line = next(lines, EOFError())
        if isinstance(line, Exception):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    Terminal(talk.chat, is_interactive=False).run()
    assert questions(talk.chat) == ["one", "two"]


@pytest.mark.parametrize("command", ["/retry", "/edit two"])
def test_answer_that_is_stopped_before_it_begins_is_told(talk, monkeypatch, command):
    def stopped(**_):
        raise KeyboardInterrupt

    talk("one")
    for method in ("retry", "reply"):
        monkeypatch.setattr(talk.chat, method, stopped)
    _, shown = talk(command)
    assert "stopped before the answer began" in shown.err


def test_words_of_a_saved_chat_do_not_control_the_terminal(kvtier, tmp_path):
    with PrefixStore(tmp_path / "store") as store:
        content = Conversation([], model={"name": "\x1b[2J"}).to_json()
        store.chats.write("x", content, after=None)
    assert "\x1b" not in kvtier("chat", "--resume", "x", code=2).stderr


@pytest.mark.parametrize("command", ["chat", "warm"])
def test_home_of_an_unknown_user_is_one_line(model_folder, document, command):
    how = [str(document), "--name", "x"] if command == "warm" else []
    for model, store in ((str(model_folder), "~no-such-user/x"), ("~no-such-user/x", "store")):
        given = [command, model, *how, "--store", store, "--device", "cpu"]
        result = CliRunner().invoke(app, given, input="x", env={"COLUMNS": "200"})
        assert result.exit_code == 2
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("kvtier")]
        assert "no-such-user" in line


def test_warmed_document_that_cannot_be_kept_is_told_with_the_reason(kvtier, document, monkeypatch):
    monkeypatch.setattr("kvtier.hf.turn.manager.identify", lambda *_, **__: NotReusable("a test says so"))
    assert "nothing of 'x' is kept: a test says so" in kvtier("warm", document, "--name", "x", code=1).stderr


def test_report_of_a_chat_tells_what_the_template_rewrites_and_its_text_only_when_asked():
    report = ChatReport(prompt_tokens=9, cached_tokens=7, computed_tokens=2, cached_by_tier={"disk": 7})
    assert str(report) == str(
        TurnReport(prompt_tokens=9, cached_tokens=7, computed_tokens=2, cached_by_tier={"disk": 7})
    )
    before = replace(report, lost_tokens=1000, lost_reason="'a' where it had 'b'")
    assert str(before).endswith("; the chat template has rewritten 1,000 tokens")
    after = replace(before, next_lost_tokens=4)
    assert str(after).endswith("; the chat template rewrites 4 tokens in the next prompt")
    assert "'a'" not in after.to_json()
    assert "'a'" in after.to_json(tokens=True)
    assert pickle.loads(pickle.dumps(after)) == after
