"""Meeting: a model computes the front of a known prefix while its end loads, until both meet."""

from __future__ import annotations

from kvtier.hf.turn.choice.decision import Estimates, next_chunk
from kvtier.hf.turn.cost import Costs
from kvtier.store.reading.back_fetch import BackFetch
from kvtier.store.reading.load import LoadJob


class Meeting:
    """Decides, chunk by chunk, what is computed while the rest arrives from the back.

    It does not trust the estimates for long: how fast blocks have arrived so far tells how long the rest takes. A tier
    that turns slow, or hangs, is given up where computing overtakes it.

    Args:
        fetch: reads the blocks of the prefix.
        begin: the first column that is not on the device.
        end: columns of the prefix.
        estimates: costs of computing and, until a block has arrived, of loading.
        seconds: what the whole load is expected to take.
        costs: the sizes of chunks.
        patience_seconds: how long nothing is computed at first.

    Attributes:
        begin: the first column that was computed here.
        joined: the column up to which was computed here; None until both have met.
    """

    def __init__(
        self,
        fetch: BackFetch,
        begin: int,
        end: int,
        estimates: Estimates,
        seconds: float,
        costs: Costs,
        patience_seconds: float = 0.0,
    ) -> None:
        self.begin = begin
        self.joined: int | None = None
        self.fetch = fetch
        self._end = end
        self._estimates = estimates
        self._costs = costs
        self._patience_seconds = patience_seconds
        self._first: int | None = None
        self._columns_per_second = (end - begin) / seconds if seconds > 0 else 0.0

    def first_chunk(self) -> int | None:
        """Return the column up to which to compute first; None when everything has arrived already."""
        self._first = self.next_chunk(self.begin)
        return self._first

    def next_chunk(self, column: int) -> int | None:
        """Return the column up to which to compute next, after ``column``; None when the rest has arrived.

        Waits where that is faster than to compute, and not much longer than it seemed: then more is computed.
        """
        if column == self.begin and self._first is not None:
            return self._first
        patience, self._patience_seconds = self._patience_seconds, 0.0
        if patience:
            self.fetch.wait(column, patience)
        while True:
            arrived = self.fetch.arrived
            missing = arrived - column
            if missing <= 0:
                return None
            if self.fetch.is_stuck:
                return column + min(missing, self._costs.longest_chunk_tokens)
            speed = self._speed(arrived, missing)
            end = next_chunk(column, arrived, speed, self._estimates, self._costs)
            if end > column:
                return end
            self.fetch.wait(column, self._costs.watched_load_times * missing / speed)

    @property
    def arrived_share(self) -> float:
        """How much of the prefix has arrived from the back, from 0 to 1."""
        return (self._end - self.fetch.arrived) / max(1, self._end - self.begin)

    def join(self, column: int) -> LoadJob | None:
        """End the meeting at ``column``. Return the load of what was not computed; None when all was."""
        self.joined = min(column, self._end)
        self.fetch.stop(column)
        if column < self._end:
            return self.fetch.job
        self.fetch.job.close()
        return None

    def close(self) -> None:
        """Give up what has not arrived. May be called more than once, and after both have met."""
        if self.joined is None:
            self.fetch.stop(self._end)
            self.fetch.job.close()

    def _speed(self, arrived: int, missing: int) -> float:
        """Return how many of the ``missing`` columns arrive in a second: measured, once there is something to measure.

        As long as nothing has come, what is missing is taken to need as long again as it was waited for.
        """
        seconds = self.fetch.elapsed_seconds
        expected = self._columns_per_second
        if arrived == self._end:
            return min(expected, missing / seconds) if seconds > 0 else expected
        return (self._end - arrived) / seconds
