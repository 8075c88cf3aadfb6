"""Seconds per decode token at growing contexts: appending in place against concatenating."""

from __future__ import annotations

from typing import Any

from benchmarks.measure import Competitor, Options, Sample, interleave
from benchmarks.result import Case, Result, Target, make_case
from benchmarks.workload import keys_values, load_chat, prefill, running_text, seeded, timed_turn
from kvtier import PrefixStore
from kvtier.cli.demo.conversation import ChatModel

PLAIN = "DynamicCache"
TIERED = "TieredCache"
_CONTEXTS = (512, 2048, 4096, 7900)
_TOKENS_A_RUN = 16


def run(options: Options) -> Result:
    """Measure at each context; both caches start from the same bytes."""
    rounds = options.rounds_or(7)
    chat = load_chat()
    contexts = (512,) if options.quick else _CONTEXTS
    cases = [_measure(chat, context, rounds, options) for context in contexts]
    targets = [_target(context, case.ratio(TIERED)) for context, case in zip(contexts, cases, strict=True)]
    return Result(
        "decode",
        (__doc__ or "").strip(),
        rounds,
        options.quick,
        tuple(cases),
        tuple(targets),
        (
            f"Each run decodes {_TOKENS_A_RUN} tokens with generate(); matching, the first token and committing are "
            "off the clock. Afterwards both caches are cropped back.",
        ),
    )


def _target(context: int, speedup: float) -> Target:
    if context >= 4096:
        return Target(f"decoding at {context} tokens", speedup, 1.0, "more than")
    return Target(f"decoding at {context} tokens", speedup, 0.98, "at least")


def _measure(chat: ChatModel, context: int, rounds: int, options: Options) -> Case:
    options.say(f"prefilling {context} tokens")
    prompt = running_text(chat, context)
    known = context - 1  # generate() must be given one token to compute
    plain = prefill(chat, prompt[:known])
    with PrefixStore() as store, seeded(store, chat, prompt, keys_values(plain, known)) as tiered:

        def decode(cache: Any) -> Sample:
            turn = timed_turn(chat, prompt, cache, _TOKENS_A_RUN + 1)
            cache.crop(known - cache.get_seq_length())
            return Sample({"decode_s": turn.seconds_per_decode_token}, turn.tokens)

        samples = interleave(
            [Competitor(PLAIN, lambda: decode(plain)), Competitor(TIERED, lambda: decode(tiered))],
            rounds,
            options.say,
        )
    return make_case(
        f"{context} tokens of context",
        samples,
        "decode_s",
        unit="s/token",
        baseline=PLAIN,
        reference=PLAIN,
        facts={"context_tokens": context, "tokens_a_run": _TOKENS_A_RUN},
    )
