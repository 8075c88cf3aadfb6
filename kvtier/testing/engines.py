"""EngineChecks: the contract of copy engines, as a class to subclass in a test."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from kvtier.transfer.base import CopyEngine

_LENGTH = 64


class EngineChecks:
    """Subclass it as ``Test…`` and define the fixture ``engine``, which yields an engine and closes it.

    Attributes:
        device: where the engine's kernels run.
    """

    device = torch.device("cpu")

    def test_a_copy_delivers_the_bytes_of_every_dtype_both_ways(self, engine: CopyEngine) -> None:
        """Host to device to host, for floating point and other types."""
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool):
            host = self._host(engine, _LENGTH, dtype)
            host.copy_(torch.arange(_LENGTH, device="cpu").to(dtype))
            there = torch.empty(_LENGTH, dtype=dtype, device=self.device)
            back = self._host(engine, _LENGTH, dtype)
            up = engine.copy(there, host, after=(engine.mark(),))
            down = engine.copy(back, there, after=(up,))
            engine.settle(down)
            assert torch.equal(back, torch.arange(_LENGTH, device="cpu").to(dtype))

    def test_a_copy_into_a_part_leaves_the_rest_alone(self, engine: CopyEngine) -> None:
        """Strided targets and sources."""
        buffer = torch.zeros(2, 3, 8, 4, device=self.device)
        page = self._ramp(2 * 3 * 2 * 4).reshape(2, 2, 3, 4).transpose(1, 2)
        engine.wait(engine.copy(buffer[:, :, 3:5], page, after=(engine.mark(),)))
        assert torch.equal(buffer[:, :, 3:5], page)
        assert not buffer[:, :, :3].any()
        assert not buffer[:, :, 5:].any()

    def test_several_copies_have_one_fence(self, engine: CopyEngine) -> None:
        """All are done when it has passed, and none begins before ``after``."""
        host = self._host(engine, 4 * _LENGTH).view(4, _LENGTH)
        there = torch.zeros(4, _LENGTH, device=self.device)
        filled = engine.call(_filling(host, 3), writes=(host,))
        engine.wait(engine.copy_all([(there[i], host[i]) for i in range(4)], after=(filled, engine.mark())))
        assert (there == 3).all()

    def test_kernels_see_what_they_waited_for(self, engine: CopyEngine) -> None:
        """A host task fills a buffer, a copy takes it to the device, a kernel uses it."""
        host = self._host(engine, _LENGTH)
        there = torch.zeros(_LENGTH, device=self.device)
        filled = engine.call(_filling(host, torch.arange(float(_LENGTH), device="cpu")), writes=(host,))
        engine.wait(engine.copy(there, host, after=(filled, engine.mark())))
        assert torch.equal(there + 1, self._ramp(_LENGTH) + 1)

    def test_a_copy_after_a_mark_sees_what_kernels_wrote(self, engine: CopyEngine) -> None:
        """And a copy after a mark overwrites memory only after kernels have read it."""
        source = self._ramp(_LENGTH)
        for step in range(8):
            source = source * 2 + step
        expected = source.clone()
        host = self._host(engine, _LENGTH)
        down = engine.copy(host, source, after=(engine.mark(),))
        doubled = source * 2
        engine.wait(down)
        up = engine.copy(source, torch.zeros_like(source), after=(engine.mark(),))
        engine.settle(down)
        engine.wait(up)
        assert torch.equal(host.to(self.device), expected)
        assert torch.equal(doubled, expected * 2)
        assert not source.any()

    def test_operations_run_in_the_order_of_their_fences(self, engine: CopyEngine) -> None:
        """A chain of tasks, each after the one before."""
        ran: list[int] = []
        fences = [engine.mark()]
        for number in range(20):
            fences.append(engine.call(partial(ran.append, number), after=fences[-1:]))
        engine.settle(fences[-1])
        assert ran == list(range(20))

    def test_an_operation_comes_after_all_of_its_fences(self, engine: CopyEngine) -> None:
        """Many tasks in any order, then one."""
        ran: list[int] = []
        before = [engine.call(partial(ran.append, number)) for number in range(10)]
        engine.settle(engine.call(partial(ran.append, 10), after=before))
        assert ran[-1] == 10
        assert sorted(ran) == list(range(11))

    def test_a_buffer_is_reused_after_the_fences_of_its_last_use(self, engine: CopyEngine) -> None:
        """One staging buffer, many pages."""
        staging = self._host(engine, _LENGTH)
        buffer = torch.zeros(10, _LENGTH, device=self.device)
        copied = engine.mark()
        for page in range(10):
            filled = engine.call(_filling(staging, page), writes=(staging,), after=(copied,))
            copied = engine.copy(buffer[page], staging, after=(filled,))
        engine.wait(copied)
        assert buffer.mean(1).tolist() == list(range(10))

    def test_an_error_is_raised_wherever_its_fence_is_waited_for(self, engine: CopyEngine) -> None:
        """Not when it is enqueued, and not only once."""
        error = OSError("broken")
        fence = engine.call(_raising(error))
        for await_ in (engine.wait, engine.settle, engine.wait):
            assert _raised(await_, fence) is error

    def test_what_comes_after_a_failure_fails_alike_and_does_not_run(self, engine: CopyEngine) -> None:
        """Over several links, for copies and tasks."""
        error, ran = OSError("broken"), list[int]()
        target = torch.zeros(_LENGTH, device=self.device)
        broken = engine.call(_raising(error))
        copied = engine.copy(target, self._ramp(_LENGTH), after=(broken, engine.mark()))
        called = engine.call(partial(ran.append, 1), after=(copied,))
        assert _raised(engine.settle, called) is error
        assert _raised(engine.settle, copied) is error
        assert ran == []

    def test_a_failure_leaves_other_operations_alone(self, engine: CopyEngine) -> None:
        """Earlier operations and unrelated operations."""
        ran: list[int] = []
        first = engine.call(partial(ran.append, 1))
        broken = engine.call(_raising(OSError("broken")), after=(first,))
        other = engine.call(partial(ran.append, 2))
        engine.settle(first)
        engine.settle(other)
        assert _raised(engine.settle, broken) is not None
        assert sorted(ran) == [1, 2]

    def test_marks_pass_and_fences_can_be_waited_for_again(self, engine: CopyEngine) -> None:
        """In any mixture."""
        mark = engine.mark()
        fence = engine.copy(torch.empty(4, device=self.device), self._ramp(4), after=(engine.mark(),))
        for one in (mark, fence, fence, mark):
            engine.wait(one)
            engine.settle(one)

    def test_tensors_of_inference_mode_can_be_copied(self, engine: CopyEngine) -> None:
        """From and to, whatever thread the copy runs on."""
        with torch.inference_mode():
            host = self._host(engine, _LENGTH)
            target = torch.zeros(_LENGTH, device=self.device)
            filled = engine.call(lambda: None)
            engine.settle(engine.copy(target, self._ramp(_LENGTH), after=(filled, engine.mark())))
            engine.settle(engine.copy(host, target))
            assert torch.equal(host, torch.arange(float(_LENGTH), device="cpu"))

    def test_host_memory_has_the_size_asked_for(self, engine: CopyEngine) -> None:
        """Zero bytes included."""
        for nbytes in (0, 1, 4096):
            memory = engine.host_empty(nbytes)
            assert (memory.shape, memory.dtype, memory.device.type) == ((nbytes,), torch.uint8, "cpu")

    def test_host_memory_takes_at_least_its_size(self, engine: CopyEngine) -> None:
        """What is taken from the machine is at least what was asked for, and asking for that takes no more."""
        for nbytes in (0, 1, 255, 256, 4097):
            taken = engine.host_nbytes(nbytes)
            assert taken >= nbytes
            assert engine.host_nbytes(taken) == taken

    def test_closing_twice_is_closing_once(self, engine: CopyEngine) -> None:
        """Results that were settled before stay."""
        ran: list[int] = []
        engine.settle(engine.call(partial(ran.append, 1)))
        engine.close()
        engine.close()
        assert ran == [1]

    def _host(self, engine: CopyEngine, length: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return engine.host_empty(length * dtype.itemsize).view(dtype)

    def _ramp(self, length: int) -> torch.Tensor:
        return torch.arange(float(length), device=self.device)


def _filling(buffer: torch.Tensor, value: float | torch.Tensor) -> Callable[[], None]:
    def task() -> None:
        buffer[:] = value

    return task


def _raising(error: Exception) -> Callable[[], None]:
    def task() -> None:
        raise error

    return task


def _raised(function: Callable[[object], None], fence: object) -> BaseException | None:
    try:
        function(fence)
    except Exception as error:
        return error
    return None
