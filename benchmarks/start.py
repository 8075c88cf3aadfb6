"""The first turn of a new process that goes on with a stored conversation: what it takes, and which part takes it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.fresh_turn import FreshTurn, run_fresh_turn, save_by_hand
from benchmarks.measure import Competitor, Options, Sample, interleave
from benchmarks.result import Result, Target, make_case
from benchmarks.start_parts import OPENING
from benchmarks.workload import Conversation, copied, expect_source, hold_first_turn, load_chat, reported, seeded
from kvtier import PrefixStore, TieredCache, demo_model
from kvtier.cli.demo.conversation import ChatModel

CONTINUED = "DynamicCache, same object"
BY_HAND = "torch.load mmap, new process"
NEW_PROCESS = "TieredCache, new process"
DISK = "TieredCache, from disk"
RAM = "TieredCache, from RAM"
_NEW_TOKENS = 8


def run(options: Options) -> Result:
    """Measure a turn from every place, and the parts of the one in a new process."""
    rounds, tokens = options.rounds_or(9), 512 if options.quick else 4096
    chat = load_chat()
    options.say(f"first turn of about {tokens} tokens")
    talk = hold_first_turn(chat, tokens)
    with tempfile.TemporaryDirectory(prefix="kvtier-bench-") as scratch_name:
        bench = _Bench(chat, talk, Path(scratch_name))
        samples = interleave(bench.competitors(), rounds, options.say)
    title = f"{len(talk.prompt)} prompt tokens, {talk.known} of them known"
    facts = {"prompt_tokens": len(talk.prompt), "known_tokens": talk.known, "answer_tokens": _NEW_TOKENS}
    from_files = make_case(title, samples, "first_token_s", baseline=BY_HAND, reference=CONTINUED, facts=facts)
    same_process = {name: samples[name] for name in (CONTINUED, DISK, RAM)}
    kept = make_case(f"the same, beside the {CONTINUED}", same_process, "first_token_s", baseline=CONTINUED)
    parts = make_case(f"parts of the turn of a {NEW_PROCESS}", bench.parts(), "seconds")
    return Result(
        "start",
        (__doc__ or "").strip(),
        rounds,
        options.quick,
        (from_files, kept, parts),
        (
            Target("a new process, against torch.load by hand", from_files.ratio(NEW_PROCESS), 1.0, "at least"),
            Target("from disk, against the continued object", kept.ratio(DISK), 0.85, "at least"),
            Target("from RAM, against the continued object", kept.ratio(RAM), 0.95, "at least"),
        ),
        (
            "The clock runs from the call of generate() to its first new token; opening the store, or loading the "
            "file, is added. The page cache holds the files.",
            "A new process loads the model and answers a short prompt with plain transformers before its turn.",
            "Parts are those of the thread that calls generate(); other threads work beside them.",
        ),
    )


class _Bench:
    """The competitors. Every turn starts from the first turn alone, in a store made for it."""

    def __init__(self, chat: ChatModel, talk: Conversation, scratch: Path) -> None:
        self._chat = chat
        self._talk = talk
        self._by_hand = scratch / "by-hand.pt"
        self._template = scratch / "template"
        self._parts: list[dict[str, float]] = []
        save_by_hand(talk.keys_values, self._by_hand)
        with PrefixStore(self._template, compression="raw") as store:
            seeded(store, chat, talk.sequence, talk.keys_values).close()

    def competitors(self) -> Sequence[Competitor]:
        return [
            Competitor(CONTINUED, self._continued),
            Competitor(BY_HAND, self._loaded_by_hand),
            Competitor(NEW_PROCESS, self._new_process),
            Competitor(DISK, self._from_disk),
            Competitor(RAM, self._from_ram),
        ]

    def parts(self) -> dict[str, tuple[Sample, ...]]:
        """Return the parts of the turns in new processes so far, in the order in which they came."""
        names = dict.fromkeys(name for parts in self._parts for name in parts)
        return {name: tuple(Sample({"seconds": parts.get(name, 0.0)}) for parts in self._parts) for name in names}

    def _turn(self, cache: object, opening_seconds: float = 0.0) -> Sample:
        answer = self._chat.answer(self._talk.prompt, cache, _NEW_TOKENS)
        return _sample(opening_seconds, answer.first_token_seconds, answer.new_tokens)

    def _continued(self) -> Sample:
        self._talk.rewind()
        return self._turn(self._talk.plain)

    def _from_ram(self) -> Sample:
        with PrefixStore() as store:
            seeded(store, self._chat, self._talk.sequence, self._talk.keys_values).close()
            with TieredCache(store) as cache:
                sample = self._turn(cache)
                expect_source(reported(cache).cached_by_tier, {"host": self._talk.known})
        return sample

    def _from_disk(self) -> Sample:
        with copied(self._template) as folder:
            started = time.perf_counter()
            store = PrefixStore(folder)
            cache = TieredCache(store)
            opening_seconds = time.perf_counter() - started
            with store, cache:
                sample = self._turn(cache, opening_seconds)
                expect_source(reported(cache).cached_by_tier, {"disk": self._talk.known})
        return sample

    def _loaded_by_hand(self) -> Sample:
        turn = run_fresh_turn(demo_model(), "torch_load_mmap", self._talk.prompt, _NEW_TOKENS, self._by_hand)
        return _of(turn)

    def _new_process(self) -> Sample:
        with copied(self._template) as folder:
            turn = run_fresh_turn(demo_model(), "tiered_folder", self._talk.prompt, _NEW_TOKENS, folder, in_parts=True)
        expect_source(turn.cached_by_tier, {"disk": self._talk.known})
        self._parts.append({OPENING: turn.opening_seconds, **turn.parts})
        return _of(turn)


def _of(turn: FreshTurn) -> Sample:
    return _sample(turn.opening_seconds, turn.first_token_seconds, turn.answer)


def _sample(opening_seconds: float, first_token_seconds: float, new_tokens: tuple[int, ...]) -> Sample:
    seconds = opening_seconds + first_token_seconds
    return Sample({"first_token_s": seconds, "opening_s": opening_seconds}, new_tokens)
