"""Each check of the sweep finds a fault planted in kvtier."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from kvtier import PrefixStore, TieredCache
from kvtier.hf.compat.names import generate_argument
from sweep.checks import Examination
from sweep.models import tiny_model
from sweep.outcome import CHECKS
from sweep.turns import NAMES

pytestmark = pytest.mark.sample(5, of="faults of the sweep")  # of 31


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.fixture
def examined(model, tmp_path):
    def examine(make_cache=TieredCache, make_store=PrefixStore):
        return Examination(model, tmp_path, make_cache, make_store).run("llama", "LlamaForCausalLM")

    return examine


def verdicts(row):
    return {check: outcome.verdict for check, outcome in row.outcomes.items()}


def test_all_checks_pass_without_a_fault(examined):
    row = examined()
    assert verdicts(row) == dict.fromkeys(CHECKS, "yes")
    assert row.control.verdict == "yes"
    assert row.keeps
    assert not row.bad


class Faulty(TieredCache):
    """Misbehaves in ``update()`` if ``when(cache)`` is true."""

    when = staticmethod(lambda cache: False)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.budget, self.had_batch = kwargs.get("device_budget"), False

    @property
    def rows(self):
        return len(self.last_turn.rows)

    def update(self, *args, **kwargs):
        keys, values = super().update(*args, **kwargs)
        self.had_batch |= self.rows > 1
        return self.misbehave(keys, values) if self.when(self) else (keys, values)


class Perturbed(Faulty):
    def misbehave(self, keys, values):
        return keys, values + 1.0


class Raising(Faulty):
    def misbehave(self, keys, values):
        raise RuntimeError("a fault")


def reused_from(tier):
    return lambda cache: cache.last_turn.cached_by_tier[tier] > 0


FAULTS = {
    "generates": lambda cache: cache.last_turn.cached_tokens == 0,
    "reuses": reused_from("device"),
    "ram": reused_from("host"),
    "disk": reused_from("disk"),
    "streams": lambda cache: cache.budget is not None,
    "edited": lambda cache: cache.last_turn.divergence is not None,
    "padded": lambda cache: cache.rows > 1,
    "padded, then alone": lambda cache: cache.had_batch and cache.rows == 1,
}


@pytest.mark.parametrize(
    ("fault", "kind", "verdict"),
    [*((fault, Perturbed, "wrong") for fault in FAULTS), ("reuses", Raising, "failed"), ("padded", Raising, "failed")],
)
def test_planted_fault_is_found_by_its_check(examined, fault, kind, verdict):
    row = examined(type("One", (kind,), {"when": staticmethod(FAULTS[fault])}))
    check = fault.split(",")[0]
    assert verdicts(row)[check] == verdict
    assert row.outcomes[check].reason
    assert any(line.startswith(f"llama {check}: {verdict}") for line in row.bad)
    if check != "generates":
        assert verdicts(row)["generates"] == "yes"


class Forgetful(TieredCache):
    """Holds nothing at the start of a turn; its store may have the prompt."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        begin = self.turns.begin

        def begin_with_nothing(*args, **kwargs):
            self.turns.start_over()
            return begin(*args, **kwargs)

        self.turns.begin = begin_with_nothing


class AllHot(TieredCache):
    def __init__(self, *args, device_budget=None, **kwargs):
        super().__init__(*args, **kwargs)


def without_ram(*args, **kwargs):
    return PrefixStore(*args, host_budget=1, **kwargs)


def without_folder(path=None, **kwargs):
    return PrefixStore(**kwargs)


@pytest.mark.parametrize(
    ("make_cache", "make_store", "missing"),
    [
        (Forgetful, PrefixStore, {"reuses"}),
        (TieredCache, without_ram, {"ram", "padded"}),  # the buffers hold only one row of a batch
        (TieredCache, without_folder, {"disk"}),
        (AllHot, PrefixStore, {"streams"}),
    ],
)
def test_missing_reuse_or_offloading_gives_the_verdict_no(examined, make_cache, make_store, missing):
    found = verdicts(examined(make_cache, make_store))
    assert {check for check, verdict in found.items() if verdict == "no"} == missing


def test_nothing_is_reused_when_nothing_is_kept(examined):
    def no_store(path=None, **kwargs):
        return PrefixStore(host_budget=1, **kwargs)

    found = verdicts(examined(Forgetful, no_store))
    assert {check for check, verdict in found.items() if verdict == "no"} == set(CHECKS) - {
        "generates",
        "streams",
        "edited",
    }


class Stale(DynamicCache):
    """Transformers' own cache, which does not compare the prompt with its contents."""

    last_turn = None

    def __init__(self, *args, **kwargs):
        super().__init__()

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_stale_answer_is_wrong_and_an_unreported_turn_is_not_reuse(examined):
    found = verdicts(examined(Stale))
    assert found["edited"] == "wrong"
    assert {found[check] for check in ("reuses", "ram", "disk")} == {"no"}
    assert found["names"] in ("no", "failed")  # before 5.24, transformers itself knows only one name


def test_report_of_the_previous_turn_is_not_reuse(examined, model):
    """A generate() that drops the cache gives the right answer, and the cache still has the previous turn's report."""
    original = model.generate

    def generate(ids, **kwargs):
        known = ids.shape[1] > 50
        return original(ids, **{name: value for name, value in kwargs.items() if not (known and name in NAMES)})

    model.generate = generate
    found = examined().outcomes
    assert {check for check in found if found[check].verdict == "no"} >= {"reuses", "ram", "disk", "padded", "names"}
    assert "did not see the turn" in found["reuses"].reason


def test_cache_name_that_generate_ignores_is_found(examined, model):
    original, lost = model.generate, next(name for name in NAMES if name != generate_argument(model))
    model.generate = lambda ids, **kwargs: original(
        ids, **{name: value for name, value in kwargs.items() if name != lost}
    )
    found = verdicts(examined())
    assert {check for check, verdict in found.items() if verdict == "no"} == {"names"}


def test_model_insensitive_to_the_edit_does_not_pass_the_edited_check(examined, model):
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    row = examined()
    assert row.outcomes["edited"].verdict == "no"
    assert "a stale answer would pass" in row.outcomes["edited"].reason


def refuse_caches(model, error):
    """Make generate() raise ``error`` when it is given a cache of any kind."""
    original = model.generate

    def generate(ids, **kwargs):
        if kwargs.keys() & set(NAMES):
            raise error
        return original(ids, **kwargs)

    model.generate = generate


def test_failure_that_transformers_shares_is_called_upstream(examined, model):
    refuse_caches(model, IndexError("of the model's own"))
    row = examined()
    assert set(verdicts(row).values()) == {"upstream"}
    assert {outcome.reason for outcome in row.outcomes.values()} == {
        "transformers on a DynamicCache: IndexError: of the model's own"
    }
    assert row.control.verdict == "refused"
    assert not row.bad
    assert not row.green


def test_cache_that_transformers_cannot_continue_is_called_upstream(examined, model):
    original = model.generate

    def generate(ids, **kwargs):
        if any(name in kwargs and kwargs[name].get_seq_length() for name in NAMES):
            raise IndexError("of the model's own")
        return original(ids, **kwargs)

    model.generate = generate
    row = examined()
    assert row.control.verdict == "failed"
    assert row.outcomes["generates"].verdict == "yes"
    assert row.outcomes["reuses"].verdict == "upstream"
    assert "IndexError: of the model's own" in row.outcomes["reuses"].reason


@pytest.mark.parametrize(("fault", "verdict"), [(1.0, "wrong"), (None, "failed")])
def test_plain_call_broken_by_kvtier_is_a_failure_of_kvtier(examined, model, fault, verdict):
    original, in_use = model.generate, []

    def generate(ids, **kwargs):
        if any(isinstance(value, TieredCache) for value in kwargs.values()):
            in_use.append(True)
        elif in_use and fault is None:
            raise TypeError("got an unexpected keyword argument 'generation_mode'")
        elif in_use:
            torch.nn.init.ones_(model.lm_head.weight)
        return original(ids, **kwargs)

    model.generate = generate
    row = examined()
    assert row.outcomes["generates"].verdict == verdict
    assert "once kvtier is in use" in row.outcomes["generates"].reason
    assert "upstream" not in verdicts(row).values()


def test_failure_unlike_that_of_transformers_is_a_failure_of_kvtier(examined, model):
    refuse_caches(model, IndexError("of the model's own"))
    model.generate = raising_for(TieredCache, RuntimeError("of kvtier"), model.generate)
    row = examined()
    assert row.outcomes["generates"].verdict == "failed"
    assert row.outcomes["generates"].reason == (
        "RuntimeError: of kvtier (on a DynamicCache: IndexError: of the model's own)"
    )


def raising_for(kind, error, original):
    def generate(ids, **kwargs):
        if any(isinstance(value, kind) for value in kwargs.values()):
            raise error
        return original(ids, **kwargs)

    return generate


@pytest.mark.parametrize(
    "error",
    [
        TypeError("LlamaForCausalLM.forward() got an unexpected keyword argument 'cache'"),
        ValueError("The following `model_kwargs` are not used by the model: ['cache'] (note: typos in the generate"),
    ],
)
def test_unknown_cache_name_is_misnamed_and_no_refusal(examined, model, error):
    refuse_caches(model, error)
    row = examined()
    assert row.control.verdict == "misnamed"
    assert set(verdicts(row).values()) == {"failed"}
    assert "a name that the model does not know" in row.bad[-1]


def test_padded_batch_that_transformers_cannot_answer_is_called_upstream(examined, model):
    original = model.generate

    def generate(ids, **kwargs):
        if len(ids) > 1:
            raise IndexError("of the model's own")
        return original(ids, **kwargs)

    model.generate = generate
    found = examined().outcomes
    assert {check for check in found if found[check].verdict == "upstream"} == {"padded"}
    assert "IndexError: of the model's own" in found["padded"].reason
