"""Short conversations of a tiny random model, played on a TieredCache and on a DynamicCache.

A script lists the turns. Both runs make the same forward calls, so that tokens and logits must have the same bits: a
turn on the DynamicCache begins with as many known tokens as the TieredCache reported for it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kvtier.hf.cache import TieredCache
from kvtier.hf.compat.names import CHUNKS_CONTINUE, passed
from kvtier.kv.room import with_slack
from kvtier.kv.spec import LayerSpec
from kvtier.offload.accounting import smallest_budget_bytes

LAYERS = 6
_VOCABULARY = 256
_MARKS = 16  # ids below it are never generated: each later turn begins with one of its own


def tiny_model(device: torch.device, dtype: torch.dtype) -> Any:
    """Return a random Llama; every call returns the same weights.

    Its weights are far from zero, so that the attended tokens decide the next token. Two query heads share each K/V
    head, so that attention copies its inputs: kernels then do not depend on the memory layout of K and V.
    """
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config).eval()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model.to(device=device, dtype=dtype)


@dataclass(frozen=True, slots=True)
class ScriptedTurn:
    """One turn: take tokens off the end, add new ones, generate.

    Attributes:
        cut: tokens taken off the end of the conversation.
        crop: tokens that ``crop`` removes from the cache before the turn, independent of the prompt.
        prompt: ids that are added, for each row.
        chunk: ``prefill_chunk_size``; None computes the prompt at once.
        new_tokens: tokens to generate.
    """

    cut: int
    crop: int
    prompt: tuple[tuple[int, ...], ...]
    chunk: int | None
    new_tokens: int


Script = Sequence[ScriptedTurn]


def random_script(chance: random.Random, longest: int, rows: int = 1) -> Script:
    """Return two to four turns of a conversation that never exceeds ``longest`` tokens (at least 64)."""
    turns: list[ScriptedTurn] = []
    length = 0
    for number in range(chance.randint(2, 4)):
        cut = chance.choice((0, chance.randint(0, length // 2)))
        new_tokens = chance.randint(2, 10)
        room = longest - (length - cut) - new_tokens - 1
        if room < 1:
            break
        count = chance.randint(1, room) if number else chance.randint(longest // 4, longest // 2)
        turns.append(
            ScriptedTurn(
                cut=cut,
                crop=chance.choice((0, 0, chance.randint(0, length))),
                # A later turn begins with an id of its own: the known prefix of its prompt ends there.
                prompt=tuple(_ids(chance, count, (number,) if number else ()) for _ in range(rows)),
                chunk=chance.choice((None, chance.randint(5, 40))),
                new_tokens=new_tokens,
            )
        )
        length += len(turns[-1].prompt[0]) + new_tokens - cut
    return turns


def steady_script() -> Script:
    """Return three turns with a prompt at once and in chunks, an edit, and a crop."""
    chance = random.Random(0)
    return (
        ScriptedTurn(cut=0, crop=0, prompt=(_ids(chance, 60, ()),), chunk=None, new_tokens=8),
        ScriptedTurn(cut=13, crop=0, prompt=(_ids(chance, 30, (1,)),), chunk=7, new_tokens=8),
        ScriptedTurn(cut=0, crop=40, prompt=(_ids(chance, 30, (2,)),), chunk=None, new_tokens=8),
    )


def _ids(chance: random.Random, count: int, mark: tuple[int, ...]) -> tuple[int, ...]:
    return mark + tuple(chance.randrange(_MARKS, _VOCABULARY) for _ in range(count))


def longest_sequence(script: Script) -> int:
    """Return the number of tokens of the longest row in ``script``."""
    longest = length = 0
    for turn in script:
        length += len(turn.prompt[0]) + turn.new_tokens - turn.cut
        longest = max(longest, length)
    return longest


@dataclass(frozen=True, slots=True)
class Answer:
    """One turn: all tokens ``[rows, columns]``, the logits of the new ones ``[rows, new, vocabulary]``, on the host."""

    sequences: torch.Tensor
    logits: torch.Tensor
    known: int


def run_tiered(model: Any, script: Script, cache: TieredCache) -> list[Answer]:
    """Run ``script`` on ``cache``, which must be empty."""
    answers: list[Answer] = []
    for turn in script:
        if turn.crop:
            cache.crop(-min(turn.crop, cache.get_seq_length()))
        sequences, logits = _generate(model, _prompt(model, answers, turn), cache, turn)
        report = cache.last_turn
        assert report is not None
        answers.append(Answer(sequences, logits, report.rows[0].cached_tokens if report.rows else 0))
    return answers


def run_plain(model: Any, script: Script, known: Sequence[int]) -> list[Answer]:
    """Run ``script`` on a DynamicCache that begins each turn with ``known`` tokens."""
    cache = DynamicCache(config=model.config)
    answers: list[Answer] = []
    for turn, count in zip(script, known, strict=True):
        surplus = cache.get_seq_length() - count
        if count == 0:
            cache = DynamicCache(config=model.config)
        elif surplus > 0:
            cache.crop(-surplus)
        sequences, logits = _generate(model, _prompt(model, answers, turn), cache, turn)
        answers.append(Answer(sequences, logits, count))
    return answers


def _prompt(model: Any, answers: Sequence[Answer], turn: ScriptedTurn) -> torch.Tensor:
    new = torch.tensor(turn.prompt, device="cpu")
    if answers:
        before = answers[-1].sequences
        new = torch.cat([before[:, : before.shape[1] - turn.cut], new], 1)
    return new.to(model.device)


def _generate(model: Any, ids: torch.Tensor, cache: Any, turn: ScriptedTurn) -> tuple[torch.Tensor, torch.Tensor]:
    # Where chunks do not continue a cache, plain transformers would be no reference for later turns.
    chunked = {"prefill_chunk_size": turn.chunk} if turn.chunk is not None and CHUNKS_CONTINUE else {}
    done = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **passed(cache),
        max_new_tokens=turn.new_tokens,
        do_sample=False,
        suppress_tokens=list(range(_MARKS)),
        return_dict_in_generate=True,
        output_logits=True,
        **chunked,
    )
    return done.sequences.cpu(), torch.stack(done.logits, 1).cpu()


def first_difference(ours: Sequence[Answer], theirs: Sequence[Answer]) -> str | None:
    """Return the first difference of ``ours`` from ``theirs``, in words; None when every bit is the same."""
    for number, (mine, reference) in enumerate(zip(ours, theirs, strict=True), 1):
        if not torch.equal(mine.sequences, reference.sequences):
            column = int((mine.sequences != reference.sequences).any(0).nonzero()[0])
            return f"turn {number} has another token at position {column}"
        if not torch.equal(mine.logits, reference.logits):
            if mine.logits.isnan().any():
                return f"turn {number} has the same tokens, but logits that are not numbers"
            off = float((mine.logits.float() - reference.logits.float()).abs().max())
            return f"turn {number} has the same tokens, but logits that are off by up to {off:.3g}"
    return None


def budgets(model: Any, columns: int, page_tokens: int, rows: int = 1, steps: int = 4) -> list[int]:
    """Return device budgets in bytes for ``columns`` tokens: every layer cold, some hot, all hot."""
    heads, dim = model.config.num_key_value_heads, model.config.head_dim
    token_bytes = LayerSpec(heads, dim, heads, dim, model.dtype).token_bytes
    layer_bytes = [token_bytes] * model.config.num_hidden_layers
    least = smallest_budget_bytes(layer_bytes, rows, columns, page_tokens)
    # Each hot buffer has some room to grow; one of them exists twice while it grows.
    capacity = with_slack(columns + 1)
    all_hot = rows * (sum(layer_bytes) * (capacity + page_tokens) + token_bytes * capacity)
    return [least + (all_hot - least) * step // (steps - 1) for step in range(steps)]
