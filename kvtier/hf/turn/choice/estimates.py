"""Estimates for a turn: from the cost book of its model on this machine, or from a probe where it is empty."""

from __future__ import annotations

import os
import time

import torch
from transformers import PreTrainedModel

from kvtier.costs.book import CostBook
from kvtier.costs.prefill import PrefillCost, first_guess
from kvtier.hf.turn.choice.decision import Estimates

_PROBE_TOKENS = 128
_CPU_PROBE_TOKENS, _CPU_PROBE_ELEMENTS = 64, 2**18  # a core reaches its speed with less, and takes longer


def machine_name(device: torch.device) -> str:
    """Return a name of what computes on ``device`` here; costs are those of machines with the same name."""
    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} of {os.cpu_count()} cores"
    try:
        module = torch.get_device_module(device)
        return f"{device.type}, {module.get_device_name(device)}"
    except (AttributeError, RuntimeError):  # a backend without names
        return device.type


def estimates_for(
    model: PreTrainedModel, book: CostBook, tiers: set[str], rows: int, block_columns: int
) -> Estimates | None:
    """Return what a turn of ``rows`` sequences is expected to cost; None where too little is known to weigh it.

    Where no pass of the model was ever timed on this machine, its weights are counted and a matrix product is timed.
    """
    if not book.knows_passes and (guess := probed_cost(model, book.token_bytes)) is not None:
        book.guess(guess)
    prefill = book.prefill()
    if prefill is None or not book.token_bytes:
        return None
    shares_cores = model.device.type == "cpu"
    return Estimates(
        prefill,
        {tier: book.transfer(tier) for tier in tiers},
        book.token_bytes,
        book.transfer("host") if shares_cores else None,
        rows,
        block_columns,
        book.around_seconds(),
    )


def probed_cost(model: PreTrainedModel, token_bytes: float) -> PrefillCost | None:
    """Return a first guess of the cost of passes of ``model``; None where its weights tell nothing.

    ``token_bytes`` are those of K and V of a token; 0 if not known.

    Two products with its largest matrix are timed: with many rows, which operations bound, and with one, which reading
    the weights bounds. On a CPU, a part of the matrix does: the first turn waits for it, a few milliseconds at most.
    """
    matrices = [weight for weight in model.parameters() if weight.ndim == 2 and weight.is_floating_point()]
    inner = [weight for weight in matrices if max(weight.shape) <= 16 * min(weight.shape)]  # no table of embeddings
    if not inner or any(weight.device.type == "meta" for weight in matrices):
        return None
    largest, tokens = max(inner, key=torch.Tensor.numel), _PROBE_TOKENS
    if largest.device.type == "cpu":
        largest, tokens = largest[: max(1, _CPU_PROBE_ELEMENTS // largest.shape[1])], _CPU_PROBE_TOKENS
    with torch.no_grad():
        many = _seconds(largest, tokens)
        single = _seconds(largest, 1)
    weights = sum(weight.numel() for weight in inner)
    text = model.config.get_text_config(decoder=True)
    layers, width = getattr(text, "num_hidden_layers", 0) or 0, getattr(text, "hidden_size", 0) or 0
    return first_guess(
        sum(weight.nbytes for weight in inner),
        token_bytes or 4.0 * layers * width,
        2.0 * weights,
        4.0 * layers * width,
        operations_per_second=2.0 * largest.numel() * tokens / many,
        bytes_per_second=largest.nbytes / single,
    )


def _seconds(weight: torch.Tensor, rows: int) -> float:
    """Return the least seconds of a few products of ``rows`` rows with ``weight [out, in]``."""
    inputs = torch.ones(rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
    best = float("inf")
    for _ in range(2):
        began = time.perf_counter()
        (inputs @ weight.T)[0, 0].item()  # waits for a device that computes asynchronously
        best = min(best, time.perf_counter() - began)
    return best
