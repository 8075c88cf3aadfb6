"""Surroundings: where a plan takes place. What the device reaches, how fast its tiers are, and how much they hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from kvtier.cli.plan.figures import Figure, Origin
from kvtier.cli.plan.probe import measured_rates
from kvtier.costs.machines import DISK_BYTES_PER_SECOND, Machine, named_machine
from kvtier.platform.filesystem import user_cache_folder
from kvtier.platform.memory import default_host_budget_bytes, free_device_bytes
from kvtier.store.store import DEFAULT_DISK_BUDGET
from kvtier.units import parse_bytes

TIERS = ("device", "host", "disk")
# To find a prefix, open its blocks and set the buffers up: rows of a catalog are read, and files opened.
_LATENCY_SECONDS = {"host": 1e-3, "disk": 3e-3}


@dataclass(frozen=True, slots=True)
class Surroundings:
    """A machine to plan for.

    Attributes:
        name: the device, in words.
        operations: matrix products that a prefill reaches.
        pair_operations: attention that a prefill reaches.
        memory: bytes of weights that the device reads in a second.
        rates: tier → bytes a second at which K and V are loaded from it.
        latencies: tier → seconds until the first byte.
        budgets: tier → bytes for K and V.
        shares_cores: whether copies take the cores that compute.
    """

    name: str
    operations: Figure
    pair_operations: Figure
    memory: Figure
    rates: Mapping[str, Figure]
    latencies: Mapping[str, Figure]
    budgets: Mapping[str, Figure]
    shares_cores: bool


def surroundings(
    device: str,
    dtype: torch.dtype,
    weight_bytes: int,
    budgets: Mapping[str, str | None],
    rates: Mapping[str, str | None],
) -> Surroundings:
    """Return the machine that ``device`` names: ``here``, ``cpu``, or one of the table of data sheets.

    Args:
        device: what ``--device`` says.
        dtype: of weights, K and V.
        weight_bytes: of the model, which takes device memory too.
        budgets: tier → bytes, as they were given; None for the usual ones.
        rates: ``host`` and ``disk`` → bytes a second, as they were given; None for what is found.

    Raises:
        ConfigurationError: there is no such device, or a budget or rate is no byte count.
    """
    given = {tier: _given(budgets[tier], f"--{tier}-budget") for tier in TIERS}
    given_rates = {tier: _given(rates[tier], f"--{tier}-rate", per_second=True) for tier in ("host", "disk")}
    found = (
        _here(device, dtype, weight_bytes) if device in ("here", "cpu") else _named(named_machine(device), weight_bytes)
    )
    return Surroundings(
        found.name,
        found.operations,
        found.pair_operations,
        found.memory,
        {tier: given_rates[tier] or figure for tier, figure in found.rates.items()},
        found.latencies,
        {tier: given[tier] or figure for tier, figure in found.budgets.items()},
        found.shares_cores,
    )


def _given(text: str | None, option: str, per_second: bool = False) -> Figure | None:
    if text is None:
        return None
    value = parse_bytes(text.strip().removesuffix("/s"), option)
    return Figure(value, "bytes/s" if per_second else "bytes", "given", option)


def _latencies() -> dict[str, Figure]:
    how = "to find a prefix and open its blocks"
    return {tier: Figure(latency, "s", "assumed", how) for tier, latency in _LATENCY_SECONDS.items()}


def _left(memory_bytes: float, weight_bytes: int, origin: Origin, how: str) -> Figure:
    """Return what the weights leave of the memory."""
    if weight_bytes > memory_bytes:
        return Figure(0, "bytes", origin, f"the weights alone take more than the {memory_bytes / 1e9:.3g} GB there are")
    return Figure(memory_bytes - weight_bytes, "bytes", origin, f"{how} and the weights")


def _lower_budgets() -> dict[str, Figure]:
    host, disk = default_host_budget_bytes(), parse_bytes(DEFAULT_DISK_BUDGET, "disk_budget")
    return {
        "host": Figure(host, "bytes", "derived", "a store's default on this machine: a quarter of RAM, at most 4 GiB"),
        "disk": Figure(disk, "bytes", "derived", "a store's default"),
    }


def _here(device: str, dtype: torch.dtype, weight_bytes: int) -> Surroundings:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    there = accelerator if accelerator is not None and device == "here" else torch.device("cpu")
    folder = user_cache_folder("--disk-rate")
    folder.mkdir(parents=True, exist_ok=True)
    rates = measured_rates(there, dtype, folder)
    is_cpu = there.type == "cpu"
    name = "the CPU of this machine" if is_cpu else f"{there.type} of this machine"
    kind = str(dtype).removeprefix("torch.")
    disk_how = f"a file in {folder}" + (", which the system was told to drop" if rates.disk_is_dropped else "")
    disk = Figure(rates.disk_bytes_per_second, "bytes/s", "measured here", disk_how)
    if disk.value is None:
        disk = Figure(DISK_BYTES_PER_SECOND, "bytes/s", "assumed", f"an NVMe drive; {folder} cannot be written")
    return Surroundings(
        name,
        Figure(rates.matrix_operations_per_second, "operations/s", "measured here", f"a matrix product in {kind}"),
        Figure(rates.pair_operations_per_second, "operations/s", "measured here", f"attention in {kind}"),
        Figure(rates.memory_bytes_per_second, "bytes/s", "measured here", "a matrix product of one token"),
        {
            "host": Figure(rates.load_bytes_per_second, "bytes/s", "measured here", "a copy of RAM"),
            "disk": disk,
        },
        _latencies(),
        {
            "device": _left(free_device_bytes(there), weight_bytes, "measured here", "free memory, less a reserve"),
            **_lower_budgets(),
        },
        shares_cores=is_cpu,
    )


def _named(machine: Machine, weight_bytes: int) -> Surroundings:
    peak = f"{machine.peak_operations_per_second / 1e12:g}e12 dense in 16 bits × {machine.utilisation:g} (assumed)"
    operations = Figure(machine.operations_per_second, "operations/s", "data sheet", peak)
    reserve = max(machine.memory_bytes / 10, 512 * 2**20)
    return Surroundings(
        machine.name,
        operations,
        operations,
        Figure(machine.memory_bytes_per_second, "bytes/s", "data sheet", "peak"),
        {
            "host": Figure(
                machine.link_bytes_per_second,
                "bytes/s",
                "data sheet",
                f"PCI Express, {machine.link_peak_bytes_per_second / 1e9:g} GB/s × {machine.link_share:g} (assumed)",
            ),
            "disk": Figure(DISK_BYTES_PER_SECOND, "bytes/s", "assumed", "an NVMe drive"),
        },
        _latencies(),
        {
            "device": _left(machine.memory_bytes - reserve, weight_bytes, "data sheet", "memory, less a tenth"),
            **_lower_budgets(),
        },
        shares_cores=False,
    )
