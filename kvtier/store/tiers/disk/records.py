"""Small JSON files of a store, read whole, with a size limit, and only if they are regular files."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from kvtier.platform.filesystem import READ_FLAGS

MARKER_BYTES = 4096
MANIFEST_BYTES = 16 * 2**20  # of the description of a root


def read_record(path: Path, at_most_bytes: int) -> Any:
    """Return the parsed JSON file ``path``.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read, or is a link.
        ValueError: it is not JSON, not a regular file (a pipe would never end), or larger than ``at_most_bytes``.
        RecursionError: it is nested too deeply.
    """
    fd = os.open(path, READ_FLAGS)
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no ordinary file")
        data = file.read(at_most_bytes + 1)
    if len(data) > at_most_bytes:
        raise ValueError("it is too large")
    return json.loads(data.decode("utf-8"))
