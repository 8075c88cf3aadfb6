"""The selection of cases when a test is sampled."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.support import samples


class Case:
    def __init__(self, nodeid, count=None, **words):
        self.nodeid = nodeid
        self._marker = SimpleNamespace(args=(count,), kwargs=words) if count is not None else None

    def get_closest_marker(self, name):
        return self._marker


def taken(monkeypatch, seed, cases, *, args=(), keyword=""):
    """Return the names of the selected cases, after checking that the others are reported."""
    monkeypatch.setenv(samples.VARIABLE, seed)
    left_out = []
    hook = SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items))
    config = SimpleNamespace(args=list(args), option=SimpleNamespace(keyword=keyword), hook=hook)
    items = list(cases)
    samples.take_samples(config, items)
    assert len(items) + len(left_out) == len(cases)
    return [each.nodeid for each in items]


CASES = [Case(f"a.py::sampled[{n}]", 3) for n in range(20)] + [Case(f"a.py::whole[{n}]") for n in range(5)]


def test_sample_has_the_requested_size_and_other_tests_stay_whole(monkeypatch):
    found = taken(monkeypatch, "abc", CASES)
    assert len(found) == 8
    assert [name for name in found if "whole" in name] == [case.nodeid for case in CASES[20:]]


def test_seed_determines_the_sample_and_seeds_together_cover_all_cases(monkeypatch):
    assert taken(monkeypatch, "abc", CASES) == taken(monkeypatch, "abc", CASES)
    assert {name for seed in range(60) for name in taken(monkeypatch, str(seed), CASES)} == {
        case.nodeid for case in CASES
    }


@pytest.mark.parametrize(
    ("seed", "more"), [("all", {}), ("abc", {"args": ["a.py::sampled[3]"]}), ("abc", {"keyword": "sampled"})]
)
def test_all_cases_run_when_asked_for(monkeypatch, seed, more):
    assert len(taken(monkeypatch, seed, CASES, **more)) == 25


def test_tests_with_one_word_share_a_sample(monkeypatch):
    cases = [Case(f"a.py::{name}[{n}]", 4, of="both") for n in range(5) for name in ("one", "two")]
    assert len(taken(monkeypatch, "first", cases)) == 4


def test_some_of_a_population_is_the_same_each_time(monkeypatch):
    monkeypatch.setenv(samples.VARIABLE, "first")
    assert (
        samples.some(range(50), 5, "things") == samples.some(range(50), 5, "things") != samples.some(range(50), 5, "x")
    )
    assert len(samples.some(range(50), 5, "things")) == 5
    assert samples.some(range(3), 5, "things") == [0, 1, 2]
    monkeypatch.setenv(samples.VARIABLE, "all")
    assert samples.some(range(50), 5, "things") == list(range(50))
