"""The interpreter's checkers: each is shown by a planted bug, and to be silent on the correct twin of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from pykernels.testing import interpreter

if torch.cuda.is_available() and not interpreter.is_active():
    pytest.skip("the kernels are compiled for the GPU in this process", allow_module_level=True)
interpreter.install()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402


@triton.jit
def copy_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n), mask=i < n)


@triton.jit
def unmasked_load_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i), mask=i < n)


@triton.jit
def unmasked_store_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n))


@triton.jit
def rows_kernel(x_ptr, out_ptr, rows, columns, stride, COLUMNS: tl.constexpr, MASKED: tl.constexpr):
    r = tl.program_id(0)
    c = tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + r * stride + c, mask=(c < columns) | (not MASKED))
    tl.store(out_ptr + r * columns + c, x, mask=c < columns)


def test_an_unmasked_tail_is_out_of_bounds():
    x, out = torch.randn(100), torch.empty(100)
    with pytest.raises(interpreter.MemoryCheckError) as error:
        unmasked_load_kernel[(2,)](x, out, 100, BLOCK=64)
    message = str(error.value)
    for part in (
        "load in unmasked_load_kernel",
        "x_ptr (float32, shape [100]",
        "program (1, 0, 0)",
        "28 of 64 lanes",
        "lane 36 at element 100",
        "test_interpreter_checks.py:",
    ):
        assert part in message, part
    with pytest.raises(interpreter.MemoryCheckError, match=r"store in unmasked_store_kernel .* out_ptr"):
        unmasked_store_kernel[(2,)](x, out, 100, BLOCK=64)
    copy_kernel[(2,)](x, out, 100, BLOCK=64)
    assert torch.equal(x, out)


@pytest.mark.parametrize("make", [lambda f: f[:, :12], lambda f: f[:, 12:], lambda f: f[1:, 4:16]])
def test_gaps_between_the_rows_of_a_view_do_not_belong_to_it(make):
    """Within the storage, and even within the view's first and last byte, but not in the view."""
    x = make(torch.randn(5, 24))
    out = torch.empty(x.shape)
    rows, columns = x.shape
    rows_kernel[(rows,)](x, out, rows, columns, x.stride(0), COLUMNS=16, MASKED=True)
    assert torch.equal(x, out)
    with pytest.raises(interpreter.MemoryCheckError, match=r"x_ptr .* lane 12 at element 12"):
        rows_kernel[(rows,)](x, out, rows, columns, x.stride(0), COLUMNS=16, MASKED=False)


@triton.jit
def pair_kernel(pair, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(pair[0] + i, mask=i < n)
    y = tl.load(pair[1] + i, mask=i < n)
    tl.store(out_ptr + i, x + y, mask=i < n)


def test_the_neighbour_is_not_mine():
    """Each access is checked against the tensor its pointer came from, not against all arguments."""
    fused = torch.zeros(96)
    x, y, out = fused[:32], fused[32:64], fused[64:]
    pair_kernel[(1,)]((x, y), out, 32, BLOCK=64)
    with pytest.raises(interpreter.MemoryCheckError, match=r"pair\[0\] \(float32, shape \[32\]"):
        pair_kernel[(1,)]((x, y), out, 40, BLOCK=64)


@triton.jit
def chosen_pointer_kernel(x_ptr, y_ptr, out_ptr, offset, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    pointers = tl.where(i % 2 == 0, x_ptr + i, y_ptr + i) + offset
    tl.store(out_ptr + i, tl.load(pointers))


def test_pointers_of_mixed_origin_must_hit_some_argument():
    x, y, out = torch.zeros(16), torch.ones(16), torch.empty(16)
    chosen_pointer_kernel[(1,)](x, y, out, 0, BLOCK=16)
    assert torch.equal(out, torch.arange(16) % 2.0)
    with pytest.raises(interpreter.MemoryCheckError, match="comes from no argument"):
        chosen_pointer_kernel[(1,)](x, y, out, 10**6, BLOCK=16)


@triton.jit
def wide_kernel(x_ptr, out_ptr, offset, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    wide = (x_ptr + offset).to(tl.pointer_type(tl.int64), bitcast=True)
    tl.store(out_ptr + i, tl.load(wide + i))


def test_misaligned_access():
    x, out = torch.arange(32, dtype=torch.int32), torch.empty(8, dtype=torch.int64)
    wide_kernel[(1,)](x, out, 2, BLOCK=8)
    assert torch.equal(out, x[2:18].view(torch.int64))
    with pytest.raises(interpreter.MemoryCheckError, match=r"is not aligned: x_ptr"):
        wide_kernel[(1,)](x, out, 1, BLOCK=8)
    with pytest.raises(interpreter.MemoryCheckError, match=r"out of bounds: x_ptr .* 1 of 8 lanes"):
        wide_kernel[(1,)](x[:16], out, 2, BLOCK=8)


@triton.jit
def descriptor_kernel(x_desc, x_ptr, n, stride, ON_DEVICE: tl.constexpr, BLOCK: tl.constexpr):
    if ON_DEVICE:
        x_desc = tl.make_tensor_descriptor(x_ptr, [n, n], [stride, 1], [BLOCK, BLOCK])
    x = x_desc.load([0, BLOCK])
    x_desc.store([0, BLOCK], x + 1)


@pytest.mark.parametrize("on_device", [True, False])
def test_tensor_descriptors_are_checked_too(on_device):
    from triton.tools.tensor_descriptor import TensorDescriptor

    x = torch.zeros(24, 24)
    descriptor = TensorDescriptor(x, [24, 24], [24, 1], [16, 16])
    descriptor_kernel[(1,)](descriptor, x, 24, 24, ON_DEVICE=on_device, BLOCK=16)
    assert x[:16, 16:].eq(1).all() and x.sum() == 16 * 8
    small = x[:8]
    wrong = TensorDescriptor(small, [24, 24], [24, 1], [16, 16])
    with pytest.raises(interpreter.MemoryCheckError, match=r"shape \[8, 24\]"):
        descriptor_kernel[(1,)](wrong, small, 24, 24, ON_DEVICE=on_device, BLOCK=16)


@triton.jit
def described_kernel(x_ptr, base, n, stride, step, SIDE: tl.constexpr):
    desc = tl.make_tensor_descriptor(x_ptr + base, [n, n], [stride, 1], [SIDE, 16])
    desc.store([tl.program_id(0) * step, 0], tl.zeros((SIDE, 16), tl.float32))


@pytest.mark.parametrize(
    "options, why",
    [
        ({"base": 2}, "base address"),
        ({"stride": 33}, r"strides \[33\]"),
        ({"stride": 0}, r"strides \[0\]"),
        ({"n": 0}, r"sizes \[0, 0\]"),
        ({"SIDE": 512}, r"block \[512, 16\] has a side of more than 256"),
    ],
)
def test_descriptors_the_hardware_would_refuse(options, why):
    given = {"base": 0, "n": 16, "stride": 32, "step": 0, "SIDE": 16}
    described_kernel[(1,)](torch.empty(32, 32), **given)
    with pytest.raises(interpreter.LaunchError, match=f"tensor descriptor in described_kernel: .*{why}"):
        described_kernel[(1,)](torch.empty(32, 32), **{**given, **options})


def test_programs_that_store_one_tile_by_descriptors_race():
    x = torch.empty(32, 32)
    described_kernel[(2,)](x, 0, 32, 32, 16, SIDE=16)
    with pytest.raises(interpreter.RaceError, match=r"store by program \(1, 0, 0\) to x_ptr"):
        described_kernel[(2,)](x, 0, 32, 32, 8, SIDE=16)


class Pair(NamedTuple):
    source: Any
    target: Any


@triton.jit
def member_kernel(pair, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(pair.target + i, tl.load(pair.source + i), mask=i < n)


def test_members_of_tuples_are_checked_under_their_names():
    x, y = torch.ones(16), torch.zeros(16)
    member_kernel[(1,)](Pair(x, y), 16, BLOCK=16)
    assert torch.equal(x, y)
    with pytest.raises(interpreter.MemoryCheckError, match=r"out of bounds: pair\.source .float32, shape \[8\]"):
        member_kernel[(1,)](Pair(x[:8], y), 16, BLOCK=16)


def test_an_empty_tensor_has_no_bytes():
    x, out = torch.empty(0), torch.zeros(4)
    with pytest.raises(interpreter.MemoryCheckError, match=r"shape \[0\]"):
        copy_kernel[(1,)](x, out, 1, BLOCK=4)
    copy_kernel[(1,)](x, x, 0, BLOCK=4)


@triton.jit
def offset_kernel(x_ptr, row, stride, WIDE: tl.constexpr):
    row = row.to(tl.int64) if WIDE else row
    tl.store(x_ptr + row * stride, 1.0)


def test_int32_offsets_that_overflow():
    """Found by arithmetic alone: no tensor of that size is needed."""
    x = torch.zeros(4)
    with pytest.raises(interpreter.IntegerOverflowError, match=r"int32 overflow in offset_kernel: mul .*int64"):
        offset_kernel[(1,)](x, 65537, 65536, WIDE=False)
    with pytest.raises(interpreter.MemoryCheckError, match="element 4295032832"):
        offset_kernel[(1,)](x, 65537, 65536, WIDE=True)


@triton.jit
def tiles_kernel(x_ptr, out_ptr, n, STEP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n), mask=i < n)


@triton.jit
def neighbour_kernel(x_ptr, n, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i + SHIFT, mask=(i + SHIFT >= 0) & (i + SHIFT < n))
    tl.store(x_ptr + i, x, mask=i < n)


@triton.jit
def scatter_kernel(index_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + tl.load(index_ptr + i), i)


def test_overlapping_tiles_race():
    x, out = torch.randn(100), torch.empty(100)
    tiles_kernel[(2,)](x, out, 100, STEP=64, BLOCK=64)
    with pytest.raises(interpreter.RaceError) as error:
        tiles_kernel[(2,)](x, out, 100, STEP=60, BLOCK=64)
    for part in (
        "race in tiles_kernel",
        "store by program (1, 0, 0) to out_ptr, element 60",
        "which program (0, 0, 0) has stored",
        "4 of 64 lanes, first lane 0",
        "test_interpreter_checks.py:",
    ):
        assert part in str(error.value), part


@pytest.mark.parametrize("shift, deed", [(-1, "load .* has stored"), (1, "store .* has loaded")])
def test_one_program_must_not_read_what_another_writes(shift, deed):
    """Shifting in place: one direction reads a neighbour's result, the other overwrites what a neighbour has read."""
    with pytest.raises(interpreter.RaceError, match=deed):
        neighbour_kernel[(4,)](torch.randn(64), 64, SHIFT=shift, BLOCK=16)
    neighbour_kernel[(4,)](torch.randn(64), 64, SHIFT=0, BLOCK=16)
    neighbour_kernel[(1,)](torch.randn(64), 64, SHIFT=1, BLOCK=64)


def test_reading_the_same_data_is_no_race():
    weights, out = torch.randn(16), torch.empty(4, 16)
    rows_kernel[(4,)](weights, out, 4, 16, 0, COLUMNS=16, MASKED=True)
    assert torch.equal(out, weights.expand(4, 16))


def test_two_lanes_of_one_store():
    out = torch.empty(8, dtype=torch.int32)
    scatter_kernel[(1,)](torch.tensor([3, 1, 0, 2]), out, BLOCK=4)
    with pytest.raises(interpreter.RaceError, match="element 3: lanes 0 and 2 of one store"):
        scatter_kernel[(1,)](torch.tensor([3, 1, 3, 2]), out, BLOCK=4)


@triton.jit
def split_sum_kernel(
    x_ptr, partial_ptr, counter_ptr, out_ptr, HANDOFF: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr
):
    pid = tl.program_id(0)
    tl.store(partial_ptr + pid, tl.sum(tl.load(x_ptr + pid * BLOCK + tl.arange(0, BLOCK)), 0))
    if HANDOFF == "atomic":
        arrived = tl.atomic_add(counter_ptr, 1)
    elif HANDOFF == "relaxed":
        arrived = tl.atomic_add(counter_ptr, 1, sem="relaxed")
    else:
        arrived = tl.load(counter_ptr)
        tl.store(counter_ptr, arrived + 1)
    if arrived == PROGRAMS - 1:
        tl.store(out_ptr, tl.sum(tl.load(partial_ptr + tl.arange(0, PROGRAMS)), 0))


@pytest.mark.parametrize("handoff", ["atomic", "relaxed", "plain"])
def test_handing_over_through_an_atomic(handoff):
    """Partial results may be read after an acquiring atomic; a relaxed atomic or a plain counter orders nothing."""
    x, partial, counter, out = torch.randn(64), torch.empty(4), torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    arguments = (x, partial, counter, out)
    if handoff == "atomic":
        split_sum_kernel[(4,)](*arguments, HANDOFF=handoff, PROGRAMS=4, BLOCK=16)
        torch.testing.assert_close(out[0], x.sum())
    else:
        target = "partial_ptr" if handoff == "relaxed" else "counter_ptr"
        with pytest.raises(interpreter.RaceError, match=target):
            split_sum_kernel[(4,)](*arguments, HANDOFF=handoff, PROGRAMS=4, BLOCK=16)


@triton.jit
def count_kernel(out_ptr, PLAIN: tl.constexpr):
    tl.atomic_add(out_ptr, 1)
    if PLAIN:
        tl.store(out_ptr + 1, tl.load(out_ptr))


def test_atomics_race_only_with_plain_accesses():
    out = torch.zeros(2, dtype=torch.int32)
    count_kernel[(5,)](out, PLAIN=False)
    assert out[0] == 5
    with pytest.raises(interpreter.RaceError):
        count_kernel[(5,)](out, PLAIN=True)


@triton.jit
def order_kernel(counter_ptr, out_ptr, WIDTH: tl.constexpr):
    ticket = tl.atomic_add(counter_ptr, 1)
    tl.store(out_ptr + ticket, tl.program_id(0) * WIDTH + tl.program_id(1))


def run_order(**options) -> list[int]:
    counter, out = torch.zeros(1, dtype=torch.int32), torch.full((12,), -1, dtype=torch.int32)
    with interpreter.checks(**options):
        order_kernel[(3, 4)](counter, out, WIDTH=4)
    return out.tolist()


def test_order_seed_shuffles_the_programs_reproducibly():
    assert run_order() == list(range(12))
    shuffled = run_order(order_seed=1)
    assert sorted(shuffled) == list(range(12)) and shuffled != list(range(12))
    assert run_order(order_seed=1) == shuffled != run_order(order_seed=2)


def test_a_race_is_found_in_any_order():
    for seed in range(4):
        with interpreter.checks(order_seed=seed), pytest.raises(interpreter.RaceError):
            tiles_kernel[(3,)](torch.randn(64), torch.empty(64), 64, STEP=15, BLOCK=16)


def test_checks_are_switched_off_and_restored():
    x, out = torch.randn(100), torch.empty(100)
    with interpreter.checks(races=False):
        tiles_kernel[(2,)](x, out, 100, STEP=60, BLOCK=64)
        with interpreter.checks(memory=False, races=False):
            unmasked_load_kernel[(1,)](x[:60], out, 60, BLOCK=64)
        with pytest.raises(interpreter.MemoryCheckError):
            unmasked_load_kernel[(1,)](x[:60], out, 60, BLOCK=64)
    with pytest.raises(interpreter.RaceError):
        tiles_kernel[(2,)](x, out, 100, STEP=60, BLOCK=64)


def test_a_grid_cuda_would_refuse():
    out = torch.zeros(1)
    with pytest.raises(interpreter.LaunchError, match=r"offset_kernel has 65536 programs along axis 1"):
        offset_kernel[(1, 65536)](out, 0, 0, WIDE=True)


@triton.jit
def device_function(x_ptr, i):
    return tl.load(x_ptr + i)


@triton.jit
def calling_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, device_function(x_ptr, i), mask=i < n)


def test_an_error_inside_a_device_function_leaves_the_language_intact():
    unpatched = tl.load
    with pytest.raises(interpreter.MemoryCheckError, match="x_ptr"):
        calling_kernel[(1,)](torch.zeros(6), torch.zeros(6), 6, BLOCK=8)
    assert tl.load is unpatched
    out = torch.zeros(8)
    calling_kernel[(1,)](torch.ones(8), out, 8, BLOCK=8)
    assert tl.load is unpatched and out.eq(1).all()
