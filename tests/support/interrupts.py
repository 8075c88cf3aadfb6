"""Interrupts that come at every possible moment, one after the other."""

import linecache
import sys


class InterruptAtLine:
    """Raises ``KeyboardInterrupt`` before line number ``at`` of ``files`` that this thread runs; ``came`` says if.

    Lines of ``with`` and ``try`` are not counted: no interpreter takes an interrupt where it leaves the one or enters
    the other.
    """

    def __init__(self, at, files):
        self._left, self._files = at, files
        self.came = False

    def _trace(self, frame, event, argument):
        if frame.f_code.co_filename not in self._files:
            return None
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip()
        if event == "line" and not line.startswith(("with ", "try:")):
            self._left -= 1
            if self._left < 0 and not self.came:
                self.came = True
                raise KeyboardInterrupt
        return self._trace

    def __enter__(self):
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_):
        sys.settrace(self._before)
