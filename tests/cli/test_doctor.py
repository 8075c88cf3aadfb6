"""``kvtier doctor`` produces every finding, leaves nothing behind and detects a broken engine."""

import json
import random
import re
import shutil
import sys
import threading
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kvtier.cli import app
from kvtier.cli.doctor import command as doctor
from kvtier.cli.doctor import devices, examination, findings, scripts, selftest, spill
from kvtier.transfer.accelerator import engine_for
from kvtier.transfer.base import InlineEngine
from kvtier.transfer.cpu import ThreadEngine

CPU = torch.device("cpu")
Partition = namedtuple("Partition", "mountpoint fstype")
Usage = namedtuple("Usage", "total used free")


class LosesOneByte(ThreadEngine):
    """Threads write and read files; one byte of each read is lost."""

    def call(self, task, *, reads=(), writes=(), after=()):
        def damage():
            task()
            for tensor in writes:
                tensor[..., :1, :1] = 0

        return super().call(damage, reads=reads, writes=writes, after=after)


class Fails(InlineEngine):
    """Every copy and every read fails."""

    def call(self, task, *, reads=(), writes=(), after=()):
        raise RuntimeError("the link is down")


class Beside(ThreadEngine):
    """A CPU engine that treats its host memory as another device's."""

    device_is_host = False


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Measure with small pieces and files."""
    monkeypatch.setattr(devices, "_PIECE_BYTES", 2**16)
    monkeypatch.setattr(spill, "_FILE_BYTES", 2**20)
    monkeypatch.setattr(spill, "_PIECE_BYTES", 2**18)


@pytest.fixture
def without_accelerator(monkeypatch):
    monkeypatch.setattr(devices, "accelerators", list)


def run(*arguments):
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)])


def by_subject(found):
    return {finding.subject: finding for finding in found}


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.sample(1, of="runs of the doctor")
@pytest.mark.usefixtures("without_accelerator")
def test_doctor_reports_every_finding_on_a_working_machine(tmp_path):
    folder, report = tmp_path / "a" / "b", tmp_path / "report.json"
    done = run("--spill-dir", folder, "--seconds", 0, "--json", report)
    assert done.exit_code == 0, done.output
    read = json.loads(report.read_text())
    assert read["ok"] is True
    subjects = [finding["subject"] for finding in read["findings"]]
    assert subjects == ["versions", "cpu", "memory", "accelerator", "spill folder", "disk", "exactness", "races"]
    for finding in read["findings"]:
        assert f"{finding['level']:<8} {finding['subject']}" in done.output
        assert finding["text"] in done.output
    assert "Streaming works here." in done.output
    facts = {finding["subject"]: finding["facts"] for finding in read["findings"]}
    assert facts["exactness"]["cold_layers"][0] == scripts.LAYERS
    assert facts["exactness"]["cold_layers"][3] == 0
    assert facts["disk"]["file_bytes"] == 2**20
    assert sorted(tmp_path.iterdir()) == [report]


@pytest.mark.usefixtures("without_accelerator")
def test_json_on_standard_output_is_not_mixed_with_text(tmp_path, monkeypatch):
    monkeypatch.setattr(selftest.SelfTest, "run", lambda self, seconds: [])
    done = run("--spill-dir", tmp_path, "--json", "-")
    assert json.loads(done.stdout)["ok"] is True
    assert "versions" in done.stderr


@pytest.mark.sample(1, of="runs of the doctor")
@pytest.mark.usefixtures("without_accelerator")
@pytest.mark.parametrize(
    ("engine", "says"),
    [(LosesOneByte, "logits that are off by|another token"), (Fails, "ends with RuntimeError: the link is down")],
)
def test_broken_engine_is_reported_as_a_problem(tmp_path, monkeypatch, engine, says):
    monkeypatch.setattr(examination, "engine_for", lambda device: engine())
    monkeypatch.setattr(selftest.SelfTest, "races", lambda self, seconds: ())
    report = tmp_path / "report.json"
    done = run("--spill-dir", tmp_path / "spill", "--json", report)
    assert done.exit_code == 1
    read = json.loads(report.read_text())
    assert read["ok"] is False
    problems = {f["subject"]: f for f in read["findings"] if f["level"] == "problem"}
    assert set(problems) == {"exactness"}
    assert re.search(says, problems["exactness"]["text"])
    assert "Do not use device_budget here" in problems["exactness"]["text"]
    assert not (tmp_path / "spill").exists()


@pytest.mark.usefixtures("without_accelerator")
def test_unwritable_spill_folder_is_reported_as_a_problem(tmp_path):
    (tmp_path / "file").write_text("no folder")
    done = run("--spill-dir", tmp_path / "file" / "spill", "--seconds", 0)
    assert done.exit_code == 1
    assert re.search(r"problem +spill folder +cannot keep files in", done.output)
    assert "--spill-dir" in done.output
    assert re.search(r"problem +self-test +not run", done.output)


class Interrupted(ThreadEngine):
    """Ctrl-C arrives while a layer waits for its pages."""

    def wait(self, fence):
        raise KeyboardInterrupt


@pytest.mark.usefixtures("without_accelerator")
def test_interrupt_during_page_transfers_leaves_no_files_or_threads(tmp_path, monkeypatch):
    threads = threading.active_count()
    monkeypatch.setattr(examination, "engine_for", lambda device: Interrupted())
    assert run("--spill-dir", tmp_path / "spill", "--seconds", 0).exit_code == 130
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == threads


@pytest.mark.usefixtures("without_accelerator")
def test_interrupt_during_the_disk_measurement_leaves_no_files(tmp_path, monkeypatch):
    def interrupted(path, piece):
        assert path.exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(spill, "_read", interrupted)
    assert run("--spill-dir", tmp_path / "spill", "--seconds", 0).exit_code == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("without_accelerator")
def test_interrupt_during_the_race_test_ends_the_background_load(tmp_path, monkeypatch):
    def interrupted(self, *arguments):
        assert threading.active_count() > threads
        raise KeyboardInterrupt

    threads = threading.active_count()
    monkeypatch.setattr(selftest.SelfTest, "exactness", lambda self: [trial()])
    monkeypatch.setattr(selftest.SelfTest, "_trial", interrupted)
    assert run("--spill-dir", tmp_path / "spill", "--seconds", 0).exit_code == 130
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == threads


@pytest.mark.sample(1, of="runs of the doctor")
@pytest.mark.usefixtures("without_accelerator")
def test_interrupt_between_two_findings_leaves_no_files(tmp_path, monkeypatch):
    shown = []

    def interrupted(console, finding):
        shown.append(finding.subject)
        if finding.subject == "exactness":
            raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "print_finding", interrupted)
    assert run("--spill-dir", tmp_path / "spill", "--seconds", 0).exit_code == 130
    assert shown[-1] == "exactness"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("without_accelerator")
def test_check_that_raises_is_a_problem_and_the_next_check_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(selftest.SelfTest, "run", lambda self, seconds: iter(()))

    def broken():
        raise ZeroDivisionError("no clock")

    monkeypatch.setattr(devices, "memory_copies", broken)
    found = by_subject(examination.examine(tmp_path, 0, engine_for))
    assert found["memory"].level == "problem"
    assert found["memory"].text == "could not be looked at: ZeroDivisionError: no clock"
    assert "disk" in found


def test_every_accelerator_is_checked(tmp_path, monkeypatch):
    """The CPU stands in for two accelerators, so no check may need a real one."""
    monkeypatch.setattr(devices, "accelerators", lambda: [CPU, CPU])
    monkeypatch.setattr(devices, "pinned_memory", lambda: findings.Finding("ok", "pinned", "stands in"))
    monkeypatch.setattr(devices, "accelerator", lambda device: findings.Finding("ok", "accelerator", "stands in"))
    tested = []
    monkeypatch.setattr(selftest.SelfTest, "run", lambda self, seconds: tested.append((self.device, seconds)) or ())
    found = list(examination.examine(tmp_path, 3, lambda device: Beside()))
    subjects = [finding.subject for finding in found]
    assert subjects.count("accelerator") == subjects.count("streams") == subjects.count("link") == 2
    assert not findings.has_problem(found)
    assert tested == [(CPU, 1.5)] * 2


# --- devices ----------------------------------------------------------------------------------------------------------


def test_side_streams_that_copy_wrong_bytes_are_a_problem():
    class Scrambles(Beside):
        def copy(self, dst, src, after=()):
            return super().copy(dst, src + 1, after)

    assert devices.side_streams(CPU, lambda device: Beside()).level == "ok"
    assert devices.side_streams(CPU, lambda device: Scrambles()).level == "problem"
    inline = devices.side_streams(CPU, lambda device: InlineEngine())
    assert inline.level == "note"
    assert inline.facts["side_streams"] is False


def test_link_finding_has_a_rate_for_each_direction():
    finding = devices.link(CPU, lambda device: Beside())
    assert finding.facts["up_bytes_per_second"] > 0
    assert finding.facts["down_bytes_per_second"] > 0


@pytest.mark.parametrize(("possible", "level"), [(9, "ok"), (4, "ok"), (3, "note"), (0, "problem")])
def test_pinned_memory_finding_depends_on_how_much_can_be_pinned(possible, level):
    left = [torch.empty(0)] * possible

    def pin(nbytes):
        if not left:
            raise RuntimeError("invalid argument")
        return left.pop()

    finding = devices.pinned_memory(pin)
    assert finding.level == level
    assert finding.facts["pinned_bytes"] == min(possible, 4) * 2**16
    assert ("ulimit -l" in finding.text) == (level != "ok")
    assert finding.facts["error"] == ("" if level == "ok" else "invalid argument")


class Module:
    """Stand-in for PyTorch's module of a device type."""

    def __init__(self, free=None):
        if free is not None:
            self.mem_get_info = lambda device: (free, 10**10)

    def get_device_name(self, device):
        return "Big Card"


@pytest.mark.parametrize(("free", "level"), [(9 * 10**9, "ok"), (10**8, "note"), (None, "note")])
def test_accelerator_finding_depends_on_its_free_memory(monkeypatch, free, level):
    monkeypatch.setattr(torch, "get_device_module", lambda device: Module(free))
    finding = devices.accelerator(CPU)
    assert finding.level == level
    assert finding.facts["name"] == "Big Card"
    assert "Big Card" in finding.text
    assert ("device_budget in bytes" in finding.text) == (free is None)


def test_little_free_host_memory_is_a_note(monkeypatch):
    monkeypatch.setattr(devices, "free_host_memory_bytes", lambda: 10**8)
    assert devices.processor().level == "note"


# --- the spill folder -------------------------------------------------------------------------------------------------


def test_file_system_is_that_of_the_deepest_and_last_mount(tmp_path):
    path = tmp_path.resolve()
    mounted = [Partition("/", "ext4"), Partition(str(path), "xfs"), Partition(str(path), "tmpfs")]
    assert spill.file_system(path / "more", mounted) == "tmpfs"
    assert spill.file_system(path / "more", mounted[:2]) == "xfs"
    assert spill.file_system(path / "more", [Partition(f"{path}-other", "tmpfs"), mounted[0]]) == "ext4"
    assert spill.file_system(path, []) == "unknown"


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="a file system in memory is looked for where Linux has it"
)
def test_spill_folder_in_memory_is_a_note():
    shared = Path("/dev/shm")
    if spill.file_system(shared) != "tmpfs":
        pytest.skip("no tmpfs here")
    before = set(shared.iterdir())
    found = by_subject(spill.check_spill_folder(shared / "kvtier-test-doctor"))
    assert found["spill folder"].level == "note"
    assert "That is RAM" in found["spill folder"].text
    assert "dropped_read_bytes_per_second" not in found["disk"].facts
    assert set(shared.iterdir()) == before


def test_nearly_full_disk_is_a_note_and_a_full_one_a_problem(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**11, 0, 4 * 2**18))
    found = by_subject(spill.check_spill_folder(tmp_path))
    assert found["spill folder"].level == "note"
    assert "nearly full" in found["spill folder"].text
    assert found["disk"].level == "ok"
    assert found["disk"].facts["file_bytes"] == 2**18  # a quarter of the free space
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**11, 0, 2**18))
    assert by_subject(spill.check_spill_folder(tmp_path))["disk"].level == "problem"
    assert list(tmp_path.iterdir()) == []


def test_slow_disk_is_measured_with_a_smaller_file(tmp_path, monkeypatch):
    monkeypatch.setattr(spill, "_LONGEST_SECONDS", 0)
    assert by_subject(spill.check_spill_folder(tmp_path))["disk"].facts["file_bytes"] == 2**18


def test_disk_that_returns_wrong_bytes_is_a_problem(tmp_path, monkeypatch):
    write = spill._write

    def forgetful(path, piece, nbytes):
        done = write(path, piece, nbytes)
        with path.open("r+b") as file:
            file.seek(100)
            file.write(bytes(8))
        return done

    monkeypatch.setattr(spill, "_write", forgetful)
    found = by_subject(spill.check_spill_folder(tmp_path))
    assert found["disk"].level == "problem"
    assert "other bytes" in found["disk"].text


def test_only_created_and_empty_folders_are_deleted(tmp_path):
    mine = tmp_path / "mine"
    with spill.made_inside(mine / "a" / "b") as scratch:
        assert scratch.parent == mine / "a" / "b"
        (scratch / "left").write_text("by whoever was interrupted")
        (mine / "theirs").write_text("someone else's")
    assert sorted(tmp_path.rglob("*")) == [mine, mine / "theirs"]
    with spill.made_inside(mine):
        pass
    assert mine.exists()


# --- scripts and trials -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(50))
def test_random_scripts_are_repeatable_and_within_their_length(seed):
    script = scripts.random_script(random.Random(seed), 96)
    assert 1 <= len(script) <= 4
    assert 0 < scripts.longest_sequence(script) <= 96
    assert script == scripts.random_script(random.Random(seed), 96)


def test_random_scripts_cover_every_kind_of_turn():
    turns = [turn for seed in range(30) for turn in scripts.random_script(random.Random(seed), 96)]
    assert any(turn.cut for turn in turns)
    assert any(turn.crop for turn in turns)
    assert any(turn.chunk for turn in turns)
    assert any(turn.chunk is None for turn in turns)


def test_plain_run_of_the_steady_script_matches_one_full_forward_pass():
    """A plain run must start each turn from the given known tokens, whatever it computed before."""
    model, script = scripts.tiny_model(CPU, torch.float32), scripts.steady_script()
    known = [0, 55, 93]
    first = scripts.run_plain(model, script, known)
    for turn, count in enumerate(known[1:], 1):
        prompt = first[turn].sequences[:, : first[turn].sequences.shape[1] - script[turn].new_tokens]
        assert count < prompt.shape[1]
        assert torch.equal(prompt[:, :count], first[turn - 1].sequences[:, :count])
    with torch.no_grad():
        whole = model(first[2].sequences[:, :-1]).logits[:, -8:]
    torch.testing.assert_close(first[2].logits, whole, atol=1e-3, rtol=1e-3)


def answer(token=1, logit=0.5):
    return scripts.Answer(torch.tensor([[3, token]]), torch.tensor([[[logit, 1.0]]]), 0)


def test_first_difference_describes_where_two_runs_differ():
    assert scripts.first_difference([answer()], [answer()]) is None
    assert "turn 2 has another token at position 1" in scripts.first_difference([answer()] * 2, [answer(), answer(2)])
    assert "off by up to 0.25" in scripts.first_difference([answer()], [answer(logit=0.75)])
    assert "not numbers" in scripts.first_difference([answer(logit=float("nan"))], [answer()])


@pytest.mark.sample(1, of="runs of the doctor")
@pytest.mark.parametrize("make", [engine_for, lambda device: InlineEngine(), lambda device: Beside()])
def test_exactness_trials_pass_from_all_cold_to_all_hot_layers(tmp_path, make):
    trials = list(selftest.SelfTest(CPU, tmp_path, make).exactness())
    assert [trial.difference for trial in trials] == [None] * 8
    cold = [trial.report.cold_layers for trial in trials]
    assert cold[:4] == cold[4:] == sorted(cold[:4], reverse=True)
    assert cold[0] == scripts.LAYERS
    assert cold[3] == 0
    assert all(trial.report.peak_device_bytes <= trial.device_budget_bytes for trial in trials)
    assert list(tmp_path.iterdir()) == []


def trial(**different):
    report = selftest.TurnReport(cold_layers=scripts.LAYERS, peak_device_bytes=10)
    fields = {"setting": "fp32", "report": report, "device_budget_bytes": 10, "turns": 2, "difference": None}
    return selftest.Trial(**(fields | different))


@pytest.mark.parametrize(
    ("trials", "level", "says"),
    [
        ([trial(), trial()], "ok", "4 turns of 2 scripts"),
        (
            [trial(), trial(difference="turn 1 is off")],
            "problem",
            "1 of 2 scripts go wrong, the first with fp32: turn 1",
        ),
        ([trial(difference="turn 1 is off", repeatable=False)], "note", "cannot be judged"),
        ([trial(device_budget_bytes=9)], "problem", "The budget is not kept"),
        ([trial(report=selftest.TurnReport())], "problem", "nothing was tested"),
    ],
)
def test_finding_of_trials_has_the_right_level_and_text(tmp_path, trials, level, says):
    finding = selftest.SelfTest(CPU, tmp_path)._finding("exactness", trials)
    assert finding.level == level
    assert says in finding.text


def test_trial_of_a_nondeterministic_model_is_marked_as_not_repeatable(tmp_path, monkeypatch):
    noise = iter(range(1, 100))

    def noisy(model, script, known):
        answers = scripts.run_plain(model, script, known)
        return [replace(one, logits=one.logits + next(noise)) for one in answers]

    monkeypatch.setattr(selftest, "run_plain", noisy)
    first = next(selftest.SelfTest(CPU, tmp_path).exactness())
    assert first.difference is not None
    assert not first.repeatable


def test_background_load_stops_with_its_context_and_raises_its_errors():
    ran = []

    class Counts(InlineEngine):
        def copy(self, dst, src, after=()):
            ran.append(dst.nbytes)
            return super().copy(dst, src, after)

    before = threading.active_count()
    with selftest.busy(Counts(), CPU):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    assert len(ran) >= 2
    with pytest.raises(RuntimeError, match="link is down"), selftest.busy(Fails(), CPU):
        pass


def test_byte_counts_are_formatted_in_gb_or_mb():
    assert findings.gigabytes(2_340_000_000) == "2.3 GB"
    assert findings.gigabytes(64 * 2**20) == "67 MB"
