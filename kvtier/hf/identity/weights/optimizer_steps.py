"""Optimizer steps of this process: fused optimizers write weights without counting a version.

PyTorch calls a hook before and after the step of every ``torch.optim.Optimizer``, subclasses included. The count does
not say which tensors a step wrote: optimizers with flat buffers or master weights write other tensors than they were
given. It costs the same for every model, and holds neither an optimizer nor a tensor.
"""

from __future__ import annotations

import threading
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle


class OptimizerSteps:
    """A count that grows before and after every step of any optimizer, from ``watch`` on.

    A reading of weights is out of date when the count differs from the count *before* the reading. A step that fails
    half way has written some weights: it was counted at its beginning.
    """

    def __init__(self) -> None:
        self._count = 0
        self._handles: tuple[RemovableHandle, ...] = ()
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """A number that was never returned before the last step began."""
        return self._count

    def watch(self) -> None:
        """Count from now on. Called again, it does nothing."""
        with self._lock:
            if not self._handles:
                self._count += 1  # steps may have been made unseen
                self._handles = (
                    register_optimizer_step_pre_hook(self._note),
                    register_optimizer_step_post_hook(self._note),
                )

    def unwatch(self) -> None:
        """Remove the hooks. Called again, it does nothing."""
        with self._lock:
            for handle in self._handles:
                handle.remove()
            self._handles = ()

    def _note(self, _optimizer: Any, _args: Any, _kwargs: Any) -> None:
        with self._lock:  # += of two threads could count once, and the second would end unseen
            self._count += 1
