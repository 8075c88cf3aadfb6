"""``kvtier bench``: every place answers, comparisons find differences, nothing is left behind."""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kvtier.cli import app
from kvtier.cli.bench import command, compare, measure, places, turns
from kvtier.cli.bench.machine import describe_machine
from tests.support import families

NAMES = [places.COLD, places.PLAIN, places.DEVICE, places.HOST, places.DISK]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with weights, but without tokenizer."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    families.build("llama").save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """A folder of the test's own for temporary files."""
    path = tmp_path / "temporary"
    path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    return path


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], env={"COLUMNS": "200"})


def short(folder, *arguments):
    return bench(folder, "--tokens", 80, "--new-tokens", 3, "--rounds", 2, "--device", "cpu", *arguments)


def test_every_place_answers_with_the_bits_of_plain_transformers(folder, temporary, tmp_path):
    done = short(folder, "--no-new-process", "--output", tmp_path / "out")
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert found["ok"] is True
    assert [row["place"] for row in found["rows"]] == NAMES
    for row in found["rows"]:
        assert len(row["seconds"]) == 2
        assert row["median_seconds"] > 0
        assert row["place"] in done.output
    tiers = {row["place"]: {k: v for k, v in row["cached_by_tier"].items() if v} for row in found["rows"]}
    assert [tiers[name] for name in NAMES[2:]] == [{"device": 48}, {"host": 48}, {"disk": 48}]
    assert all(row["same_calls"]["equal_bits"] for row in found["rows"][2:])
    assert all(row["against_cold"]["tokens"] == 6 for row in found["rows"][2:])
    assert all(row["against_cold"] == found["control_two_passes_against_one"] for row in found["rows"][2:])
    assert found["subject"]["text"] == "random ids: the model has no tokenizer"
    assert found["machine"]["cores"] > 0
    assert "equal bits" in done.output
    assert "control" in done.output
    assert list(temporary.iterdir()) == []


def test_no_round_begins_when_the_time_is_over_but_the_first(folder):
    found = json.loads(short(folder, "--no-new-process", "--json", "--seconds", 0).stdout)
    assert [len(row["seconds"]) for row in found["rows"]] == [1] * len(NAMES)
    assert found["notes"] == ["1 of 2 rounds: 0 seconds were over (--seconds)."]


@pytest.mark.slow
def test_a_new_process_answers_from_the_files(folder, temporary):
    done = bench(folder, "--tokens", 80, "--new-tokens", 2, "--rounds", 1, "--device", "cpu", "--json")
    assert done.exit_code == 0, done.output
    row = json.loads(done.stdout)["rows"][-1]
    assert row["place"] == places.PROCESS
    assert row["cached_by_tier"]["disk"] == 48
    assert row["same_calls"]["equal_bits"]
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("name", ["gemma3", "qwen3_next"])
def test_models_with_windows_and_states_are_measured(name, tmp_path):
    families.build(name).save_pretrained(tmp_path / "model")
    done = short(tmp_path / "model", "--no-new-process", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [sum(row["cached_by_tier"].values()) for row in found["rows"][2:]] == [48, 48, 48]


def test_a_failing_new_process_is_a_note(folder, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    done = short(folder, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [row["place"] for row in found["rows"]] == NAMES
    assert found["notes"] == ["the new process ended with exit code 1: it said nothing"]


def test_a_model_that_does_not_fit_twice_is_not_tried_in_a_new_process(folder, monkeypatch):
    monkeypatch.setattr(places, "free_device_bytes", lambda device: 1000)
    assert json.loads(short(folder, "--json").stdout)["notes"][0].startswith("No new process")


def test_wrong_bits_are_an_error(folder, monkeypatch):
    right = places.Places._host

    def wrong(self, prompt):
        found = right(self, prompt)
        found.logits[0, 0] += 1
        return found

    monkeypatch.setattr(places.Places, "_host", wrong)
    done = short(folder, "--no-new-process")
    assert done.exit_code == 1
    assert "This is a bug in kvtier" in done.output
    assert "Δ 1, 0 of 6 tokens" in done.output


def test_bits_that_plain_transformers_does_not_repeat_are_not_judged(folder, monkeypatch):
    right, calls = places.Places.plain, []

    def random(self, prompt):
        found = right(self, prompt)
        calls.append(prompt)
        found.logits[0, 0] += len(calls)
        return found

    monkeypatch.setattr(places.Places, "plain", random)
    done = short(folder, "--no-new-process", "--json")
    assert done.exit_code == 0
    assert any("does not repeat its own" in note for note in json.loads(done.stdout)["notes"])


@pytest.mark.parametrize("at", ["first prompt", "a round"])
def test_an_interrupt_leaves_no_files_and_no_threads(folder, temporary, monkeypatch, at):
    def interrupted(*arguments):
        if at == "a round":
            assert list(temporary.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(*((places, "new_cache") if at == "first prompt" else (places.Places, "_disk")), interrupted)
    threads = threading.active_count()
    assert short(folder, "--no-new-process").exit_code == 130
    assert list(temporary.iterdir()) == []
    assert threading.active_count() == threads


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--device", "H100"], "--device='H100' must be here or cpu"),
        (["--tokens", 5000], "the model is made for 2,048"),
        (["--rounds", 70], "the text has only"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(folder, arguments, says):
    done = bench(folder, "--tokens", 80, *arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("kvtier bench: ")
    assert says in line


def test_a_model_that_cannot_be_loaded_is_one_line_and_exit_code_2(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    for path, says in ((tmp_path, "cannot be loaded"), (tmp_path / "temporary", "has no config.json")):
        done = bench(path)
        assert done.exit_code == 2
        assert says in done.stderr.splitlines()[-1]


def test_a_document_without_text_and_a_folder_that_cannot_be_written_are_errors(folder, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "picture.txt").write_bytes(b"\xff\xfe\xff")
    assert "has no text" in short(folder, "--document", tmp_path / "empty.txt").stderr
    assert "is no text" in short(folder, "--document", tmp_path / "picture.txt").stderr
    done = short(folder, "--no-new-process", "--rounds", 1, "--output", tmp_path / "empty.txt" / "folder")
    assert done.exit_code == 2
    assert "cannot be written" in done.stderr


def test_prompts_share_a_prefix_and_part_at_its_end():
    ids = tuple(range(50)) * 3
    prefix, prompts = command._prompts(ids, 100, 4)
    assert all(prompt[: len(prefix)] == prefix and len(prompt) == 100 for prompt in prompts)
    assert len({prompt[len(prefix)] for prompt in prompts}) == 4


def made(tokens, logits):
    return turns.Answer(tuple(tokens), torch.tensor(logits), 1.0)


def test_logits_are_compared_up_to_the_first_token_that_differs():
    one = made([1, 2, 3], [[0.0, 1.0], [0.0, 2.0], [9.0, 0.0]])
    other = made([1, 5, 3], [[0.0, 1.5], [0.25, 2.0], [0.0, 9.0]])
    found = compare.difference(one, other)
    assert found == compare.Difference(False, 0.5, 1, 3)
    assert found.text == "Δ 0.5, 1 of 3 tokens"
    assert compare.difference(one, one) == compare.Difference(True, 0.0, 0, 3)
    assert compare.largest([found, compare.difference(one, one)]) == compare.Difference(False, 0.5, 1, 6)


def test_equal_infinities_are_no_difference_and_nan_is_one():
    inf = made([1], [[-torch.inf, 0.0]])
    assert compare.difference(inf, inf).equal_bits
    assert compare.difference(inf, made([1], [[torch.nan, 0.0]])).largest_logit_delta == torch.inf


def test_rows_take_turns_and_a_median_stands_for_the_rounds():
    row = measure.Row("x", (3.0, 1.0, 9.0), {}, None, None, True, None)
    assert row.median_seconds == 3.0
    assert not row.is_wrong


def test_the_machine_is_described():
    machine = describe_machine(torch.device("cpu"))
    assert machine.packages.keys() == {"kvtier", "torch", "transformers"}
    assert machine.device == "cpu"
    assert machine.memory_bytes > 2**28
    assert Path("/proc/cpuinfo").exists() <= bool(machine.cpu)


def test_the_picture_is_a_png_where_matplotlib_is_installed(folder, tmp_path):
    pytest.importorskip("matplotlib")
    done = short(folder, "--no-new-process", "--rounds", 1, "--output", tmp_path)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
