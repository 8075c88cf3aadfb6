"""TurnReport: the reused and computed tokens of one turn, the value of ``TieredCache.last_turn``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from kvtier.errors import ConfigurationError
from kvtier.report.divergence import Divergence
from kvtier.report.html import bar_html
from kvtier.report.text import reused_text, seconds_text


@dataclass(frozen=True, slots=True)
class RowReport:
    """One row of a batch: its tokens without padding, and how many of them were reused.

    Attributes:
        prompt_tokens: its tokens.
        cached_tokens: of those, the tokens whose K and V were reused.
        generated_tokens: new tokens of all sequences that continue it.
        divergence: the first token at which it differs from the best known prefix.
        known_tokens: tokens that could have been reused if the row had been alone.
    """

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int = 0
    divergence: Divergence | None = None
    known_tokens: int = 0

    def to_dict(self, *, tokens: bool = False) -> dict[str, Any]:
        """Return the values as JSON types, as ``TurnReport.to_dict`` does."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "generated_tokens": self.generated_tokens,
            "divergence": None if self.divergence is None else self.divergence.to_dict(tokens=tokens),
            "known_tokens": self.known_tokens,
        }


@dataclass(frozen=True, slots=True)
class TurnReport:
    """One turn, summed over its rows.

    ``print`` shows one line, a notebook a bar. Neither shows user text, nor does ``repr``. Reports can be pickled.

    Attributes:
        prompt_tokens: tokens of all prompts, without padding.
        cached_tokens: of those, the tokens whose K and V were reused.
        computed_tokens: of those, the tokens the model had to compute.
        generated_tokens: new tokens, up to each row's end of sequence; 0 until the turn is committed.
        cached_by_tier: ``cached_tokens`` by source tier: ``device``, ``host``, ``disk``, or a lower tier.
        restored_bytes: bytes of K and V copied from the store into the buffers.
        restore_seconds: time this turn spent matching, waiting for pages and copying them.
        miss_reason: why no more tokens were reused; None when all reusable tokens were.
        divergence: the first token at which row 0 differs from the best known prefix.
        rows: reports of the rows.
        hot_layers: layers whose K and V are on the device that computes. This value and the following ones up to
            ``peak_host_bytes`` are 0 without a ``device_budget``, and until the turn is committed.
        cold_layers: layers whose pages are in lower tiers.
        bytes_down: bytes of K and V that went to lower tiers.
        bytes_up: bytes of K and V fetched from lower tiers, some of them for the step after the last.
        waits: how often attention needed fetched pages.
        wait_seconds: time that the caller waited for these pages.
        peak_device_bytes: most bytes of buffers, unfinished pages and prefetch slots on any one device.
        peak_host_bytes: most bytes of pages in RAM, below the devices.
        known_tokens: tokens whose K and V were known. Tokens beyond ``cached_tokens`` were computed again, because
            transformers cuts the rows of a batch at one column, or a model's states are not known there.
        decision: how the turn began: ``load`` (from the store), ``compute`` (nothing, or nothing more, was reused),
            ``both`` (the front was computed while the rest loaded), ``held`` (from the buffers). Empty where nothing
            could be reused or kept.
        predicted_seconds: what loading and computing the prompt was expected to take; 0 where too little was known.
        actual_seconds: what it took, to the end of the forward pass with the end of the prompt. This value and the next
            are 0 until another forward pass began, or the turn ended.
        first_token_seconds: the same from the call on, finding the prefix included.
        other_ways: what the other decisions were expected to take, in seconds.
        cold_seconds: what computing the whole prompt was expected to take, as if nothing had been known; 0 where too
            little was known.
        kept_tokens: tokens of all sequences, prompt included, that the cache holds after the turn; 0 until the turn is
            committed, and when it was not kept.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    cached_by_tier: Mapping[str, int] = field(
        default_factory=lambda: MappingProxyType({"device": 0, "host": 0, "disk": 0}), hash=False
    )
    restored_bytes: int = 0
    restore_seconds: float = 0.0
    miss_reason: str | None = None
    divergence: Divergence | None = None
    rows: tuple[RowReport, ...] = ()
    hot_layers: int = 0
    cold_layers: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    waits: int = 0
    wait_seconds: float = 0.0
    peak_device_bytes: int = 0
    peak_host_bytes: int = 0
    known_tokens: int = 0
    decision: str = ""
    predicted_seconds: float = 0.0
    actual_seconds: float = 0.0
    first_token_seconds: float = 0.0
    other_ways: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}), hash=False)
    cold_seconds: float = 0.0
    kept_tokens: int = 0

    @property
    def usage(self) -> dict[str, Any]:
        """The counts under the names that public APIs give them in their ``usage``, as JSON types.

        ``prompt_tokens``, ``completion_tokens``, ``total_tokens`` and ``prompt_tokens_details["cached_tokens"]`` are
        those of OpenAI's chat completions. ``input_tokens``, ``cache_read_input_tokens``,
        ``cache_creation_input_tokens`` and ``output_tokens`` are those of Anthropic's messages, where the first three
        add up to the prompt. All are 0 for a turn without reuse whose prompt was not read.
        """
        created = min(self.computed_tokens, max(0, self.kept_tokens - self.cached_tokens))
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.generated_tokens,
            "total_tokens": self.prompt_tokens + self.generated_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "input_tokens": self.computed_tokens - created,
            "cache_read_input_tokens": self.cached_tokens,
            "cache_creation_input_tokens": created,
            "output_tokens": self.generated_tokens,
        }

    def to_dict(self, *, tokens: bool = False) -> dict[str, Any]:
        """Return all fields as JSON types, for a table or a file.

        Args:
            tokens: also return the ids around the divergence, which are user text.
        """
        values: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(self)}
        values["cached_by_tier"], values["other_ways"] = dict(self.cached_by_tier), dict(self.other_ways)
        values["divergence"] = None if self.divergence is None else self.divergence.to_dict(tokens=tokens)
        values["rows"] = [row.to_dict(tokens=tokens) for row in self.rows]
        return values

    def to_json(self, *, tokens: bool = False) -> str:
        """Return ``to_dict`` as one line of JSON."""
        return json.dumps(self.to_dict(tokens=tokens))

    def explain(self, tokenizer: Any, row: int = 0) -> str:
        """Return what was reused, why not more, and the text around the first token that differs.

        The result contains user text: up to 8 tokens before that token, and 16 after it, of both sides.

        Args:
            tokenizer: has a method ``decode(ids)``, as transformers' tokenizers have.
            row: which row of the batch.

        Raises:
            ConfigurationError: ``tokenizer`` has no method ``decode``.
            IndexError: the report has rows, but not this one.
        """
        if not callable(getattr(tokenizer, "decode", None)):
            raise ConfigurationError(
                f"tokenizer is a {type(tokenizer).__name__}, which has no decode(); pass a tokenizer."
            )
        lines = [str(self)]
        divergence = self.rows[row].divergence if self.rows else self.divergence
        if divergence is not None:
            lines.append(divergence.explain(tokenizer))
        elif self.cached_tokens:
            lines.append("the prompt does not differ from the known tokens: it goes on after them, or ends before")
        return "\n".join(lines)

    def __str__(self) -> str:
        """Return one line without user text."""
        if not self.prompt_tokens:
            return f"nothing reused or kept: {self.miss_reason or 'no turn has begun'}"
        parts = [reused_text(self.cached_tokens, self.prompt_tokens, self.cached_by_tier)]
        if self.first_token_seconds:
            parts.append(f"first token {seconds_text(self.first_token_seconds)}")
            if self.cached_tokens and self.cold_seconds:
                parts[-1] += f", cold would take about {seconds_text(self.cold_seconds)}"
        if self.miss_reason:
            parts.append(self.miss_reason)
        return "; ".join(parts)

    def _repr_html_(self) -> str:
        """Return the report as a bar of where the prompt's tokens came from, for notebooks."""
        rows = {"rows": f"{len(self.rows):,}"} if len(self.rows) > 1 else {}
        rows["generated"] = f"{self.generated_tokens:,} tokens"
        if self.decision:
            rows["decision"] = self.decision
        if self.restored_bytes:
            rows["copied from the store"] = f"{self.restored_bytes / 1e6:,.1f} MB"
        if self.divergence is not None:
            rows["first token that differs"] = f"{self.divergence.index:,}"
        return bar_html(str(self), self.cached_by_tier, self.computed_tokens, rows)

    def __reduce__(self) -> Any:
        """Return how to make an equal report: its read-only mappings cannot be pickled as they are."""
        return _again, (type(self), {each.name: _plain(getattr(self, each.name)) for each in fields(self)})


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, MappingProxyType) else value


def _again(kind: type[TurnReport], values: Mapping[str, Any]) -> TurnReport:
    """Return the report of pickled ``values``; those of another version that this one does not know are left out."""
    known = {each.name for each in fields(kind)}
    again: dict[str, Any] = {k: MappingProxyType(v) if isinstance(v, dict) else v for k, v in values.items()}
    return kind(**{name: value for name, value in again.items() if name in known})
