"""CostBook: the timed passes and loads of one model on one machine, and the costs that fit them."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, TypeGuard, TypeVar

from kvtier.costs.encoding import EncodingCost, EncodingSample, as_read, encoding_cost
from kvtier.costs.prefill import PrefillCost, PrefillSample
from kvtier.costs.transfer import TransferCost, TransferSample
from kvtier.costs.worth import ENOUGH_LOADS, Worth

_OF_A_KIND = 5  # samples that are kept: the middle one counts, so that a hiccup does not
_KINDS = 64  # of passes
_TURNS = 7  # of which the middle one counts
_LOADS = 24  # the latest of a tier: a link changes
_LOOKUPS = 24  # the same
_LARGEST = 1e15  # of numbers that another process has kept: larger ones are damage
_OLD_LOOKUPS = ", asking"  # earlier files have lookups among loads, under the name of the tier with this
_TRIALS = 8  # the latest of a codec: prompts differ
_GUESSES = {"host": TransferCost(2e-4, 5e9), "disk": TransferCost(2e-3, 1e9)}
# Of tiers below. It is optimistic: what is never tried is never measured, and a turn gives up what comes too late.
_GUESS_BELOW = TransferCost(0.005, 1e9)


T = TypeVar("T")


class CostBook:
    """What computing and loading cost, as far as it was measured. Thread-safe.

    Passes of a kind, of about as many tokens after about as many others, stand for each other: the last few of each are
    kept, and the middle one of them counts. Of loads, the latest of each tier are kept.

    Args:
        lock: held to read or change it; that of several books, so that a fork can wait for all of them.

    Attributes:
        token_bytes: bytes of K and V of a token, over all layers; 0 if not known.
        news: number of kinds of passes, of loads and of trials of codecs that were noted since it was last saved.
        changes: number of samples that were noted.
    """

    def __init__(self, lock: threading.RLock | None = None) -> None:
        self.token_bytes = 0.0
        self.news = 0
        self.changes = 0
        self._guess: PrefillCost | None = None
        self._passes: dict[Hashable, deque[PrefillSample]] = {}
        self._beside_loads: set[Hashable] = set()  # kinds of passes of which none ran alone
        self._loads: dict[str, deque[TransferSample]] = {}
        self._trials: dict[str, deque[EncodingSample]] = {}
        self._fitted: dict[str | None, PrefillCost | TransferCost] = {}
        self._lookups: dict[str, deque[float]] = {}
        self._around: deque[float] = deque(maxlen=_TURNS)
        self._lock = lock or threading.RLock()

    def guess(self, cost: PrefillCost) -> None:
        """Take ``cost`` for what no pass has shown."""
        with self._lock:
            self._guess = cost
            self._fitted.pop(None, None)

    def note_pass(self, sample: PrefillSample, *, alone: bool = True) -> None:
        """Note a forward pass that was timed.

        If it was not ``alone``, a load may have slowed it down: it counts where no pass of its kind ran alone.
        """
        if sample.tokens < 1:
            return
        kind = (_size(sample.tokens), _size(sample.depth_tokens), _size(sample.rows))
        with self._lock:
            if not alone and kind in self._passes and kind not in self._beside_loads:
                return
            if not alone:
                self._beside_loads.add(kind)
            elif kind in self._beside_loads:
                self._beside_loads.remove(kind)
                del self._passes[kind]
            self.changes += 1
            self.news += _add(self._passes, kind, sample)
            self._fitted.pop(None, None)

    def note_load(self, tier: str, sample: TransferSample) -> None:
        """Note a load from ``tier`` that was timed."""
        with self._lock:
            self._loads.setdefault(tier, deque(maxlen=_LOADS)).append(sample)
            self.news += 1
            self.changes += 1
            self._fitted.pop(tier, None)

    def note_trial(self, codec: str, sample: EncodingSample) -> None:
        """Note K and V that ``codec`` encoded and decoded."""
        if sample.nbytes < 1 or sample.kept_bytes < 1 or not _is_positive(sample.decode_seconds):
            return
        with self._lock:
            self._trials.setdefault(codec, deque(maxlen=_TRIALS)).append(sample)
            self.news += 1
            self.changes += 1

    @property
    def knows_passes(self) -> bool:
        """Whether there is a cost of forward passes, measured or guessed."""
        return bool(self._passes) or self._guess is not None

    def prefill(self) -> PrefillCost | None:
        """Return the cost of forward passes; None when none was timed, and none guessed."""
        with self._lock:
            found = self._fitted.get(None)
            if found is None:
                samples = [_middle(kind, key=lambda each: each.seconds) for kind in self._passes.values()]
                if self._guess is None and not samples:
                    return None
                guess = self._guess or _supposed(samples)
                found = self._fitted[None] = guess.refined(samples)
        assert isinstance(found, PrefillCost)
        return found

    def transfer(self, tier: str) -> TransferCost:
        """Return the cost of loads from ``tier``: measured, else a guess."""
        with self._lock:
            found = self._fitted.get(tier)
            if found is None:
                samples = self._loads.get(tier, ())
                found = self._fitted[tier] = _GUESSES.get(tier, _GUESS_BELOW).refined(list(samples))
        assert isinstance(found, TransferCost)
        return found

    def worth(self) -> Worth | None:
        """Return what K and V are worth; None where no pass was timed, or the bytes of a token are not known."""
        if not self._passes or not self.token_bytes:
            return None
        prefill = self.prefill()
        assert prefill is not None
        with self._lock:
            measured = [*(tier for tier, samples in self._loads.items() if len(samples) >= ENOUGH_LOADS)]
        byte_seconds = {tier: 1 / self.transfer(tier).bytes_per_second for tier in measured}
        return Worth(prefill.token_seconds, prefill.pair_seconds, self.token_bytes, byte_seconds)

    def encoding(self, codec: str) -> EncodingCost | None:
        """Return the cost of a codec; None where it was not tried."""
        with self._lock:
            samples = list(self._trials.get(codec, ()))
        return encoding_cost(samples)

    def reading_byte_seconds(self, tier: str, codec: str) -> float | None:
        """Return how long reading a byte from ``tier`` takes without decoding; None where too little was measured.

        ``codec`` is the one that decoded what was decoded.
        """
        with self._lock:
            samples = list(self._loads.get(tier, ()))
        cost = self.encoding(codec)
        if cost is not None:
            samples = [as_read(each, cost) for each in samples]
        samples = [each for each in samples if not each.decoded_nbytes]
        if len(samples) < ENOUGH_LOADS:
            return None
        return 1 / _GUESSES.get(tier, _GUESS_BELOW).refined(samples).bytes_per_second

    def note_lookup(self, tier: str, seconds: float) -> None:
        """Note how long it takes to ask ``tier`` what it has."""
        if _is_positive(seconds):
            with self._lock:
                self._lookups.setdefault(tier, deque(maxlen=_LOOKUPS)).append(float(seconds))
                self.news += 1
                self.changes += 1

    def lookup_seconds(self, tier: str) -> float:
        """Return how long it takes to ask ``tier`` what it has; 0 if it was never timed."""
        with self._lock:
            return _middle(self._lookups.get(tier, (0.0,)))

    def note_around(self, seconds: float) -> None:
        """Note what a turn took besides its passes and loads, up to its first token: what ``generate`` itself does."""
        if _is_positive(seconds):
            with self._lock:
                self._around.append(float(seconds))
                self.news += 1

    def around_seconds(self) -> float:
        """Return what turns have taken lately besides passes and loads: the middle of the last ones; 0 for none."""
        with self._lock:
            return _middle(self._around or (0.0,))

    # --- to keep it -------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return its samples as plain values; what is learnt from here on is news."""
        with self._lock:
            self.news = 0
            return {
                "token_bytes": self.token_bytes,
                "around": [[seconds] for seconds in self._around],
                "passes": [
                    [each.tokens, each.depth_tokens, each.rows, each.seconds]
                    for kind in self._passes.values()
                    for each in kind
                ],
                "loads": {
                    tier: [[each.nbytes, each.seconds, each.decoded_nbytes] for each in samples]
                    for tier, samples in self._loads.items()
                },
                "lookups": {tier: [[seconds] for seconds in samples] for tier, samples in self._lookups.items()},
                "trials": {
                    codec: [[each.nbytes, each.kept_bytes, each.decode_seconds] for each in samples]
                    for codec, samples in self._trials.items()
                },
            }

    def learn(self, values: Mapping[str, Any]) -> None:
        """Take over the samples of another process; values that ``to_dict`` cannot have returned are left out."""
        token_bytes = values.get("token_bytes")
        if _is_positive(token_bytes):
            self.token_bytes = float(token_bytes)
        for tokens, depth, rows, seconds in _tuples(values.get("passes"), 4):
            self.note_pass(PrefillSample(int(tokens), int(depth), float(seconds), max(1, int(rows))))
        for tier, nbytes, seconds, decoded in _tuples_by_name(values.get("loads"), 3):
            if tier.endswith(_OLD_LOOKUPS):
                self.note_lookup(tier.removesuffix(_OLD_LOOKUPS), seconds)
            else:
                self.note_load(tier, TransferSample(int(nbytes), float(seconds), int(decoded)))
        for tier, seconds in _tuples_by_name(values.get("lookups"), 1):
            self.note_lookup(tier, seconds)
        for (seconds,) in _tuples(values.get("around"), 1):
            self.note_around(seconds)
        for codec, nbytes, kept, seconds in _tuples_by_name(values.get("trials"), 3):
            self.note_trial(codec, EncodingSample(int(nbytes), int(kept), float(seconds)))
        self.news = 0


def _size(count: int) -> int:
    """Return a number that is the same for counts of about the same size."""
    return round(2 * math.log2(count)) if count > 0 else -1


def _add(kinds: dict[Hashable, deque[PrefillSample]], kind: Hashable, sample: PrefillSample) -> bool:
    """Add a sample of a kind; return whether it is the first one."""
    found = kinds.pop(kind, None)
    kinds[kind] = found if found is not None else deque(maxlen=_OF_A_KIND)  # the kind noted last stands last
    kinds[kind].append(sample)
    if len(kinds) > _KINDS:
        del kinds[next(iter(kinds))]
    return found is None


def _middle(samples: Iterable[T], key: Callable[[T], float] | None = None) -> T:
    """Return the median, the lower one of two: a pause of the machine can only lengthen a sample."""
    ordered = sorted(samples, key=key)  # type: ignore[type-var,arg-type]  # without a key they are numbers
    return ordered[(len(ordered) - 1) // 2]


def _supposed(samples: Iterable[PrefillSample]) -> PrefillCost:
    """Return a guess by the largest pass: mostly matrix products."""
    largest = max(samples, key=lambda each: each.tokens * each.rows)
    token = largest.seconds / (largest.tokens * largest.rows)
    return PrefillCost(4 * token, token, token / 32768, token / 1024, token)


def _is_positive(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < _LARGEST


def _tuples(values: Any, length: int) -> Iterable[tuple[Any, ...]]:
    """Yield what is a list of ``length`` numbers in a list."""
    for each in values if isinstance(values, list) else ():
        numbers = isinstance(each, list) and all(_is_positive(n) or (n == 0 and type(n) is int) for n in each)
        if numbers and len(each) == length:
            yield tuple(each)


def _tuples_by_name(values: Any, length: int) -> Iterable[tuple[Any, ...]]:
    """Yield what is a list of ``length`` numbers in a list of a dictionary, each behind its name."""
    for name, lists in values.items() if isinstance(values, dict) else ():
        for numbers in _tuples(lists, length):
            yield str(name), *numbers
