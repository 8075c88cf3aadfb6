"""What a first turn costs more with kvtier, when there is nothing to reuse and all of it is to be kept."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

from transformers import DynamicCache

from benchmarks.measure import BenchmarkError, Competitor, Options, Sample, interleave
from benchmarks.result import Case, Result, Target, make_case
from benchmarks.workload import TimedTurn, load_chat, reported, running_text, timed_turn
from kvtier import PrefixStore, TieredCache
from kvtier.cli.demo.conversation import ChatModel

PLAIN = "DynamicCache"
RAM = "TieredCache, RAM only"
FOLDER = "TieredCache, with a folder"
_PROMPTS = {512: 9, 4096: 5}
"""Prompt tokens, and rounds by default: the shorter turn is over sooner and its figures scatter more."""
_NEW_TOKENS = 16
_MOST = 1.02


def run(options: Options) -> Result:
    """Measure the whole turn and its time to first token, at a short and a long prompt."""
    chat = load_chat()
    prompts = {512: 9} if options.quick else _PROMPTS
    cases: list[Case] = []
    targets: list[Target] = []
    for tokens, rounds in prompts.items():
        for case in _measure(chat, tokens, options.rounds_or(rounds), options):
            cases.append(case)
            targets += [Target(f"{case.title}: {name}", case.ratio(name), _MOST, "at most") for name in (RAM, FOLDER)]
    return Result(
        "first_turn",
        (__doc__ or "").strip(),
        max(options.rounds_or(rounds) for rounds in prompts.values()),
        options.quick,
        tuple(cases),
        tuple(targets),
        (
            "The whole turn is the call of generate(), committing included. Files are written behind it: what is left "
            "to write when it returns is written off the clock, before the next competitor runs.",
        ),
    )


def _measure(chat: ChatModel, tokens: int, rounds: int, options: Options) -> tuple[Case, Case]:
    prompt = running_text(chat, tokens)

    def plain() -> Sample:
        return _sample(timed_turn(chat, prompt, DynamicCache(config=chat.model.config), _NEW_TOKENS))

    def tiered(with_folder: bool) -> Sample:
        with ExitStack() as stack:
            folder = None
            if with_folder:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvtier-bench-")))
            store = stack.enter_context(PrefixStore(folder))
            cache = stack.enter_context(TieredCache(store))
            turn = timed_turn(chat, prompt, cache, _NEW_TOKENS)
            if reported(cache).computed_tokens != tokens:
                raise BenchmarkError(f"expected {tokens} computed tokens, the turn reports {cache.last_turn}")
            cache.flush()
            return _sample(turn)

    options.say(f"first turns of {tokens} tokens")
    samples = interleave(
        [
            Competitor(PLAIN, plain),
            Competitor(RAM, lambda: tiered(with_folder=False)),
            Competitor(FOLDER, lambda: tiered(with_folder=True)),
        ],
        rounds,
        options.say,
    )
    facts = {"prompt_tokens": tokens, "new_tokens": _NEW_TOKENS}

    def case(title: str, metric: str) -> Case:
        return make_case(
            title, samples, metric, baseline=PLAIN, ratio_kind="cost", reference=PLAIN, facts=facts | {"rounds": rounds}
        )

    return (
        case(f"{tokens} prompt tokens, whole turn of {_NEW_TOKENS} new ones", "turn_s"),
        case(f"{tokens} prompt tokens, first new token", "first_token_s"),
    )


def _sample(turn: TimedTurn) -> Sample:
    return Sample({"turn_s": turn.seconds, "first_token_s": turn.token_seconds[0]}, turn.tokens)
