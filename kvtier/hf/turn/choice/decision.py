"""Whether a known prefix is loaded, computed, or both at once, by what each is expected to take. Pure functions."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from kvtier.costs.prefill import PrefillCost
from kvtier.costs.transfer import TransferCost
from kvtier.errors import ConfigurationError
from kvtier.hf.turn.cost import Costs

COMPUTE, LOAD, BOTH, HELD = "compute", "load", "both", "held"
"""The ways to begin a turn. ``HELD``: the buffers have all that is known, and nothing is loaded."""

REUSE_VARIABLE = "KVTIER_REUSE"


@dataclass(frozen=True, slots=True)
class StoredRange:
    """Columns ``[begin, end)`` of one row that can be loaded from ``tier``."""

    tier: str
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Estimates:
    """What computing and loading are expected to cost.

    Attributes:
        prefill: of forward passes.
        transfers: of loads, by tier.
        token_bytes: bytes of K and V of a token, over all layers.
        copying: of what keeps the cores busy in a load; None where copies do not use the cores that compute.
        rows: sequences that are computed.
        block_columns: columns of a block, which arrives as a whole.
        around_seconds: what a turn takes besides passes and loads.
    """

    prefill: PrefillCost
    transfers: Mapping[str, TransferCost]
    token_bytes: float
    copying: TransferCost | None = None
    rows: int = 1
    block_columns: int = 1
    around_seconds: float = 0.0

    def compute_seconds(self, begin: int, end: int) -> float:
        """Return the seconds to compute the columns ``[begin, end)`` in one pass."""
        return self.prefill.seconds(end - begin, begin, self.rows)

    def front_seconds(self, begin: int, end: int, longest: int) -> float:
        """Return the seconds to compute the columns ``[begin, end)`` in passes of at most ``longest`` columns."""
        return sum(self.compute_seconds(at, min(at + longest, end)) for at in range(begin, end, longest))

    def load_seconds(self, stored: Sequence[StoredRange], begin: int, end: int) -> float:
        """Return the seconds to load what is stored of the columns ``[begin, end)``, one tier after the other."""
        tokens = _tokens_by_tier(stored, begin, end)
        return sum(self.transfers[tier].seconds(int(n * self.token_bytes)) for tier, n in tokens.items())

    def arrival_seconds(self, stored: Sequence[StoredRange], begin: int, end: int) -> float:
        """Return the seconds to load the columns ``[begin, end)``, and those before that are in the same block."""
        return self.load_seconds(stored, begin - begin % self.block_columns, end)

    def busy_seconds(self, stored: Sequence[StoredRange], begin: int, end: int) -> float:
        """Return for how many of these seconds the cores that compute are busy with it."""
        if self.copying is None:
            return 0.0
        tokens = sum(_tokens_by_tier(stored, begin, end).values())
        return min(self.copying.seconds(int(tokens * self.token_bytes)), self.load_seconds(stored, begin, end))


@dataclass(frozen=True, slots=True)
class Decision:
    """How a turn begins.

    Attributes:
        way: ``"compute"``, ``"load"``, ``"both"`` or ``"held"``.
        columns: columns of the prompt that are reused, those included that ``both`` computes beside the load.
        meeting: the column where computing is expected to meet what was loaded from the back; ``both`` alone has one.
        seconds: until the prompt is computed, as expected; None where nothing is known of its cost.
        load_seconds: of these, for the load of what is not computed.
        others: the same for the other ways, by name.
        cold_seconds: what computing the whole prompt would take, as if nothing were known of it; 0 where its cost is
            not known.
    """

    way: str
    columns: int
    meeting: int = 0
    seconds: float | None = None
    load_seconds: float = 0.0
    others: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    cold_seconds: float = 0.0


def is_weighed(reuse: object) -> bool:
    """Return whether known prefixes are loaded only where that pays, by the argument ``reuse``.

    Raises:
        ConfigurationError: it is neither "auto" nor "always".
    """
    asked = os.environ.get(REUSE_VARIABLE, "auto") if reuse is None else reuse
    if asked not in ("auto", "always"):
        said = (
            f"reuse={reuse!r:.80}" if reuse is not None else f"the environment variable {REUSE_VARIABLE}={asked!r:.80}"
        )
        raise ConfigurationError(f"{said} is unknown; pass 'auto' or 'always'.")
    return asked == "auto"


def decide(
    end: int,
    held: int,
    cuts: Sequence[int],
    stored: Sequence[StoredRange],
    estimates: Estimates,
    costs: Costs,
    *,
    may_split: bool,
) -> Decision:
    """Return the way that is expected to have a prompt computed soonest.

    Computing the front while the rest loads from the back is the way of Cake (Jin et al., arXiv 2410.03065). Near-ties
    go to loading: it leaves the cores to others.

    Args:
        end: columns of the prompt.
        held: the columns, from the first on, that are on the device already.
        cuts: more columns up to which a prefix can be reused, in order.
        stored: what can be loaded.
        estimates: what it costs.
        costs: how much sooner another way must be.
        may_split: whether the front can be computed before the rest is there.
    """
    computing = estimates.around_seconds + estimates.compute_seconds(held, end)
    cold = estimates.around_seconds + estimates.compute_seconds(0, end)
    if not cuts or cuts[-1] <= held:
        return Decision(HELD if held else COMPUTE, held, seconds=computing, cold_seconds=cold)
    loads = {cut: _loading(end, held, cut, stored, estimates) for cut in cuts if cut > held}
    longest = cuts[-1]
    load_to = min(loads, key=lambda cut: loads[cut] * (1 if cut == longest else 1 / costs.other_way_share))
    ways = {COMPUTE: computing, LOAD: loads[load_to]}
    meeting = 0
    if may_split:
        meeting = meeting_column(held, longest, stored, estimates, costs)
        ways[BOTH] = _together(end, held, longest, meeting, stored, estimates, costs)
    way = COMPUTE if ways[COMPUTE] < costs.other_way_share * ways[LOAD] else LOAD
    if BOTH in ways and ways[BOTH] < costs.both_share * ways[way]:
        way = BOTH
    others = MappingProxyType({name: seconds for name, seconds in ways.items() if name != way})
    columns = {COMPUTE: held, LOAD: load_to, BOTH: longest}[way]
    begin = {COMPUTE: columns, LOAD: held, BOTH: meeting}[way]
    loading = estimates.load_seconds(stored, begin, columns)
    meeting = meeting if way == BOTH else 0
    return Decision(way, columns, meeting, ways[way], loading, others, cold)


def _loading(end: int, held: int, cut: int, stored: Sequence[StoredRange], estimates: Estimates) -> float:
    return estimates.around_seconds + estimates.load_seconds(stored, held, cut) + estimates.compute_seconds(cut, end)


def _together(
    end: int, held: int, cut: int, meeting: int, stored: Sequence[StoredRange], estimates: Estimates, costs: Costs
) -> float:
    busy = estimates.busy_seconds(stored, meeting, cut)
    front = estimates.front_seconds(held, meeting, costs.longest_chunk_tokens) + busy
    # What has arrived is copied into the buffers once both have met.
    arriving = estimates.arrival_seconds(stored, meeting, cut)
    return estimates.around_seconds + max(front, arriving) + busy + estimates.compute_seconds(cut, end)


def meeting_column(held: int, cut: int, stored: Sequence[StoredRange], estimates: Estimates, costs: Costs) -> int:
    """Return the column up to which computing takes as long as loading what follows, between ``held`` and ``cut``."""
    low, high = held, cut
    while low < high:  # computing takes longer with each column, loading the rest less long
        middle = (low + high) // 2
        front = estimates.front_seconds(held, middle, costs.longest_chunk_tokens)
        front += estimates.busy_seconds(stored, middle, cut)
        if front < estimates.arrival_seconds(stored, middle, cut):
            low = middle + 1
        else:
            high = middle
    return low


def next_chunk(begin: int, arrived: int, columns_per_second: float, estimates: Estimates, costs: Costs) -> int:
    """Return the column up to which to compute next, while the columns before ``arrived`` still load from the back.

    Of the ends of blocks, which arrive as a whole, the one where chunk and rest are there soonest. ``begin`` when it is
    better to wait: what is missing arrives sooner than any chunk is computed.
    """
    missing, size = arrived - begin, estimates.block_columns
    if missing <= 0:
        return begin
    if columns_per_second <= 0:
        return begin + min(missing, costs.longest_chunk_tokens)

    def arriving(block: int) -> float:
        return max(0, arrived - block * size) / columns_per_second

    def computing(block: int) -> float:
        return estimates.compute_seconds(begin, min(arrived, block * size))

    low, high = begin // size, -(-arrived // size)
    while low < high:  # the first end that is computed no sooner than the rest arrives
        middle = (low + high) // 2
        if computing(middle) >= arriving(middle):
            high = middle
        else:
            low = middle + 1
    if low > begin // size and arriving(low - 1) <= computing(low):
        low -= 1
    end = max(begin, min(arrived, low * size, begin + costs.longest_chunk_tokens))
    short = min(missing, costs.shortest_chunk_tokens)
    if end == begin or end - begin >= short:
        return end
    waits = missing / columns_per_second <= estimates.compute_seconds(begin, begin + short)
    return begin if waits else begin + short


def _tokens_by_tier(stored: Sequence[StoredRange], begin: int, end: int) -> dict[str, int]:
    tokens: dict[str, int] = {}
    for each in stored:
        inside = min(each.end, end) - max(each.begin, begin)
        if inside > 0:
            tokens[each.tier] = tokens.get(each.tier, 0) + inside
    return tokens
