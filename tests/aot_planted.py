"""Kernels made for the lint's own tests: each breaks one rule, its twin keeps it. Not collected as tests."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pykernels.testing.aot.rules import ELEMENTWISE, Entry, Rules

BF16 = torch.bfloat16


@triton.jit
def scale_kernel(x_ptr, y_ptr, n, SPLIT: tl.constexpr, TERMS: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0) * BLOCK
    i = start + tl.arange(0, BLOCK)
    if SPLIT and start + BLOCK <= n:
        x = tl.load(x_ptr + i).to(tl.float32)
        y = x
        for _ in tl.static_range(TERMS):
            y = tl.exp(y * x)
        tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty))
    else:
        x = tl.load(x_ptr + i, mask=i < n).to(tl.float32)
        tl.store(y_ptr + i, (x * x).to(y_ptr.dtype.element_ty), mask=i < n)


def scale(n: int, split: bool, terms: int = 1) -> None:
    x = torch.empty(n, dtype=BF16)
    scale_kernel[(triton.cdiv(n, 1024),)](x, x, n, SPLIT=split, TERMS=terms, BLOCK=1024, num_warps=4)


@triton.jit
def centre_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, tl.exp(x - tl.sum(x, 0) / BLOCK))


def centre(warps: int) -> None:
    """One warp must hold 512 values a thread."""
    x = torch.empty(16384)
    centre_kernel[(1,)](x, x, BLOCK=16384, num_warps=warps)


@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, K, PRECISION: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    c = tl.zeros((N, N), tl.float32)
    for k in range(0, K, N):
        a = tl.load(a_ptr + i[:, None] * K + k + i[None, :])
        b = tl.load(b_ptr + (k + i)[:, None] * N + i[None, :])
        c = tl.dot(a, b, c, input_precision=PRECISION)
    tl.store(c_ptr + i[:, None] * N + i[None, :], c)


def product(dtype: torch.dtype) -> None:
    a, b, c = torch.empty(64, 512, dtype=dtype), torch.empty(512, 64, dtype=dtype), torch.empty(64, 64)
    product_kernel[(1,)](a, b, c, 512, PRECISION="ieee", N=64, num_warps=4)


@triton.autotune(configs=[triton.Config({"BLOCK": b}, num_warps=4) for b in (1024, 2048)], key=["n"])
@triton.jit
def tuned_kernel(x_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + i, tl.load(x_ptr + i, mask=i < n) + 1.0, mask=i < n)


def tuned() -> None:
    tuned_kernel[lambda meta: (triton.cdiv(4096, meta["BLOCK"]),)](torch.empty(4096), 4096)


@triton.jit
def refused_kernel(x_ptr):
    tl.static_assert(False, "refused on purpose")


MOVED = {"scale_kernel": 2 * 2 * 1000003}
MATRIX = Rules(tensor_cores=True, mma_efficiency=0.95)

ENTRIES = [
    Entry("good", lambda: scale(1000003, split=True), ELEMENTWISE, (90,), MOVED),
    Entry("narrow", lambda: scale(1000003, split=False), ELEMENTWISE, (90,), MOVED),
    Entry("heavy", lambda: scale(1000003, split=True, terms=9), ELEMENTWISE, (90,), MOVED),
    Entry("kept", lambda: centre(16), Rules(), (90,)),
    Entry("spilling", lambda: centre(1), Rules(), (90,)),
    Entry("good matrix", lambda: product(BF16), MATRIX, (80, 90), loop_flops=2 * 64**3),
    Entry("no tensor cores", lambda: product(torch.float32), Rules(tensor_cores=True, spill_bytes=10**6), (90,)),
    Entry("crowded", lambda: centre(16), Rules(blocks=5), (90,)),
    Entry("good tuned", tuned, Rules(occupancy=0.5), (90,)),
    Entry("refused", lambda: refused_kernel[(1,)](torch.empty(1)), Rules(), (90,)),
    Entry("nothing", lambda: None, Rules(), (90,)),
]
