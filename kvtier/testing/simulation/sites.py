"""Sites: the places in code that call an engine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

_HERE = str(Path(__file__).parent)


class Site(NamedTuple):
    """A line of a file. A call that spans lines is known by the line that the interpreter reports for it."""

    file: str
    line: int
    function: str = ""

    @classmethod
    def of_caller(cls) -> Site:
        """Return the innermost line that is being executed outside this package."""
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_filename.startswith(_HERE):
            frame = frame.f_back
        return cls(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)

    def __str__(self) -> str:
        path = Path(self.file)
        return f"{path.parent.name}/{path.name}:{self.line}"
