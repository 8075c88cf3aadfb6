"""Default budgets follow the memory of the container, not that of the machine around it."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from kvtier.platform import memory
from kvtier.platform.memory import container_limits, default_host_budget_bytes, free_device_bytes, host_memory_bytes

GIB = 2**30


def written(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/memory"
NO_LIMIT = str(2**63 - 4096)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, []),
        ({"proc/self/cgroup": "0::/\n"}, []),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                f"{V2}/a/b/memory.max": "max\n",
                f"{V2}/a/b/memory.current": "5\n",
                f"{V2}/a/memory.max": f"{2 * GIB}\n",
                f"{V2}/a/memory.current": f"{GIB}\n",
                f"{V2}/a/memory.stat": f"anon 7\ninactive_file {GIB // 2}\n",
            },
            [(2 * GIB, GIB // 2)],
        ),
        (
            {  # a container that sees its own group as the root
                "proc/self/cgroup": "0::/../../pod\n",
                f"{V2}/memory.max": f"{GIB}",
                f"{V2}/memory.current": "100",
            },
            [(GIB, 100)],
        ),
        (
            {
                "proc/self/cgroup": "9:name=systemd:/x\n4:cpu,memory:/a\n0::/\n",
                f"{V1}/a/memory.limit_in_bytes": f"{3 * GIB}",
                f"{V1}/a/memory.usage_in_bytes": "1000",
                f"{V1}/a/memory.stat": "cache 1\ntotal_inactive_file 400\n",
                f"{V1}/memory.limit_in_bytes": NO_LIMIT,
                f"{V1}/memory.usage_in_bytes": "2000",
            },
            [(3 * GIB, 600), (int(NO_LIMIT), 2000)],
        ),
        ({"proc/self/cgroup": "0::/a\n", f"{V2}/a/memory.max": "nonsense", f"{V2}/a/memory.current": "1"}, []),
    ],
    ids=["no-cgroups", "no-limit", "v2-of-the-parent", "v2-namespace", "v1", "nonsense"],
)
def test_container_limits_are_read_from_cgroup_v1_and_v2(tmp_path, files, expected):
    assert container_limits(written(tmp_path, files)) == expected


def test_container_limit_bounds_the_default_budget_and_free_memory(monkeypatch):
    machine = host_memory_bytes()
    monkeypatch.setattr(memory, "container_limits", lambda: [(2 * GIB, GIB), (machine * 4, 0)])
    assert host_memory_bytes() == 2 * GIB
    assert default_host_budget_bytes() == GIB // 2
    free = min(GIB, psutil.virtual_memory().available)
    assert free_device_bytes(torch.device("cpu")) <= free - 512 * 2**20


def test_container_over_its_limit_has_no_free_memory(monkeypatch):
    monkeypatch.setattr(memory, "container_limits", lambda: [(GIB, 2 * GIB)])
    assert free_device_bytes(torch.device("cpu")) == 0


def test_default_budget_is_a_quarter_of_the_memory_and_at_most_4_gib():
    assert 0 < default_host_budget_bytes() == min(host_memory_bytes() // 4, 4 * GIB)
