"""Display of a root, whatever its file holds."""

from __future__ import annotations

import json

import pytest

from kvtier.cli.store.roots import RootFile

ROOT = "c3" * 32


def read(folder, content):
    (folder / "roots").mkdir()
    (folder / "roots" / f"{ROOT}.json").write_text(content)
    return RootFile.read(folder, ROOT)


def test_root_title_and_facts_describe_the_model(tmp_path):
    manifest = {
        "model": "LlamaForCausalLM",
        "config": {"num_hidden_layers": 30, "dtype": "bfloat16", "_model_name_or_path": "tiny"},
        "adapters": ["LoraLayer"],
        "namespace": "alice",
        "block_size": 256,
    }
    file = read(tmp_path, json.dumps(manifest))
    assert file.title == "LlamaForCausalLM, 30 layers, bfloat16, with adapters, namespace alice"
    facts = dict(file.facts)
    assert facts["called"] == "tiny"
    assert facts["adapters"] == "LoraLayer"
    assert facts["block size"] == "256 tokens"
    assert "weights" not in facts


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", "[" * 100_000, '{"a": "\udcff"}'.encode("utf-8", "surrogatepass")],
    ids=["empty", "torn", "list", "number", "deep", "no text"],
)
def test_unusable_root_file_is_reported_as_a_problem(content, tmp_path):
    (tmp_path / "roots").mkdir()
    path = tmp_path / "roots" / f"{ROOT}.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    file = RootFile.read(tmp_path, ROOT)
    assert file.manifest is None
    assert str(path) in file.problem
    assert file.title == f"root {ROOT[:12]}"
    assert dict(file.facts)["root"] == ROOT


def test_oversized_root_file_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "roots").mkdir()
    with (tmp_path / "roots" / f"{ROOT}.json").open("wb") as file:
        file.write(b"{}")
        file.truncate(16 * 2**20 + 1)
    monkeypatch.setattr("pathlib.Path.read_text", lambda *_, **__: pytest.fail("it was read"))
    assert "too large" in RootFile.read(tmp_path, ROOT).problem


@pytest.mark.parametrize("manifest", [{}, {"config": [1]}, {"config": None, "adapters": None}, {"model": 3}])
def test_manifest_of_an_unexpected_shape_still_gives_a_title(manifest, tmp_path):
    file = read(tmp_path, json.dumps(manifest))
    assert file.title
    assert dict(file.facts)["adapters"] == "none"
