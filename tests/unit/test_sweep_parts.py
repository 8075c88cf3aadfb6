"""The parts of the sweep: what shrinks a config, what judges an answer, what runs the workers, what writes the page."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from transformers import CONFIG_MAPPING

from sweep.checks import judge
from sweep.models import NotMadeError, brief, tiny_model
from sweep.outcome import Outcome, Row, read_json, write_json
from sweep.page import numbers, page, reasons
from sweep.shrink import SIZES, picked_layers, shrink
from sweep.turns import Answer
from sweep.workers import examine_all

OF = {"kvtier": "1.0"}
CONVERSATION = {"prompt": 4, "answer": 2, "question": 1, "second": 7}
ROWS = [
    Row("alpha", "A", "2 full", {c: Outcome("yes", cached=5) for c in ("generates", "reuses", "ram", "disk")}),
    Row(
        "beta",
        "B",
        "1 linear",
        {"generates": Outcome("yes"), "reuses": Outcome("no", "it forgets"), "ram": Outcome("no", "it forgets")},
        Outcome("wrong", "differs at token 3"),
    ),
    Row("gamma", "C", "1 full", {"generates": Outcome("refused", "takes none")}),
    Row("delta", "D", "1 full", {"generates": Outcome("yes"), "reuses": Outcome("wrong", "differs at token 0")}),
    Row("epsilon", "E", not_made="needs a <package>"),
]


def test_one_layer_of_each_kind_is_kept_and_two_of_each_attention():
    kinds = ["sliding"] * 5 + ["full"] + ["sliding"] * 5 + ["full"]
    experts = ["dense"] * 7 + ["sparse"] * 5
    assert picked_layers({"layer_types": kinds, "mlp_layer_types": experts}, 12) == [0, 1, 5, 7, 11]
    assert picked_layers({}, 12) == [0, 1]
    assert picked_layers({}, 1) == [0]


def test_lists_with_an_entry_for_each_layer_keep_those_of_the_layers_that_stay():
    default = CONFIG_MAPPING["granite_swa"]()
    tiny = shrink(default)
    assert len(tiny["layer_types"]) == len(tiny["layer_rope_theta"]) == tiny["num_hidden_layers"] < 6
    assert set(tiny["layer_types"]) == set(default.layer_types)


def test_configs_inside_a_config_shrink_too():
    assert shrink(CONFIG_MAPPING["gemma3"]())["text_config"]["hidden_size"] == SIZES["hidden_size"]


def test_a_model_that_cannot_be_made_says_why():
    with pytest.raises(NotMadeError, match="drafts for another model"):
        tiny_model("gemma4_assistant")
    assert brief(ValueError("x " * 200)).endswith("…")


def test_the_same_seed_makes_the_same_weights():
    first, second, other = (tiny_model("llama", seed) for seed in (0, 0, 1))
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def answer(ids, *logits):
    return Answer(torch.tensor([[7, *ids]]), torch.tensor(logits))


def test_verdicts_on_answers():
    reference = answer([1, 0], [0.0, 9.0], [9.0, 8.999])
    assert judge(reference, reference) == Outcome("yes", deviation=0.0)
    assert judge(answer([1, 1], [0.0, 9.0], [8.999, 9.0]), reference).verdict == "draw"
    assert judge(answer([1, 1], [0.0, 9.0], [0.0, 9.0]), reference) == Outcome("wrong", "differs at token 1", None, 0.0)
    # A draw after logits that were off before is none.
    assert judge(answer([1, 1], [1.0, 9.0], [8.999, 9.0]), reference).verdict == "wrong"
    lucky = judge(answer([1, 0], [1.0, 9.0], [9.0, 8.999]), reference)
    assert lucky.verdict == "wrong"
    assert "the same tokens" in lucky.reason


def odd(model_type):
    if model_type == "gpt2":
        threading.Event().wait()
    if model_type == "llama":
        os._exit(7)
    if model_type == "opt":
        raise RuntimeError("of the checks themselves")
    return Row(model_type, "Fine")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the examiner of this test cannot be sent to a new interpreter")
def test_architectures_that_hang_die_or_raise_cost_their_own_rows():
    rows = {row.model_type: row for row in examine_all(["gpt2", "llama", "opt", "mpt"], odd, 2, limit_seconds=3)}
    assert rows["mpt"].class_name == "Fine"
    reasons = {name: row.outcomes["generates"].reason for name, row in rows.items() if name != "mpt"}
    assert reasons == {
        "gpt2": "took longer than 3 s",
        "llama": "its process ended with status 7",
        "opt": "its process ended with status 1",
    }
    assert all(row.bad for name, row in rows.items() if name != "mpt")


def test_rows_survive_a_file(tmp_path):
    write_json(ROWS, OF, tmp_path / "new" / "sweep.json")
    assert read_json(tmp_path / "new" / "sweep.json") == (ROWS, OF)


def test_the_page_has_a_line_for_every_row_and_a_reason_for_every_one_that_is_not_all_yes():
    text = page(ROWS, OF, CONVERSATION)
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert lines["alpha"] == "| alpha | 2 full | yes | yes (5) | yes (5) | yes (5) |  |  |  |  |"
    assert "reuses, RAM: it forgets; transformers, continuing its own cache: wrong" in lines["beta"]
    assert lines["gamma"].count("no cache") == 1
    assert "**wrong**" in lines["delta"]
    assert lines["epsilon"] == "| epsilon | needs a &lt;package&gt; |"
    assert not reasons(ROWS[0])


def test_the_numbers_of_the_page():
    found = numbers([*ROWS, Row("zeta", "F", "1 full", {"generates": Outcome("yes")}, keeps=False)])
    assert found["architectures that transformers lists"] == "6"
    assert found["run tiny where this page was made"] == "5"
    assert found["reuse on the second turn, with equal tokens"] == "1 of 5, 20.0%"
    assert found["of those, reuse on the second turn"] == "1 of 4, 25.0%"
    assert found["wrong tokens or exceptions"] == "1"
