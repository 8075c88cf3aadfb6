"""Run the readers on bytes that libFuzzer chooses by code coverage: ``make fuzz``.

Arguments are libFuzzer's: folders of inputs (it keeps new inputs in the first folder), ``-max_total_time=60``, …
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["kvtier.store", "kvtier.kv.safetensors_header"]):
    from tests.support.fuzz_targets import read_as_archive, read_as_block

from tests.support.fuzz_mutations import mutate

_folder = tempfile.TemporaryDirectory(prefix="kvtier-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
_file = Path(_folder.name) / "input"


def one_input(data: bytes) -> None:
    """Run both readers on ``data``."""
    _file.write_bytes(data)
    read_as_block(_file)
    read_as_archive(_file)


def mutated(data: bytes, most: int, seed: int) -> bytes:
    """Mutate ``data`` by its format, or as libFuzzer does."""
    if random.Random(seed).random() < 0.3:
        return bytes(atheris.Mutate(data, most))
    return mutate(data, seed)[:most]


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input, custom_mutator=mutated)
    atheris.Fuzz()
