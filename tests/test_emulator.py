"""The emulator finds every planted bug, in every order of execution, says where, and leaves correct kernels alone.

The bugs are the cases of csrc/emulator/selftest_*.cu: each kernel computes out[i] = in[n - 1 - i] + 1, and is right but
for what its name says.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pykernels._cuda._extension import Extension

ROOT = Path(__file__).parent.parent
emulator = Extension("_emulator_ext")
pytestmark = pytest.mark.skipif(not emulator.available, reason=str(emulator.reason))

N = 128
ORDERS = {"forward": 0, "reversed": 1, "random": 7}

# case -> (what the message says, text of the source line it names or None where no single line is to blame)
BUGS: dict[str, tuple[str, str | None]] = {
    # barriers, shared memory, warps
    "missing_barrier": (r"data race on static shared memory .* no barrier between", "s["),
    "reuse_without_barrier": (r"data race on static shared memory .* no barrier between", "s["),
    "last_element_unwritten": (r"read of uninitialised static shared memory \+ 508", "s[n - 1 - i]"),
    "accumulation_without_atomics": (r"data race on static shared memory \+ 0", "sum[0]"),
    "atomic_meets_plain_read": (r"data race on static shared memory .*atomic by thread", "count"),
    "barrier_in_branch": (r"threads 64-127 have exited; threads 0-63 wait at __syncthreads", "__syncthreads"),
    "different_barriers_meet": (r"divergent __syncthreads: this thread is at .* while \d+ others", "__syncthreads"),
    "exit_before_barrier": (r"threads 100-127 have exited; threads 0-99 wait at __syncthreads", "__syncthreads"),
    "named_barrier_without_its_warp": (r"deadlock: .*threads 0-63 wait at a named barrier", "named_barrier_sync"),
    "named_barrier_not_handed_back": (r"named barrier 1 is used again|data race on static shared", None),
    "missing_syncwarp": (r"data race on static shared memory", "s[i"),
    "shuffle_taken_for_syncwarp": (r"data race on static shared memory", "s[i"),
    "divergent_shuffle": (r"divergent warp: this lane is at .* while lanes [0-9a-f]{8} are at", "__shfl_xor_sync"),
    "shuffle_outside_its_mask": (r"lane \d+ is not in its own mask 0000ffff", "__shfl_sync"),
    "ldmatrix_before_syncwarp": (r"(data race on|read of uninitialised) static shared memory", "ldmatrix_x4"),
    "mma_by_half_a_warp": (r"this operation needs all 32 lanes, got 0000ffff", "mma_m16n8k16"),
    "pointer_to_another_threads_local": (r"out of bounds: 4-byte read of global address", "*p[i ^ 1]"),
    "too_much_static_shared": (r"over 48 KiB of static shared memory", "PK_SHARED"),
    # asynchronous copies
    "copy_not_waited_for": (r"read of static shared .* while the async copy issued at .* in flight", "s[n - 1 - i]"),
    "copy_waited_for_one_group_short": (r"while the async copy issued at .* is in flight", "s[n - 1 - i]"),
    "copy_without_barrier": (r"data race on static shared memory", None),
    "copy_never_waited_for": (r"exits with cp.async never waited for", "cp_async16"),
    "write_into_copy_in_flight": (r"write of static shared .* while the async copy issued at", "s[4 * i] ="),
    "prefetch_into_stage_being_read": (r"data race on static shared memory", None),
    "misaligned_copy": (r"cp.async operand is not 16-byte aligned", "cp_async16"),
    # bounds, alignment, arithmetic
    "dynamic_shared_overrun": (r"out of bounds: 4-byte write of dynamic shared memory \+ 512 \(of 512 bytes\)", "s[n]"),
    "static_shared_overrun": (r"out of bounds: 4-byte write of static shared memory \+ 512 \(of 512 bytes\)", "p[n]"),
    "static_array_index": (r"array index out of bounds", "s[i == 5"),
    "global_read_past_the_end": (r"out of bounds: 4-byte read of 0 bytes behind the end of tensor 0", "in[i + 1]"),
    "global_write_before_the_start": (r"out of bounds: 4-byte write of 4 bytes before tensor 1", "out[-1]"),
    "misaligned_vector_load": (r"misaligned", "float4"),
    "register_array_overrun": (r"array index out of bounds", "r[k]"),
    "index_overflow": (r"signed integer overflow", "20'000'000"),
    "shift_too_far": (r"shift out of bounds", "1 <<"),
    "division_by_zero": (r"division by zero", "n / (n - kThreads)"),
    # threads that never get further
    "spin_on_a_flag_nobody_sets": (r"livelock: \d+ turns of a spin loop", None),
    "spin_on_plain_loads": (r"livelock: \d+ reads while no thread wrote", None),
    "stack_overflow": (r"stack overflow: over \d+ KiB of local arrays", None),
    # between blocks
    "block_barrier_taken_for_grid_barrier": (r"data race on tensor 1 .* of block \d at", None),
    "grid_sync_in_plain_launch": (r"grid_sync in a launch that is not cooperative", "grid_sync"),
    "cooperative_grid_too_large": (r"cooperative grid of 100000 blocks cannot be resident at once", None),
    "two_blocks_write_one_element": (r"data race on tensor 1 .* write by thread 0 of block", "out[i"),
    "last_block_without_release_fence": (r"data race on tensor 1 .* no barrier between", None),
    "last_block_without_acquire_fence": (r"data race on tensor 1 .* but no __threadfence follows that atomic", None),
    "last_block_with_block_fences": (r"data race on tensor 1", None),
    "last_block_with_plain_counter": (r"data race on tensor 1 \+ 508 bytes", "(*counter)++"),
    "flag_chain_without_release": (r"data race on tensor 1", None),
    "flag_chain_without_acquire": (r"data race on tensor 1 .* but no __threadfence follows that atomic", None),
    "launch_without_a_device": (r"launch without a device: no argument is a pointer", None),
    "empty_grid": (r"grid of 32 x 0 x 1", None),
    "no_room_before_dynamic_shared": (r"static and dynamic shared memory exceed 227 KiB", "PK_SHARED"),
    # TMA, mbarriers, wgmma
    "tensor_map_of_repeated_rows": (r"tensor map: stride 0 bytes of dimension 1", None),
    "tensor_map_of_odd_rows": (r"tensor map: stride 120 bytes of dimension 1", None),
    "no_wait_for_empty_stage": (r"too many arrivals at the mbarrier|in flight|data race", None),
    "no_wait_for_full_stage": (r"read of uninitialised dynamic shared memory|in flight", None),
    "wrong_parity": (r"read of uninitialised dynamic shared memory|in flight|too many arrivals", None),
    "expect_too_few_bytes": (r"while the async copy issued at .* is in flight", None),
    "expect_too_many_bytes": (r"deadlock: .*wait at mbar_wait", "mbar_wait"),
    "arrival_count_too_large": (r"deadlock: .*wait at mbar_wait", "mbar_wait"),
    "no_barrier_after_mbarrier_init": (r"data race on static shared|uninitialised static shared", "mbar_wait"),
    "no_fence_after_mbarrier_init": (r"no mbar_fence_init between", "tma_load_2d"),
    "tma_tile_misaligned": (r"shared address 0x\w+ of a .* TMA box is not 1024-byte aligned", "tma_load_2d"),
    "no_wgmma_wait": (r"exits with a wgmma never waited for", None),
    "no_wgmma_fence": (r"no wgmma_fence before the first wgmma", None),
    "stage_released_before_wgmma_wait": (r"data race on dynamic shared memory", None),
    "accumulator_used_before_wgmma_wait": (r"accumulator touched before wgmma_wait", None),
    "no_proxy_fence_before_wgmma": (r"no fence_proxy_async between the write of .* and its use", "*p"),
    "no_proxy_fence_before_tma_store": (r"no fence_proxy_async between the write of .* and its use", "row[i]"),
    "tma_store_never_waited_for": (r"exits with a TMA store never waited for", "tma_store_4d"),
    "tma_store_source_overwritten": (r"no fence_proxy_async between|data race", None),
    # clusters and distributed shared memory
    "no_cluster_barrier": (r"rank \d reached at .* may not have started, no cluster barrier before", "ld_cluster"),
    "cluster_barrier_before_the_write": (r"data race|uninitialised .* of rank \d", None),
    "block_barrier_taken_for_cluster_barrier": (r"data race|uninitialised .* of rank \d", None),
    "relaxed_cluster_arrive": (r"data race on static shared .* of rank \d: read by thread \d+ of block \d", "s[tid]"),
    "no_cluster_wait": (r"may not have started, no cluster barrier before", "ld_cluster"),
    "no_cluster_barrier_at_the_end": (r"that block has exited|block ends while thread \d+ of block", "ld_cluster"),
    "rank_outside_the_cluster": (r"rank 4 in a cluster of 4 blocks", "map_cluster"),
    "cluster_arrive_twice": (r"arrives at the cluster's barrier again without cluster_wait", "cluster_sync"),
    "cluster_wait_without_arrive": (r"waits at the cluster's barrier without cluster_arrive", "cluster_wait"),
    "misaligned_remote_load": (r"shared memory address 0x\w+ is not 4-byte aligned", "ld_cluster"),
    "remote_shared_overrun": (r"shared memory address 0x\w+ \(\+4\) of rank \d is out of bounds", "ld_cluster"),
    "all_blocks_write_to_one": (r"data race on static shared memory .*write by thread \d+ of block", "st_cluster"),
    "cluster_does_not_divide_the_grid": (r"clusters of 2 blocks in a grid of 9", None),
    "cluster_too_large": (r"clusters of 9 blocks in a grid of 9", None),
    "st_async_without_expect_tx": (r"read of uninitialised static shared|in flight|deadlock", None),
    "st_async_expected_more": (r"deadlock: .*wait at mbar_wait", "mbar_wait_cluster"),
    "st_async_not_waited_for": (r"read of uninitialised static shared|in flight", None),
    "st_async_waited_for_in_block_scope": (r"data race on static shared memory .* write by thread \d+ of block", None),
    "st_async_through_one_buffer": (r"in flight|data race|too many arrivals|deadlock", None),
    "no_cluster_barrier_after_mbarrier_init": (r"may not have started, no cluster barrier before", "st_async"),
    "no_fence_after_init_before_st_async": (r"no mbar_fence_init between", "st_async"),
    "st_async_with_another_blocks_mbarrier": (r"st.async with an mbarrier of another block", "st_async"),
    "last_st_async_not_waited_for": (r"block ends with a TMA copy or st.async in flight|has exited", "st_async"),
    "misaligned_st_async": (r"st.async of 4 bytes to shared address", "st_async"),
    "remote_arrive_waited_for_in_block_scope": (r"data race on static shared memory .* no barrier between", "s[tid]"),
    "remote_arrive_missing": (r"deadlock: .*wait at mbar_wait", "mbar_wait_cluster"),
    "remote_arrive_at_no_mbarrier": (r"uninitialised static shared|was never initialised", None),
    "remote_arrive_when_the_peer_may_be_gone": (r"block has exited|block ends while thread", "mbar_arrive_cluster"),
    "multicast_without_expect_tx_in_one_block": (r"read of uninitialised dynamic shared|in flight", None),
    "multicast_before_the_others_are_ready": (r"may not have started|data race", None),
    "multicast_into_a_buffer_still_read": (r"in flight|data race on dynamic shared memory", None),
    "multicast_free_in_block_scope": (r"data race on dynamic shared memory", None),
    "multicast_to_a_rank_outside": (r"multicast to the ranks 0x1f in a cluster of 4 blocks", "tma_multicast_2d"),
}  # fmt: skip
UNDEFINED_RESULT = "shuffle_from_absent_lane"  # no error: the lanes that read it get NaN
NO_THREAD = (
    "cooperative_grid_too_large",
    "cluster_does_not_divide_the_grid",
    "cluster_too_large",
    "launch_without_a_device",
    "empty_grid",
    "tensor_map_of_repeated_rows",
    "tensor_map_of_odd_rows",
)  # refused before a thread runs


def cases() -> list[str]:
    return list(emulator.module.selftest_names()) if emulator.module else []


@pytest.fixture(autouse=True)
def _defaults() -> Iterator[None]:
    yield
    if emulator.module:
        emulator.module.set_order(0)
        emulator.module.set_checks(True, True)
        emulator.module.set_resident_blocks(132)


@pytest.fixture(params=ORDERS.values(), ids=ORDERS.keys())
def order(request: pytest.FixtureRequest) -> int:
    emulator.module.set_order(request.param)
    return request.param


def run(case: str) -> torch.Tensor:
    x, y = torch.arange(N, dtype=torch.float32), torch.zeros(N)
    m = emulator.module
    m.set_buffers([(t.data_ptr(), 4, t.shape, t.stride()) for t in (x, y)])
    m.selftest(case, x.data_ptr(), y.data_ptr(), N, 0)
    return y


RIGHT = torch.arange(N, dtype=torch.float32).flip(0) + 1


def message_of(case: str) -> str:
    with pytest.raises(RuntimeError) as e:
        run(case)
    return str(e.value)


def test_every_case_is_judged() -> None:
    correct = {c for c in cases() if c.startswith("correct_")}
    assert set(cases()) == correct | set(BUGS) | {UNDEFINED_RESULT}
    assert len(correct) >= 10


@pytest.mark.parametrize("case", [c for c in cases() if c.startswith("correct_")])
def test_correct_kernels_pass(case: str, order: int) -> None:
    torch.testing.assert_close(run(case), RIGHT, atol=0, rtol=0)


@pytest.mark.parametrize("case", BUGS)
def test_planted_bug_is_found(case: str, order: int) -> None:
    message = message_of(case)
    pattern, line = BUGS[case]
    assert re.search(pattern, message), message
    if case not in NO_THREAD and "deadlock" not in message:
        assert re.match(r"block\(\d+,\d+,\d+\) thread\(\d+,\d+,\d+\): ", message), message
    if line is not None:
        named = re.findall(r"(csrc/\w+/\w+\.cu):(\d+)", message)
        assert named, message
        texts = [(ROOT / file).read_text().splitlines()[int(number) - 1] for file, number in named]
        assert any(line in text for text in texts), f"{message}\nnames {texts}"
    torch.testing.assert_close(run("correct_barrier"), RIGHT)  # a failed launch leaves nothing behind


def test_value_of_an_absent_lane_is_poison(order: int) -> None:
    y = run(UNDEFINED_RESULT)
    wrong = torch.arange(N) % 32 == 3
    assert y[wrong].isnan().all()
    torch.testing.assert_close(y[~wrong], RIGHT[~wrong])


def test_orders_differ() -> None:
    first = {}
    for name, code in ORDERS.items():
        emulator.module.set_order(code)
        first[name] = message_of("missing_barrier")
    assert len(set(first.values())) == 3, first


def test_checks_can_be_switched_off() -> None:
    emulator.module.set_checks(races=False)
    torch.testing.assert_close(run("reuse_without_barrier"), RIGHT)  # right by luck of the order
    assert "uninitialised" in message_of("last_element_unwritten")
    emulator.module.set_checks(races=False, uninitialised=False)
    assert run("last_element_unwritten")[0].isnan()  # what was read is poison
    assert "out of bounds" in message_of("global_read_past_the_end")


def test_resident_blocks_limit() -> None:
    emulator.module.set_resident_blocks(3)
    assert "cooperative grid of 4 blocks" in message_of("correct_grid_sync")
    emulator.module.set_resident_blocks(4)
    torch.testing.assert_close(run("correct_grid_sync"), RIGHT)


# ---- exact bounds through Extension.call


def test_extent_is_the_view_not_its_storage() -> None:
    storage = torch.arange(20.0)
    x, y = storage[4:12], torch.zeros(8)
    emulator.call("check_vec_copy", x, y, 8, x.dtype)
    torch.testing.assert_close(y, x)
    with pytest.raises(RuntimeError, match="read of 0 bytes behind the end of tensor 0"):
        emulator.call("check_vec_copy", x, torch.zeros(9), 9, x.dtype)
    with pytest.raises(RuntimeError, match="write of 0 bytes behind the end of tensor 1"):
        emulator.call("check_vec_copy", storage[4:13], y, 9, x.dtype)


def test_gaps_between_rows_are_outside() -> None:
    storage = torch.randn(3, 40)
    dense, padded, out = storage[:, :32].contiguous(), storage[:, :32], torch.zeros(3, 3)
    emulator.call("check_block_reduce", dense, out, 3, 32)
    torch.testing.assert_close(out[1], dense.amax(1))
    with pytest.raises(RuntimeError, match=r"read of tensor 0 \+ 128 bytes \(between its rows\)"):
        emulator.call("check_block_reduce", padded, out, 3, 32)


@pytest.mark.parametrize(
    "view", [lambda t: t.t(), lambda t: t[:, ::2], lambda t: t[1:3].expand(2, 2, 6), lambda t: t[:0]]
)
def test_extents_of_strided_views(view: object) -> None:
    """Every element of a view is inside its extent, and nothing else of its storage is."""
    storage = torch.zeros(4, 6)
    x = view(storage)  # type: ignore[operator]
    inside = torch.zeros(storage.numel(), dtype=torch.bool)
    if x.numel():
        index = torch.arange(storage.numel())
        inside[torch.as_strided(index, x.shape, x.stride(), x.storage_offset()).flatten()] = True
    y = torch.zeros(1)
    for i in range(storage.numel()):
        m = emulator.module
        m.set_buffers([(t.data_ptr(), 4, t.shape, t.stride()) for t in (x, y)])
        arguments = (storage.data_ptr() + 4 * i, y.data_ptr(), 1, 0, 0)
        if inside[i]:
            m.check_vec_copy(*arguments)
        else:
            with pytest.raises(RuntimeError, match="out of bounds"):
                m.check_vec_copy(*arguments)


# ---- whole kernels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("length", [1, 64, 150])
def test_attention(length: int, causal: bool, dtype: torch.dtype, order: int) -> None:
    q, k, v = (torch.randn(2, length, 64).to(dtype) for _ in range(3))
    o, lse = torch.full_like(q, float("nan")), torch.full((2, length), float("nan"))
    emulator.module.stats()
    emulator.call("selftest_attention", q, k, v, o, lse, 2, length, 0.125, causal, dtype)
    stats = emulator.module.stats()
    assert stats["ldmatrix_phases"] > 0 and stats["ldmatrix_conflicts"] == 0
    s = q.double() @ k.double().mT * 0.125
    if causal:
        s = s.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1.5e-3
    torch.testing.assert_close(o.double(), s.softmax(-1) @ v.double(), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), s.logsumexp(-1), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("steps", "batch", "hidden", "blocks"), [(1, 1, 4, 1), (5, 3, 20, 4)])
def test_lstm(steps: int, batch: int, hidden: int, blocks: int, order: int) -> None:
    m = torch.nn.LSTM(10, hidden)
    x, h0, c0 = torch.randn(steps, batch, 10), torch.randn(batch, hidden), torch.randn(batch, hidden)
    with torch.no_grad():
        expected, (_, c_expected) = m(x, (h0[None], c0[None]))
        gates = x @ m.weight_ih_l0.T + m.bias_ih_l0 + m.bias_hh_l0
        hs, c = torch.full((steps, batch, hidden), float("nan")), torch.full_like(c0, float("nan"))
        emulator.call("selftest_lstm", gates, m.weight_hh_l0, h0, c0, hs, c, steps, batch, hidden, blocks)
    torch.testing.assert_close(hs, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(c, c_expected[0], atol=1e-5, rtol=1e-5)


# ---- the loader


def test_extension_names_itself() -> None:
    info = emulator.module.build_info()
    assert info["backend"] == "emulator" and info["compiler"].startswith("g++")


def test_absent_extension_names_its_build_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    absent = Extension("_cuda_ext")
    assert not absent.available
    assert "was not built" in str(absent.reason) and "nvcc is found: pip install" in str(absent.reason)
    with pytest.raises(RuntimeError, match="where nvcc is found"):
        absent.call("check_votes")


def test_unknown_extension_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown extension '_other_ext'"):
        Extension("_other_ext")


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(TypeError):
        emulator.call("check_votes", torch.zeros(32))
    with pytest.raises(AttributeError):
        emulator.call("no_such_launcher")
    with pytest.raises(KeyError):
        emulator.call("check_vec_copy", torch.zeros(1), torch.zeros(1), 1, torch.int8)


FIBERS = r"""
#include "emulator/fiber.h"
#include <cstdint>
#include <cstdio>
#include <cstdlib>
using namespace emu;
Context home, a, b;
double sums[2];
static char stacks[2][65536];
template <int I> void body(void*) {
  double x = I + 1;                       // kept in registers and on the stack across switches
  for (int k = 0; k < 1000; ++k) {
    alignas(16) volatile double local[2] = {x, 1};
    if (reinterpret_cast<uintptr_t>(local) % 16) std::abort();
    switch_context(I ? b : a, I ? a : b);
    x = local[0] + local[1];
  }
  sums[I] = x;
  switch_context(I ? b : a, I ? home : b);
  std::abort();
}
int main() {
  make_context(a, stacks[0], sizeof stacks[0], body<0>, nullptr);
  make_context(b, stacks[1], sizeof stacks[1], body<1>, nullptr);
  switch_context(home, a);
  std::printf("%g %g\n", sums[0], sums[1]);
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to build the context switches")
@pytest.mark.parametrize("flags", [[], ["-DEMU_UCONTEXT"]], ids=["assembly", "ucontext"])
def test_context_switches(flags: list[str], tmp_path: Path) -> None:
    source = tmp_path / "fibers.cpp"
    source.write_text(FIBERS)
    binary = tmp_path / "fibers"
    fiber = ROOT / "csrc/emulator/fiber.cpp"
    subprocess.run(["g++", "-std=c++20", "-O2", f"-I{ROOT / 'csrc'}", *flags, source, fiber, "-o", binary], check=True)
    assert subprocess.run([binary], capture_output=True, text=True, check=True).stdout == "1001 1002\n"
