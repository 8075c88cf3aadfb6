"""Wrong arguments raise an error that names the mistake, or get the answer that plain transformers gives."""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, StoppingCriteria

from kvtier import ClosedError, ConfigurationError, PrefixStore, PromptError, StoreError, StoreVersionError, TieredCache
from tests.support.reuse import reuse_off
from tests.support.upstream import CACHE

# --- stores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [PrefixStore, TieredCache], ids=["PrefixStore", "TieredCache"])
def test_store_path_that_is_a_file_raises_and_keeps_the_file(tmp_path, make):
    place = tmp_path / "notes.txt"
    place.write_text("mine")
    with pytest.raises(StoreError, match=r"notes\.txt.*pass a folder you can write to"):
        make(place)
    with pytest.raises(StoreError, match=r"notes\.txt.*pass a folder you can write to"):
        make(place / "below")
    assert place.read_text() == "mine"


@pytest.mark.parametrize("make", [PrefixStore, TieredCache], ids=["PrefixStore", "TieredCache"])
def test_error_of_a_path_that_is_a_file_says_so(tmp_path, make):
    place = tmp_path / "notes.txt"
    place.write_text("mine")
    for path in (place, place / "below"):
        with pytest.raises(StoreError, match=r"notes\.txt is a file, and a store is a folder; pass a folder"):
            make(path)


@pytest.mark.parametrize("path", ["~/.cache", Path("store")], ids=["str", "Path"])
def test_path_in_place_of_a_cache_raises_and_shows_the_call(model, tokens, path):
    written = re.escape(f"{CACHE}={str(path)!r} is a path, not a cache; make the cache once, cache = TieredCache(")
    with pytest.raises(ConfigurationError, match=written):
        model.generate(tokens(12), **{CACHE: path}, max_new_tokens=2)
    assert not Path("store").exists()


@pytest.mark.parametrize("value", ["50%", "0.5 %", 0.5, "Auto", "half"], ids=repr)
def test_error_of_a_device_budget_says_what_is_accepted(value):
    with pytest.raises(ConfigurationError, match=re.escape(f"device_budget={value!r} is not a byte count")) as error:
        TieredCache(device_budget=value)
    text = str(error.value)
    assert '"auto" for the free memory of the device less a reserve' in text
    assert ("Shares of a memory are not accepted" in text) == (value not in ("Auto", "half"))


def test_spill_dir_that_is_a_file_raises_and_keeps_the_file(tmp_path):
    place = tmp_path / "notes.txt"
    place.write_text("mine")
    with pytest.raises(ConfigurationError, match=r"spill_dir=.*notes\.txt' is a file; pass a folder"):
        TieredCache(device_budget="1GiB", spill_dir=place)
    assert place.read_text() == "mine"


@pytest.mark.parametrize("make", [PrefixStore, TieredCache], ids=["PrefixStore", "TieredCache"])
def test_store_folder_under_proc_raises_store_error(make):
    if not Path("/proc/self").exists():
        pytest.skip("no /proc here")
    with pytest.raises(StoreError, match=r"/proc/kvtier-store.*pass a folder you can write to"):
        make("/proc/kvtier-store")


def test_read_only_store_folder_raises_store_error(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StoreError, match="pass a folder you can write to"):
            PrefixStore(tmp_path / "store")
        with pytest.raises(StoreError, match="pass a folder you can write to"):
            PrefixStore(tmp_path)
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("argument", ["host_budget", "disk_budget"])
@pytest.mark.parametrize(
    "value", ["12 parsecs", "", "GiB", "-1", "1e9", -1, 0, "0", "0.1", True, 1.5, b"1GiB", [1]], ids=repr
)
def test_invalid_budget_raises_and_creates_no_folder(tmp_path, argument, value):
    with pytest.raises(ConfigurationError, match=re.escape(f"{argument}={value!r}")):
        PrefixStore(tmp_path / "store", **{argument: value})
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "x", "256", None], ids=repr)
def test_invalid_block_size_raises_configuration_error(value):
    with pytest.raises(ConfigurationError, match=re.escape(f"block_size={value!r} must be a whole number of tokens")):
        PrefixStore(block_size=value)


@pytest.mark.parametrize("value", ["gzip", "", "ZSTD", None, 3], ids=repr)
def test_unknown_compression_raises_configuration_error(value):
    with pytest.raises(ConfigurationError, match=re.escape(f"compression={value!r} is unknown; pass 'auto', 'raw'")):
        PrefixStore(compression=value)


@pytest.mark.parametrize("value", [7, None, b"me", ["me"]], ids=repr)
def test_namespace_that_is_not_a_string_raises_configuration_error(value):
    with pytest.raises(ConfigurationError, match=re.escape(f"namespace={value!r} must be a string")):
        PrefixStore(namespace=value)


@pytest.mark.parametrize("make", [PrefixStore, TieredCache], ids=["PrefixStore", "TieredCache"])
def test_store_of_a_newer_version_raises_and_keeps_its_marker(tmp_path, make):
    PrefixStore(tmp_path).close()
    marker = tmp_path / "kvtier.json"
    version = json.loads(marker.read_text())["format_version"]
    marker.write_text(json.dumps({"format_version": version + 1}))
    with pytest.raises(StoreVersionError, match=f"newer kvtier.*format {version + 1}.*update kvtier or pass another"):
        make(tmp_path)
    assert json.loads(marker.read_text()) == {"format_version": version + 1}


# --- caches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [3, True, b"folder", ["folder"], object()], ids=lambda value: type(value).__name__)
def test_cache_refuses_a_store_argument_of_another_type(value):
    with pytest.raises(ConfigurationError, match="neither a folder nor a PrefixStore"):
        TieredCache(value)


@pytest.mark.parametrize("value", [3, True, b"folder", ["folder"]], ids=lambda value: type(value).__name__)
def test_store_refuses_a_path_of_another_type(value):
    with pytest.raises(ConfigurationError, match="path="):
        PrefixStore(value)


@pytest.mark.parametrize("make", [PrefixStore, TieredCache], ids=["PrefixStore", "TieredCache"])
def test_empty_path_raises_and_writes_nothing_to_the_current_folder(tmp_path, monkeypatch, make):
    """``TieredCache(os.environ.get("CACHE", ""))`` must not spread files over the current folder."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match=r"(path|store)=''"):
        make("")
    assert list(tmp_path.iterdir()) == []


def test_config_passed_as_the_store_raises_a_short_error(model):
    """Users are used to ``DynamicCache(config)``."""
    with pytest.raises(ConfigurationError, match="pass a model's config as config=") as error:
        TieredCache(model.config)
    assert len(str(error.value)) < 300, "the message drowns in the config"


def test_config_of_another_type_raises_configuration_error():
    with pytest.raises(ConfigurationError, match="config="):
        TieredCache(config={"num_hidden_layers": 2})


@pytest.mark.parametrize(
    "use",
    [
        lambda cache, model, ids: model.generate(ids, past_key_values=cache, max_new_tokens=2),
        lambda cache, model, ids: model(ids, **{CACHE: cache}),
        lambda cache, model, ids: cache.update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16), 0),
        lambda cache, model, ids: cache.begin(model, ids),
        lambda cache, model, ids: cache.commit(ids),
        lambda cache, model, ids: cache.flush(),
        lambda cache, model, ids: cache.__enter__(),
        lambda cache, model, ids: copy.deepcopy(cache),
    ],
    ids=["generate", "forward", "update", "begin", "commit", "flush", "with", "deepcopy"],
)
def test_closed_cache_raises_and_its_store_stays_usable(model, generate, tokens, store, use):
    cache = TieredCache(store)
    generate(model, tokens(12), cache)
    cache.close()
    cache.close()
    with pytest.raises(ClosedError, match="TieredCache was closed; make a new one"):
        use(cache, model, tokens(12))
    assert cache.get_seq_length() == 0
    with TieredCache(store) as again:
        generate(model, tokens(12), again)
        assert again.last_turn.cached_tokens == 11


def test_entering_a_closed_store_raises_closed_error(tmp_path):
    store = PrefixStore(tmp_path)
    store.close()
    store.close()
    assert store.closed
    with pytest.raises(ClosedError, match="the store was closed; make a new PrefixStore"), store:
        pass


def test_cache_over_a_closed_store_raises_closed_error(model, generate, tokens, store):
    cache = TieredCache(store)
    generate(model, tokens(12), cache)
    store.close()
    with pytest.raises(ClosedError, match="the store was closed; make a new PrefixStore"):
        generate(model, tokens(12), cache)
    with pytest.raises(ClosedError, match="the store was closed; make a new PrefixStore"):
        cache.begin(model, tokens(12))
    cache.close()


def test_closing_the_store_during_generate_keeps_the_answer_and_warns_once(model, generate, tokens, store, caplog):
    """An answer that cannot be stored is still returned."""

    class CloseStore(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            store.close()
            return torch.zeros(len(input_ids), dtype=torch.bool)

    cache, ids = TieredCache(store), tokens(12)
    found = generate(model, ids, cache, stopping_criteria=[CloseStore()])
    assert torch.equal(found.sequences, generate(model, ids).sequences)
    assert [r.levelname for r in caplog.records if r.name.startswith("kvtier")] == ["WARNING"]
    cache.close()


# --- models and prompts -----------------------------------------------------------------------------------------------


class Bare(torch.nn.Module):
    """A user's own model, without a config and without generate()."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def __getattr__(self, name):
        if name == "config":
            raise AttributeError(name)
        return super().__getattr__(name)

    def forward(self, ids, cache):
        return self.inner(ids, **{CACHE: cache}).logits


@reuse_off
def test_model_without_a_config_is_computed_without_reuse(model, cache, tokens):
    bare, ids = Bare(model), tokens(12)
    for _ in range(2):
        report = cache.begin(bare, ids)
        assert (report.cached_tokens, report.miss_reason) == (0, "the model has no config")
        assert cache.get_seq_length() == 0
        with torch.no_grad():
            first = bare(ids[:, :9], cache)
            second = bare(ids[:, 9:], cache)
        reference = DynamicCache()
        with torch.no_grad():
            assert torch.equal(first, model(ids[:, :9], **{CACHE: reference}).logits)
            assert torch.equal(second, model(ids[:, 9:], **{CACHE: reference}).logits)
        assert cache.commit(ids).cached_tokens == 0


def outcome(call):
    """Return the tokens of a call, or the type and text of its error."""
    try:
        return call().sequences.tolist()
    except Exception as error:
        return type(error), str(error)


PROMPTS = {
    "one token": lambda ids: ids[:, :1],
    "no token": lambda ids: ids[:, :0],
    "no row": lambda ids: ids[:0],
    "one dimension": lambda ids: ids[0],
    "float": lambda ids: ids.float(),
    "truth values": lambda ids: ids > 100,
    "unknown words": lambda ids: ids + 1000,
    "short integers": lambda ids: ids.int(),
    "a list": lambda ids: ids.tolist(),
    "nothing": lambda ids: None,
}


@pytest.mark.sample(10)  # of 20
@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("used", [False, True], ids=["empty cache", "used cache"])
def test_odd_prompt_gives_the_same_outcome_as_plain_transformers(model, generate, tokens, cache, kind, used):
    ids = tokens(12)
    odd = PROMPTS[kind](ids)
    if used:
        generate(model, ids, cache)

    def turn(past):
        return model.generate(odd, **{CACHE: past}, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)

    expected = outcome(lambda: turn(DynamicCache(config=model.config)))
    assert outcome(lambda: turn(cache)) == expected
    again = torch.cat([ids, tokens(3, seed=1)], 1)
    for _ in range(2):
        assert torch.equal(generate(model, again, cache).sequences, generate(model, again).sequences)
    assert cache.last_turn.cached_tokens == again.shape[1] - 1


def test_conversation_that_starts_with_one_token_is_reused(model, generate, tokens, cache):
    sequences = generate(model, tokens(1), cache).sequences
    report = cache.last_turn
    assert (report.prompt_tokens, report.cached_tokens, report.generated_tokens) == (1, 0, 8)
    ids = torch.cat([sequences, tokens(2, seed=1)], 1)
    assert torch.equal(generate(model, ids, cache).sequences, generate(model, ids).sequences)
    assert cache.last_turn.cached_by_tier["device"] == 8


@pytest.mark.parametrize("shape", [(1, 9), (1, 15), (2, 12)], ids=str)
def test_mask_of_another_shape_raises_prompt_error(model, generate, tokens, cache, shape):
    ids = tokens(12)
    generate(model, ids, cache)
    mask = torch.ones(shape, dtype=torch.long)
    with pytest.raises(PromptError, match=f"attention_mask has .*{shape[1]}.*pass the whole conversation as input_ids"):
        generate(model, ids, cache, attention_mask=mask)
    with pytest.raises(PromptError, match=f"attention_mask has .*{shape[1]}.*pass the whole conversation as input_ids"):
        cache.begin(model, ids, mask)
    assert torch.equal(generate(model, ids, cache).sequences, generate(model, ids).sequences)
    assert cache.last_turn.cached_tokens == 11


@pytest.mark.parametrize("dimensions", [1, 3, 4])
def test_mask_of_other_dimensions_gives_the_outcome_of_plain_transformers(model, generate, tokens, cache, dimensions):
    ids = tokens(12)
    mask = {1: torch.ones(12), 3: torch.ones(1, 12, 12), 4: torch.ones(1, 1, 12, 12)}[dimensions].long()
    expected = outcome(lambda: generate(model, ids, attention_mask=mask))
    assert outcome(lambda: generate(model, ids, cache, attention_mask=mask)) == expected
    assert torch.equal(generate(model, ids, cache).sequences, generate(model, ids).sequences)


def test_cache_implementation_beside_a_cache_raises_and_keeps_cached_tokens(model, generate, tokens, cache):
    ids = tokens(12)
    generate(model, ids, cache)
    expected = outcome(lambda: generate(model, ids, cache_implementation="static"))
    assert expected[0] is ValueError
    assert outcome(lambda: generate(model, ids, cache, cache_implementation="static")) == expected
    assert torch.equal(generate(model, ids, cache).sequences, generate(model, ids).sequences)
    assert cache.last_turn.cached_tokens == 11


def test_commit_without_begin_raises_prompt_error(model, generate, tokens, cache):
    for _ in range(2):
        with pytest.raises(PromptError, match=r"commit\(\) without begin\(\): call begin"):
            cache.commit(tokens(12))
        generate(model, tokens(12), cache)  # a turn that has ended does not count as begin()


def test_commit_of_one_dimensional_ids_raises_prompt_error(model, tokens, cache):
    cache.begin(model, tokens(12))
    with pytest.raises(PromptError, match=r"must be \[rows, columns\], not 1-dimensional"):
        cache.commit(tokens(12)[0])


def test_crop_by_a_positive_number_raises_and_removes_nothing(model, generate, tokens, cache):
    generate(model, tokens(12), cache)
    before = cache.get_seq_length()
    with pytest.raises(ValueError, match=r"crop\(3\): pass a negative number"):
        cache.crop(3)
    assert cache.get_seq_length() == before


@pytest.mark.parametrize(
    "other",
    [{}, {"num_hidden_layers": 2}, {"num_key_value_heads": 4}, {"family": "gemma3"}, {"dtype": torch.bfloat16}],
    ids=["other weights", "fewer layers", "more heads", "another family", "another dtype"],
)
def test_one_cache_gives_exact_answers_for_two_alternating_models(make_model, generate, tokens, cache, other):
    first, second = make_model("llama"), make_model(**{"family": "llama", **other})
    if not other:
        with torch.no_grad():
            second.model.layers[0].self_attn.k_proj.weight.neg_()
    ids = tokens(20)
    for turn in range(3):
        for model, changed in ((first, turn > 0), (second, True)):
            found = generate(model, ids, cache)
            # From the second turn on the store has prefixes of both models.
            assert cache.last_turn.cached_tokens == (19 if turn else 0)
            if changed and not turn:
                assert cache.last_turn.miss_reason == "the model is not the one that filled this cache"
            assert torch.equal(found.sequences, generate(model, ids).sequences)
