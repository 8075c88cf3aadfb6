"""The simulated engine detects every unordered access, and accepts every ordered one."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.testing import Drop, Mutant, RaceError, Recorder, SimulatedEngine, drops
from kvtier.transfer.base import InlineEngine

SEEDS = [*range(25), None]  # None: lazy
LAYERS, SIZE = 5, 8


def make_engine(seed, **options):
    return SimulatedEngine(random.Random(seed), lazy=seed is None, **options)


def pages(engine):
    """Host memory with the page of each layer, filled outside any watch."""
    memory = [engine.host_empty(SIZE * 4).view(torch.float32) for _ in range(LAYERS)]
    for layer, page in enumerate(memory):
        page.fill_(layer + 1)
    return memory


def double_buffered(
    engine, steps=2, *, wait=True, after=True, marks_early=False, fetches_far=False, reuses_source=False
):
    """Attend to pages prefetched alternately into two slots; return the answers. Each argument breaks one order."""
    host = pages(engine)
    answers = []
    with engine.watching():
        slots = [torch.zeros(SIZE) for _ in range(2)]
        free = [engine.mark(), engine.mark()]
        arriving = [None, None]
        staged = engine.host_empty(SIZE * 4).view(torch.float32)
        unstaged = ()

        def fetch(layer):
            nonlocal unstaged
            slot = layer % 2
            page = host[layer % LAYERS]
            read = engine.call(
                lambda: np.copyto(staged.numpy(), page.numpy()), reads=(page,), writes=(staged,), after=unstaged
            )
            arriving[slot] = engine.copy(slots[slot], staged, after=(read, free[slot]) if after else (read,))
            if not reuses_source:
                unstaged = (arriving[slot],)

        fetch(0)
        for layer in range(steps * LAYERS):
            slot = layer % 2
            if layer + 1 < steps * LAYERS:
                fetch(layer + 1)
            if wait:
                engine.wait(arriving[slot])
            if marks_early:
                free[slot] = engine.mark()
            if fetches_far:
                fetch(layer + 2)
            answers.append((slots[slot] * 2).sum())
            if not marks_early:
                free[slot] = engine.mark()
    engine.close()
    return [answer.item() for answer in answers]


EXPECTED = [2 * SIZE * (layer % LAYERS + 1) for layer in range(2 * LAYERS)]


def rule_of(function):
    with pytest.raises(RaceError) as caught:
        function()
    assert str(caught.value).startswith(caught.value.rule + ": ")
    assert "test_simulated.py:" in str(caught.value)
    return caught.value.rule


@pytest.mark.parametrize("seed", SEEDS)
class TestPipelines:
    @pytest.mark.parametrize("grad", [torch.enable_grad, torch.no_grad, torch.inference_mode])
    def test_correct_pipeline_passes(self, seed, grad):
        with grad():
            assert double_buffered(make_engine(seed)) == EXPECTED

    def test_missing_wait_is_caught(self, seed):
        assert rule_of(lambda: double_buffered(make_engine(seed), wait=False)) == "R1"

    def test_missing_after_is_caught(self, seed):
        assert rule_of(lambda: double_buffered(make_engine(seed), after=False)) == "R3"

    def test_mark_before_the_kernel_is_caught(self, seed):
        assert rule_of(lambda: double_buffered(make_engine(seed), marks_early=True)) == "R3"

    def test_filling_a_slot_before_its_kernel_is_enqueued_is_caught(self, seed):
        assert rule_of(lambda: double_buffered(make_engine(seed), fetches_far=True)) == "R1"

    def test_reusing_a_source_too_early_is_caught(self, seed):
        assert rule_of(lambda: double_buffered(make_engine(seed), reuses_source=True)) == "R4"


@given(choices=st.randoms(use_true_random=False), lazy=st.booleans(), data=st.data())
def test_correct_pipeline_gives_exact_bytes_under_any_schedule(choices, lazy, data):
    """Pages go from a buffer to the host, are overwritten in the buffer, return to a ring, and are read by kernels."""
    engine = SimulatedEngine(choices, lazy=lazy)
    count = data.draw(st.integers(1, 8))
    ring = data.draw(st.integers(1, 3))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64]))
    expected = [torch.arange(12).reshape(3, 4).to(dtype) + 7 * page for page in range(count)]
    with engine.watching():
        buffer = torch.empty(3, 4 * count, dtype=dtype)
        below, down = [], []
        for page, values in enumerate(expected):
            at = buffer[:, 4 * page : 4 * page + 4]
            at.copy_(values)
            below.append(engine.host_empty(12 * dtype.itemsize).view(dtype).view(3, 4))
            down.append(engine.copy(below[-1], at, after=(engine.mark(),)))
        for fence in down:
            engine.wait(fence)
        buffer.zero_()
        slots = torch.empty(ring, 3, 4, dtype=dtype)
        free = [engine.mark()] * ring
        answers = []
        arriving = {}
        for page in range(count + ring - 1):
            if page < count:
                slot = page % ring
                arriving[page] = engine.copy(slots[slot], below[page], after=(free[slot], down[page]))
            ready = page - ring + 1
            if ready >= 0:
                engine.wait(arriving[ready])
                answers.append(slots[ready % ring] * 1)
                free[ready % ring] = engine.mark()
    engine.close()
    assert all(torch.equal(answer, values) for answer, values in zip(answers, expected, strict=True))
    assert not buffer.any()


class TestScheduling:
    def test_operations_run_later_and_poison_their_targets_until_then(self):
        engine = SimulatedEngine(lazy=True)
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex128):
            target = torch.zeros(3, 4, dtype=dtype)
            fence = engine.copy(target[:, 1:3], torch.ones(3, 2, dtype=dtype))
            assert target[:, 1:3].isnan().all()
            assert not target[:, 0].any()
            engine.settle(fence)
            assert target.sum() == 6
        counts = torch.zeros(4, dtype=torch.int32)
        engine.call(lambda: counts.fill_(1), writes=(counts,))
        assert counts.view(torch.uint8).tolist() == [255] * 16
        assert engine.pending == 1
        truths = torch.zeros(4, dtype=torch.bool)
        engine.copy(truths, torch.zeros(4, dtype=torch.bool))
        assert truths.view(torch.uint8).tolist() == [1] * 4  # other bytes are not valid booleans
        engine.close()
        assert counts.tolist() == [1] * 4
        assert engine.host_empty(3).tolist() == [255] * 3

    def test_memory_that_an_operation_reads_and_writes_is_not_poisoned(self):
        engine = SimulatedEngine(lazy=True)
        memory, other = torch.ones(4), torch.ones(4)
        fence = engine.call(lambda: memory.mul_(3), reads=(memory[:1],), writes=(memory, other))
        assert memory.tolist() == [1] * 4
        assert other.isnan().all()
        engine.settle(fence)
        assert memory.tolist() == [3] * 4

    def test_source_is_read_when_the_operation_runs(self):
        engine = SimulatedEngine(lazy=True)
        source, target = torch.ones(4), torch.zeros(4)
        fence = engine.copy(target, source)
        source.fill_(2)
        engine.settle(fence)
        assert target.tolist() == [2] * 4

    def test_target_is_poisoned_only_when_the_operation_may_begin(self):
        engine = SimulatedEngine(lazy=True)
        source, staging, target = torch.ones(4), torch.zeros(4), torch.zeros(4)
        first = engine.copy(staging, source)
        second = engine.copy(target, staging, after=(first,))
        third = engine.copy(staging, source * 3, after=(second,))
        engine.settle(second)
        assert target.tolist() == [1] * 4
        assert staging.isnan().all()
        engine.settle(third)
        assert staging.tolist() == [3] * 4

    def test_unordered_operations_run_in_every_order(self):
        orders = set()
        for seed in range(200):
            engine, ran = SimulatedEngine(random.Random(seed)), []
            for name in "abc":
                engine.call(lambda name=name, ran=ran: ran.append(name))
            engine.close()
            orders.add("".join(ran))
        assert len(orders) == 6

    def test_operations_run_before_any_wait_unless_the_engine_is_lazy(self):
        def left(seed, lazy):
            engine = SimulatedEngine(random.Random(seed), lazy=lazy)
            for _ in range(20):
                engine.call(lambda: None)
            return engine.pending

        assert {left(seed, lazy=True) for seed in range(20)} == {20}
        assert len({left(seed, lazy=False) for seed in range(20)}) > 4

    def test_wait_forces_only_the_dependencies_of_its_fence(self):
        engine, ran = SimulatedEngine(lazy=True), []
        first = engine.call(lambda: ran.append(1))
        engine.call(lambda: ran.append(2))
        third = engine.call(lambda: ran.append(3), after=(first,))
        engine.wait(third)
        assert ran == [1, 3]

    def test_long_chain_of_operations_runs_in_order(self):
        engine, ran = SimulatedEngine(lazy=True), []
        fence = engine.mark()
        for number in range(1100):
            fence = engine.call(lambda number=number: ran.append(number), after=(fence,))
        engine.wait(fence)
        assert ran == list(range(1100))

    def test_engine_counts_copies_bytes_and_calls(self):
        engine = SimulatedEngine()
        engine.copy(torch.zeros(3), torch.ones(3))
        engine.copy(torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64))
        engine.call(lambda: None)
        assert (engine.copies, engine.bytes_copied, engine.calls) == (2, 28, 1)

    def test_engine_rejects_foreign_fences_and_mismatched_copies(self):
        engine = SimulatedEngine()
        for fence in (SimulatedEngine().mark(), InlineEngine().mark()):
            with pytest.raises(ValueError, match="no fence of this engine"):
                engine.wait(fence)
        for other in (torch.ones(4), torch.ones(3, dtype=torch.int32)):
            with pytest.raises(ValueError, match="must be equal"):
                engine.copy(torch.zeros(3), other)

    def test_host_task_runs_outside_the_callers_inference_mode_and_watch(self):
        engine, seen = SimulatedEngine(), []
        with engine.watching(), torch.inference_mode():
            memory = torch.zeros(4)
            copied = engine.copy(memory, torch.ones(4), after=(engine.mark(),))
            fence = engine.call(
                lambda: seen.append((torch.is_inference_mode_enabled(), memory.sum().item())), after=(copied,)
            )
            engine.settle(fence)
        assert seen == [(False, 4.0)]


class TestFailures:
    def test_wait_that_fails_may_leave_other_dependencies_pending(self):
        ran = set()
        for seed in range(20):
            engine, done = SimulatedEngine(random.Random(seed), lazy=True), []
            slow = engine.call(lambda done=done: done.append(1))
            broken = engine.call(lambda: 1 // 0)
            with pytest.raises(ZeroDivisionError):
                engine.wait(engine.call(lambda: None, after=(slow, broken)))
            ran.add(len(done))
        assert ran == {0, 1}

    def test_failed_operation_has_ended_once_its_error_is_raised(self):
        engine, target = SimulatedEngine(lazy=True), torch.zeros(4)
        with engine.watching():
            fence = engine.call(lambda: 1 // 0, writes=(target,), after=(engine.mark(),))
            with pytest.raises(ZeroDivisionError):
                engine.wait(fence)
            target.zero_()
            engine.copy(target, torch.zeros(4), after=(engine.mark(),))

    @pytest.mark.parametrize("lazy", [True, False])
    def test_every_step_can_be_made_to_fail(self, lazy):
        """There are seven steps: the caller's steps raise at once, the steps of operations raise at their wait."""

        def run(fail):
            engine = SimulatedEngine(random.Random(3), lazy=lazy, fail=fail)
            memory = engine.host_empty(4)
            mark = engine.mark()
            called = engine.call(lambda: memory.fill_(1), writes=(memory,), after=(mark,))
            copied = engine.copy(torch.empty(4, dtype=torch.uint8), memory, after=(called,))
            engine.wait(copied)
            engine.settle(copied)

        steps = []
        run(lambda step, ordinal: steps.append((step, ordinal)))
        caller = [step for step in steps if step[0] not in ("copy", "call")]
        assert caller == [("mark", 0), ("enqueue", 1), ("enqueue", 2), ("wait", 3), ("settle", 4)]
        assert [step for step in steps if step[0] in ("copy", "call")] == [("call", 1), ("copy", 2)]
        for chosen in steps:

            def fail(step, ordinal, chosen=chosen):
                if (step, ordinal) == chosen:
                    raise KeyboardInterrupt(f"{step} {ordinal}")

            with pytest.raises(KeyboardInterrupt, match=f"{chosen[0]} {chosen[1]}"):
                run(fail)

    def test_interrupt_of_an_operation_is_raised_when_it_is_settled(self):
        def fail(step, ordinal):
            if step == "call":
                raise KeyboardInterrupt

        engine = SimulatedEngine(random.Random(0), fail=fail)
        fence = engine.call(lambda: None)
        while engine.pending:
            engine.mark()
        with pytest.raises(KeyboardInterrupt):
            engine.settle(fence)

    def test_failed_wait_does_not_order_compute_after_other_dependencies(self):
        engine = SimulatedEngine(lazy=True)
        target = torch.zeros(4)
        slow = engine.copy(target, torch.ones(4))
        broken = engine.call(lambda: 1 // 0)
        last = engine.call(lambda: None, after=(slow, broken))
        with engine.watching():
            with pytest.raises(ZeroDivisionError):
                engine.wait(last)
            engine.wait(slow)
            assert target.sum() == 4

        def reads_too_early():
            other = torch.zeros(4)
            slow = engine.copy(other, torch.ones(4))
            last = engine.call(lambda: None, after=(slow, broken))
            with engine.watching():
                with pytest.raises(ZeroDivisionError):
                    engine.wait(last)
                other.sum()

        assert rule_of(reads_too_early) == "R1"


@pytest.fixture
def engine():
    return SimulatedEngine(lazy=True)


class TestRules:
    """Each test breaks one rule with the shortest program, beside similar programs without a race."""

    def test_r1_kernel_touching_a_target_before_its_wait_is_a_race(self, engine):
        target = torch.zeros(8)
        for touch in (target.sum, lambda: target.add_(1), lambda: torch.cat([target, target]), target[0].item):

            def run(touch=touch):
                engine = SimulatedEngine(lazy=True)
                engine.copy(target[:4], torch.ones(4))
                with engine.watching():
                    touch()

            assert rule_of(run) == "R1"
        fence = engine.copy(target[:4], torch.ones(4))
        with engine.watching():
            target[4:].sum()  # other bytes of the same memory
            target.view(2, 4).t()  # a view
            torch.empty_like(target)
            target.new_zeros(8)
            target.view(8).unsqueeze_(0)
            engine.wait(fence)
            target.sum()

    @pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
    def test_r1_reshape_that_copies_counts_as_a_read(self, engine, grad):
        target = torch.zeros(4, 4)
        engine.copy(target, torch.ones(4, 4))

        def run():
            with engine.watching(), grad():
                target.t().reshape(16)

        with engine.watching(), grad():
            target.reshape(16)
        assert rule_of(run) == "R1"

    @pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_r1_attention_reads_k_and_v(self, engine, grad, attention):
        q = torch.randn(1, 4, 1, 8)
        buffer = torch.randn(2, 1, 2, 32, 8)
        page = torch.randn(2, 6, 8)

        def attend(columns):
            k, v = buffer[:, :, :, :columns]
            with engine.watching(), grad():
                if attention == "sdpa":
                    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
                k, v = (x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(1, 4, columns, 8) for x in (k, v))
                return torch.matmul(torch.softmax(torch.matmul(q, k.transpose(2, 3)), -1), v)

        fence = engine.copy(buffer[1, 0, :, 20:26], page)
        before = attend(20)
        assert rule_of(lambda: attend(21)) == "R1"
        engine = SimulatedEngine(lazy=True)
        engine.wait(engine.copy(buffer[1, 0, :, 20:26], page))
        assert attend(26).isfinite().all()
        assert torch.equal(before, attend(20))
        del fence

    def test_r2_kernel_writing_a_source_before_its_wait_is_a_race(self, engine):
        source = torch.zeros(4)

        def run():
            with engine.watching():
                fence = engine.copy(torch.empty(4), source, after=(engine.mark(),))
                source.sum()
                if waits:
                    engine.wait(fence)
                source.add_(1)

        waits = True
        run()
        waits = False
        assert rule_of(run) == "R2"

    def test_r3_copy_to_a_target_must_follow_the_kernels_that_used_it(self):
        slots, source = torch.zeros(2, 4), torch.ones(4)

        def run(slot):
            engine = SimulatedEngine(lazy=True)
            with engine.watching():
                slots[0].sum()
                mark = engine.mark()
                slots[1].sum()
                engine.copy(slots[slot], source, after=(mark,))

        run(0)
        assert rule_of(lambda: run(1)) == "R3"

    def test_r3_counts_the_last_access_of_a_kernel(self, engine):
        slots, source = torch.zeros(2, 4), torch.ones(4)

        def run():
            with engine.watching():
                slots[0].sum()
                slots[1].sum()
                mark = engine.mark()
                slots[0].sum()
                engine.copy(slots[1], source, after=(mark,))
                engine.copy(slots[0], source, after=(mark,))

        assert rule_of(run) == "R3"
        assert engine.copies == 1

    def test_r3_copy_from_a_source_must_follow_the_kernels_that_wrote_it(self):
        source, target = torch.zeros(4), torch.zeros(4)

        def run(mark_first):
            engine = SimulatedEngine(lazy=True)
            with engine.watching():
                early = engine.mark()
                source.add_(1)
                late = engine.mark()
                source.sum()  # concurrent reads are no race
                engine.copy(target, source, after=(early if mark_first else late,))

        run(mark_first=False)
        assert rule_of(lambda: run(mark_first=True)) == "R3"

    def test_r3_new_memory_needs_a_mark_because_running_kernels_may_have_freed_it(self, engine):
        def run(marks):
            with engine.watching():
                target = torch.empty(4)
                engine.copy(target, torch.ones(4), after=[engine.mark()] * marks)

        assert rule_of(lambda: run(0)) == "R3"

    def test_r3_mark_counts_through_dependent_operations(self, engine):
        with engine.watching():
            target = torch.zeros(4)
            first = engine.call(lambda: None, after=(engine.mark(),))
            second = engine.call(lambda: None, after=(first,))
            engine.copy(target, torch.ones(4, dtype=torch.float32), after=(second, engine.mark()))
            other = torch.zeros(4)
            engine.settle(engine.mark())
            engine.call(lambda: None, writes=(other,))

    def test_r4_unordered_operations_on_the_same_bytes_are_a_race(self, engine):
        buffer = torch.zeros(4, 8)
        first = engine.copy(buffer[:, :4], torch.ones(4, 4))
        engine.copy(buffer[:, 4:], torch.ones(4, 4))  # between the rows of the other operations
        second = engine.call(lambda: None, reads=(buffer[:, :4],), after=(first,))
        assert rule_of(lambda: engine.copy(buffer[2:3, 3:5], torch.ones(1, 2))) == "R4"
        assert rule_of(lambda: engine.call(lambda: None, reads=(buffer[2, :4],))) == "R4"
        assert rule_of(lambda: engine.copy(buffer[:, :4], torch.ones(4, 4), after=(first,))) == "R4"
        engine.copy(buffer[:, :4], torch.ones(4, 4), after=(second,))

    def test_r4_concurrent_readers_are_no_race(self, engine):
        source = torch.ones(4)
        readers = [engine.copy(torch.zeros(4), source) for _ in range(3)]
        assert rule_of(lambda: engine.copy(source, torch.zeros(4), after=readers[1:])) == "R4"
        engine.copy(source, torch.zeros(4), after=readers)

    def test_r4_detects_the_same_memory_behind_two_tensors(self, engine):
        memory = torch.zeros(8).numpy()
        engine.copy(torch.from_numpy(memory)[:4], torch.ones(4))
        assert rule_of(lambda: engine.copy(torch.from_numpy(memory[2:]), torch.ones(6))) == "R4"

    def test_mark_comes_after_everything_that_compute_has_waited_for(self, engine):
        target = torch.zeros(4)
        early = engine.mark()
        fence = engine.copy(target, torch.ones(4))
        engine.wait(fence)
        assert rule_of(lambda: engine.copy(target, torch.ones(4), after=(early,))) == "R4"
        engine.copy(target, torch.ones(4), after=(engine.mark(),))

    def test_settled_operations_precede_everything_the_host_enqueues_later(self, engine):
        target, source = torch.zeros(4), torch.ones(4)
        engine.settle(engine.copy(target, source))
        with engine.watching():
            target.add_(1)
            engine.settle(engine.mark())
        engine.copy(target, source)

    def test_kernels_on_host_memory_need_settle_instead_of_wait(self, engine):
        host = engine.host_empty(16)

        def run(wait):
            with engine.watching():
                wait(engine.copy(host, torch.zeros(16, dtype=torch.uint8), after=(engine.mark(),)))
                other = host.clone()
                other.add_(1)
                engine.settle(engine.call(lambda: None, reads=(host,), writes=(other,)))  # the host is done with both

        run(engine.settle)
        assert rule_of(lambda: run(engine.wait)) == "R1"

    def test_kernels_on_host_memory_need_only_wait_when_the_device_is_the_host(self):
        engine = SimulatedEngine(lazy=True, device_is_host=True)
        host = engine.host_empty(16)
        with engine.watching():
            engine.wait(engine.copy(host, torch.zeros(16, dtype=torch.uint8), after=(engine.mark(),)))
            host.add_(1)

    def test_swallowed_race_is_raised_again_at_the_end(self, engine):
        def run():
            with engine.watching():
                target = torch.zeros(4)
                with pytest.raises(RaceError):
                    engine.copy(target, torch.ones(4))

        assert rule_of(run) == "R3"

    def test_reused_memory_addresses_are_no_race(self, engine):
        """The allocator reuses the same addresses: for kernels, and for a host that sets no marks."""
        addresses = {"device": set(), "host": set()}
        with engine.watching():
            for number in range(100):
                target = torch.empty(1000)
                addresses["device"].add(target.data_ptr())
                engine.wait(engine.copy(target, torch.full((1000,), float(number)), after=(engine.mark(),)))
                assert target.sum() == 1000 * number
                del target
                host = engine.host_empty(4000)
                addresses["host"].add(host.data_ptr())
                engine.wait(engine.call(lambda: None, writes=(host,)))
                del host
        assert addresses["device"] & addresses["host"]

    def test_memory_of_an_operation_without_a_wait_is_not_reused(self):
        engine, addresses = SimulatedEngine(random.Random(0)), set()
        for _ in range(10):
            target = torch.empty(1000)
            addresses.add(target.data_ptr())
            engine.copy(target, torch.ones(1000))
            while engine.pending:  # on an accelerator it could still be running
                engine.mark()
            del target
        assert len(addresses) == 10


class TestMutants:
    def record(self):
        recorder = Recorder(SimulatedEngine(lazy=True))
        assert double_buffered(recorder) == EXPECTED
        return recorder

    def test_recorder_changes_nothing_and_lists_possible_drops(self):
        found = drops(self.record())
        assert {drop.what for drop in found} == {"wait", "after", "after[0]", "after[-1]"}
        assert {drop.site.file for drop in found} == {__file__}
        assert any(drop.origin.startswith("mark at") for drop in found)
        assert found == sorted(set(found))

    def test_every_mutant_of_a_pipeline_without_redundant_fences_is_caught(self):
        for drop in drops(self.record()):
            for seed in SEEDS:
                mutant = Mutant(make_engine(seed), drop)
                with pytest.raises(RaceError):
                    double_buffered(mutant)
                assert mutant.dropped, drop

    def test_what_cannot_be_told_apart_is_listed_once(self):
        recorder = Recorder(SimulatedEngine())
        marks = [recorder.mark() for _ in range(2)]
        one = recorder.call(lambda: None, after=marks[:1])
        several = recorder.call(lambda: None, after=marks)
        recorder.wait(several)
        mixed = recorder.call(lambda: None, after=(*marks, one))
        recorder.settle(mixed)
        line = self.test_what_cannot_be_told_apart_is_listed_once.__code__.co_firstlineno
        origins = {
            "mark": f"mark at testing/test_simulated.py:{line + 2}",
            "call": f"call at testing/test_simulated.py:{line + 3}",
        }
        assert [(drop.site.line - line, drop.what, drop.origin) for drop in drops(recorder)] == [
            (3, "after", ""),
            (4, "after", ""),
            (4, "after[-1]", ""),
            (4, "after[0]", ""),
            (5, "wait", ""),
            (6, "after", ""),
            (6, "after", origins["call"]),
            (6, "after", origins["mark"]),
            (6, "after[-1]", ""),
            (6, "after[0]", ""),
            (7, "settle", ""),
        ]

    def test_recorder_passes_foreign_fences_through(self):
        engine = SimulatedEngine(lazy=True)
        fence, recorder = engine.mark(), Recorder(engine)
        recorder.wait(recorder.call(lambda: None, after=(fence, recorder.mark())))
        assert any(drop.origin == "elsewhere" for drop in drops(recorder))

    def test_mutant_whose_drop_never_occurs_behaves_like_the_engine(self):
        site = self.record().seen.most_common(1)[0][0].site
        mutant = Mutant(SimulatedEngine(), Drop(site._replace(line=1), "wait"))
        assert double_buffered(mutant) == EXPECTED
        assert mutant.dropped == 0
