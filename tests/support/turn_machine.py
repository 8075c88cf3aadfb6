"""Random turns of every kind: each turn answers as on a fresh ``DynamicCache``, and its report is true.

The machine plays turns with five words, so that prompts also share beginnings by accident. After each turn it compares

- tokens and logits with those of a fresh ``DynamicCache``, to rounding: cached columns were computed in other chunks;
- logits, bit by bit, with those of a ``DynamicCache`` that holds the same cached columns and is fed the same tokens;
- each cached column, bit by bit, with the columns that the model computed earlier for the same tokens;
- the number of cached tokens with the number that earlier turns must have left, while nothing was evicted or damaged.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, precondition, rule

from kvtier import PrefixStore, TieredCache
from tests.support.stores import DAMAGES, block_files, bytes_in_ram, bytes_on_disk, damage, shared
from tests.support.tiny import (
    CHUNKS,
    HEAD_DIM,
    VOCABULARY,
    FedAlike,
    Tokens,
    answer,
    assert_same_answer,
    bytes_of_columns,
    columns_of,
    left_padded,
    tiny,
)
from tests.support.upstream import CACHE

LONGEST = 40
ROOMY = 2**30

words = st.integers(1, VOCABULARY - 1)
prompts = st.lists(words, min_size=1, max_size=20).map(tuple)
additions = st.lists(words, min_size=1, max_size=5).map(tuple)
places = st.integers(0, 255)
counts = st.integers(1, 4)
modes = st.one_of(
    st.just({}),
    st.sampled_from(
        [
            {"eos_token_id": 3},
            CHUNKS,
            {"do_sample": True, "top_k": 0},
            {"do_sample": True, "top_k": 0, "num_return_sequences": 2},
            {"do_sample": True, "top_k": 0, "num_return_sequences": 3},
            {"num_beams": 2},
            {"num_beams": 2, "num_return_sequences": 2},
            {"num_beams": 3, "num_return_sequences": 2},
        ]
    ),
)


class Interrupt:
    """Raises ``KeyboardInterrupt`` before or after pass ``at_pass`` through a module."""

    def __init__(self, module: torch.nn.Module, at_pass: int, before: bool) -> None:
        self._left = at_pass
        self.remove = (module.register_forward_pre_hook if before else module.register_forward_hook)(self).remove

    def __call__(self, *_: Any) -> None:
        self._left -= 1
        if self._left < 0:
            raise KeyboardInterrupt


def up_to(end: int | None, generated: list[int]) -> Tokens:
    return tuple(generated[: generated.index(end) + 1] if end in generated else generated)


class Turns(RuleBasedStateMachine):
    family: str
    layers: int
    keeps_all_windows = True  # of sliding layers, for prompts as short as these
    known = Bundle("known")  # final sequences of turns

    @initialize(
        on_disk=st.booleans(),
        block_size=st.sampled_from([4, 8]),
        compression=st.sampled_from(["raw", "zstd"]),
        host_blocks=st.sampled_from([None, 1, 3]),
        disk_blocks=st.sampled_from([None, None, 2, 6]),
    )
    def open(self, on_disk, block_size, compression, host_blocks, disk_blocks):
        self.model = tiny(self.family, self.layers)
        self.folder = Path(tempfile.mkdtemp(prefix="kvtier-turns-")) if on_disk else None
        block = block_size * 2 * 4 * HEAD_DIM * self.model.config.num_hidden_layers
        self.settings = {
            "host_budget": ROOMY if host_blocks is None else host_blocks * block,
            "disk_budget": ROOMY if disk_blocks is None else disk_blocks * (block + 1500),  # a file has a header
            "block_size": block_size,
            "compression": compression,
        }
        self.all_is_kept = disk_blocks is None if on_disk else host_blocks is None
        self.kept: set[Tokens] = set()  # sequences that the store must know while all_is_kept
        # Tokens and layer → columns that the model computed for the last token.
        self.computed: dict[tuple[Tokens, int], set[bytes]] = {}
        self.store = PrefixStore(self.folder, **self.settings)
        self.caches: list[TieredCache] = []

    def new_cache(self, store: PrefixStore) -> TieredCache:
        return TieredCache(store)

    def cache(self, which: int) -> TieredCache:
        if not self.caches:
            self.caches.append(self.new_cache(self.store))
        return self.caches[which % len(self.caches)]

    # --- a turn and its checks ----------------------------------------------------------------------------------------

    def turn(self, cache, rows, *, extra=0, **mode):
        """Play a turn; return its final sequences."""
        rows = [row[-LONGEST:] for row in rows]
        ids = left_padded(rows, extra)
        with FedAlike(cache) as alike:
            found = answer(self.model, ids, cache, **mode)
        fresh = answer(self.model, ids, **mode)
        report, beams = cache.last_turn, mode.get("num_beams")
        if beams:
            assert torch.equal(found.sequences, fresh.sequences)
        else:
            assert_same_answer(found, fresh, exact=report.cached_tokens == 0)
            columns = self.known_columns(rows, ids, report)
            if columns and "prefill_chunk_size" not in mode:
                fed_alike = answer(self.model, ids, alike.cache(columns, self.model), **mode)
                assert_same_answer(found, fed_alike, exact=True)
        each = len(found.sequences) // len(rows)
        generated = [up_to(mode.get("eos_token_id"), new) for new in found.sequences[:, ids.shape[1] :].tolist()]
        ended = [rows[i // each] + new for i, new in enumerate(generated)]
        self.check_report(report, rows, ids, sum(map(len, generated)))
        # Rows of beams hold the tokens that were fed to them, which may differ from the returned tokens. The last word
        # of a turn was not fed to the model, unless it ended its row before other rows.
        held = [tuple(tokens.tolist()) for tokens in cache.turns.resident().rows] if beams else ended
        assert all(
            tokens[: len(row)] == row
            for tokens, row in zip(held, [r for r in rows for _ in range(len(held) // len(rows))], strict=True)
        )
        self.note_computed(alike, rows, ids, None if beams else held)
        self.check_columns(cache, held, rows, ids)
        self.kept.update(rows if beams else [sequence[:-1] for sequence in ended])
        return ended

    def slides(self, layer):
        """Whether some columns of ``layer`` were never seen at the end of a turn."""
        return self.family != "llama" and layer < self.layers - 1

    @staticmethod
    def known_columns(rows, ids, report):
        known = [(ids.shape[1] - len(row), r.cached_tokens) for row, r in zip(rows, report.rows, strict=True)]
        return max((pad + cached for pad, cached in known if cached), default=0)

    def check_report(self, report, rows, ids, generated):
        cached = [row.cached_tokens for row in report.rows]
        assert [row.prompt_tokens for row in report.rows] == [len(row) for row in rows]
        assert all(0 <= c <= len(row) - 1 for c, row in zip(cached, rows, strict=True)), cached
        assert report.prompt_tokens == sum(map(len, rows))
        assert report.cached_tokens == sum(cached) == sum(report.cached_by_tier.values())
        assert report.computed_tokens == report.prompt_tokens - report.cached_tokens
        assert report.generated_tokens == generated == sum(row.generated_tokens for row in report.rows)
        assert all(tokens >= 0 for tokens in report.cached_by_tier.values())
        from_store = report.cached_by_tier["host"] + report.cached_by_tier["disk"]
        assert report.restored_bytes > 0 or not from_store
        assert from_store or not report.restored_bytes or self.family != "llama"  # windows alone, then
        assert self.folder is not None or report.cached_by_tier["disk"] == 0
        assert report.cached_tokens or report.miss_reason
        if self.all_is_kept and self.keeps_all_windows:
            pads = [ids.shape[1] - len(row) for row in rows]
            must = [max((shared(row, other) for other in self.kept), default=0) for row in rows]
            columns = min([ids.shape[1] - 1, *(pad + n for pad, n in zip(pads, must, strict=True))])
            assert all(c >= columns - pad for c, pad in zip(cached, pads, strict=True)), (cached, must)

    def note_computed(self, alike, rows, ids, ended=None):
        """Note the columns that the model computed in this turn: sliding layers do not have all of them at its end.

        Of generated tokens only if ``ended`` says which follow each row.
        """
        for layer, begin, k, v in alike.appended:
            for i in range(len(k)):
                prompt = rows[i * len(rows) // len(k)]
                pad = ids.shape[1] - len(prompt)
                tokens = prompt if ended is None else ended[i]
                for j, values in enumerate(bytes_of_columns(k[i], v[i]), begin - pad):
                    if 0 <= j < len(tokens):
                        self.computed.setdefault((tokens[: j + 1], layer), set()).add(values)

    def check_columns(self, cache, held, rows, ids):
        """Check that cached columns were computed for these very tokens; record the others as computed now."""
        each = len(held) // len(rows)
        for i, tokens in enumerate(held):
            pad = ids.shape[1] - len(rows[i // each])
            cached = cache.last_turn.rows[i // each].cached_tokens
            for j, column in enumerate(columns_of(cache, i)[pad : pad + len(tokens)]):
                for layer, values in column.items():
                    computed = self.computed.setdefault((tokens[: j + 1], layer), set())
                    if j < cached and (computed or not self.slides(layer)):
                        assert values in computed, f"token {j} of {tokens} is from elsewhere in layer {layer}"
                    else:
                        computed.add(values)

    # --- turns --------------------------------------------------------------------------------------------------------

    @rule(target=known, which=places, prompt=prompts, new=counts, mode=modes)
    def begin_a_conversation(self, which, prompt, new, mode):
        return multiple(*self.turn(self.cache(which), [prompt], max_new_tokens=new, **mode))

    @rule(target=known, which=places, sequence=known, more=additions, new=counts, mode=modes)
    def continue_it(self, which, sequence, more, new, mode):
        return multiple(*self.turn(self.cache(which), [sequence + more], max_new_tokens=new, **mode))

    @rule(target=known, which=places, sequence=known, at=places, word=words, new=counts)
    def edit_one_word(self, which, sequence, at, word, new):
        at %= len(sequence)
        edited = (*sequence[:at], word, *sequence[at + 1 :])
        return multiple(*self.turn(self.cache(which), [edited], max_new_tokens=new))

    @rule(target=known, which=places, sequence=known, at=places, new=counts, mode=modes)
    def shorten_it(self, which, sequence, at, new, mode):
        shorter = sequence[: 1 + at % len(sequence)]
        return multiple(*self.turn(self.cache(which), [shorter], max_new_tokens=new, **mode))

    @rule(target=known, which=places, sequence=known, at=places, new=counts)
    def ask_the_same_and_its_beginning_again(self, which, sequence, at, new):
        """The buffers hold the whole prompt, whatever became of the store."""
        cache, sequence = self.cache(which), sequence[-LONGEST:]
        ended = self.turn(cache, [sequence], max_new_tokens=new)
        for prompt in (sequence, sequence[: 1 + at % len(sequence)]):
            self.turn(cache, [prompt], max_new_tokens=new)
            if self.family == "llama":  # sliding layers may need what the store has lost
                assert cache.last_turn.cached_by_tier["device"] == len(prompt) - 1
        return multiple(*ended)

    @rule(
        target=known,
        which=places,
        rows=st.lists(known | prompts, min_size=2, max_size=3),
        extra=counts,
        mode=modes | st.just({"eos_token_id": 3}),  # rows that end early are padded
    )
    def ask_several_at_once(self, which, rows, extra, mode):
        return multiple(*self.turn(self.cache(which), rows, extra=extra - 1, **mode))

    @rule(target=known, which=places, sequence=known | prompts, steps=st.integers(0, 3), commit=st.booleans())
    def call_the_model_in_a_loop(self, which, sequence, steps, commit):
        cache, prompt = self.cache(which), sequence[-LONGEST:]
        ids = left_padded([prompt])
        known = cache.begin(self.model, ids).cached_tokens
        assert cache.get_seq_length() == known
        outputs, sequence, feed = [], ids, ids[:, known:]
        with torch.no_grad(), FedAlike(cache) as alike:
            for _ in range(steps):
                outputs.append(self.model(feed, **{CACHE: cache}).logits)
                feed = outputs[-1][:, -1, 1:].argmax(-1, keepdim=True) + 1
                sequence = torch.cat([sequence, feed], 1)
            if steps:
                whole = self.model(sequence[:, :-1]).logits[:, known:]
                assert torch.allclose(torch.cat(outputs, 1), whole, rtol=0, atol=1e-3)
                reference, at = alike.cache(known, self.model), known
                for output in outputs:
                    fed = sequence[:, at : at + output.shape[1]]
                    assert torch.equal(self.model(fed, **{CACHE: reference}).logits, output)
                    at += output.shape[1]
        ended = tuple(sequence[0].tolist())
        if commit:
            cache.commit(sequence)
            if steps:
                self.check_report(cache.last_turn, [prompt], ids, steps)
                self.kept.add(ended[:-1])
        if steps:
            self.note_computed(alike, [prompt], ids, [ended])
            self.check_columns(cache, [ended], [prompt], ids)
        return ended

    @rule(
        target=known,
        which=places,
        sequence=known,
        more=additions,
        layer=places,
        at_pass=st.integers(0, 2),
        before=st.booleans(),
        mode=st.sampled_from([{}, {}, {"num_beams": 2}]),
    )
    def interrupt_it(self, which, sequence, more, layer, at_pass, before, mode):
        cache, prompt = self.cache(which), (sequence + more)[-LONGEST:]
        ids, layers = left_padded([prompt]), self.model.model.layers
        interrupt = Interrupt(layers[layer % len(layers)], at_pass, before)
        try:
            with FedAlike(cache) as alike:
                answer(self.model, ids, cache, **mode)
        except KeyboardInterrupt:
            self.note_computed(alike, [prompt], ids)
            rows = {0 if layer.keys is None else layer.keys.shape[0] for layer in cache.layers}
            if rows - {0}:
                self.check_columns(cache, [prompt] * max(rows), [prompt], ids)
        else:
            raise AssertionError("nothing was interrupted")
        finally:
            interrupt.remove()
        return multiple(*self.turn(cache, [prompt]))

    # --- between turns ------------------------------------------------------------------------------------------------

    @rule(which=places, removed=st.integers(1, 50))
    def crop(self, which, removed):
        cache = self.cache(which)
        if cache.layers:
            before = cache.get_seq_length()
            cache.crop(-removed)
            assert cache.get_seq_length() == max(0, before - removed)

    @rule(which=places)
    def reset(self, which):
        self.cache(which).reset()
        assert self.cache(which).get_seq_length() == 0

    @rule(which=places, alike=st.booleans())
    def add_a_cache(self, which, alike):
        self.caches.append(copy.deepcopy(self.cache(which)) if alike else self.new_cache(self.store))
        if len(self.caches) > 3:
            self.caches.pop(0).close()

    @rule(target=known, which=places, sequence=known, more=additions, other=additions)
    def go_on_apart_with_a_copy(self, which, sequence, more, other):
        cache = self.cache(which)
        ended = self.turn(cache, [sequence])
        self.caches.append(copy.deepcopy(cache))
        ended += self.turn(self.caches[-1], [sequence + more]) + self.turn(cache, [sequence + other])
        ended += self.turn(self.caches[-1], [sequence + more])
        if len(self.caches) > 3:
            self.caches.pop(0).close()
        return multiple(*ended)

    @precondition(lambda self: self.folder is not None)
    @rule(target=known, sequence=known, more=additions)
    def ask_through_another_store_on_the_folder(self, sequence, more):
        self.store.flush()
        with PrefixStore(self.folder, **self.settings) as store, self.new_cache(store) as cache:
            return multiple(*self.turn(cache, [sequence + more]))

    @rule(
        lose=st.sampled_from(["nothing", "nothing", "a file", "the catalog"]), how=st.sampled_from(DAMAGES), at=places
    )
    def close_and_reopen(self, lose, how, at):
        for cache in self.caches:
            cache.close()
        self.store.close()
        if self.folder is None:
            self.kept.clear()
        elif lose == "a file":
            self.damage_files(how, at, at)
        elif lose == "the catalog":
            damage(self.folder / "catalog.sqlite", how, at)
        self.store = PrefixStore(self.folder, **self.settings)
        self.caches = []

    @precondition(lambda self: self.folder is not None)
    @rule(
        target=known,
        which=places,
        sequence=known,
        more=additions,
        how=st.sampled_from(["flip", *DAMAGES]),
        files=st.none() | places,
        at=places,
    )
    def damage_files_and_ask_for_them(self, which, sequence, more, how, files, at):
        self.damage_files(how, files, at)
        self.cache(which).reset()
        return multiple(*self.turn(self.cache(which), [sequence + more]))

    def damage_files(self, how, which, at):
        """Damage one file, or all of them."""
        self.store.flush()
        files = block_files(self.folder)
        if files and which is not None:
            files = [files[which % len(files)]]
        self.all_is_kept = self.all_is_kept and not files
        for path in files:
            damage(path, how, -1 - at * 2)  # from the end: payloads rather than headers

    # --- always -------------------------------------------------------------------------------------------------------

    @invariant()
    def budgets_are_held(self):
        assert bytes_in_ram(self.store) <= self.settings["host_budget"]
        if self.folder is not None:
            self.store.flush()
            assert bytes_on_disk(self.folder) <= self.settings["disk_budget"]

    def teardown(self):
        if hasattr(self, "store"):
            for cache in self.caches:
                cache.close()
            self.store.close()
            if self.folder is not None:
                shutil.rmtree(self.folder)


LONGEST_BATCH = 6 * (LONGEST + 12)  # most columns that the rows of a turn have together, new ones included


class OffloadedTurns(Turns):
    """Small budgets: pages beyond them go to page files."""

    layers = 5

    @initialize(share=st.sampled_from([0.55, 0.7, 0.9]))
    def choose_budget(self, share):
        self.spill = Path(tempfile.mkdtemp(prefix="kvtier-spill-"))
        token = 2 * HEAD_DIM * 4 * self.layers
        self.budget = int(share * token * LONGEST_BATCH)

    def new_cache(self, store):
        return TieredCache(store, device_budget=self.budget, spill_dir=self.spill)

    @invariant()
    def device_budgets_are_held(self):
        for cache in self.caches:
            if cache.last_turn is not None:
                assert cache.last_turn.peak_device_bytes <= self.budget

    def teardown(self):
        super().teardown()
        if hasattr(self, "spill"):
            assert not list(self.spill.glob("*/*.safetensors")), "page files were left behind"
            shutil.rmtree(self.spill)


# A tenth of the steps interrupts or damages something: shorter runs would seldom see the consequences.
SETTINGS = settings(max_examples=max(1, settings().max_examples // 4), stateful_step_count=15)
