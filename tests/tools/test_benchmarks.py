"""The parts of the benchmarks: run order, statistics, results, workload, and runs on a tiny model."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache
from typer.testing import CliRunner

from benchmarks import decode, first_turn, fresh_turn, gpu, gpu_turns, imports, page_cache, restore
from benchmarks.__main__ import NAMES, app
from benchmarks.import_probe import replaced
from benchmarks.machine import CHECKOUT, Machine, commit, describe_machine
from benchmarks.measure import (
    BenchmarkError,
    Competitor,
    Options,
    Sample,
    Spread,
    agreement,
    interleave,
    paired_ratios,
    turn_order,
)
from benchmarks.result import Result, Target, as_json, make_case, write_json
from benchmarks.start_parts import part_clocks
from benchmarks.table import format_value
from benchmarks.workload import copied, expect_source, keys_values, reported, running_text, seeded, timed_turn
from kvtier import PrefixStore, TieredCache
from kvtier.hf.compat.names import passed
from kvtier.transfer.base import InlineEngine
from tests.support.upstream import CACHE

VOCABULARY = 200  # vocabulary size of the tiny models
needs_dropping = pytest.mark.skipif(not page_cache.can_drop(), reason="this system cannot drop pages")


def quiet(text):
    pass


def samples_of(*values, answer=None, metric="s"):
    return tuple(Sample({metric: value}, answer) for value in values)


# --- order ------------------------------------------------------------------------------------------------------------


def test_turn_order_of_two_competitors_is_balanced():
    assert ["".join(turn_order("ab", r)) for r in range(4)] == ["ab", "ba", "ba", "ab"]


def test_turn_order_varies_the_first_competitor_and_each_predecessor():
    orders = [turn_order("abcd", r) for r in range(8)]
    assert {order[0] for order in orders} == set("abcd")
    for name in "abcd":
        before = {order[order.index(name) - 1] for order in orders if order.index(name)}
        assert len(before) > 1


@pytest.mark.parametrize("competitors", range(1, 6))
@pytest.mark.parametrize("round_index", range(7))
def test_every_competitor_runs_once_per_round(competitors, round_index):
    names = [str(i) for i in range(competitors)]
    assert sorted(turn_order(names, round_index)) == names


def test_rounds_are_interleaved_and_samples_stay_in_round_order():
    ran = []

    def competitor(name):
        def run():
            ran.append(name)
            return Sample({"s": float(len(ran))})

        return Competitor(name, run)

    samples = interleave([competitor("a"), competitor("b")], 3, quiet)
    assert ran == ["a", "b", "b", "a", "b", "a"]
    assert [s.values["s"] for s in samples["a"]] == [1.0, 4.0, 6.0]
    assert [s.values["s"] for s in samples["b"]] == [2.0, 3.0, 5.0]


def test_interleave_rejects_equal_names_and_zero_rounds():
    one = Competitor("a", lambda: Sample({"s": 1.0}))
    with pytest.raises(BenchmarkError, match="same name"):
        interleave([one, one], 1, quiet)
    with pytest.raises(BenchmarkError, match="rounds=0"):
        interleave([one], 0, quiet)


def test_explicit_rounds_override_quick_and_default():
    assert Options().rounds_or(7) == 7
    assert Options(quick=True).rounds_or(7) == 2
    assert Options(rounds=5, quick=True).rounds_or(7) == 5


# --- statistics -------------------------------------------------------------------------------------------------------


def test_spread_is_median_and_extremes():
    assert Spread.of([3.0, 1.0, 10.0]) == Spread(3.0, 1.0, 10.0)
    assert Spread.of([4.0, 1.0]).median == 2.5


def test_ratios_are_taken_round_by_round():
    # The machine was twice as slow in the second round. The ratio of medians would be 2 as well, but not its spread.
    assert paired_ratios([2.0, 4.0], [1.0, 2.0]) == [2.0, 2.0]
    with pytest.raises(ValueError, match="zip"):
        paired_ratios([1.0], [1.0, 2.0])


def test_agreement_names_the_first_token_that_differs():
    reference = (1, 2, 3)
    assert agreement(samples_of(1.0, answer=(1, 2, 3)), reference) == "equal"
    assert agreement([Sample({}, (1, 2, 3)), Sample({}, (1, 9, 3))], reference) == "differs at token 1 in round 2"
    assert agreement([Sample({}, (1, 2))], reference) == "differs at token 2 in round 1"
    assert agreement([Sample({}, None)], reference) == "no answer"
    assert agreement([Sample({}, (1,))], None) == "no answer"


# --- cases and results ------------------------------------------------------------------------------------------------


def test_speedup_and_cost_are_inverse():
    samples = {"base": samples_of(4.0, 8.0), "other": samples_of(2.0, 4.0)}
    speedup = make_case("t", samples, "s", baseline="base")
    cost = make_case("t", samples, "s", baseline="base", ratio_kind="cost")
    assert speedup.ratio("other") == 2.0
    assert cost.ratio("other") == 0.5
    assert speedup.ratio("base") == cost.ratio("base") == 1.0
    assert speedup.row("other").samples == (2.0, 4.0)


def test_a_case_without_baseline_has_no_ratios():
    case = make_case("t", {"a": samples_of(1.0)}, "s")
    assert case.row("a").ratio is None
    with pytest.raises(BenchmarkError, match="no baseline"):
        case.ratio("a")


def test_case_reports_medians_of_additional_figures():
    case = make_case("t", {"a": (Sample({"s": 1.0, "more": 5.0}), Sample({"s": 1.0, "more": 7.0}))}, "s")
    assert case.row("a").also == {"more": 6.0}


def test_different_tokens_are_wrong_only_for_the_same_calls():
    samples = {"plain": samples_of(1.0, answer=(1, 2)), "other": samples_of(1.0, answer=(1, 3))}
    assert wrong_of(make_case("t", samples, "s", reference="plain")) == ("t: other differs at token 1 in round 1",)
    assert wrong_of(make_case("t", samples, "s", reference="plain", other_calls=["other"])) == ()
    assert wrong_of(make_case("t", samples, "s")) == ()


def wrong_of(case):
    return Result("b", "p", 1, False, (case,)).wrong


@pytest.mark.parametrize(
    ("sense", "below", "same", "above"),
    [
        ("at least", False, True, True),
        ("more than", False, False, True),
        ("at most", True, True, False),
        ("less than", True, False, False),
    ],
)
def test_target_is_met_according_to_its_sense(sense, below, same, above):
    assert [Target("t", measured, 2.0, sense).met for measured in (1.0, 2.0, 3.0)] == [below, same, above]


MACHINE = Machine("cpu", 2, 1, "system", "3", "2", "5", "0", "abc", 2, None, "today")


def test_json_holds_samples_targets_and_machine(tmp_path):
    samples = {"a": samples_of(1.0, 3.0, answer=(1,)), "b": samples_of(2.0, 2.0, answer=(2,))}
    case = make_case("t", samples, "s", baseline="a", reference="a", facts={"tokens": 3})
    result = Result("name", "why", 2, False, (case,), (Target("fast", 1.0, 2.0, "at least"),), ("note",))
    path = write_json(result, MACHINE, tmp_path / "new" / "folder")
    assert path.name == "name.json"
    read = json.loads(path.read_text())
    assert read["machine"]["commit"] == "abc"
    assert read["targets"] == [
        {"statement": "fast", "measured": 1.0, "bound": 2.0, "sense": "at least", "unit": "×", "met": False}
    ]
    assert read["wrong"] == ["t: b differs at token 0 in round 1"]
    (row_a, row_b) = read["cases"][0]["rows"]
    assert row_a["samples"] == [1.0, 3.0]
    assert row_a["spread"] == {"median": 2.0, "minimum": 1.0, "maximum": 3.0}
    assert row_b["ratio"] == {"median": 1.0, "minimum": 0.5, "maximum": 1.5}
    assert read["cases"][0]["facts"] == {"tokens": 3}
    assert read == json.loads(json.dumps(as_json(result, MACHINE)))
    assert replace(result, targets=()).targets == ()


def test_figures_are_formatted_with_a_suitable_unit():
    assert format_value(0.01234, "s") == "12.3 ms"
    assert format_value(12.345, "s") == "12.3 s"
    assert format_value(0.1, "s/token") == "100 ms"
    assert format_value(705_300_000, "bytes") == "705 MB"


# --- the machine ------------------------------------------------------------------------------------------------------


def test_describe_machine_reports_cpu_memory_threads_torch_and_date():
    machine = describe_machine()
    assert machine.cpu
    assert 1 <= machine.cores <= (os.cpu_count() or 1)
    assert machine.memory_bytes > 2**28
    assert machine.threads == torch.get_num_threads()
    assert machine.torch == torch.__version__
    assert machine.date.endswith("+00:00")


def test_commit_marks_uncommitted_changes(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert commit(tmp_path) == "unknown"
    git("init", "--quiet")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "--quiet", "-m", "one")
    head = git("rev-parse", "HEAD")
    assert commit(tmp_path) == head
    (tmp_path / "file").write_text("two")
    assert commit(tmp_path) == head + "+changes"


# --- the workload -----------------------------------------------------------------------------------------------------


class Chat:
    """A tiny model, and a tokenizer with one token per character."""

    def __init__(self, model):
        self.model = model

    def tokenizer(self, text, add_special_tokens):
        return SimpleNamespace(input_ids=[1 + ord(letter) % (VOCABULARY - 1) for letter in text])


@pytest.fixture
def known(model, tokens):
    """Ids of a turn, and K and V of all but its last token."""
    ids = tokens(20)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids[:, :19], **{CACHE: cache})
    return tuple(ids[0].tolist()), keys_values(cache, 19)


def test_seeded_cache_answers_like_a_computed_cache(model, known, store):
    ids, states = known
    prompt = (*ids, 5, 6)
    plain = timed_turn(Chat(model), prompt, DynamicCache(config=model.config), 4)
    with seeded(store, Chat(model), ids, states) as cache:
        warm = timed_turn(Chat(model), prompt, cache, 4)
        expect_source(reported(cache).cached_by_tier, {"device": 19})
    assert warm.tokens == plain.tokens
    assert len(warm.token_seconds) == 4
    assert 0 < warm.token_seconds[0] < warm.token_seconds[-1] <= warm.seconds
    assert warm.seconds_per_decode_token == pytest.approx((warm.token_seconds[3] - warm.token_seconds[0]) / 3)


def test_seeding_a_store_that_has_the_turn_is_refused(model, known, store):
    seeded(store, Chat(model), *known).close()
    with pytest.raises(BenchmarkError, match="knows the conversation already"):
        seeded(store, Chat(model), *known)


def test_turn_from_an_unexpected_tier_is_refused():
    with pytest.raises(BenchmarkError, match=r"expected known tokens \{'host': 8\}, the turn reports \{'device': 3"):
        expect_source({"device": 3, "host": 5, "disk": 0}, {"host": 8})
    with pytest.raises(BenchmarkError, match=r"reports \{\}"):
        expect_source({"device": 0}, {"host": 8})
    with pytest.raises(BenchmarkError, match=r"reports \{'disk': 1\}"):
        expect_source({"disk": 1}, {})
    expect_source({"device": 0, "host": 8, "disk": 0}, {"host": 8})


def test_a_cache_without_a_turn_has_no_report(cache):
    with pytest.raises(BenchmarkError, match="reports no turn"):
        reported(cache)


def test_copied_store_leaves_the_template_unchanged(model, known, tokens, tmp_path):
    with PrefixStore(tmp_path / "store", block_size=8) as store:
        seeded(store, Chat(model), *known).close()
    before = sorted(tmp_path.rglob("*.safetensors"))
    with copied(tmp_path / "store") as folder:
        with PrefixStore(folder, block_size=8) as store, TieredCache(store) as cache:
            timed_turn(Chat(model), (*known[0], *range(1, 20)), cache, 4)
            expect_source(reported(cache).cached_by_tier, {"disk": 19})
        assert len(list(folder.rglob("*.safetensors"))) > len(before)
    assert not folder.exists()
    assert sorted(tmp_path.rglob("*.safetensors")) == before


def test_block_files_are_ordered_by_their_tokens(model, known, tmp_path):
    with PrefixStore(tmp_path, block_size=8) as store:
        seeded(store, Chat(model), *known).close()
    assert [(file.start, file.stop) for file in restore._in_order(tmp_path)] == [(0, 8), (8, 16), (16, 19)]


def test_store_with_two_sequences_is_refused(model, known, tokens, tmp_path):
    with PrefixStore(tmp_path, block_size=8) as store:
        seeded(store, Chat(model), *known).close()
        other = tuple(tokens(20, seed=1)[0].tolist())
        seeded(store, Chat(model), other, known[1]).close()
    with pytest.raises(BenchmarkError, match="more than one sequence"):
        restore._in_order(tmp_path)


def test_running_text_repeats_a_short_document(model):
    chat = Chat(model)
    text = running_text(chat, 40_000)
    assert len(text) == 40_000
    assert text[:100] == running_text(chat, 100)
    period = text.index(text[0], 1)
    while text[period : period + 100] != text[:100]:
        period = text.index(text[0], period + 1)
    assert text[period:] == text[: 40_000 - period]


# --- benchmarks on a tiny model ---------------------------------------------------------------------------------------


@pytest.mark.sample(1, of="benchmarks")
def test_decode_benchmark_gets_equal_tokens(model):
    case = decode._measure(Chat(model), 64, 2, Options())
    assert [row.name for row in case.rows] == [decode.PLAIN, decode.TIERED]
    assert {row.answer for row in case.rows} == {"equal"}


def test_decode_target_depends_on_the_context_length():
    assert decode._target(512, 0.98).met
    assert not decode._target(512, 0.97).met
    assert not decode._target(4096, 1.0).met
    assert decode._target(7900, 1.01).met


@pytest.fixture
def streaming_setup(make_model, monkeypatch):
    """A CPU in place of the accelerator: pages go to host memory, and come back."""
    monkeypatch.setattr(gpu, "PrefixStore", partial(PrefixStore, block_size=8))
    monkeypatch.setattr(gpu, "_CHUNK", 32)
    model = make_model("llama", num_hidden_layers=12)
    return gpu.set_up("tiny", model, torch.device("cpu"), 512, lambda device: InlineEngine())


@pytest.mark.sample(1, of="benchmarks")
def test_offloaded_and_plain_decoding_give_equal_tokens(streaming_setup):
    setup = streaming_setup
    case = gpu.measure(setup, 2, Options(), offloading=False)
    assert {row.answer for row in case.rows} == {"equal"}
    assert [row.also.get("cold_layers", 0) > 0 for row in case.rows] == [False, False, True, True]
    half, quarter = (case.row(name).also for name in gpu._FRACTIONS)
    up = [row["bytes_up_per_call"] for row in (half, quarter)]
    assert 0 < up[0] < up[1] < 1.1 * case.facts["keys_values_bytes"]  # a little more: the last prefetch is not used
    for row in (half, quarter):
        assert row["floor_s"] == pytest.approx(row["bytes_up_per_call"] / case.facts["link_up_bytes_per_second"])
    assert len(gpu._movements(case)) == 2


@pytest.mark.sample(1, of="benchmarks")
def test_budget_that_keeps_all_layers_hot_is_refused(streaming_setup, monkeypatch):
    monkeypatch.setattr(gpu, "_FRACTIONS", {"half": 9.0})
    with pytest.raises(BenchmarkError, match="0 layers were cold"):
        gpu.measure(streaming_setup, 1, Options(), offloading=False)


@pytest.mark.sample(1, of="benchmarks")
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_whole_turns_on_a_device_get_equal_tokens(make_model, monkeypatch, kind):
    monkeypatch.setattr(gpu_turns, "PrefixStore", partial(PrefixStore, block_size=8))
    model = make_model(kind)
    prompt = gpu_turns.prompt_of(model, 60)
    setup = gpu_turns.Setup("tiny", model, torch.device("cpu"), prompt, lambda device: InlineEngine())
    first, later = gpu_turns.measure(setup, 1, Options())
    assert {row.answer for row in first.rows} == {"equal"}
    assert [row.name for row in later.rows] == [gpu_turns.PLAIN, gpu_turns.CONTINUED, gpu_turns.TIERED]


@pytest.mark.parametrize("name", ["gpu", "gpu_turns"])
def test_benchmark_that_cannot_run_here_is_skipped(monkeypatch, tmp_path, name):
    monkeypatch.setattr(gpu, "accelerators", list)
    monkeypatch.setattr(gpu_turns, "accelerators", list)
    done = CliRunner().invoke(app, [name, "--output", str(tmp_path)])
    assert done.exit_code == 0
    assert f"{name} skipped: no accelerator" in done.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.sample(1, of="benchmarks")
def test_first_turns_are_cold_and_give_equal_tokens(model):
    turn, first_token = first_turn._measure(Chat(model), 32, 2, Options())
    for case in (turn, first_token):
        assert [row.answer for row in case.rows] == ["equal"] * 3
    assert all(a > b for a, b in zip(turn.rows[1].samples, first_token.rows[1].samples, strict=True))


def test_first_turn_with_cached_tokens_is_refused(model, monkeypatch):
    store = PrefixStore()
    monkeypatch.setattr(first_turn, "PrefixStore", lambda folder: store)
    monkeypatch.setattr(store, "close", lambda: None)
    with pytest.raises(BenchmarkError, match="expected 32 computed tokens"):
        first_turn._measure(Chat(model), 32, 2, Options())


def test_turn_with_too_few_tokens_is_refused(model):
    class Short:
        config, device = model.config, model.device

        def generate(self, **settings):
            return model.generate(**(settings | {"max_new_tokens": 2, "min_new_tokens": 2}))

    with pytest.raises(BenchmarkError, match="asked for 4 tokens, got 2"):
        timed_turn(Chat(Short()), (1, 2, 3), DynamicCache(config=model.config), 4)


@pytest.fixture
def restore_bench(model, known, tmp_path):
    folders = {codec: tmp_path / codec for codec in ("raw", "zstd")}
    for codec, folder in folders.items():
        with PrefixStore(folder, compression=codec) as store:
            seeded(store, Chat(model), *known).close()
    return restore._Bench(Chat(model), *known, folders)


@pytest.mark.sample(1, of="benchmarks")
@pytest.mark.parametrize("dropped", [False, pytest.param(True, marks=[needs_dropping])])
def test_restore_benchmark_gets_equal_bytes_from_every_source(restore_bench, dropped):
    case = restore_bench.case(2, Options(), dropped=dropped)
    assert case.facts["tokens"] == 19
    assert (restore.RAM in [row.name for row in case.rows]) is not dropped
    assert case.row(restore.PLAIN).also["bytes_per_s"] > 0


def test_restored_bytes_that_differ_stop_the_benchmark(restore_bench):
    restore_bench._known[1][1][0, 0, 3] += 1
    for run in (lambda: restore_bench._plainly(None), lambda: restore_bench._from_disk("raw")):
        with pytest.raises(BenchmarkError, match="layer 1 does not hold the bytes"):
            run()


def test_failing_new_process_reports_its_error(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "no such model")
    monkeypatch.setattr(fresh_turn.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(BenchmarkError, match=r"a new process with dynamic failed:\nno such model"):
        fresh_turn.run_fresh_turn("nowhere", "dynamic", (1,), 1)
    with pytest.raises(BenchmarkError, match=r"importing failed:\nno such model"):
        imports._probe(with_kvtier=False)


def test_clocks_of_parts_add_up_and_are_taken_away_again(model, tmp_path):
    before = vars(PrefixStore)["restore"]
    ids = torch.arange(1, 12).unsqueeze(0)
    for opened, found in ((False, 0), (True, 8)):
        with PrefixStore(tmp_path, block_size=4) as store, TieredCache(store) as cache, part_clocks() as parts_of:
            model.generate(ids, **passed(cache), max_new_tokens=1, do_sample=False)
            assert cache.last_turn.cached_tokens >= found
            parts = parts_of(10.0)
        assert sum(parts.values()) == pytest.approx(10.0)
        assert ("open blocks" in parts) is opened
        assert min(parts.values()) >= 0
    assert vars(PrefixStore)["restore"] is before


@pytest.mark.parametrize(
    ("replaced_names", "threads", "message"),
    [
        (["DynamicCache.update"], [], "changed transformers: DynamicCache.update"),
        (imports.WRAPPED, ["kvtier-read"], "kvtier-read"),
    ],
)
def test_import_with_side_effects_stops_the_benchmark(monkeypatch, replaced_names, threads, message):
    seen = {"seconds": 2.0, "kvtier_seconds": 1.0, "replaced": replaced_names, "threads_started": threads}
    monkeypatch.setattr(imports, "_probe", lambda with_kvtier: seen)
    with pytest.raises(BenchmarkError, match=message):
        imports._with_kvtier()


# --- system queries ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mincore is asked as Linux answers it")
def test_recently_read_pages_are_resident(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 20))
    (tmp_path / "empty").touch()
    path.read_bytes()
    assert page_cache.resident_share([path, tmp_path / "empty"]) == 1.0
    assert page_cache.resident_share([tmp_path / "empty"]) == 0.0


@needs_dropping
def test_dropping_pages_keeps_the_bytes(tmp_path):
    path = tmp_path / "file"
    content = os.urandom(1 << 20)
    path.write_bytes(content)
    kind = subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True, check=True)
    if kind.stdout.strip() in ("tmpfs", "ramfs"):
        pytest.skip("a file system in memory has nowhere to drop pages to")
    page_cache.drop([path])
    assert page_cache.resident_share([path]) < 0.5
    assert path.read_bytes() == content


def test_replaced_finds_changed_added_and_deleted_attributes():
    class Owner:
        kept = gone = object()
        other = 1

    before = dict(vars(Owner))
    assert replaced(before, Owner) == []
    Owner.other, Owner.new = object(), 1
    del Owner.gone
    assert replaced(before, Owner) == ["Owner.gone", "Owner.new", "Owner.other"]


@pytest.mark.sample(2, of="new processes")
def test_importing_kvtier_wraps_only_the_declared_names_and_starts_no_thread():
    command = [sys.executable, "-m", "benchmarks.import_probe", "kvtier"]
    seen = json.loads(subprocess.run(command, cwd=CHECKOUT, capture_output=True, check=True).stdout)
    assert seen["replaced"] == imports.WRAPPED
    assert seen["threads_started"] == []
    assert 0 < seen["kvtier_seconds"] < seen["seconds"]


def test_unknown_benchmark_is_refused_with_the_known_names():
    done = CliRunner().invoke(app, ["speed"])
    assert done.exit_code == 2
    assert "no benchmark speed" in done.output
    assert NAMES[0] in done.output


def test_every_benchmark_has_a_module_docstring_and_a_readme_entry():
    folder = CHECKOUT / "benchmarks"
    readme = (folder / "README.md").read_text(encoding="utf-8")
    for name in NAMES:
        first_line = Path(folder / f"{name}.py").read_text(encoding="utf-8").splitlines()[0]
        assert first_line.startswith('"""')
        assert first_line.endswith('."""')
        assert f"`{name}`" in readme
