"""Time to first token of a turn that continues a conversation, from every place its K and V can come from."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from transformers import DynamicCache

from benchmarks.fresh_turn import CacheKind, run_fresh_turn, save_by_hand
from benchmarks.measure import Competitor, Options, Sample, interleave
from benchmarks.result import Case, Result, Target, make_case
from benchmarks.workload import Conversation, copied, expect_source, hold_first_turn, load_chat, reported, seeded
from kvtier import PrefixStore, TieredCache, demo_model
from kvtier.cli.demo.conversation import Answer, ChatModel

COLD = "DynamicCache, cold"
CONTINUED = "DynamicCache, same object"
WINDOW = "TieredCache, same object"
RAM = "TieredCache, from RAM"
NEW_PROCESS = "TieredCache, new process, raw"
_LENGTHS = (512, 1024, 2048, 4096)
_NEW_TOKENS = 8
_CODECS = ("raw", "zstd")


def run(options: Options) -> Result:
    """Measure at several lengths; at the longest with everything that a new process can start from."""
    rounds = options.rounds_or(5)
    chat = load_chat()
    lengths = (512,) if options.quick else _LENGTHS
    cases = [_measure(chat, length, length == lengths[-1], rounds, options) for length in lengths]
    targets = (
        Target("a new process, from disk, against a cold start", cases[-1].ratio(NEW_PROCESS), 25, "at least"),
        Target("from RAM, against a cold start", cases[-1].ratio(RAM), 35, "at least"),
    )
    return Result(
        benchmark="ttft",
        purpose=(__doc__ or "").strip(),
        rounds=rounds,
        quick=options.quick,
        cases=tuple(cases),
        targets=targets,
        notes=(
            "The clock runs from the call of generate() to its first new token. Where a store is opened or a file is "
            "loaded for the turn, that time is added (opening_s).",
            "The page cache holds the files. A new process loads the model and answers a short prompt before its turn.",
            "A cold start computes the prompt in one piece, the others in two: other kernels, whose last bits differ, "
            "so its tokens may differ.",
        ),
    )


def _measure(chat: ChatModel, tokens: int, everything: bool, rounds: int, options: Options) -> Case:
    options.say(f"first turn of about {tokens} tokens")
    talk = hold_first_turn(chat, tokens)
    with tempfile.TemporaryDirectory(prefix="kvtier-bench-") as scratch_name:
        bench = _Bench(chat, talk, Path(scratch_name))
        samples = interleave(bench.competitors(everything), rounds, options.say)
    return make_case(
        f"{len(talk.prompt)} prompt tokens, {talk.known} of them known",
        samples,
        "first_token_s",
        baseline=COLD,
        reference=CONTINUED,
        other_calls=[COLD],
        facts={"prompt_tokens": len(talk.prompt), "known_tokens": talk.known, "answer_tokens": _NEW_TOKENS},
    )


class _Bench:
    """The competitors of one length. Every turn starts from the first turn alone, in a store made for it."""

    def __init__(self, chat: ChatModel, talk: Conversation, scratch: Path) -> None:
        self._chat = chat
        self._talk = talk
        self._scratch = scratch
        self._by_hand = scratch / "by-hand.pt"
        save_by_hand(talk.keys_values, self._by_hand)
        for codec in _CODECS:
            with PrefixStore(self._template(codec), compression=codec) as store:
                seeded(store, chat, talk.sequence, talk.keys_values).close()

    def competitors(self, everything: bool) -> Sequence[Competitor]:
        """Return those of the longest prompt, or the fewer that show how things change with length."""
        codecs = _CODECS if everything else ("raw",)
        found = [
            Competitor(COLD, self._cold),
            Competitor(CONTINUED, self._continued),
            Competitor(WINDOW, self._from_window),
            Competitor(RAM, self._from_ram),
        ]
        for codec in codecs:
            found.append(Competitor(f"TieredCache, from disk, {codec}", partial(self._from_disk, codec)))
            found.append(Competitor(f"TieredCache, new process, {codec}", partial(self._new_tiered_process, codec)))
        if everything:
            found += [
                Competitor("torch.load, new process", lambda: self._new_process("torch_load", self._by_hand)),
                Competitor("torch.load mmap, new process", lambda: self._new_process("torch_load_mmap", self._by_hand)),
            ]
        return found

    def _template(self, codec: str) -> Path:
        return self._scratch / f"template-{codec}"

    def _answer(self, cache: object) -> Answer:
        return self._chat.answer(self._talk.prompt, cache, _NEW_TOKENS)

    def _cold(self) -> Sample:
        return _sample(self._answer(DynamicCache(config=self._chat.model.config)))

    def _continued(self) -> Sample:
        self._talk.rewind()
        return _sample(self._answer(self._talk.plain))

    def _seeded(self, store: PrefixStore) -> TieredCache:
        return seeded(store, self._chat, self._talk.sequence, self._talk.keys_values)

    def _from_window(self) -> Sample:
        with PrefixStore() as store, self._seeded(store) as cache:
            answer = self._answer(cache)
            expect_source(reported(cache).cached_by_tier, {"device": self._talk.known})
        return _sample(answer)

    def _from_ram(self) -> Sample:
        with PrefixStore() as store:
            self._seeded(store).close()
            with TieredCache(store) as cache:
                answer = self._answer(cache)
                expect_source(reported(cache).cached_by_tier, {"host": self._talk.known})
        return _sample(answer)

    def _from_disk(self, codec: str) -> Sample:
        with copied(self._template(codec)) as folder:
            started = time.perf_counter()
            store = PrefixStore(folder)
            cache = TieredCache(store)
            opening = time.perf_counter() - started
            with store, cache:
                answer = self._answer(cache)
                expect_source(reported(cache).cached_by_tier, {"disk": self._talk.known})
        return _sample(answer, opening)

    def _new_tiered_process(self, codec: str) -> Sample:
        with copied(self._template(codec)) as folder:
            return self._new_process("tiered_folder", folder, {"disk": self._talk.known})

    def _new_process(self, kind: CacheKind, path: Path, expected: dict[str, int] | None = None) -> Sample:
        turn = run_fresh_turn(demo_model(), kind, self._talk.prompt, _NEW_TOKENS, path)
        expect_source(turn.cached_by_tier, expected or {})
        return Sample(
            {
                "first_token_s": turn.opening_seconds + turn.first_token_seconds,
                "opening_s": turn.opening_seconds,
                "peak_bytes": turn.peak_bytes,
            },
            turn.answer,
        )


def _sample(answer: Answer, opening_seconds: float = 0.0) -> Sample:
    return Sample(
        {"first_token_s": opening_seconds + answer.first_token_seconds, "opening_s": opening_seconds},
        answer.new_tokens,
    )
