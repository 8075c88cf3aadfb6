"""The text of token ids, read from tokenizers of every kind, and kept by the turns of a cache."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kvtier import ConfigurationError, PrefixStore, TieredCache
from kvtier.hf.inputs.vocabulary import vocabulary_of
from tests.support.upstream import CACHE

TEXT = "The lamp was lit — in Zürich 🎉 twice, the lamplighter said"


def byte_level():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    return core


def sentence_pieces():
    words = ["▁The", "▁lamp", "light", "er", "▁", "said", "▁twice"]
    pieces = [*words, *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(set(TEXT.replace(" ", "")))]
    core = Tokenizer(models.BPE(dict(zip(dict.fromkeys(pieces), range(999), strict=False)), [], byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return core


def word_pieces():
    words = ["[UNK]", "The", "lamp", "##light", "##er", "was", "lit", "in", "twice", "said"]
    core = Tokenizer(models.WordPiece(dict(zip(words, range(99), strict=False)), unk_token="[UNK]"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    return core


def words():
    core = Tokenizer(models.WordLevel({"<pad>": 0, "lamp": 1, "lit": 2}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return core


def fast(core, **tokens):
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **tokens)


def shown(tokenizer, ids, **how):
    return vocabulary_of(tokenizer)().text(np.array(ids, dtype=np.int64), **how)


@pytest.mark.parametrize("core", [byte_level, sentence_pieces])
def test_text_is_what_the_tokenizer_decodes(core):
    tokenizer = fast(core(), eos_token="<|end|>")
    ids = [*tokenizer.encode(TEXT, add_special_tokens=False), tokenizer.eos_token_id]
    assert shown(tokenizer, ids) == tokenizer.decode(ids) == TEXT + "<|end|>"
    assert shown(tokenizer, ids, specials=False) == TEXT + " "


def test_text_of_word_pieces_and_words_has_spaces():
    tokenizer = fast(word_pieces())
    ids = tokenizer.encode("The lamplighter said", add_special_tokens=False)
    assert shown(tokenizer, ids).strip() == tokenizer.decode(ids) == "The lamplighter said"
    assert shown(fast(words()), [1, 2]) == " lamp lit"


class Bytes:
    """A tokenizer without fast core: one letter for each byte, and one token as bytes."""

    def get_vocab(self):
        return {**{chr(byte): byte for byte in range(128)}, "é".encode(): 128}


def test_text_of_characters_has_no_spaces_between_them():
    assert shown(Bytes(), [72, 105, 32, 128]) == "Hi é"


def test_object_without_a_vocabulary_is_refused():
    with pytest.raises(ConfigurationError, match="tokenizer=int has no get_vocab"):
        TieredCache(PrefixStore(), tokenizer=7)

    class Processor:
        tokenizer = Bytes()

    with TieredCache(PrefixStore(), tokenizer=Processor()) as cache:
        assert cache.tokenizer is Processor.tokenizer
        assert cache.fork().tokenizer is Processor.tokenizer
        cache.tokenizer = None
        with pytest.raises(ConfigurationError):
            cache.tokenizer = "gpt2"


@pytest.mark.parametrize("way", ["constructor", "attribute", "generate", "later cache"])
def test_turn_keeps_the_vocabulary_beside_its_root(tmp_path, model, tokens, way):
    more = {"tokenizer": Bytes()} if way == "generate" else {}
    with PrefixStore(tmp_path, block_size=8) as store:
        with TieredCache(store, tokenizer=Bytes() if way == "constructor" else None) as cache:
            if way == "attribute":
                cache.tokenizer = Bytes()
            model.generate(tokens(20), max_new_tokens=2, do_sample=False, **{CACHE: cache}, **more)
        if way == "later cache":
            with TieredCache(store, tokenizer=Bytes()) as cache:
                model.generate(tokens(20), max_new_tokens=2, do_sample=False, **{CACHE: cache})
        store.flush()
        (root,) = {chain.root for chain in store.chains()}
        assert store.vocabulary(root).text(np.array([72, 105])) == "Hi"


class Broken:
    def get_vocab(self):
        raise RuntimeError("Already borrowed")


def test_broken_tokenizer_costs_one_line(tmp_path, model, tokens, warned):
    with PrefixStore(tmp_path, block_size=8) as store, TieredCache(store, tokenizer=Broken()) as cache:
        for seed in (0, 1):
            model.generate(tokens(20, seed=seed), max_new_tokens=2, do_sample=False, **{CACHE: cache})
        store.flush()
        assert [text for text in warned() if "Already borrowed" in text][1:] == []
        assert len(store.chains()) == 2
