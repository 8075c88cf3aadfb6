"""Interrupts at every possible moment, one after the other."""

import inspect
import linecache
import sys


class InterruptAtLine:
    """Raises ``KeyboardInterrupt`` before line ``at`` of ``files`` in this thread; ``came`` tells whether it did.

    Lines of ``with`` and ``try`` are not counted: no interpreter takes an interrupt on leaving a ``with`` or entering a
    ``try``.
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


class Interrupt:
    """Raises ``KeyboardInterrupt`` in forward pass ``at_pass`` of a module, before or after it runs.

    A profiler raises it: a hook or another class would make it a different model.
    """

    def __init__(self, module, at_pass, before):
        self._module, self._left = module, at_pass
        self._event = "call" if before else "return"
        self._code = inspect.unwrap(type(module).forward).__code__

    def _profile(self, frame, event, argument):
        if event == self._event and frame.f_code is self._code and frame.f_locals.get("self") is self._module:
            self._left -= 1
            if self._left < 0:
                raise KeyboardInterrupt

    def __enter__(self):
        self._before = sys.getprofile()
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *_):
        sys.setprofile(self._before)
