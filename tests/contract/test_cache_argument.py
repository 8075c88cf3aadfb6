"""The parameter names under which transformers' forward passes and generate() take a cache."""

from __future__ import annotations

import ast
import warnings
from pathlib import Path

import pytest
import transformers
from reliance import CACHE_PARAMETERS, INSTALLED

from kvtier.hf.compat import names
from tests.support.upstream import CACHE, given

MODELS = Path(transformers.__file__).parent / "models"


def cache_parameters():
    """Each generating model class, with the parameters of its forward pass that are annotated as a cache."""
    for file in sorted(MODELS.glob("*/modeling_*.py")):
        text = file.read_text(encoding="utf-8")
        if "GenerationMixin" not in text:
            continue
        for node in ast.parse(text).body:
            if not isinstance(node, ast.ClassDef) or "GenerationMixin" not in map(ast.unparse, node.bases):
                continue
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == "forward":
                    yield (
                        node.name,
                        [a.arg for a in method.args.args if a.annotation and "Cache" in ast.unparse(a.annotation)],
                    )


def test_every_forward_pass_takes_a_cache_under_a_known_name():
    """This test would have caught the rename in 5.24. An unknown name turns reuse off for a model."""
    found = dict(cache_parameters())
    assert len(found) > 200  # the search works
    for model, parameters in found.items():
        for name in parameters:
            since, until = CACHE_PARAMETERS.get(name, (INSTALLED, INSTALLED))
            known = since <= INSTALLED and (until is None or until > INSTALLED)
            assert known, f"{model}.forward takes a cache as {name}: hf/compat/names.py must know"
    assert set(names.CACHE_ARGUMENTS) <= set(CACHE_PARAMETERS)
    assert sum(CACHE in parameters for parameters in found.values()) > 200


def test_generate_and_forward_use_the_same_cache_argument_name(model, tokens):
    """The wrapper passes upstream's own name, which causes no deprecation warning."""
    assert ("cache" if INSTALLED >= (5, 24) else "past_key_values") == names.CACHE_ARGUMENT
    assert names.forward_argument(model) == names.generate_argument(model) == names.CACHE_ARGUMENT
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = transformers.DynamicCache(config=model.config)
        model.generate(tokens(5), max_new_tokens=2, do_sample=False, **{CACHE: cache})
        model(tokens(1), **given(model, cache))
    assert cache.get_seq_length() == 7


@pytest.mark.skipif(INSTALLED < (5, 24), reason="the old names are the only ones")
@pytest.mark.parametrize("old", ["past_key_values", "cache_params"])
def test_old_cache_argument_names_still_work_with_a_warning(model, tokens, old):
    cache = transformers.DynamicCache(config=model.config)
    with pytest.warns(FutureWarning, match=old):
        model.generate(tokens(5), max_new_tokens=2, do_sample=False, **{old: cache})
    assert cache.get_seq_length() == 6
