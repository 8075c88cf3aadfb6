"""What else may lie in the place of a file of a store."""

from __future__ import annotations

import os
from pathlib import Path


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_link(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


def a_sparse_giant(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(2**31)


def nothing(path: Path) -> None:
    path.write_bytes(b"")
