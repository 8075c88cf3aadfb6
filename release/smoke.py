"""A smoke test of an installed kvtier. It runs in the environment under test and imports nothing of the checkout.

Usage: ``python -P smoke.py VERSION``.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.metadata import metadata
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvtier
from kvtier import TieredCache


def expect(holds: bool, what: str) -> None:
    """End the process with a message if a check failed."""
    if not holds:
        sys.exit(f"smoke test: {what}")


def check_installation(version: str) -> None:
    """Check that the package is this environment's own, is whole, and states the version of the release."""
    package = Path(kvtier.__file__).resolve().parent
    expect(package.is_relative_to(Path(sys.prefix).resolve()), f"kvtier was imported from {package}")
    expect((package / "py.typed").exists(), "py.typed is missing: type checkers would ignore kvtier's types")
    expect(kvtier.__version__ == version, f"kvtier.__version__ is {kvtier.__version__}, not {version}")
    expect(metadata("kvtier")["Version"] == version, f"the metadata does not state version {version}")


def reused(cache: TieredCache, tier: str | None = None) -> int:
    """Return how many tokens of the last turn were reused: from one tier, or from all."""
    turn = cache.last_turn
    if turn is None:
        return 0
    return turn.cached_tokens if tier is None else turn.cached_by_tier.get(tier, 0)


def check_turns(folder: Path) -> None:
    """Check that a second turn reuses the first one, also in a new cache on the folder, with the same answers."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, pad_token_id=0, eos_token_id=None,
        )
    ).eval()  # fmt: skip
    settings = {"max_new_tokens": 5, "do_sample": False}
    prompt = torch.randint(1, 100, (1, 200))

    with TieredCache(folder, reuse="always") as cache:
        answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, **settings)
        longer = torch.cat([answer, torch.randint(1, 100, (1, 7))], dim=1)
        model.generate(longer, attention_mask=torch.ones_like(longer), past_key_values=cache, **settings)
        expect(reused(cache) >= 200, f"the second turn reused nothing: {cache.last_turn}")
    plain = model.generate(longer, attention_mask=torch.ones_like(longer), **settings)
    with TieredCache(folder, reuse="always") as cache:
        warm = model.generate(longer, attention_mask=torch.ones_like(longer), past_key_values=cache, **settings)
        expect(reused(cache, "disk") >= 200, f"nothing came from files: {cache.last_turn}")
    expect(torch.equal(plain, warm), "a warm turn gave other tokens than plain transformers")


def check_command(version: str, folder: Path) -> None:
    """Check that the command states the version and lists the store."""
    command = str(Path(sys.executable).parent / "kvtier")
    shown = subprocess.run([command, "--version"], check=True, capture_output=True, text=True).stdout
    expect(shown == f"kvtier {version}\n", f"kvtier --version printed {shown!r}")
    listing = [command, "store", "ls", "--unnamed", "--json", "--store", str(folder)]
    listed = subprocess.run(listing, check=True, capture_output=True, text=True).stdout
    expect("LlamaForCausalLM" in listed, f"kvtier store ls printed {listed!r}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        check_installation(sys.argv[1])
        check_turns(Path(scratch) / "store")
        check_command(sys.argv[1], Path(scratch) / "store")
