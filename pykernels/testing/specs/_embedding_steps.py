"""Training steps of the embedding room that are timed whole: a lookup's backward and the step of its optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import optim
from ...ops import embedding as functional
from ..step import Provider, Step

ROWS, SIZE = 100_000, 128


def zipf(count: int, rows: int = ROWS) -> Tensor:
    """Ids with P(rank r) ~ 1 / r, ranks scattered over the table; the same on every call."""
    generator = torch.Generator().manual_seed(11)
    probability = 1 / torch.arange(1, rows + 1, dtype=torch.float64)
    ranks = torch.multinomial(probability, count, replacement=True, generator=generator)
    return torch.randperm(rows, generator=generator)[ranks]


def _table(rows: int = ROWS, size: int = SIZE) -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(12)
    return torch.nn.Parameter(torch.randn(rows, size, generator=generator) * 0.01)


def _gradient(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(13))


def _step(forward: Callable[[], Tensor], dy: Tensor, optimizer: Any) -> Callable[[], None]:
    def run() -> None:
        forward().backward(dy)
        optimizer.step()
        optimizer.zero_grad()

    return run


def _sparse_gradient(count: int) -> Callable[[], dict[str, Provider]]:
    """Backward of a lookup up to a sparse gradient with each id once."""

    def make() -> dict[str, Provider]:
        ids, dy = zipf(count), _gradient(count, SIZE)
        found = {}
        for name, function in (("pykernels", functional.embedding), ("eager", F.embedding)):
            weight, held = _table(), list[Tensor]()
            out = function(ids, weight, sparse=True)

            def run(w: Tensor = weight, y: Tensor = out, held: list[Tensor] = held) -> None:
                held[:] = [torch.autograd.grad(y, w, dy, retain_graph=True)[0].coalesce()]

            found[name] = Provider(run, lambda held=held: [held[0].indices().float(), held[0].values()])  # type: ignore[misc]
        return found

    return make


def _lookup_sgd(count: int) -> Callable[[], dict[str, Provider]]:
    """Forward is made once; backward and the SGD step are timed."""

    def make() -> dict[str, Provider]:
        ids, dy, found = zipf(count), _gradient(count, SIZE), {}
        for name, function, by, sparse in (
            ("pykernels", functional.embedding, optim.SGD, False),
            ("eager", F.embedding, torch.optim.SGD, True),
            ("dense", F.embedding, torch.optim.SGD, False),
        ):
            weight = _table()
            optimizer: Any = by([weight], lr=1e-2)
            out = function(ids, weight, sparse=sparse)

            def run(y: Tensor = out, optimizer: Any = optimizer) -> None:
                y.backward(dy, retain_graph=True)
                optimizer.step()
                optimizer.zero_grad()

            found[name] = Provider(run, lambda w=weight: [w.detach()])  # type: ignore[misc]
        return found

    return make


def _fbgemm(shapes: list[tuple[int, int]], start: list[Tensor], ids: Tensor, length: int, rule: str, lr: float) -> Any:
    """FBGEMM's table-batched bags on the CPU, with its fused exact optimizer; (call, tables)."""
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        OptimType,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    kind = {"sgd": OptimType.EXACT_SGD, "rowwise_adagrad": OptimType.EXACT_ROWWISE_ADAGRAD}[rule]
    tables = [(*shape, EmbeddingLocation.HOST, ComputeDevice.CPU) for shape in shapes]
    module = SplitTableBatchedEmbeddingBagsCodegen(tables, optimizer=kind, learning_rate=lr, eps=1e-10)
    for weight, value in zip(module.split_embedding_weights(), start, strict=True):
        weight.copy_(value)
    flat, offsets = ids.reshape(-1), torch.arange(0, ids.numel() + 1, length)
    return lambda: module(flat, offsets), module.split_embedding_weights


def _bags(count: int, bags: int, length: int, size: int, rule: str) -> Callable[[], dict[str, Provider]]:
    """Forward, backward and step of `count` tables' bags of `length` ids."""
    lr = 1e-2
    make_ours, make_torch = {
        "sgd": (optim.SGD, torch.optim.SGD),
        "rowwise_adagrad": (optim.RowWiseAdagrad, None),
    }[rule]

    def make() -> dict[str, Provider]:
        ids = zipf(count * bags * length).view(count, bags, length)
        dy = _gradient(bags, count * size)

        def tables() -> list[torch.nn.Parameter]:
            return [_table(size=size) for _ in range(count)]

        ours = tables()
        lists = list(ids)

        def forward() -> Tensor:
            if count == 1:
                return functional.embedding_bag(lists[0], ours[0], mode="sum")
            return functional.embedding_bag_multi(lists, None, ours)

        found = {"pykernels": Provider(_step(forward, dy, make_ours(ours, lr=lr)), lambda: [w.detach() for w in ours])}
        if make_torch is not None:
            theirs = tables()

            def stock() -> Tensor:
                parts = [F.embedding_bag(i, w, mode="sum", sparse=True) for i, w in zip(lists, theirs, strict=True)]
                return torch.cat(parts, 1)

            found["eager"] = Provider(_step(stock, dy, make_torch(theirs, lr=lr)), lambda: [w.detach() for w in theirs])
        call, weights = _fbgemm([(ROWS, size)] * count, tables(), ids, length, rule, lr)
        found["fbgemm"] = Provider(lambda: call().backward(dy), weights)
        return found

    return make


def _fbgemm_packed(packed: Tensor, bits: int, ids: Tensor, length: int) -> Callable[[], Tensor]:
    """FBGEMM's table-batched bags for inference, of the same codes; scale and bias are float16 there."""
    from fbgemm_gpu.split_embedding_configs import SparseType  # type: ignore[import-not-found]
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_inference import (  # type: ignore[import-not-found]
        IntNBitTableBatchedEmbeddingBagsCodegen,
    )

    kind = {8: SparseType.INT8, 4: SparseType.INT4}[bits]
    table = [("", packed.shape[0], SIZE, kind, EmbeddingLocation.HOST)]
    module = IntNBitTableBatchedEmbeddingBagsCodegen(table, device="cpu", output_dtype=SparseType.FP32)
    module.initialize_weights()
    numbers = packed[:, -bits:].contiguous().view(torch.float32 if bits == 8 else torch.float16)
    module.assign_embedding_weights([(packed[:, :-bits].contiguous(), numbers.half().view(torch.uint8))])
    flat, offsets = ids.reshape(-1).int(), torch.arange(0, ids.numel() + 1, length, dtype=torch.int32)
    return lambda: module(flat, offsets)  # type: ignore[no-any-return]


def _packed_bags(bits: int, rows: int, bags: int, length: int) -> Callable[[], dict[str, Provider]]:
    """Sums of rows of one packed table, whose scales and biases are float16 numbers for all."""

    def make() -> dict[str, Provider]:
        packed = functional.quantize_rows(_table(rows).detach(), bits)
        if bits == 8:
            numbers = packed[:, -8:].contiguous().view(torch.float32).half().float()
            packed[:, -8:] = numbers.view(torch.uint8)
        ids = torch.randint(0, rows, (bags, length), generator=torch.Generator().manual_seed(14))
        flat, offsets, operators = ids.view(-1), torch.arange(0, ids.numel(), length), torch.ops.quantized
        stock: Any = {
            8: operators.embedding_bag_byte_rowwise_offsets,
            4: operators.embedding_bag_4bit_rowwise_offsets,
        }[bits]
        calls: dict[str, Callable[[], Tensor]] = {
            "pykernels": lambda: functional.embedding_bag_quantized(packed, ids, bits=bits),
            "eager": lambda: stock(packed, flat, offsets),
            "fbgemm": _fbgemm_packed(packed, bits, ids, length),
        }
        return {name: Provider(call, lambda call=call: [call()]) for name, call in calls.items()}  # type: ignore[misc]

    return make


def _packed_bytes(bits: int, bags: int, length: int) -> Callable[[], int]:
    """Rows and ids in, sums out."""
    return lambda: bags * (length * (SIZE * bits // 8 + bits + 8) + SIZE * 4)


def _bytes(positions: int, size: int, copies: int) -> Callable[[], int]:
    """Rows of dy or of the table that are read once for each position, and `copies` rows for each different id."""
    return lambda: (positions + copies * zipf(positions).unique().numel()) * size * 4


def _packed(bits: int, rows: int, name: str) -> Step:
    make, moved = _packed_bags(bits, rows, 4096, 20), _packed_bytes(bits, 4096, 20)
    return Step(f"quantised bag sum, {bits} bits", f"{name}x{SIZE}-4096x20", make, moved)


STEPS = (
    Step("sparse gradient, coalesced", "100kx128-64k-zipf", _sparse_gradient(65536), _bytes(65536, SIZE, 1)),
    Step("backward and SGD", "100kx128-64k-zipf", _lookup_sgd(65536), _bytes(65536, SIZE, 2)),
    Step("bag step, SGD", "100kx128-2048x32-zipf", _bags(1, 2048, 32, SIZE, "sgd"), _bytes(65536, SIZE, 2)),
    Step("bag step, row-wise Adagrad", "100kx128-2048x32-zipf", _bags(1, 2048, 32, SIZE, "rowwise_adagrad")),
    Step("8 tables step, SGD", "8x100kx64-2048x8-zipf", _bags(8, 2048, 8, 64, "sgd")),
    *(_packed(bits, rows, name) for rows, name in ((1_000_000, "1M"), (2_000, "2k")) for bits in (8, 4)),
)
