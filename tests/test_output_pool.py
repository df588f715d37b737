"""Output memory on the CPU, kept and reused: no two live tensors share any, it is bounded, and it goes back."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pykernels as pk
from pykernels import _cpu_ext
from pykernels.testing.memory import peak_bytes

MIB = 2**20
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    gc.collect()  # what other tests left in cycles must not be freed in the middle of this one
    pk.set_output_pool()
    pk.empty_cache()
    yield
    pk.set_output_pool()
    pk.empty_cache()


def state() -> pk.OutputPool:
    found = pk.output_pool()
    assert found is not None
    return found


def result(value: float, count: int = MIB // 4) -> Tensor:
    """A result of ours of `count` float32, each `value` (at least 0)."""
    return pk.functional.relu(torch.full((count,), value))


def test_memory_is_reused_and_given_back() -> None:
    before = state()
    y = result(1.0, 3 * MIB)
    address = y.data_ptr()
    assert address % (2 * MIB) == 0
    assert state().used_bytes - before.used_bytes == 12 * MIB and state().mapped == before.mapped + 1
    del y
    assert state().idle_bytes == 12 * MIB and state().used_blocks == before.used_blocks
    y = result(2.0, 3 * MIB - 1000)  # a little smaller: the same block
    assert y.data_ptr() == address and state().idle_blocks == 0 and state().reused == before.reused + 1
    other = result(3.0, 3 * MIB)
    assert other.data_ptr() != address and (y == 2).all()
    small = result(4.0, MIB // 4 - 1)
    assert state().used_blocks == before.used_blocks + 2, "below 1 MiB results are torch's"
    del y, other, small
    assert state().idle_blocks == 2
    assert result(5.0, MIB).data_ptr() != address, "12 MiB are not given to 4"
    pk.empty_cache()
    assert state().idle_bytes == 0 and state().returned == before.returned + 3


def blocks_of(call: Callable[[], object]) -> int:
    """How many blocks `call` takes."""
    before = state().mapped + state().reused
    call()
    return state().mapped + state().reused - before


def test_gradients_and_compiled_calls_take_it_too() -> None:
    x = torch.randn(256, 2048, requires_grad=True)
    y = pk.functional.swiglu(x)
    assert blocks_of(lambda: torch.autograd.grad(y, x, torch.ones_like(y))) == 1
    compiled = torch.compile(lambda x: pk.functional.gelu(x * 1.0), fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    assert blocks_of(lambda: compiled(x).sum().backward()) == 2
    with torch.inference_mode():
        assert blocks_of(lambda: pk.functional.gelu(x)) == 1 and pk.functional.gelu(x).is_inference()


_STRESS = """
import os, random, sys, threading
import torch, pykernels as pk
torch.set_num_threads(1)
pk.set_output_pool(max_bytes=48 << 20)
wrong = []

def check(held):
    for y, value in held:
        # first, last and a few between: a block under two tensors shows one's value in the other
        if not (y[:: max(1, y.numel() // 64)] == value).all() or y[-1] != value:
            wrong.append((y.numel(), value))

def work(seed, rounds):
    draw, held = random.Random(seed), []
    for i in range(rounds):
        value = float(seed * 1000 + i)
        size = draw.choice([1 << 18, 1 << 18, 3 << 18, 1 << 19, 1 << 20]) + draw.randrange(3000)
        y = pk.functional.relu(torch.full((size,), value))
        held.append((y, value))
        if draw.random() < 0.1:
            pk.empty_cache()
        if draw.random() < 0.1:
            pk.set_output_pool(max_bytes=draw.choice([0, 4 << 20, 48 << 20]))
        if pk.output_pool().idle_bytes > 48 << 20:
            wrong.append("over the bound")
        if draw.random() < 0.1:
            y.resize_(y.numel() + 70000)[: size].sub_(0)
            y[size:] = value
        while len(held) > 4:
            check(held)
            held.pop(draw.randrange(len(held)))
    check(held)

def forked(held):
    children = []
    for i in range(4):
        child = os.fork()
        if child == 0:  # other threads may have been inside the pool at this moment
            status = 1
            try:
                idle = pk.output_pool().idle_blocks
                check(held)
                held[0][0].fill_(-1.0)  # the parent's copy must not see it
                del held[:]
                work(100 + i, 12)
                status = len(wrong) + idle
            finally:
                os._exit(status)
        children.append(child)
    for child in children:
        wrong.extend(["child"] * (os.waitpid(child, 0)[1] != 0))

threads = [threading.Thread(target=work, args=(seed, 60)) for seed in range(1, 5)]
for thread in threads:
    thread.start()
held = [(pk.functional.relu(torch.full((size,), float(size))), float(size)) for size in (1 << 18, 1 << 19, 1 << 20)]
forked(held)
for thread in threads:
    thread.join()
check(held)
del held, threads
pk.empty_cache()
found = pk.output_pool()
print(len(wrong), found.used_blocks, found.idle_bytes, found.reused > 20, found.mapped == found.returned)
"""


def test_no_two_live_tensors_share_memory() -> None:
    """Four threads, forks amid them, random sizes, the bound changed on the way; every tensor keeps its value."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", _STRESS], env=environment, capture_output=True, text=True, timeout=600)
    assert done.stdout.split() == ["0", "0", "0", "True", "True"], done.stdout + done.stderr


def test_a_storage_is_an_ordinary_one() -> None:
    before = state().used_blocks
    y = result(1.0)
    assert state().used_blocks == before + 1
    assert torch.equal(pickle.loads(pickle.dumps(y)), y) and torch.equal(copy.deepcopy(y), y)
    y.resize_(MIB)
    y[MIB // 4 :] = 7
    assert (y[: MIB // 4] == 1).all()
    y.untyped_storage().resize_(0)
    y.untyped_storage().resize_(64)  # small: torch's memory
    assert state().used_blocks == before
    array = result(2.0).numpy()  # keeps the tensor alive
    result(3.0)
    assert (array == 2).all()
    del array
    y = result(2.0)
    shared = y.share_memory_()
    assert shared.is_shared() and (shared == 2).all() and state().used_blocks == before
    view = result(3.0)[1000:2000]
    assert state().used_blocks == before + 1
    del view
    assert state().used_blocks == before


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "expanded", "strided", "overlapping"])
def test_results_have_the_strides_of_empty_like(layout: str) -> None:
    x = torch.randn(8, 64, 32, 32)
    x = {
        "transposed": x.transpose(1, 3),
        "channels_last": x.to(memory_format=torch.channels_last),
        "expanded": x[:1].expand(8, 64, 32, 32),
        "strided": x.repeat(1, 1, 1, 2)[..., ::2],
        "overlapping": torch.randn(700_000).as_strided((1000, 600), (600, 1)).as_strided((1000, 600), (3, 1)),
    }[layout]
    y = pk.functional.gelu(x)
    assert y.stride() == torch.empty_like(x).stride()
    torch.testing.assert_close(y, torch.nn.functional.gelu(x))


def test_the_profiler_sees_every_block() -> None:
    x = torch.randn(3 * MIB // 4)
    assert peak_bytes(lambda: pk.functional.gelu(x)) == x.nbytes

    def twice() -> None:
        kept = [pk.functional.gelu(x) for _ in range(2)]
        del kept[0]
        kept.append(pk.functional.gelu(x))

    assert peak_bytes(twice) == 2 * x.nbytes  # what is freed counts as freed though its block is kept


def test_bounded_and_trimmed() -> None:
    pk.set_output_pool(max_bytes=5 * MIB)
    kept = [result(1.0, MIB // 2) for _ in range(4)]
    kept.clear()
    assert state().idle_bytes == 4 * MIB, "two blocks of 2 MiB of the four"
    large = result(1.0, 2 * MIB)
    del large
    assert state().idle_bytes == 4 * MIB, "a block beyond the bound is not kept, and does not push others out"
    _cpu_ext.pool_trim(60.0)
    assert state().idle_blocks == 2
    time.sleep(1.0)
    kept.append(result(2.0, MIB // 2))
    kept.clear()  # this one is young
    _cpu_ext.pool_trim(0.5)
    assert state().idle_blocks == 1


def soon(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_a_shortage_of_memory_takes_what_lies_idle(tmp_path: Path) -> None:
    kept = [result(float(i), MIB) for i in range(4)]
    kept.clear()
    assert state().idle_bytes == 16 * MIB
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal: {2**30 >> 10} kB\nMemAvailable: {24 * MIB >> 10} kB\n")
    _cpu_ext.pool_trim(60.0, str(tmp_path), str(tmp_path))
    assert state().idle_bytes == 8 * MIB, "a quarter of what is available, the idle blocks themselves counted: 10 MiB"
    meminfo.write_text(f"MemTotal: {2**30 >> 10} kB\nMemAvailable: 0 kB\n")
    _cpu_ext.pool_trim(60.0, str(tmp_path), str(tmp_path))
    assert state().idle_bytes == 0
    result(1.0, MIB)
    assert state().idle_bytes == 0, "nothing is kept while the shortage lasts"

    def kept_again() -> bool:
        result(1.0, MIB)
        return state().idle_blocks > 0

    assert soon(kept_again, 10.0), "the machine's own figures are looked at again"


def test_what_lies_idle_goes_back_by_itself() -> None:
    def watched() -> bool:
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):  # a thread that ends while we look
                if Path(task, "comm").read_text().strip() == "pykernels-pool":
                    return True
        return False

    result(1.0)
    assert state().idle_blocks == 1
    assert soon(watched, 5.0)
    assert soon(lambda: not state().idle_blocks, 30.0)
    assert soon(lambda: not watched(), 5.0), "the thread ends when there is nothing to look after"


def test_off() -> None:
    on = result(1.0)
    before = state()
    pk.set_output_pool(False)
    assert state().max_bytes == 0 and str(state()) == "off"
    off = result(2.0)
    assert state().used_blocks == before.used_blocks and (off == 2).all()
    del on
    assert state().idle_blocks == 0 and state().returned > before.returned
    pk.set_output_pool()
    assert state().max_bytes > 0 and "MiB" in str(state())


def test_uninitialised_memory_is_filled_where_torch_promises_it() -> None:
    before = state().mapped + state().reused
    torch.use_deterministic_algorithms(True)
    try:
        result(1.0)
    finally:
        torch.use_deterministic_algorithms(False)
    assert state().mapped + state().reused == before


def test_bad_input_and_no_memory() -> None:
    with pytest.raises(TypeError, match="enabled must be a bool, not int"):
        pk.set_output_pool(2**30)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="max_bytes must be an int or None, not float"):
        pk.set_output_pool(max_bytes=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_bytes must be 0 or more, got -1"):
        pk.set_output_pool(max_bytes=-1)
    pk.set_output_pool(max_bytes=2**70)  # no bound but that of what is available
    assert state().max_bytes == 2**63 - 1
    with pytest.raises(torch.OutOfMemoryError, match="could not map"):
        pk.functional.relu(torch.ones(1).expand(2**46))


def _tree(root: Path, files: dict[str, str]) -> tuple[int, int]:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found: tuple[int, int] = _cpu_ext.system_memory(f"{root}/proc", f"{root}/cgroup")
    return found


def test_limits_of_control_groups(tmp_path: Path) -> None:
    meminfo = {"proc/meminfo": "MemTotal:       8000 kB\nMemFree: 1 kB\nMemAvailable:    6000 kB\n"}
    total, available = 8000 * 1024, 6000 * 1024
    assert _tree(tmp_path / "none", meminfo) == (total, available)
    assert _tree(tmp_path / "nothing", {}) == (0, 0)
    two = {
        **meminfo,
        "proc/self/cgroup": "0::/outer/inner\n",
        "cgroup/outer/memory.max": "3000000\n",
        "cgroup/outer/memory.current": "1000000\n",
        "cgroup/outer/memory.stat": "anon 5\ninactive_file 200000\n",
        "cgroup/outer/inner/memory.max": "max\n",
        "cgroup/outer/inner/memory.current": "900000\n",
    }
    assert _tree(tmp_path / "two", two) == (3000000, 2200000)  # the outer group's limit holds
    over = {**two, "cgroup/outer/memory.current": "4000000\n", "cgroup/outer/memory.stat": "anon 5\n"}
    assert _tree(tmp_path / "over", over) == (3000000, 0)
    one = {
        **meminfo,
        "proc/self/cgroup": "5:cpu,cpuacct:/a\n4:memory:/docker/a1\n0::/\n",
        "cgroup/memory/memory.limit_in_bytes": "2000000\n",  # seen from inside: the group is mounted at the root
        "cgroup/memory/memory.usage_in_bytes": "500000\n",
        "cgroup/memory/memory.stat": "inactive_file 7\ntotal_inactive_file 100000\n",
    }
    assert _tree(tmp_path / "one", one) == (2000000, 1600000)
    unlimited = {**one, "cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}
    assert _tree(tmp_path / "unlimited", unlimited) == (total, available)
    here = _cpu_ext.system_memory("/proc", "/sys/fs/cgroup")
    assert 0 < here[1] <= here[0]
