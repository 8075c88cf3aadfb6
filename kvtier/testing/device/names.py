"""Names of ``torch`` that the test device replaces: streams, events, pinned memory, and copies of storages.

They are classes and functions of a module, without closures: kvtier reads the code that ``torch`` holds to tell whether
a model computes as it did.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch.utils import _device as default_device

from kvtier.testing.device.machine import Machine
from kvtier.testing.device.streams import Point

DEVICE_TYPE = "testdevice"
_PRIVATE_USE_1 = 20  # c10::DeviceType::PrivateUse1
_released_stream: Any = torch.Stream
_released_empty = torch.empty
_released_clone: Any = torch.UntypedStorage.clone
_machines: list[Machine] = []


def replace(machine: Machine) -> None:
    """Replace them for the rest of the process."""
    _machines.append(machine)
    constructors: Any = default_device._device_constructors
    constructors()  # cached: for these functions, ``torch.set_default_device`` fills in the device
    names: Any = torch
    names.Stream, names.empty = Stream, empty
    names.UntypedStorage.clone = clone
    names.accelerator.current_stream = current_stream
    names.accelerator.set_stream = set_stream
    names.accelerator.synchronize = synchronize


class Event:
    """A point in the queue of a stream."""

    def __init__(self, point: Point) -> None:
        self.point = point

    def query(self) -> bool:
        """Whether it was passed."""
        return _machines[0].streams.has_passed(self.point)

    def synchronize(self) -> None:
        """Block until it is passed."""
        _machines[0].streams.settle(self.point)

    def wait(self, stream: Any = None) -> None:
        """Let a stream, else the current one, wait for it."""
        streams = _machines[0].streams
        streams.wait(streams.current if stream is None else stream.stream_id, self.point)


class Stream(_released_stream):  # type: ignore[misc]
    """A queue of the device. Entering an object notes in it which stream was current, as released streams do.

    Raises:
        RuntimeError: an object is entered that was entered and not left: two threads would mix up their streams.
    """

    def __new__(cls, device: Any = None, *, stream_id: int | None = None, **where: Any) -> Any:
        """Return a new stream, or with ``stream_id`` another object for a stream."""
        if stream_id is None and device is not None and torch.device(device).type != DEVICE_TYPE:
            return _released_stream(device)
        number = _machines[0].streams.new_number() if stream_id is None else stream_id
        return super().__new__(cls, stream_id=number, device_index=0, device_type=_PRIVATE_USE_1)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._before: int | None = None

    def __enter__(self) -> Any:
        """Make it the current stream of this thread."""
        streams = _machines[0].streams
        if self._before is not None:
            raise RuntimeError("this object was entered before: two threads would mix up their current streams")
        self._before, streams.current = streams.current, self.stream_id
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Make the stream current that was current before."""
        before, self._before = self._before, None
        _machines[0].streams.current = before or 0

    def record_event(self, event: Any = None) -> Any:
        """Return an event after all that is queued."""
        return Event(_machines[0].streams.record(self.stream_id))

    def wait_event(self, event: Any) -> None:
        """Let all that is queued from now on run after ``event``."""
        _machines[0].streams.wait(self.stream_id, event.point)

    def wait_stream(self, stream: Any) -> None:
        """Let all that is queued from now on run after all that is queued on ``stream``."""
        self.wait_event(stream.record_event())

    def query(self) -> bool:
        """Whether all that was queued has run."""
        return not _machines[0].streams.queue(self.stream_id).work

    def synchronize(self) -> None:
        """Block until all that was queued has run."""
        _machines[0].streams.synchronize(self.stream_id)


def current_stream(device: Any = None) -> Any:
    """Return the current stream of this thread."""
    return Stream(stream_id=_machines[0].streams.current)


def set_stream(stream: Any) -> None:
    """Make ``stream`` the current stream of this thread."""
    _machines[0].streams.current = stream.stream_id


def synchronize(device: Any = None) -> None:
    """Block until all work of all streams has run."""
    _machines[0].streams.synchronize()


def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Return ``torch.empty(…)``; with ``pin_memory=True``, pinned memory of this device."""
    if not kwargs.pop("pin_memory", False):
        return _released_empty(*args, **kwargs)
    layout = _released_empty(*args, **{**kwargs, "device": "meta"})
    return _machines[0].pinned(layout.nbytes).view(layout.dtype).view(layout.shape)


def clone(storage: Any) -> Any:
    """Return a copy of ``storage``. The released method asks for an allocator written in C++, which does not exist."""
    if storage.device.type != DEVICE_TYPE:
        return _released_clone(storage)
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).clone().untyped_storage()
