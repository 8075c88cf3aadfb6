"""Peak memory of a process that has one long turn: a first one, and one that continues a conversation."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.fresh_turn import CacheKind, run_fresh_turn, save_by_hand
from benchmarks.measure import Competitor, Options, Sample, Tokens, interleave
from benchmarks.result import Result, make_case
from benchmarks.workload import copied, hold_first_turn, load_chat, seeded
from kvtier import PrefixStore, demo_model

PLAIN = "DynamicCache"
BY_HAND = "torch.load"
_NEW_TOKENS = 8


def run(options: Options) -> Result:
    """Measure the peak of resident memory in processes of their own."""
    rounds = options.rounds_or(1)
    chat = load_chat()
    talk = hold_first_turn(chat, 512 if options.quick else 4096)
    first_prompt = talk.prompt[: talk.known]

    def turn(kind: CacheKind, prompt: Tokens, path: Path | None = None) -> Sample:
        done = run_fresh_turn(demo_model(), kind, prompt, _NEW_TOKENS, path)
        growth = done.peak_bytes - done.start_peak_bytes
        return Sample({"peak_bytes": done.peak_bytes, "growth_bytes": growth}, done.answer)

    def first_with_folder() -> Sample:
        with tempfile.TemporaryDirectory(prefix="kvtier-bench-") as folder:
            return turn("tiered_folder", first_prompt, Path(folder))

    def later_from(template: Path) -> Sample:
        with copied(template) as folder:
            return turn("tiered_folder", talk.prompt, folder)

    first = interleave(
        [
            Competitor(PLAIN, lambda: turn("dynamic", first_prompt)),
            Competitor("TieredCache, RAM only", lambda: turn("tiered_ram", first_prompt)),
            Competitor("TieredCache, with a folder", first_with_folder),
        ],
        rounds,
        options.say,
    )
    with tempfile.TemporaryDirectory(prefix="kvtier-bench-") as scratch_name:
        folder, by_hand = Path(scratch_name) / "store", Path(scratch_name) / "by-hand.pt"
        save_by_hand(talk.keys_values, by_hand)
        with PrefixStore(folder) as store:
            seeded(store, chat, talk.sequence, talk.keys_values).close()
        later = interleave(
            [
                Competitor(BY_HAND, lambda: turn("torch_load", talk.prompt, by_hand)),
                Competitor("TieredCache, from disk", lambda: later_from(folder)),
            ],
            rounds,
            options.say,
        )
    facts = {"known_bytes": sum(k.nbytes + v.nbytes for k, v in talk.keys_values)}
    cases = tuple(
        make_case(
            title, samples, "peak_bytes", unit="bytes", baseline=base, ratio_kind="cost", reference=base, facts=facts
        )
        for title, samples, base in (
            (f"first turn, {len(first_prompt)} prompt tokens", first, PLAIN),
            (f"later turn, {len(talk.prompt)} prompt tokens, {talk.known} of them known", later, BY_HAND),
        )
    )
    notes = ("No target. Beside its buffer, TieredCache keeps blocks in the RAM tier, for other conversations.",)
    return Result("memory", (__doc__ or "").strip(), rounds, options.quick, cases, (), notes)
