"""Devices of this machine, and how fast bytes reach them."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from contextlib import closing
from importlib.metadata import version
from typing import Any

import torch

from kvtier.cli.doctor.findings import Finding, gigabytes
from kvtier.platform.memory import free_host_memory_bytes, host_memory_bytes
from kvtier.transfer.base import CopyEngine, InlineEngine
from kvtier.transfer.engines import MakeEngine

_PACKAGES = ("kvtier", "torch", "transformers", "accelerate", "safetensors")
_PIECE_BYTES = 64 * 2**20  # offloading pins this much at once
_PINNED_PIECES = 4
_COPIES = 8
_ROUNDS = 3
_GIB = 2**30


def versions() -> Finding:
    """Name the installed versions."""
    facts = {name: version(name) for name in _PACKAGES}
    facts |= {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    return Finding("ok", "versions", ", ".join(f"{name} {text}" for name, text in facts.items()), facts)


def processor() -> Finding:
    """Count cores and RAM."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    total, free = host_memory_bytes(), free_host_memory_bytes()
    facts = {"cores": cores, "threads": torch.get_num_threads(), "ram_bytes": total, "free_ram_bytes": free}
    text = f"{cores} cores, {gigabytes(total)} of RAM, {gigabytes(free)} of it free"
    if free < _GIB:
        return Finding("note", "cpu", f"{text}: end other programs before you trust any figure here", facts)
    return Finding("ok", "cpu", text, facts)


def accelerators() -> list[torch.device]:
    """Return every accelerator that PyTorch can use."""
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return [torch.device(kind.type, index) for index in range(torch.accelerator.device_count())] if kind else []


def accelerator(device: torch.device) -> Finding:
    """Name ``device`` and its memory."""
    module: Any = torch.get_device_module(device)
    name = module.get_device_name(device) if hasattr(module, "get_device_name") else device.type
    facts: dict[str, Any] = {"device": str(device), "name": name}
    if not hasattr(module, "mem_get_info"):
        text = f'{device}: {name}, which does not tell its free memory: pass device_budget in bytes, not "auto"'
        return Finding("note", "accelerator", text, facts)
    free, total = module.mem_get_info(device)
    facts |= {"free_bytes": int(free), "total_bytes": int(total)}
    text = f"{device}: {name}, {gigabytes(free)} of {gigabytes(total)} free"
    if free < total // 10:
        return Finding("note", "accelerator", f"{text}: other programs or tensors have nearly all of it", facts)
    return Finding("ok", "accelerator", text, facts)


def side_streams(device: torch.device, make: MakeEngine) -> Finding:
    """Copy bytes to ``device`` and back beside the computation, ordered by fences alone."""
    with closing(make(device)) as engine:
        if isinstance(engine, InlineEngine):
            text = f"{device}: none; copies run in line. Answers are right, but nothing is hidden behind computing"
            return Finding("note", "streams", text, {"device": str(device), "side_streams": False})
        sent, back = engine.host_empty(2**20), engine.host_empty(2**20)
        sent.copy_(torch.arange(2**20) % 251)
        back.zero_()
        there = torch.zeros(2**20, dtype=torch.uint8, device=device)
        up = engine.copy(there, sent, after=[engine.mark()])
        engine.wait(up)
        doubled = there * 2  # a kernel between the copies: both directions are ordered against the current stream
        engine.settle(engine.copy(back, doubled, after=[engine.mark()]))
        right = torch.equal(back, sent * 2)
    facts = {"device": str(device), "side_streams": right}
    if not right:
        text = f"{device}: copies on side streams bring wrong bytes. Do not use device_budget here; update the driver"
        return Finding("problem", "streams", text, facts)
    return Finding("ok", "streams", f"{device}: copies run beside the computation, in order", facts)


def pinned_memory(pin: Callable[[int], torch.Tensor] | None = None) -> Finding:
    """Pin a few pieces of host memory, as large as offloading pins at once, and release them."""
    pin = pin or (lambda nbytes: torch.empty(nbytes, dtype=torch.uint8, pin_memory=True))
    pieces: list[torch.Tensor] = []
    error = None
    try:
        while len(pieces) < _PINNED_PIECES:
            pieces.append(pin(_PIECE_BYTES))
    except RuntimeError as caught:
        error = caught
    pinned = len(pieces) * _PIECE_BYTES
    facts = {"tried_bytes": _PINNED_PIECES * _PIECE_BYTES, "pinned_bytes": pinned, "error": str(error or "")}
    if error is None:
        return Finding("ok", "pinned", f"{gigabytes(pinned)} of host memory could be pinned; more was not tried", facts)
    advice = "raise the limit of locked memory (ulimit -l; in a container --ulimit memlock=-1)"
    if not pieces:
        text = f"no host memory can be pinned, so copies are slow: {error}; {advice}"
        return Finding("problem", "pinned", text, facts)
    return Finding("note", "pinned", f"only {gigabytes(pinned)} of host memory can be pinned: {advice}", facts)


def link(device: torch.device, make: MakeEngine) -> Finding:
    """Measure how fast the engine of ``device`` copies up and down."""
    with closing(make(device)) as engine:
        host, there = engine.host_empty(_PIECE_BYTES), torch.zeros(_PIECE_BYTES, dtype=torch.uint8, device=device)
        host.zero_()
        up, down = _best_rate(engine, there, host), _best_rate(engine, host, there)
    facts = {"device": str(device), "up_bytes_per_second": up, "down_bytes_per_second": down}
    text = f"{device}: {gigabytes(up)}/s up to the device, {gigabytes(down)}/s down"
    return Finding("ok", "link", text, facts)


def memory_copies() -> Finding:
    """Measure how fast the CPU copies memory."""
    source = torch.zeros(_PIECE_BYTES, dtype=torch.uint8)
    engine = InlineEngine(device_is_host=True)
    rate = _best_rate(engine, torch.zeros_like(source), source)
    return Finding("ok", "memory", f"the CPU copies {gigabytes(rate)}/s", {"copied_bytes_per_second": rate})


def _best_rate(engine: CopyEngine, dst: torch.Tensor, src: torch.Tensor) -> float:
    """Return bytes a second of the fastest of a few rounds: disturbances make copies slower, never faster."""
    best = 0.0
    engine.settle(engine.copy(dst, src, after=[engine.mark()]))  # the first copy includes one-time setup
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        fence = engine.mark()
        for _ in range(_COPIES):
            fence = engine.copy(dst, src, after=[fence])
        engine.settle(fence)
        best = max(best, _COPIES * src.nbytes / (time.perf_counter() - started))
    return best
