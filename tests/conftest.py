"""Shared test settings, and fixtures for tiny models, stores, caches and calls of generate()."""

from __future__ import annotations

import os
import signal
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import DynamicCache, PreTrainedModel

from kvtier import PrefixStore, TieredCache
from kvtier.hf.not_reusable import forget_warnings
from kvtier.testing.device import DEVICE_TYPE, Machine, install
from tests.support import families, samples
from tests.support.upstream import CACHE

# CI tries the same examples every time: a change must not fail because of an older bug. To look for new examples, run
# `pytest --hypothesis-profile=nightly`, or set HYPOTHESIS_PROFILE=nightly in the environment.
_ANY_TIME = {
    "deadline": None,  # a disk, a thread or a neighbour may be slow
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    "print_blob": True,
}
settings.register_profile("ci", max_examples=10, derandomize=True, **_ANY_TIME)
settings.register_profile("nightly", max_examples=2500, **_ANY_TIME)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


# What tiny models compute in a millisecond is not worth a load; tests are about loads, in processes of theirs too.
os.environ.setdefault("KVTIER_REUSE", "always")
os.environ.pop("KVTIER_STORE", None)  # tests, and processes of theirs, must not use the store of a person


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers ``sample`` and ``cpu_only``, and let tests raise interrupts."""
    config.addinivalue_line(
        "markers",
        "sample(n, of=None): a run takes n of its cases, or of all tests of that word; see tests/support/samples.py",
    )
    config.addinivalue_line("markers", "cpu_only(reason): makes no sense on the test device")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a job in the background of a shell script
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    """Return a header line that says how to take the same samples again."""
    return f"samples: {samples.VARIABLE}={samples.seed()}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out cases that are not in the sample. Slow files come first: a last one would keep one core busy alone."""
    samples.take_samples(config, items)
    for item in items:
        mark = item.get_closest_marker("cpu_only") if MACHINE is not None else None
        if mark is not None:
            item.add_marker(pytest.mark.skip(reason=mark.args[0]))
    items.sort(key=lambda item: item.path.parent.name not in _SLOW)


VOCABULARY = 200
# Families of the tests that use `family`: K and V of every kind, none slow. The other families are in families.py.
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt_oss", "phi3", "olmo2")
SLIDING_FAMILIES = ("mistral", "gemma2", "gemma3", "gpt_oss")

MakeModel = Callable[..., PreTrainedModel]
Generate = Callable[..., Any]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Run torch on one thread: on tiny matrices, threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# The test device, if the tests run on it: everything that names no device is then on it.
MACHINE = install() if "KVTIER_DEVICE" in os.environ else None
if MACHINE is not None:
    torch.set_default_device(DEVICE_TYPE)


@pytest.fixture(autouse=True)
def _on_the_test_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """With ``KVTIER_DEVICE=test``, run the test on the test device, with a schedule of its own; fail if copies raced.

    ``KVTIER_DEVICE=lazy``: all copies as late as permitted.
    """
    if MACHINE is None:
        yield
        return
    seed = zlib.crc32(f"{samples.seed()} {request.node.nodeid}".encode())
    MACHINE.restart(seed, lazy=os.environ["KVTIER_DEVICE"] == "lazy" or seed % 4 == 0)
    yield
    assert not MACHINE.races, MACHINE.races[0]


@pytest.fixture(scope="session")
def machine() -> Machine:
    """The test device."""
    if MACHINE is None:
        pytest.skip("KVTIER_DEVICE=test runs it")
    return MACHINE


@pytest.fixture
def on_host() -> Iterator[None]:
    """Make tensors on the host that name no device, on the test device too: for parts that see host memory only."""
    with torch.device("cpu"):
        yield


_SLOW = {"system", "tools", "offload", "inputs", "identity"}  # folders of tests

# Folders of tests that check whether bytes reach the drive.
_WAITING_FOR_THE_DRIVE = {"platform", "system", "tools"}


@pytest.fixture(autouse=True, scope="module")
def _no_power_cuts(request: pytest.FixtureRequest) -> Iterator[None]:
    """Skip ``fsync`` in all other folders: thousands of turns would spend most of their time waiting for the drive."""
    with pytest.MonkeyPatch.context() as patched:
        if request.path.parent.name not in _WAITING_FOR_THE_DRIVE:
            patched.setattr(os, "fsync", lambda fd: None)
        yield


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """``make_model(family, dtype, attention, **config)``: a new tiny model; same arguments, same weights."""

    def make(
        family: str = "llama", dtype: torch.dtype = torch.float32, attention: str = "eager", **config: Any
    ) -> PreTrainedModel:
        return families.build(family, dtype=dtype, attention=attention, **{"vocab_size": VOCABULARY, **config})

    return make


@pytest.fixture
def model(make_model: MakeModel) -> PreTrainedModel:
    """A tiny Llama in fp32."""
    return make_model("llama")


@pytest.fixture(scope="session")
def tokens() -> Callable[..., torch.Tensor]:
    """``tokens(columns, rows, seed)``: random ids without padding ids."""

    def make(columns: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
        return torch.randint(1, VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture(scope="session")
def generate() -> Generate:
    """``generate(model, ids, cache, **settings)``: greedy, with logits, on a fresh ``DynamicCache`` by default."""

    def run(model: PreTrainedModel, ids: torch.Tensor, cache: Any = None, **settings: Any) -> Any:
        settings = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [0], **settings}
        if "attention_mask" not in settings:
            settings["attention_mask"] = (ids != 0).long()
        return model.generate(
            ids,
            **{CACHE: DynamicCache(config=model.config) if cache is None else cache},
            return_dict_in_generate=True,
            output_logits=True,
            **settings,
        )

    return run


@pytest.fixture
def store() -> Iterator[PrefixStore]:
    """A store in RAM with small blocks."""
    with PrefixStore(block_size=8) as store:
        yield store


@pytest.fixture
def cache(store: PrefixStore) -> Iterator[TieredCache]:
    """A cache over ``store``."""
    with TieredCache(store) as cache:
        yield cache


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize the tests that use ``family``, ``sliding_family`` or, beside ``family``, ``attention``."""
    if "attention" in metafunc.fixturenames and "family" in metafunc.fixturenames:
        pairs = [(f, a) for f in FAMILIES for a in ("eager", "sdpa") if a == "eager" or families.FAMILIES[f].sdpa]
        metafunc.parametrize(("family", "attention"), pairs)
    elif "family" in metafunc.fixturenames:
        metafunc.parametrize("family", FAMILIES)
    if "sliding_family" in metafunc.fixturenames:
        metafunc.parametrize("sliding_family", SLIDING_FAMILIES)


@pytest.fixture(autouse=True)
def _each_reason_is_warned_of() -> None:
    """Warn again of reasons for which nothing is reused: once per process would be once per run."""
    forget_warnings()


@pytest.fixture
def warned(caplog):
    """``warned()``: the warnings of kvtier since the last call."""

    def texts():
        found = [r.getMessage() for r in caplog.records if r.name.startswith("kvtier") and r.levelno >= 30]
        caplog.clear()
        return found

    return texts
