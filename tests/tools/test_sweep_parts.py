"""The parts of the sweep: shrinking configs, judging answers, running workers, and writing the page."""

from __future__ import annotations

import os
import threading

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import CONFIG_MAPPING
from typer.testing import CliRunner

from kvtier.hf.compat.names import INSTALLED, OLDEST_TESTED
from sweep.__main__ import PAGES, app
from sweep.families import NOT_ALONE
from sweep.judging import judge, worst
from sweep.losses import difference
from sweep.models import NotMadeError, architectures, base_of, brief, listed, tiny_config, tiny_model
from sweep.outcome import CHECKS, Outcome, Row, Run, read_json, write_json
from sweep.page import numbers, page, reasons
from sweep.shrink import SIZES, picked_layers, shrink
from sweep.turns import Answer
from sweep.workers import examine_all

OF = {"kvtier": "1.0", "transformers": transformers.__version__}
ROWS = [
    Row("alpha", "A", "2 full", {c: Outcome("yes", cached=5) for c in ("generates", "reuses", "ram", "disk")}),
    Row(
        "beta",
        "B",
        "1 linear",
        {"generates": Outcome("yes"), "reuses": Outcome("no", "it forgets"), "ram": Outcome("no", "it forgets")},
        Outcome("wrong", "differs at token 3"),
    ),
    Row("gamma", "C", "1 full", {"generates": Outcome("upstream", "takes none")}),
    Row("delta", "D", "1 full", {"generates": Outcome("yes"), "reuses": Outcome("wrong", "differs at token 0")}),
    Row("epsilon", "E", not_made="needs a <package>"),
]


def test_picked_layers_have_one_of_each_kind_and_two_of_each_attention():
    kinds = ["sliding"] * 5 + ["full"] + ["sliding"] * 5 + ["full"]
    experts = ["dense"] * 7 + ["sparse"] * 5
    assert picked_layers({"layer_types": kinds, "mlp_layer_types": experts}, 12) == [0, 1, 5, 7, 11]
    assert picked_layers({}, 12) == [0, 1]
    assert picked_layers({}, 1) == [0]


def test_shrink_cuts_per_layer_lists_to_the_kept_layers():
    default = CONFIG_MAPPING["granite_swa"]()
    tiny = shrink(default)
    assert len(tiny["layer_types"]) == len(tiny["layer_rope_theta"]) == tiny["num_hidden_layers"] < 6
    assert set(tiny["layer_types"]) == set(default.layer_types)


@pytest.mark.sample(83)  # of 197
@pytest.mark.parametrize("name", sorted(architectures().keys() - NOT_ALONE.keys()))
def test_tiny_config_keeps_its_family_and_every_layer_type(name):
    try:
        default = CONFIG_MAPPING[base_of(name)]()
        tiny = tiny_config(name)
    except ImportError as error:
        pytest.skip(brief(error))
    except StrictDataclassFieldValidationError as error:
        if INSTALLED > OLDEST_TESTED:
            raise
        pytest.skip(brief(error))  # this version cannot make some configs without all their parts
    family = (default.model_type, default.get_text_config(decoder=True).model_type)
    assert tiny.model_type in family or tiny.model_type in {part.model_type for part in parts(default)}
    kinds = [getattr(each.get_text_config(decoder=True), "layer_types", None) or () for each in (default, tiny)]
    assert set(kinds[0]) <= set(kinds[1])


def parts(config):
    return [part for part in vars(config).values() if isinstance(part, transformers.PreTrainedConfig)]


@pytest.mark.skipif("dory" not in listed(), reason="no model with loops before transformers 5.24")
def test_tiny_looped_models_have_every_layer_type_inside_and_outside_the_loop():
    dory, inkling = tiny_config("dory"), tiny_config("inkling2_loop_text")
    inside = slice(dory.n_input_layers, dory.n_input_layers + dory.n_recurrent_layers)
    assert dory.n_recurrent_loops > 1
    assert {dory.recurrent_kv_cache_mode, tiny_config("dory:last_loop").recurrent_kv_cache_mode} == {
        "per_loop",
        "last_loop",
    }
    loops = [(dory, inside), (inkling, slice(inkling.loop_layer_index_start, inkling.loop_layer_index_end))]
    assert inkling.loop_num_passes > 1
    for config, loop in loops:
        kinds = list(config.layer_types)
        within = kinds[loop]
        del kinds[loop]
        assert set(within) == set(kinds) == set(CONFIG_MAPPING[config.model_type]().layer_types)


def test_shrink_also_shrinks_nested_configs():
    assert shrink(CONFIG_MAPPING["gemma3"]())["text_config"]["hidden_size"] == SIZES["hidden_size"]


def test_model_that_cannot_be_made_raises_with_the_reason():
    with pytest.raises(NotMadeError, match="drafts for another model"):
        tiny_model("gemma4_assistant")
    assert brief(ValueError("x " * 200)).endswith("…")


def test_the_same_seed_makes_the_same_weights():
    first, second, other = (tiny_model("llama", seed) for seed in (0, 0, 1))
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_zero_initialized_parameters_get_reproducible_values():
    model = tiny_model("doge")
    gates = [layer.self_attn.A for layer in model.model.layers]
    assert all(gate.any() for gate in gates)
    assert torch.equal(gates[0], tiny_model("doge").model.layers[0].self_attn.A)


def answer(ids, *logits):
    return Answer(torch.tensor([[7, *ids]]), torch.tensor(logits))


def test_judge_distinguishes_equal_draw_and_wrong_answers():
    reference = answer([1, 0], [0.0, 9.0], [9.0, 8.999])
    assert judge(reference, reference) == Outcome("yes", deviation=0.0)
    assert judge(answer([1, 1], [0.0, 9.0], [8.999, 9.0]), reference).verdict == "draw"
    other = judge(answer([1, 1], [0.0, 9.0], [0.0, 9.0]), reference)
    assert (other.verdict, other.reason) == ("wrong", "differs at token 1")
    assert other.deviation > 1.0
    # Logits that were off earlier rule out a draw.
    assert judge(answer([1, 1], [1.0, 9.0], [8.999, 9.0]), reference).verdict == "wrong"
    late = judge(answer([1, 0], [0.0, 9.0], [9.0, 7.0]), reference)  # right at first, wrong later
    assert late.verdict == "wrong"
    assert judge(answer([1, 0], [0.0, float("nan")], [9.0, 8.999]), reference).verdict == "wrong"
    lucky = judge(answer([1, 0], [1.0, 9.0], [9.0, 8.999]), reference)
    assert lucky.verdict == "wrong"
    assert "the same tokens" in lucky.reason


def test_worst_returns_the_most_severe_verdict():
    verdicts = ["yes", "draw", "no", "upstream", "wrong", "failed"]
    for index, verdict in enumerate(verdicts):
        assert worst([Outcome(each) for each in verdicts[: index + 1]]).verdict == verdict


def odd(model_type):
    if model_type == "gpt2":
        threading.Event().wait()
    if model_type == "llama":
        os._exit(7)
    if model_type == "opt":
        raise RuntimeError("of the checks themselves")
    return Row(model_type, "Fine")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the examiner of this test cannot be sent to a new interpreter")
def test_architectures_that_hang_die_or_raise_fail_only_their_own_rows():
    rows = {row.model_type: row for row in examine_all(["gpt2", "llama", "opt", "mpt"], odd, 2, limit_seconds=3)}
    assert rows["mpt"].class_name == "Fine"
    reasons = {name: row.outcomes["generates"].reason for name, row in rows.items() if name != "mpt"}
    assert reasons == {
        "gpt2": "took longer than 3 s",
        "llama": "its process ended with status 7",
        "opt": "the checks raised RuntimeError: of the checks themselves",
    }
    assert all(row.bad for name, row in rows.items() if name != "mpt")


def test_run_survives_writing_and_reading_json(tmp_path):
    run = Run(ROWS, OF, ["alpha streams: it was not examined"])
    write_json(run, tmp_path / "new" / "sweep.json")
    assert read_json(tmp_path / "new" / "sweep.json") == run


def test_committed_file_omits_values_that_differ_between_machines(tmp_path):
    outcome = Outcome("draw", "differs at token 3", cached=5, deviation=0.5)
    run = Run([Row("alpha", "A", outcomes={"reuses": outcome}, influence=0.5, seconds=3.0)], OF)
    write_json(run, tmp_path / "models.json", measured=False)
    row = Row("alpha", "A", outcomes={"reuses": Outcome("draw", "differs at token 3", cached=5)})
    assert read_json(tmp_path / "models.json").rows == [row]


def test_page_has_a_line_for_every_row_and_reasons_for_rows_not_all_yes():
    text = page(Run(ROWS, OF))
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert lines["alpha"] == "| alpha | 2 full | yes | yes (5) | yes (5) | yes (5) |  |  |  |  |  |"
    assert "reuses, RAM: it forgets; transformers, continuing its own cache: wrong" in lines["beta"]
    assert "upstream fails" in lines["gamma"]
    assert "generates: takes none" in lines["gamma"]
    assert "**wrong**" in lines["delta"]
    assert lines["epsilon"] == "| epsilon | needs a &lt;package&gt; |"
    assert not reasons(ROWS[0])


def test_page_names_accepted_losses():
    assert "- alpha disk: no, full" in page(Run(ROWS, OF, ["alpha disk: no, full"]))
    assert "on purpose" not in page(Run(ROWS, OF))


def test_page_numbers_count_architectures_reuse_and_failures():
    variant = Row("alpha:often", "A", "2 full", {"generates": Outcome("yes")})
    found = numbers([*ROWS, Row("zeta", "F", "1 full", {"generates": Outcome("yes")}, keeps=False), variant])
    assert found["architectures that transformers lists"] == "6"
    assert found["run tiny where this page was made"] == "5"
    assert found["reuse on the second turn, with equal tokens"] == "1 of 5, 20.0%"
    assert found["of those, reuse on the second turn"] == "1 of 4, 25.0%"
    assert found["transformers itself fails in a column"] == "1"
    assert found["wrong tokens or exceptions"] == "1"


def test_misnamed_control_makes_a_row_bad():
    assert Row("alpha", "A", control=Outcome("misnamed", "as past=")).bad == ["alpha control: as past="]
    assert not Row("alpha", "A", control=Outcome("refused", "takes none")).bad


# --- losses -----------------------------------------------------------------------------------------------------------

YES = Outcome("yes")


def found(**outcomes):
    return Row("llama", "LlamaForCausalLM", outcomes=outcomes)


@pytest.mark.parametrize(
    ("now", "line"),
    [
        (found(reuses=Outcome("no", "it forgets")), "llama reuses: no, it forgets"),
        (found(reuses=Outcome("upstream", "ValueError")), "llama reuses: upstream, ValueError"),
        (found(reuses=Outcome("wrong", "at token 3")), "llama reuses: wrong, at token 3"),
        (found(reuses=Outcome("failed", "OSError")), "llama reuses: failed, OSError"),
        (found(generates=YES), "llama reuses: the check was not run"),
        (Row("llama", "LlamaForCausalLM", not_made="needs a package"), "llama reuses: needs a package"),
        (None, "llama reuses: it was not examined"),
        (found(reuses=Outcome("yes", cached=50)), "llama reuses: 50 tokens, not 51 as before"),
        (found(reuses=YES), "llama reuses: 0 tokens, not 51 as before"),
    ],
)
@pytest.mark.parametrize("was", ["yes", "draw"])
def test_check_that_no_longer_passes_is_reported_as_lost(was, now, line):
    before = found(reuses=Outcome(was, cached=51))
    assert difference([before], [now] if now else [], listed()).lost == [line]


def test_only_a_passed_check_can_be_lost_and_a_draw_passes():
    before = found(generates=YES, streams=Outcome("no", "cold"), padded=Outcome("failed", "OSError"))
    assert not difference([before], [found(generates=Outcome("draw"), names=Outcome("no"))], listed()).lost


def test_difference_reports_dropped_architectures_as_gone_and_added_ones_as_new():
    before = [Row("llama", "L", outcomes={"ram": YES}), Row("llama:old", "L", outcomes={"ram": YES}), ROWS[0]]
    changed = difference(before, [Row("gpt2", "G", outcomes={"ram": Outcome("no", "full")})], {"llama", "gpt2"})
    assert changed.gone == ["alpha"]
    assert changed.new == ["gpt2"]
    assert changed.lost == ["llama ram: it was not examined", "llama:old ram: it was not examined"]


def sweep(tmp_path, run, *options):
    """Run the program on a finished run; return its exit status and its output."""
    write_json(run, tmp_path / "sweep.json")
    arguments = ["--from-json", "--output", str(tmp_path / "sweep.json"), "--pages", str(tmp_path), *options]
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.stdout


def test_loss_fails_and_keeps_the_page_until_it_is_accepted(tmp_path):
    assert sweep(tmp_path, Run([found(reuses=YES, ram=YES)], OF)) == (0, "new: llama\n")
    before = (tmp_path / "models.md").read_text(), (tmp_path / "models.json").read_text()
    worse = Run([found(reuses=YES, ram=Outcome("no", "full"))], OF)
    for _ in range(2):
        status, text = sweep(tmp_path, worse)
        assert status == 1
        assert "lost: llama ram: no, full\n" in text
        assert ((tmp_path / "models.md").read_text(), (tmp_path / "models.json").read_text()) == before
    status, text = sweep(tmp_path, worse, "--accept-losses")
    assert (status, text) == (0, "lost, accepted: llama ram: no, full\n")
    assert "- llama ram: no, full" in (tmp_path / "models.md").read_text()
    assert sweep(tmp_path, worse) == (0, "")
    assert "- llama ram: no, full" in (tmp_path / "models.md").read_text()
    newer = Run(worse.rows, OF | {"kvtier": "1.1"})
    assert sweep(tmp_path, newer) == (0, "")
    assert "- llama ram: no, full" not in (tmp_path / "models.md").read_text()


def test_wrong_answer_fails_even_when_losses_are_accepted(tmp_path):
    bad = Run([found(reuses=Outcome("wrong", "at token 3"))], OF)
    for options in ((), ("--accept-losses",)):
        status, text = sweep(tmp_path, bad, *options)
        assert status == 1
        assert "llama reuses: wrong, at token 3" in text


def test_partial_sweep_compares_only_its_architectures_and_keeps_the_page(tmp_path):
    gpt2 = Row("gpt2", "GPT2LMHeadModel", outcomes={"ram": YES})
    sweep(tmp_path, Run([gpt2, found(ram=YES)], OF))
    text = (tmp_path / "models.md").read_text()
    assert sweep(tmp_path, Run([gpt2], OF), "gpt2") == (0, "")
    assert sweep(tmp_path, Run([found(ram=Outcome("no", "full"))], OF), "llama")[0] == 1
    assert (tmp_path / "models.md").read_text() == text


def test_older_transformers_does_not_update_the_page(tmp_path):
    sweep(tmp_path, Run([found(ram=YES)], OF))
    text = (tmp_path / "models.md").read_text()
    status, said = sweep(tmp_path, Run([found(ram=YES)], OF | {"transformers": "5.9.0"}))
    assert status == 0
    assert "stays as it was" in said
    assert (tmp_path / "models.md").read_text() == text


def test_committed_page_matches_the_committed_run():
    run = read_json(PAGES / "models.json")
    assert page(run) == (PAGES / "models.md").read_text(encoding="utf-8")
    assert {check for row in run.rows for check in row.outcomes} == set(CHECKS)
