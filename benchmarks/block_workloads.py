"""Workloads of blocks, drawn at random with a seed: shared prompts, conversations, long prompts that nobody repeats."""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import dataclass

from benchmarks.trace import LARGE, MEDIUM, ROOT, SMALL, WIDE, ModelSize, Trace

_BLOCK_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Habits:
    """How people ask.

    Attributes:
        prompts: beginnings that requests share; the n-th most popular is asked for 1/n as often as the first. Half
            way through, popularity is dealt out anew.
        scans: share of new requests that nobody repeats, 10 to 100 blocks long.
        talks: share of the others that go on as conversations, of 5 turns on average.
        pause: turns of others between two turns of a conversation, in the median.
        models: each shared prompt is for one of them.
    """

    prompts: int
    scans: float
    talks: float
    pause: int
    models: tuple[ModelSize, ...] = (MEDIUM,)


ASSISTANTS = Habits(prompts=60, scans=0.15, talks=0.7, pause=300)
SCANS = Habits(prompts=300, scans=0.3, talks=0.7, pause=60)
CHATS = Habits(prompts=20, scans=0.0, talks=1.0, pause=30)
TWO_MODELS = Habits(prompts=60, scans=0.15, talks=0.7, pause=300, models=(WIDE, MEDIUM))
MODELS = Habits(prompts=60, scans=0.15, talks=0.7, pause=300, models=(SMALL, SMALL, MEDIUM, MEDIUM, LARGE))


@dataclass(frozen=True, slots=True, order=True)
class _Due:
    at: float
    order: int
    chain: tuple[int, ...]
    turns_left: int
    model: ModelSize


def draw(habits: Habits, requests: int, seed: int) -> Trace:
    """Return ``requests`` requests; the same for the same seed. Sizes are in bytes."""
    chance, trace = random.Random(seed), Trace()

    def longer(chain: tuple[int, ...], blocks: int, model: ModelSize) -> tuple[int, ...]:
        grown = list(chain)
        for _ in range(blocks):
            grown.append(trace.add_block(grown[-1] if grown else ROOT, _BLOCK_TOKENS, model))
        return tuple(grown)

    models = [chance.choice(habits.models) for _ in range(habits.prompts)]
    prompts = [longer((), chance.randint(2, 24), model) for model in models]
    popularity = list(range(habits.prompts))
    weights = [1 / (rank + 1) for rank in popularity]
    waiting: list[_Due] = []

    def wait(now: int, chain: tuple[int, ...], turns: int, model: ModelSize) -> None:
        at = now + 1 + chance.lognormvariate(math.log(habits.pause), 1)
        heapq.heappush(waiting, _Due(at, len(trace.parents), chain, turns, model))

    for now in range(requests):
        if now == requests // 2:
            chance.shuffle(popularity)
        if waiting and waiting[0].at <= now:
            due = heapq.heappop(waiting)
            chain = longer(due.chain, chance.randint(1, 6), due.model)
            if due.turns_left > 1:
                wait(now, chain, due.turns_left - 1, due.model)
        elif chance.random() < habits.scans:
            chain = longer((), chance.randint(10, 100), chance.choice(models))
        else:
            prompt = popularity[chance.choices(range(habits.prompts), weights)[0]]
            chain = longer(prompts[prompt], chance.choice((1, 2, 4, 8, 32)), models[prompt])
            if chance.random() < habits.talks:
                wait(now, chain, min(1 + int(chance.expovariate(1 / 4)), 30), models[prompt])
        trace.requests.append(chain)
    return trace
