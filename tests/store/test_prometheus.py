"""The Prometheus exposition of store statistics, checked with a small parser of the format."""

from __future__ import annotations

import re

import pytest

from kvtier.store import PrefixStore
from kvtier.store.manage.stats import StoreStats
from kvtier.store.prometheus import exposition
from kvtier.store.tiers.base import TierStats
from tests.support.stores import OTHER_ROOT, commit, count, ids, restored_length

_SAMPLE = re.compile(r'([a-z_]+)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\[\\n"])*",?)*)\})? (\d+)')
_LABEL = re.compile(r'([a-z_]+)="((?:[^"\\]|\\.)*)"')


def parsed(text):
    """Return every sample by name and labels; every family must be declared once, before its samples."""
    assert text.endswith("\n")
    samples, kinds, helped = {}, {}, set()
    for line in text.splitlines():
        if line.startswith("# HELP "):
            name = line.split(" ", 3)[2]
            assert name not in helped
            helped.add(name)
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name in helped
            assert name not in kinds
            kinds[name] = kind
        else:
            match = _SAMPLE.fullmatch(line)
            assert match, line
            labels = tuple(_LABEL.findall(match[2] or ""))
            assert list(kinds)[-1] == match[1]
            assert (match[1], labels) not in samples
            samples[match[1], labels] = int(match[3])
    for name, kind in kinds.items():
        assert (kind == "counter") == name.endswith("_total")
    return samples


def test_exposition_reports_blocks_bytes_hits_and_misses_of_a_store(tmp_path):
    with PrefixStore(tmp_path, block_size=4, disk_budget="1MiB") as store:
        commit(store, count(8))
        store.flush()
        assert restored_length(store, count(8)) == 8
        assert restored_length(store, ids(9), OTHER_ROOT) == 0
        found = parsed(exposition(store.stats()))
    disk, host = (("tier", "disk"),), (("tier", "host"),)
    assert found["kvtier_store_blocks", disk] == found["kvtier_store_blocks", host] == 2
    assert found["kvtier_store_budget_bytes", disk] == 2**20
    assert found["kvtier_store_held_bytes", disk] > 0
    assert found["kvtier_store_hits_total", host] == 2
    assert found["kvtier_store_hits_total", disk] == 0
    assert found["kvtier_store_lookups_total", ()] == 2
    assert found["kvtier_store_lookup_tokens_total", ()] == 9
    assert found["kvtier_store_hit_tokens_total", ()] == 8
    assert found["kvtier_store_misses_total", (("reason", "unknown"),)] == 1


def test_known_reasons_are_exposed_before_they_occur():
    found = parsed(exposition(StoreStats(None, (TierStats("host"),))))
    reasons = {labels[0][1] for name, labels in found if name == "kvtier_store_misses_total"}
    assert reasons == {"unknown", "diverged", "shorter", "damaged", "unavailable", "gone"}
    assert found["kvtier_store_errors_total", (("reason", "write"),)] == 0


def test_unknown_miss_reason_is_exposed():
    found = parsed(exposition(StoreStats(None, (), misses={"gone": 2, "stolen": 3})))
    assert found["kvtier_store_misses_total", (("reason", "gone"),)] == 2
    assert found["kvtier_store_misses_total", (("reason", "stolen"),)] == 3


def test_process_local_metrics_can_be_left_out():
    stats = StoreStats(
        "x", (TierStats("host", nbytes=1), TierStats("disk", nbytes=2)), names=3, lookups=4, paused="full"
    )
    assert parsed(exposition(stats))["kvtier_store_paused", ()] == 1
    found = parsed(exposition(stats, of_process=False))
    assert found["kvtier_store_held_bytes", (("tier", "disk"),)] == 2
    assert found["kvtier_store_names", ()] == 3
    assert {name for name, _ in found} == {
        "kvtier_store_held_bytes",
        "kvtier_store_blocks",
        "kvtier_store_pinned_blocks",
        "kvtier_store_names",
    }
    assert (("tier", "host"),) not in {labels for _, labels in found}


def test_extra_labels_are_escaped_and_come_first():
    text = exposition(StoreStats(None, (TierStats("host"),)), labels={"service": 'a "b"\\\nc'})
    assert 'kvtier_store_blocks{service="a \\"b\\"\\\\\\nc",tier="host"} 0\n' in text
    assert len(parsed(text)) > 10


@pytest.mark.parametrize("name", ["", "1x", "a-b", "é", "__x", "tier", "reason"])
def test_invalid_or_reserved_label_names_are_refused(name):
    with pytest.raises(ValueError, match="labels"):
        exposition(StoreStats(None, ()), labels={name: "x"})
