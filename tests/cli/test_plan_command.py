"""``kvtier plan``: figures with their origin, the known break-even points, JSON, and refusals."""

from __future__ import annotations

import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from typer.testing import CliRunner

from kvtier.cli import app
from kvtier.cli.plan import probe, surroundings
from kvtier.cli.plan.figures import readable
from kvtier.report.text import duration_text
from tests.hf.test_model_sheet import gemma3_12b, llama_8b, qwen3_4b
from tests.support import families

ORIGINS = {"measured here", "derived", "data sheet", "assumed", "given"}


def plan(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def data(*arguments):
    done = plan(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.parametrize("folder", ["/nowhere", "./nowhere", "~/nowhere", "no/such/model"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(folder):
    done = plan(folder)
    assert done.exit_code == 2
    assert "there is no such folder" in done.stderr


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_plan_fits_the_terminal_and_keeps_figures_whole(tiny, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    printed = plan(tiny, "--device", "RTX 4090").output
    assert [line for line in printed.splitlines() if cell_len(line) > width] == []
    assert "…" not in printed
    assert re.search(r"loading from host +24.9 GB/s", printed)


@pytest.fixture
def tiny(tmp_path):
    """The folder of a tiny config."""
    families.build("llama").config.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def _quick(monkeypatch, tmp_path):
    """Probe with small pieces, and read a small file in a folder of the test's own."""
    for name, value in {"_SECONDS": 0.01, "_WIDTH": 64, "_COPIED_BYTES": 2**16, "_FILE_BYTES": 2**20}.items():
        monkeypatch.setattr(probe, name, value)
    monkeypatch.setattr(surroundings, "user_cache_folder", lambda option: tmp_path / "cache")


# Derived once for the same cards with utilisations of 0.40 and 0.45: tokens a second at 8,192, break-even bandwidth in
# GB/s, and how much faster K and V come from pinned memory than they are computed.
TABLE = [
    (llama_8b, "T4", 1.6e3, 0.21, 57),
    (llama_8b, "RTX 4090", 4.6e3, 0.60, 41),
    (llama_8b, "A100", 8.7e3, 1.14, 22),
    (llama_8b, "H100", 27.6e3, 3.6, 14),
    (qwen3_4b, "A100", 14.6e3, 2.15, 12),
    (qwen3_4b, "H100", 46e3, 6.8, 7),
    (gemma3_12b, "T4", 1.1e3, 0.12, 99),
    (gemma3_12b, "H100", 19.5e3, 2.1, 24),
]


@pytest.mark.parametrize(("config", "device", "rate", "even", "gain"), TABLE)
def test_known_break_even_points(tmp_path, config, device, rate, even, gain):
    config().save_pretrained(tmp_path)
    found = data(tmp_path, "--tokens", 8192, "--device", device)
    (prediction,) = found["predictions"]
    reading = found["model"]["operations_per_token"]["value"] / found["device"]["memory"]["value"]
    assert 8192 / (prediction["cold_seconds"] - reading) == pytest.approx(rate, rel=0.05)
    bandwidth = prediction["break_even_bytes_per_second"]
    assert bandwidth / 1e9 == pytest.approx(even, rel=0.05)
    assert found["tiers"]["host"]["load"]["value"] / bandwidth == pytest.approx(gain, rel=0.07)


def test_every_figure_has_an_origin(tiny):
    def figures(value):
        if isinstance(value, dict):
            if "value" in value:
                yield value
            for each in value.values():
                yield from figures(each)

    found = data(tiny, "--device", "h100", "--disk-rate", "2GB/s", "--host-budget", "1GiB")
    every = list(figures(found))
    assert len(every) > 10
    assert {each["origin"] for each in every} <= ORIGINS
    assert all(each["how"] for each in every)
    assert {each["origin"] for each in found["predictions"]} == {"derived"}
    assert found["tiers"]["disk"]["load"] == {"value": 2e9, "unit": "bytes/s", "origin": "given", "how": "--disk-rate"}
    assert found["tiers"]["host"]["budget"]["value"] == 2**30
    assert found["tiers"]["host"]["fits_tokens"] == 2**30 // found["model"]["kv_bytes_per_token"]["value"]
    assert found["device"]["operations"]["origin"] == "data sheet"


@pytest.mark.usefixtures("_quick")
def test_this_machine_is_measured_and_nothing_is_left(tiny, tmp_path):
    found = data(tiny, "--device", "cpu", "--dtype", "float32", "--tokens", 64, "--tokens", 128)
    assert found["dtype"] == "float32"
    assert found["device"]["operations"]["origin"] == "measured here"
    assert found["tiers"]["disk"]["load"]["origin"] == "measured here"
    assert found["device"]["copies_take_compute_cores"] is True
    assert [each["tokens"] for each in found["predictions"]] == [64, 128]
    for each in found["predictions"]:
        for tier in ("host", "disk"):
            assert each["both"][tier]["seconds"] <= min(each["cold_seconds"], each["load_seconds"][tier])
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.usefixtures("_quick")
def test_a_folder_that_cannot_be_written_leaves_an_assumed_rate(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "_disk_rate", lambda folder: (None, False))
    assert data(tiny)["tiers"]["disk"]["load"]["origin"] == "assumed"


def flowing(done):
    """Return the output in one line: where lines wrap depends on the length of paths."""
    return " ".join(done.output.split())


def test_text_names_windows_states_and_the_limit(tmp_path):
    gemma3_12b().save_pretrained(tmp_path)
    done = plan(tmp_path, "--device", "A100", "--tokens", 200_000)
    assert done.exit_code == 0, done.output
    for text in ("sliding windows", "335 MB", "64 KiB", "data sheet", "assumed", "made for 131,072 tokens at most"):
        assert text in flowing(done)
    assert "the weights alone take more" in flowing(plan(tmp_path, "--device", "T4"))
    families.build("qwen3_next").config.save_pretrained(tmp_path)
    assert "states of 2 layers" in flowing(plan(tmp_path, "--device", "A100"))
    families.build("deepseek_v4").config.save_pretrained(tmp_path)
    assert "left out below" in flowing(plan(tmp_path, "--device", "A100"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--device", "K80"], "device='K80' is not known"),
        (["--dtype", "int4"], "--dtype='int4' must be one of"),
        (["--device", "T4", "--disk-budget", "much"], "--disk-budget='much' is not a byte count"),
        (["--device", "T4", "--host-rate", "fast"], "--host-rate='fast' is not a byte count"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(tiny, arguments, says):
    done = plan(tiny, *arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("kvtier plan: ")
    assert says in line


def test_a_folder_without_config_is_one_line_and_exit_code_2(tmp_path):
    done = plan(tmp_path)
    assert done.exit_code == 2
    assert done.stderr.splitlines() == [
        f"kvtier plan: model={str(tmp_path)!r}: the folder has no config.json; name a folder that has one."
    ]


@given(st.floats(1e-9, 1e6))
def test_durations_have_a_unit_and_few_digits(value):
    number, unit = duration_text(value).split(" ")
    assert float(number.replace(",", "")) * {"µs": 1e-6, "ms": 1e-3, "s": 1}[unit] == pytest.approx(value, rel=0.01)


def test_numbers_as_people_read_them():
    assert readable(131072, "bytes") == "128 KiB"
    assert readable(335e6, "bytes") == "335 MB"
    assert readable(3.35e12, "bytes/s") == "3.35 TB/s"
    assert readable(8.03e9, "parameters") == "8.03 G"
    assert readable(12, "operations") == "12 op"
    assert readable(1234567, "tokens") == "1,234,567"


def test_a_probe_so_slow_that_one_call_takes_its_time_still_has_a_figure(monkeypatch):
    monkeypatch.setattr(probe, "_SECONDS", 0.0)
    rate = probe._read_rate(probe.engine_for(torch.device("cpu")), torch.device("cpu"), torch.float32)
    assert 0 < rate < 1e15
