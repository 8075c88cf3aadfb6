"""Forecast: a model's figures, what fits, seconds to the first token, and where loading breaks even."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvtier.cli.plan.figures import Figure
from kvtier.cli.plan.surroundings import TIERS, Surroundings
from kvtier.costs.break_even import Race, Split
from kvtier.costs.compute import ComputeCost
from kvtier.costs.prefill import first_guess
from kvtier.costs.transfer import TransferCost
from kvtier.hf.model_sheet import ModelSheet


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds to the first token of a prompt of which all but the last token are known.

    Attributes:
        tokens: of the prompt.
        prefix_bytes: K, V and states of its known tokens.
        cold_seconds: when nothing is known.
        load_seconds: tier → when all is loaded.
        both: tier → the best split between computing the front and loading the rest.
        break_even_bytes_per_second: bandwidth at which loading is as fast as computing; None for one token.
    """

    tokens: int
    prefix_bytes: int
    cold_seconds: float
    load_seconds: Mapping[str, float]
    both: Mapping[str, Split]
    break_even_bytes_per_second: float | None


@dataclass(frozen=True, slots=True)
class Forecast:
    """All that a plan says of a model on a machine; tiers are ``device``, ``host`` and ``disk``.

    Attributes:
        figures: of the model, by name.
        fits: tier → tokens of one sequence; the value is None if any length fits.
        predictions: for each length of prompt.
        break_even_tokens: tier → the shortest prompt from which on loading is no slower; None if none is.
    """

    figures: Mapping[str, Figure]
    fits: Mapping[str, Figure]
    predictions: tuple[Prediction, ...]
    break_even_tokens: Mapping[str, int | None]


def forecast(sheet: ModelSheet, where: Surroundings, lengths: Sequence[int]) -> Forecast:
    """Return what is to be expected of ``sheet`` in the surroundings ``where`` for prompts of ``lengths`` tokens."""
    races = {
        tier: Race(
            compute_cost(sheet, where),
            TransferCost(where.latencies[tier].value or 0.0, rate.value or 1.0),
            sheet.footprint,
            where.shares_cores,
        )
        for tier, rate in where.rates.items()
    }
    any_race = races["host"]
    return Forecast(
        model_figures(sheet),
        {
            tier: Figure(
                sheet.footprint.tokens_in(int(where.budgets[tier].value or 0)),
                "tokens",
                "derived",
                f"{where.budgets[tier].text} ({where.budgets[tier].origin}: {where.budgets[tier].how})",
            )
            for tier in TIERS
        },
        tuple(
            Prediction(
                tokens,
                sheet.footprint.nbytes(tokens - 1),
                any_race.cold_seconds(tokens),
                {tier: race.load_seconds(tokens) for tier, race in races.items()},
                {tier: race.both(tokens) for tier, race in races.items()},
                any_race.break_even_bytes_per_second(tokens),
            )
            for tokens in lengths
        ),
        {tier: race.break_even_tokens() for tier, race in races.items()},
    )


def compute_cost(sheet: ModelSheet, where: Surroundings) -> ComputeCost:
    """Return the cost of computing tokens of a model that was never run."""
    operations, pair_operations = where.operations.value or 1.0, where.pair_operations.value or 1.0
    return ComputeCost(
        first_guess(
            sheet.token_parameters * sheet.dtype.itemsize,
            sheet.footprint.token_bytes,
            sheet.token_operations,
            sheet.pair_operations * operations / pair_operations,  # attention may reach another rate
            operations_per_second=operations,
            bytes_per_second=where.memory.value or 1.0,
        ),
        tuple((visible, some / pair_operations) for visible, some in sheet.window_pair_operations),
    )


def model_figures(sheet: ModelSheet) -> dict[str, Figure]:
    """Return the figures of a model by name; those that it does not have are left out."""
    footprint, itemsize = sheet.footprint, sheet.dtype.itemsize
    full = sheet.attention_layers - sheet.sliding_layers
    found = {
        "kv_bytes_per_token": Figure(
            footprint.token_bytes, "bytes", "derived", f"K and V of {full} layers of full attention, from their shapes"
        )
    }
    if sheet.sliding_layers:
        window, each = footprint.window_tokens, footprint.window_token_bytes
        found["window_bytes"] = Figure(
            window * each,
            "bytes",
            "derived",
            f"K and V of {sheet.sliding_layers} sliding layers: {window:,} tokens × {each / 1024:g} KiB, once",
        )
    if sheet.state_layers > sheet.unknown_layers:
        how = f"states of {sheet.state_layers - sheet.unknown_layers} layers, once for each place they are kept"
        found["state_bytes"] = Figure(footprint.state_bytes, "bytes", "derived", how)
    if sheet.unknown_layers:
        how = f"states of {sheet.unknown_layers} layers grow in steps, or only a running model has them: left out below"
        found["unknown_state_bytes"] = Figure(None, "bytes", "derived", how)
    stored = "; the files have fewer bits" if sheet.is_quantised else ""
    found["parameters"] = Figure(sheet.parameters, "parameters", "derived", "counted without reading weights")
    found["weight_bytes"] = Figure(sheet.weight_bytes, "bytes", "derived", f"parameters × {itemsize} bytes{stored}")
    how = "two for each weight but the tables of tokens"
    if sheet.experts is not None:
        how += "; of {1} experts, {0} compute a token".format(*sheet.experts)
    elif sheet.has_experts:
        how += "; of all experts, because the config does not tell how many compute a token"
    found["operations_per_token"] = Figure(sheet.token_operations, "operations", "derived", how)
    return found


def as_json(sheet: ModelSheet, where: Surroundings, found: Forecast) -> dict[str, Any]:
    """Return a plan for programs."""
    return {
        "model_type": sheet.model_type,
        "dtype": str(sheet.dtype).removeprefix("torch."),
        "reuse": {"possible": sheet.not_reusable is None, "reason": sheet.not_reusable},
        "model": {name: figure.as_json() for name, figure in found.figures.items()},
        "device": {
            "name": where.name,
            "operations": where.operations.as_json(),
            "attention_operations": where.pair_operations.as_json(),
            "memory": where.memory.as_json(),
            "copies_take_compute_cores": where.shares_cores,
        },
        "tiers": {
            tier: {
                "budget": where.budgets[tier].as_json(),
                "fits_tokens": found.fits[tier].value,
                "load": where.rates[tier].as_json() if tier in where.rates else None,
                "latency": where.latencies[tier].as_json() if tier in where.latencies else None,
                "break_even_tokens": found.break_even_tokens.get(tier),
            }
            for tier in TIERS
        },
        "predictions": [{**asdict(each), "origin": "derived"} for each in found.predictions],
    }
