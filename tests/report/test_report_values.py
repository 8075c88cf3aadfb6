"""Reports as text, HTML, dicts, JSON and pickles: complete, equal after a round trip, without user text unasked."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from html.parser import HTMLParser
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import ConfigurationError
from kvtier.report import Divergence, RowReport, Totals, TurnLog, TurnReport

DIVERGENCE = Divergence.at(3, np.arange(70_000, 70_030), np.arange(70_000, 70_030) + (np.arange(30) >= 3) * 1000)
REPORT = TurnReport(
    prompt_tokens=1167,
    cached_tokens=1153,
    computed_tokens=14,
    generated_tokens=32,
    cached_by_tier=MappingProxyType({"device": 0, "host": 0, "disk": 1153}),
    divergence=DIVERGENCE,
    rows=(RowReport(1167, 1153, 32, DIVERGENCE, 1153),),
    decision="load",
    first_token_seconds=0.21,
    other_ways=MappingProxyType({"compute": 3.9}),
    cold_seconds=3.9,
    kept_tokens=1198,
)


class Words:
    """A tokenizer whose decoded text begins with a space, except at the very beginning."""

    def decode(self, ids: list[int]) -> str:
        """Return a word for each id."""
        return " ".join(f"w{each}" for each in ids)


# --- one line ---------------------------------------------------------------------------------------------------------


def test_report_is_one_line():
    assert str(REPORT) == (
        "1,153 of 1,167 prompt tokens reused (device 0, host 0, disk 1,153); first token 0.21 s, "
        "cold would take about 3.9 s"
    )


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({}, "nothing reused or kept: no turn has begun"),
        ({"miss_reason": "why"}, "nothing reused or kept: why"),
        (
            {"prompt_tokens": 5, "computed_tokens": 5, "miss_reason": "why", "cold_seconds": 1.0},
            "0 of 5 prompt tokens reused (device 0, host 0, disk 0); why",
        ),
        (
            {"prompt_tokens": 5, "cached_tokens": 2, "first_token_seconds": 1234.5},
            "2 of 5 prompt tokens reused (device 0, host 0, disk 0); first token 1,234 s",
        ),
        (
            {"prompt_tokens": 5, "first_token_seconds": 1e-5, "cold_seconds": 2.0},
            "0 of 5 prompt tokens reused (device 0, host 0, disk 0); first token under 0.001 s",
        ),
    ],
)
def test_line_leaves_out_what_is_not_known(fields, line):
    assert str(TurnReport(**fields)) == line


# --- user text --------------------------------------------------------------------------------------------------------


def test_report_shows_no_token_ids_unasked():
    shown = [str(REPORT), repr(REPORT), REPORT._repr_html_(), REPORT.to_json(), str(REPORT.to_dict())]
    assert not [text for text in shown if any(str(token) in text for token in (*range(70_000, 70_030), 71_003))]


def test_dict_has_the_ids_around_the_divergence_on_request():
    found = REPORT.to_dict(tokens=True)["rows"][0]["divergence"]
    assert (found["index"], found["expected"], found["seen"]) == (3, 71_003, 70_003)
    assert found["before"] == [70_000, 70_001, 70_002]
    assert found["known_after"] == list(range(71_003, 71_019))
    assert found["seen_after"] == list(range(70_003, 70_019))


@given(st.lists(st.integers(0, 3), min_size=1), st.lists(st.integers(0, 3), min_size=1), st.integers(0, 20))
def test_divergence_keeps_a_bounded_part_of_both_sides(tokens, known, offset):
    index = next((i for i, (a, b) in enumerate(zip(tokens, known, strict=False)) if a != b), None)
    if index is None:
        return
    shifted = [9] * offset + tokens
    found = Divergence.at(index + offset, np.array(shifted), np.array(known), index)
    assert (found.index, found.expected, found.seen) == (index + offset, known[index], tokens[index])
    assert found.before == tuple(shifted[: index + offset][-8:])
    assert found.known_after == tuple(known[index:][:16])
    assert found.seen_after == tuple(tokens[index:][:16])


# --- explain ----------------------------------------------------------------------------------------------------------


def test_explain_shows_the_text_before_the_difference_and_both_continuations():
    lines = REPORT.explain(Words()).splitlines()
    assert lines[0] == str(REPORT)
    assert lines[1] == "the prompt differs from the known tokens at token 3"
    assert lines[2] == "  after:   …'w70000 w70001 w70002'"
    assert lines[3].startswith("  known:   ' w71003 w71004")
    assert lines[4].startswith("  prompt:  ' w70003 w70004")


def test_explain_names_the_row():
    rows = (RowReport(5, 5), RowReport(5, 2, divergence=Divergence(2, 8, 9)))
    report = TurnReport(prompt_tokens=10, cached_tokens=7, rows=rows)
    assert "does not differ" in report.explain(Words())
    assert "'w8'" in report.explain(Words(), row=1)
    with pytest.raises(IndexError):
        report.explain(Words(), row=2)


def test_explain_does_not_decode_hashes_of_images():
    picture = [(1 << 62) + n for n in range(3)]
    seen = Divergence.at(2, [1, 2, *picture, 5], [1, 2, 3, 4])
    assert "'<image, sound or embedding>w5'" in seen.explain(Words())
    after = Divergence.at(3, [*picture, 5], [*picture, 6])
    assert "…'<image, sound or embedding>'" in after.explain(Words())
    assert "'w6'" in after.explain(Words())


# --- to keep ----------------------------------------------------------------------------------------------------------


def test_report_and_totals_are_equal_after_a_round_trip():
    for value in (REPORT, TurnReport(), Totals().plus(REPORT)):
        for again in (pickle.loads(pickle.dumps(value)), copy.deepcopy(value), copy.copy(value)):
            assert again == value
            with pytest.raises(TypeError):
                again.cached_by_tier["disk"] = 5


def test_pickled_context_of_the_divergence_survives():
    assert pickle.loads(pickle.dumps(REPORT)).divergence.seen_after == DIVERGENCE.seen_after


def test_pickle_of_a_later_version_loads_without_its_fields():
    make, (kind, values) = REPORT.__reduce__()
    assert make(kind, {**values, "a_field_of_next_year": 1}) == REPORT


def test_dict_is_json_with_every_field():
    for value in (REPORT, TurnReport()):
        assert set(value.to_dict()) == set(TurnReport.__slots__)
        assert json.loads(value.to_json()) == value.to_dict()
        assert json.loads(value.to_json(tokens=True)) == value.to_dict(tokens=True)
    assert json.loads(json.dumps(Totals().plus(REPORT).to_dict()))["cached_by_tier"]["disk"] == 1153


def test_usage_has_the_names_of_public_apis():
    assert REPORT.usage == {
        "prompt_tokens": 1167,
        "completion_tokens": 32,
        "total_tokens": 1199,
        "prompt_tokens_details": {"cached_tokens": 1153},
        "input_tokens": 0,
        "cache_read_input_tokens": 1153,
        "cache_creation_input_tokens": 14,
        "output_tokens": 32,
    }


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 200))
def test_parts_of_the_usage_add_up_to_the_prompt(cached, computed, kept):
    report = TurnReport(
        prompt_tokens=cached + computed, cached_tokens=cached, computed_tokens=computed, kept_tokens=kept
    )
    parts = [report.usage[f"{name}input_tokens"] for name in ("", "cache_read_", "cache_creation_")]
    assert sum(parts) == report.prompt_tokens
    assert min(parts) >= 0


# --- notebooks --------------------------------------------------------------------------------------------------------


class Balanced(HTMLParser):
    """Collects tags that load something, and fails when tags do not close in order."""

    def __init__(self):
        super().__init__()
        self.open, self.loading, self.widths = [], [], []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        style = dict(attrs).get("style") or ""
        if tag in ("script", "img", "link", "iframe") or "url(" in style or {"src", "href"} & {n for n, _ in attrs}:
            self.loading.append(tag)
        if style.startswith("flex:"):
            self.widths.append(int(style[5:].split()[0]))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("value", [REPORT, TurnReport(), Totals().plus(REPORT)], ids=lambda value: type(value).__name__)
def test_html_is_balanced_and_loads_nothing(value):
    parser = Balanced()
    parser.feed(value._repr_html_())
    assert (parser.open, parser.loading) == ([], [])
    assert sum(parser.widths) == value.prompt_tokens


def test_html_escapes_reasons_and_tier_names():
    tiers = MappingProxyType({'<s "3>': 5})
    html = TurnReport(prompt_tokens=5, cached_tokens=5, cached_by_tier=tiers, miss_reason="<b>&")._repr_html_()
    assert "<b>" not in html
    assert "<s " not in html
    assert "&lt;b&gt;&amp;" in html


def test_html_has_no_colour_for_text_or_page_that_one_theme_would_hide():
    html = REPORT._repr_html_()
    assert not [colour for colour in ("#fff", "#000", "white;", "black;") if colour in html.replace("white-space", "")]


# --- totals -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.floats(0, 9), st.floats(0, 9)), max_size=20))
def test_totals_are_sums_and_the_log_is_bounded(turns):
    log = TurnLog(most=5)
    reports = [
        TurnReport(
            prompt_tokens=cached + computed,
            cached_tokens=cached,
            computed_tokens=computed,
            cached_by_tier=MappingProxyType({"device": cached, "mine": 0}),
            first_token_seconds=first,
            cold_seconds=cold,
        )
        for cached, computed, first, cold in turns
    ]
    for report in reports:
        log.add(report)
    assert log.reports == tuple(reports[-5:])
    totals = log.totals
    assert (totals.turns, totals.prompt_tokens) == (len(turns), sum(r.prompt_tokens for r in reports))
    assert totals.cached_tokens == totals.cached_by_tier["device"] == sum(r.cached_tokens for r in reports)
    assert totals.turns_without_reuse == sum(not r.prompt_tokens for r in reports)
    known = [r for r in reports if r.cached_tokens and r.cold_seconds and r.first_token_seconds]
    assert totals.estimated_turns == len(known)
    assert totals.saved_seconds == pytest.approx(sum(r.cold_seconds - r.first_token_seconds for r in known))


def test_totals_are_one_line():
    assert str(Totals()) == "0 turns: 0 of 0 prompt tokens reused (device 0, host 0, disk 0)"
    assert str(Totals().plus(REPORT).plus(TurnReport(miss_reason="off"))) == (
        "2 turns: 1,153 of 1,167 prompt tokens reused (device 0, host 0, disk 1,153); first tokens 0.21 s; "
        "about 3.7 s saved; reuse was off in 1"
    )


def test_reports_are_imported_without_torch():
    loaded = "import kvtier.report, sys; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    prelude = (
        "import sys, types; p = types.ModuleType('kvtier'); p.__path__ = [sys.argv[1]]; sys.modules['kvtier'] = p;"
    )
    import kvtier

    run = [sys.executable, "-c", prelude + loaded, str(kvtier.__path__[0])]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("tokenizer", [None, "a name", object()])
def test_explain_without_a_tokenizer_is_an_error_that_says_so(tokenizer):
    with pytest.raises(ConfigurationError, match=r"which has no decode\(\); pass a tokenizer"):
        TurnReport(prompt_tokens=3).explain(tokenizer)


# --- keys and tables --------------------------------------------------------------------------------------------------


def test_equal_reports_and_totals_are_one_key():
    other = pickle.loads(pickle.dumps(REPORT))
    assert {REPORT: "seen"}[other] == "seen"
    assert len({REPORT, other, TurnReport()}) == 2
    assert hash(Totals()) == hash(Totals())


def test_reports_become_tables_of_pandas_as_documented():
    pandas = pytest.importorskip("pandas")
    history = [REPORT, TurnReport(prompt_tokens=5)]
    table = pandas.DataFrame(r.to_dict() for r in history)
    assert table["prompt_tokens"].tolist() == [1167, 5]
    wide = pandas.json_normalize([r.to_dict() for r in history])
    assert wide["cached_by_tier.disk"].tolist() == [1153, 0]
