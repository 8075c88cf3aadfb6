"""Digests of tensors: every byte counts, every detectable change is noticed, and no tensor crashes the process."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import optimizer as torch_optimizer

from kvtier.hf.identity.weights import block_sums, tensor_values
from kvtier.hf.identity.weights import digest as weights
from kvtier.hf.identity.weights.block_sums import BLOCK_BYTES, BLOCK_WORDS
from kvtier.hf.identity.weights.digest import OptimizerSteps, Unread, digest_weights, forget_models
from kvtier.hf.identity.weights.samples import SAMPLES, Sampler, _word_positions
from kvtier.hf.identity.weights.tensor_values import read_values, rows_differ


def digest(tensor):
    """Return the digest of a model that has only this tensor and was never read before."""
    return digest_weights(torch.nn.Module(), [("weight", tensor)])


def numbers(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


class Remembered:
    """A module with one tensor that was read once."""

    def __init__(self, tensor):
        self.module = torch.nn.Module()
        self.tensor = tensor
        self.first = self.digest()

    def digest(self, tokens=()):
        return digest_weights(self.module, [("weight", self.tensor)], tokens)

    def noticed(self, tokens=()):
        """Whether the digest differs from the first one; if so, it must equal that of a fresh reading."""
        found = self.digest(tokens)
        assert found in (self.first, digest(self.tensor))
        return found != self.first


# --- the digest of one tensor -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool])
@pytest.mark.parametrize("shape", [(), (3,), (129,), (100, 333)], ids=str)
def test_digest_changes_when_one_element_changes(dtype, shape):
    tensor = numbers(*shape, dtype=torch.float32).mul(9).to(dtype)
    seen = {digest(tensor)}
    for position in range(0, tensor.numel(), 997):
        changed = tensor.clone().reshape(-1).view(torch.uint8)
        changed[position * dtype.itemsize] ^= 1
        seen.add(digest(changed.view(dtype).reshape(shape)))
    assert len(seen) == 1 + len(range(0, tensor.numel(), 997))


THROUGH_NUMPY = pytest.mark.cpu_only("NumPy cannot reach the memory of a device")


def at_odd_address(tensor):
    """Return the same values at an address two bytes after a multiple of eight."""
    place = torch.zeros(tensor.nbytes + 8, dtype=torch.uint8)[2 : 2 + tensor.nbytes]
    place.copy_(tensor.reshape(-1).view(torch.uint8))
    moved = torch.from_numpy(np.frombuffer(place.numpy(), dtype=np.float32)).view(tensor.shape)
    assert moved.data_ptr() % 4 == 2
    return moved


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")
@pytest.mark.parametrize("shape", [(3, 5), (300, 70)], ids=str)
def test_equal_values_give_one_digest_in_any_memory_layout(shape):
    tensor = numbers(*shape)
    expected = digest(tensor)
    bytes_before = torch.zeros(tensor.nbytes + 4, dtype=torch.uint8)
    bytes_before[4:] = tensor.reshape(-1).view(torch.uint8)
    others = [
        tensor.clone(),
        tensor.t().contiguous().t(),
        torch.cat([tensor, tensor])[shape[0] :],
        torch.nn.Parameter(tensor),
        torch._neg_view(-tensor),
        torch.complex(tensor, -tensor).conj().imag,
    ]
    if tensor.device.type == "cpu":
        others.append(at_odd_address(tensor))
    others.append(bytes_before[4:].view(torch.float32).view(shape))
    with torch.inference_mode():
        others.append(tensor.clone())
    assert {digest(other) for other in others} == {expected}


def test_digest_depends_on_order_shape_and_dtype():
    tensor = numbers(512, 64)
    rows, columns = tensor.clone(), tensor.clone()
    rows[[1, 2]] = rows[[2, 1]]
    columns[:, [0, 1, 2, 3]] = columns[:, [2, 3, 0, 1]]
    assert len({digest(tensor), digest(rows), digest(columns), digest(tensor.reshape(64, 512))}) == 4
    assert digest(tensor.view(torch.int32)) != digest(tensor)


def test_digests_of_empty_tensors_depend_on_their_shape():
    assert digest(torch.empty(0, 4)) == digest(torch.empty(0, 4)) != digest(torch.empty(4, 0))


def test_digest_stays_the_same_as_in_existing_stores():
    """The digest is part of the root of every stored block: another digest would make all of them unreachable."""
    small, large = torch.arange(300, dtype=torch.int32), torch.arange(9_000, dtype=torch.int32).view(90, 100)
    module = torch.nn.Module()
    found = digest_weights(module, [("small", small), ("large", large)])
    assert found == "c74d56186753167820e64e8d3458b751fda831ebcfcf09541ce4e28e49b97c52"


def test_device_sums_equal_host_sums():
    data = torch.randint(-(2**63), 2**63 - 1, (40, BLOCK_WORDS)).view(torch.uint8).view(-1)
    assert np.array_equal(block_sums.block_sums(data.cpu().numpy()), tensor_values._device_sums(data).cpu().numpy())


@pytest.mark.parametrize("fetched_bytes", [1, 20_000, 2**26], ids=["each", "some", "all"])
def test_values_from_a_device_equal_those_of_the_host_and_come_in_few_transfers(monkeypatch, fetched_bytes):
    """Small tensors, tensors with and without a tail, views that are not contiguous, and none at all."""
    tensors = [torch.arange(n, dtype=torch.int16) for n in (0, 1, 300, 9_000, 8_192 * 3, 50_001)]
    tensors += [numbers(300, 300).t(), numbers(64, 512)[:, ::2], torch.ones(5_000, dtype=torch.uint8)[3:]]
    expected, transfers = read_values([tensor.cpu() for tensor in tensors]), []
    fetch = torch.Tensor.cpu

    def counted(tensor):
        transfers.append(tensor.nbytes)
        with torch._C.DisableTorchFunction():  # with a default device, it would call ``torch.Tensor.cpu`` again
            return fetch(tensor)

    monkeypatch.setattr(tensor_values, "is_host", lambda device: False)
    monkeypatch.setattr(tensor_values, "_FETCHED_BYTES", fetched_bytes)
    monkeypatch.setattr(torch.Tensor, "cpu", counted)
    for ours, theirs in zip(read_values(tensors), expected, strict=True):
        assert ours.digest == theirs.digest
        assert np.array_equal(ours.sums, theirs.sums)
        assert ours.tail == theirs.tail
    assert {1: 8, 20_000: 4, 2**26: 1}[fetched_bytes] >= len(transfers) > 0
    tensor_values._factors_on(torch.device("cpu"))
    assert tensor_values._factors_on(torch.device("cpu")) is tensor_values._factors_on(torch.device("cpu"))
    assert read_values([]) == []


# --- tensors of every kind --------------------------------------------------------------------------------------------


def released(tensor):
    tensor.untyped_storage().resize_(0)
    return tensor


def as_dtype(name):
    return torch.arange(200, dtype=torch.uint8).view(getattr(torch, name))


def inside(mode, make):
    with mode:
        return make()


def fake(*shape):
    mode = torch._subclasses.FakeTensorMode()
    return mode.from_tensor(torch.ones(shape))


SIZES = [(7,), (150,)]
READABLE = {
    "bool": lambda s: numbers(*s) > 0,
    "complex64": lambda s: torch.complex(numbers(*s), numbers(*s)),
    "complex32": lambda s: torch.complex(numbers(*s), numbers(*s)).to(torch.complex32),
    "conjugate": lambda s: torch.complex(numbers(*s), numbers(*s)).conj(),
    "negative": lambda s: torch._neg_view(numbers(*s)),
    "expanded": lambda s: torch.tensor(0.5).expand(s),
    "strided": lambda s: numbers(*s, 2)[..., 0],
    "overlapping": lambda s: numbers(s[0] + 3).as_strided((s[0], 3), (1, 1)),
    "no elements": lambda s: torch.empty(0, *s),
    "one value": lambda s: torch.tensor(1.5),
    "made in inference mode": lambda s: inside(torch.inference_mode(), lambda: numbers(*s)),
    "copy on write": lambda s: torch._lazy_clone(numbers(*s)),
    "uint16": lambda s: numbers(*s).abs().to(torch.uint16),
    "uint64": lambda s: numbers(*s).abs().to(torch.uint64),
} | {
    name: (lambda s, name=name: as_dtype(name)[: s[0]])
    for name in [
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"),
        *("bits8", "bits16", "bits1x8", "uint1", "uint4", "uint7", "int1", "int4", "int7"),
    ]
    if hasattr(torch, name)
}
UNREADABLE = {
    "quantised": lambda s: torch.quantize_per_tensor(numbers(*s), 0.1, 0, torch.qint8),
    "quantised in four bits": lambda s: torch.quantize_per_channel(
        numbers(*s, 2), torch.ones(s[0]), torch.zeros(s[0]), 0, torch.quint4x2
    ),
    "sparse_coo": lambda s: numbers(*s).to_sparse(),
    "sparse_csr": lambda s: numbers(*s, 4).to_sparse_csr(),
    "sparse_csc": lambda s: numbers(*s, 4).to_sparse_csc(),
    "nested": lambda s: torch.nested.nested_tensor([numbers(*s), numbers(3)]),
    "jagged": lambda s: torch.nested.nested_tensor([numbers(*s), numbers(3)], layout=torch.jagged),
    "mkldnn": lambda s: numbers(*s).to_mkldnn(),
    "zero": lambda s: torch._efficientzerotensor(s),
    "meta": lambda s: torch.empty(s, device="meta"),
    "fake": lambda s: fake(*s),
    "functional": lambda s: torch._to_functional_tensor(numbers(*s)),
    "released": lambda s: released(numbers(*s)),
    "expanded without end": lambda s: torch.ones(1).expand(10**13),
    "uninitialised": lambda s: torch.nn.UninitializedParameter(),
    "masked": lambda s: torch.masked.masked_tensor(numbers(*s), numbers(*s) > 0),
}
NOT_ON_THE_TEST_DEVICE = {
    **dict.fromkeys(["quantised", "quantised in four bits", "copy on write", "mkldnn"], "it has no such tensors"),
    **dict.fromkeys(["sparse_coo", "sparse_csr", "sparse_csc"], "it has no sparse tensors"),
    "released": "its storages cannot be resized",
    "functional": "a device's tensors are read by operators, which know functional tensors",
}
RESIZES = pytest.mark.cpu_only("storages of the test device cannot be resized")


def marked(kinds):
    """Return ``kinds``; those that the test device does not have are for the CPU only."""
    why = NOT_ON_THE_TEST_DEVICE
    return [pytest.param(kind, marks=pytest.mark.cpu_only(why[kind]) if kind in why else ()) for kind in kinds]


IGNORED = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


@IGNORED
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("kind", marked(READABLE))
def test_readable_tensors_have_a_stable_digest(kind, shape):
    known = Remembered(READABLE[kind](shape))
    assert isinstance(known.first, str)
    assert known.digest() == known.first == digest(READABLE[kind](shape))


@IGNORED
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("kind", marked(UNREADABLE))
def test_unreadable_tensors_are_reported_with_an_error(kind, shape):
    found = Remembered(UNREADABLE[kind](shape)).first
    assert isinstance(found, Unread)
    assert found.name == "weight"
    assert found.error


@RESIZES
def test_tensor_released_after_a_reading_is_reported_unread():
    known = Remembered(numbers(500, 500))
    released(known.tensor)
    assert known.digest() == Unread("weight", "its memory was released")


@RESIZES
def test_reading_leaves_storages_resizable():
    """``Tensor.numpy`` would not leave them resizable."""
    for tensor in (numbers(7), numbers(500, 500), numbers(500, 500).t(), torch.ones(3, dtype=torch.complex64)):
        for _ in range(2):
            digest(tensor)
        tensor.untyped_storage().resize_(0)


# --- later turns ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 10**6))
def test_samples_lie_within_the_tensor(words):
    positions = _word_positions(np.array([words]))[0]
    assert len(positions) == SAMPLES
    assert positions.min() >= 0
    assert positions.max() < words
    assert len(set(positions)) == min(words, SAMPLES)


@pytest.mark.parametrize("width", [16, 144, 1024, 12288])
def test_samples_spread_over_the_columns_of_a_matrix(width):
    """Samples at equal distances would all lie in a few columns and never notice an edit of the others."""
    positions = torch.from_numpy(_word_positions(np.array([width * 4096]))[0])
    assert (positions.diff() > 0).all()
    assert len((positions % width).unique()) > min(SAMPLES, width) / 3


@pytest.mark.parametrize(
    "make",
    [
        lambda t: t,
        lambda t: t.t(),
        pytest.param(at_odd_address, marks=THROUGH_NUMPY),
        lambda t: t.to(torch.float8_e5m2),
    ],
)
def test_sampling_notices_a_large_unversioned_edit(make):
    known = Remembered(make(numbers(500, 500)).clone(memory_format=torch.preserve_format))
    before = known.tensor.clone()
    version = known.tensor._version
    known.tensor.data.copy_((known.tensor.float() * 2).to(known.tensor.dtype))
    assert known.tensor._version == version
    assert known.noticed()
    known.tensor.data.copy_(before)
    assert not known.noticed()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("count", [1, 5, 64, 67, 128])
def test_every_byte_of_a_small_tensor_is_sampled(dtype, count):
    for position in range(count * dtype.itemsize):
        known = Remembered(torch.zeros(count, dtype=dtype))
        known.tensor.data.view(torch.uint8)[position] ^= 1
        assert known.noticed()


def test_digest_depends_on_names_shapes_and_order_of_tensors():
    module, tensors = torch.nn.Module(), [("a", numbers(200, 9)), ("b", numbers(200, 9) + 1)]
    (_, a), (_, b) = tensors
    seen = {digest_weights(module, tensors)}
    for changed in ([("a", b), ("b", a)], tensors[:1], [("a", a), ("c", b)], [("a", a.view(9, 200)), ("b", b)]):
        seen.add(digest_weights(module, changed))
    assert len(seen) == 5
    assert digest_weights(module, tensors) in seen


def replaced(known):
    known.tensor = known.tensor.clone()
    edit_unseen(known.tensor)


def other_data(known):
    data = known.tensor.data.clone()
    edit_unseen(data)
    known.tensor.data = data


def view_of_the_same_memory(known):
    data = known.tensor.data
    edit_unseen(data)
    known.tensor = data


def transposed(known):
    known.tensor.data = known.tensor.data.t()


def counted(known):
    with torch.no_grad():
        known.tensor[3, 5] += 1


def marked(known):
    edit_unseen(known.tensor)
    torch.autograd.graph.increment_version(known.tensor)


def with_gradient(known):
    known.tensor.grad = torch.zeros_like(known.tensor)
    edit_unseen(known.tensor)


def swapped(known):
    other = known.tensor.detach().clone()
    edit_unseen(other)
    torch.utils.swap_tensors(known.tensor, other)


def edit_unseen(tensor):
    """Change an element that no sample covers, without changing the version of the tensor."""
    flat = tensor.data.view(-1)
    before = Sampler([tensor]).read([tensor])
    for position in range(100, 200):
        flat[position] += 1
        if Sampler([tensor]).read([tensor]).equal(before):
            return
        flat[position] -= 1
    raise AssertionError("every element is sampled")


@pytest.mark.parametrize(
    "edit", [replaced, other_data, view_of_the_same_memory, transposed, counted, marked, with_gradient, swapped]
)
def test_edits_that_change_tensor_metadata_are_noticed(edit):
    known = Remembered(numbers(300, 300))
    edit(known)
    assert known.noticed()


def test_unversioned_edit_of_one_unsampled_element_is_missed():
    """The limit that docs/limits.md admits. A change that removes the limit may change this test."""
    known = Remembered(numbers(300, 300))
    edit_unseen(known.tensor)
    assert not known.noticed()


@THROUGH_NUMPY
def test_new_tensor_with_reused_id_and_address_is_read_again():
    """Python and the allocator may reuse both. The address of a weakly held storage is not reused."""
    memory = torch.zeros(300 * 300)
    array = memory.numpy()
    for _ in range(1000):
        known = Remembered(torch.frombuffer(array, dtype=torch.float32))
        place = id(known.tensor), known.tensor.data_ptr(), known.tensor._version
        edit_unseen(memory)
        known.tensor = None  # nothing else is made before the next line, which may take the place
        known.tensor = torch.frombuffer(array, dtype=torch.float32)
        assert known.noticed()
        if place == (id(known.tensor), known.tensor.data_ptr(), known.tensor._version):
            return
    pytest.fail("no tensor took the place of another one")


def test_tensors_can_be_swapped_after_a_reading():
    module = torch.nn.Linear(50, 50)
    digest_weights(module, list(module.named_parameters()))
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.to(torch.bfloat16)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert module.weight.dtype == torch.bfloat16
    assert digest_weights(module, list(module.named_parameters())) == digest_weights(
        copy.deepcopy(module), list(module.named_parameters())
    )


def test_remembering_keeps_no_model_and_no_tensor_alive():
    module = torch.nn.Embedding(50, 50)
    digest_weights(module, list(module.named_parameters()), [1, 2])
    weight, gone = weakref.ref(module.weight), weakref.ref(module)
    storage = torch.multiprocessing.reductions.StorageWeakRef(module.weight.untyped_storage())
    module.weight = torch.nn.Parameter(numbers(50, 50))
    gc.collect()
    assert weight() is None
    assert storage.expired()
    del module
    gc.collect()
    assert gone() is None


def test_edits_of_tensors_made_in_inference_mode_are_noticed():
    with torch.inference_mode():
        known = Remembered(numbers(300, 300))
        known.tensor[3, 5] += 1
        assert known.noticed()
    assert known.noticed()


def test_write_in_inference_mode_to_a_normal_tensor_is_noticed():
    known = Remembered(numbers(300, 300))
    with torch.inference_mode():
        known.tensor[3, 5] += 1
    assert known.noticed()


# --- embedding rows that the prompt looks up --------------------------------------------------------------------------


@pytest.mark.parametrize("width", [3, 64, 512, 700])
@pytest.mark.parametrize("rows", [5, 1000])
def test_rows_differ_notices_an_edit_of_a_given_row(rows, width):
    table = numbers(rows, width)
    (values,) = read_values([table])
    for row in {0, 1, rows // 2, rows - 1}:
        for column in {0, width // 2, width - 1}:
            table[row, column] += 1
            assert rows_differ(table, values, [row])
            assert rows_differ(table, values, [2, row, rows + 7, -1])
            table[row, column] -= 1
    table = numbers(rows, width)
    assert not rows_differ(table, values, range(-1, rows + 1))
    assert not rows_differ(table, values, [])
    assert not rows_differ(table[:, :0], read_values([table[:, :0]])[0], [1])


def test_embedding_edit_is_noticed_only_if_a_token_looks_the_row_up():
    embedding = torch.nn.Embedding(2000, 128)
    tensors = list(embedding.named_parameters())
    far = BLOCK_BYTES // (128 * 4)

    def now(tokens):
        return digest_weights(embedding, tensors, tokens)

    first = now([3, 700])
    row = embedding.weight.data[700]
    row[5] += 1
    assert now([3, 700 + 2 * far]) == first
    second = now([3, 700])
    assert second != first
    row[5] += 1
    assert now([700]) not in (first, second)


# --- optimizers -------------------------------------------------------------------------------------------------------


FUSED = [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad]


class Own(torch.optim.Optimizer):
    """Writes through ``.data``, to the model weights that its master weights stand for, not to its own parameters."""

    def __init__(self, model_weights, lr):
        self.model_weights = list(model_weights)
        super().__init__([torch.nn.Parameter(weight.detach().clone()) for weight in self.model_weights], {"lr": lr})

    def step(self, closure=None):
        for master, weight in zip(self.param_groups[0]["params"], self.model_weights, strict=True):
            edit_unseen(weight)
            master.data.copy_(weight.data)


def make_fused(kind):
    return lambda parameters: kind(parameters, lr=0.1, fused=True)


@pytest.mark.parametrize(
    "make", [*map(make_fused, FUSED), lambda parameters: Own(parameters, 0.1)], ids=[k.__name__ for k in [*FUSED, Own]]
)
def test_optimizer_step_without_a_version_is_noticed(make):
    known = Remembered(torch.nn.Parameter(numbers(300, 300)))
    optimizer = make([known.tensor])
    known.tensor.grad = torch.zeros(300, 300)
    known.tensor.grad[3, 5] = 1
    optimizer.step()
    known.tensor.grad = None
    del optimizer
    assert known.noticed()


@pytest.mark.cpu_only("torch.compile does not know the streams of the test device")
def test_step_of_a_copied_optimizer_after_torch_compile_is_noticed():
    known = Remembered(torch.nn.Parameter(numbers(300, 300)))
    optimizer = copy.deepcopy(torch.optim.SGD([known.tensor], lr=0.1, fused=True))
    optimizer.param_groups[0]["params"][:] = [known.tensor]
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
    known.tensor.grad = torch.zeros(300, 300)
    known.tensor.grad[3, 5] = 1
    optimizer.step()
    known.tensor.grad = None
    assert known.noticed()


def test_optimizer_step_that_fails_is_noticed():
    class Failing(torch.optim.Optimizer):  # does not inherit from Own, whose step is watched separately
        def step(self, closure=None):
            edit_unseen(self.param_groups[0]["params"][0])
            raise MemoryError

    known = Remembered(torch.nn.Parameter(numbers(300, 300)))
    with pytest.raises(MemoryError):
        Failing([known.tensor], {}).step()
    assert known.noticed()


def test_edit_after_a_reading_inside_a_step_is_noticed():
    known = Remembered(torch.nn.Parameter(numbers(300, 300)))

    class Slow(torch.optim.Optimizer):
        def step(self, closure=None):
            assert not known.noticed()
            edit_unseen(known.tensor)

    Slow([known.tensor], {}).step()
    assert known.noticed()


def test_step_on_another_thread_during_a_reading_is_noticed(monkeypatch):
    """The step ends after the tensors were read and before the whole reading ends."""
    known = Remembered(torch.nn.Parameter(numbers(300, 300)))
    other = torch.nn.Parameter(numbers(300, 300))
    optimizer = Own([known.tensor], 0.1)
    read = weights.read_values

    def read_and_step(tensors):
        values = read(tensors)
        step = threading.Thread(target=optimizer.step)
        step.start()
        step.join()
        return values

    monkeypatch.setattr(weights, "read_values", read_and_step)
    pair = [("weight", known.tensor), ("later", other)]
    before = digest_weights(known.module, pair)
    monkeypatch.undo()
    assert digest_weights(known.module, pair) == digest_weights(torch.nn.Module(), pair) != before


def test_optimizers_are_watched_from_first_reading_to_forget_models():
    forget_models()
    hooks = torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks
    before = [len(some) for some in hooks]
    known = Remembered(torch.nn.Parameter(numbers(300, 300)))
    known.digest()
    assert [len(some) for some in hooks] == [count + 1 for count in before]
    forget_models()
    forget_models()
    assert [len(some) for some in hooks] == before
    edit_unseen(known.tensor)
    assert known.noticed()


def test_optimizer_steps_are_counted_across_threads():
    steps = OptimizerSteps()
    steps.watch()
    try:
        before = steps.count
        optimizers = [torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]) for _ in range(4)]
        threads = [threading.Thread(target=lambda o=o: [o.step() for _ in range(50)]) for o in optimizers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert steps.count == before + 2 * 4 * 50
    finally:
        steps.unwatch()
    torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]).step()
    assert steps.count == before + 2 * 4 * 50
    steps.watch()
    assert steps.count != before + 2 * 4 * 50
    steps.unwatch()
