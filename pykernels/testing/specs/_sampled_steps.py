"""Training steps of the sampled_softmax room that are timed whole: loss, gradients, and the step of the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import optim
from ...ops import sampled_softmax as functional
from ..step import Provider, Step

BATCH, SIZE, LR = 1024, 128, 1e-2
DRAWS = 8  # batches that are taken in turn, so that a step does not find the rows of the last one in cache

Ids = tuple[Tensor, Tensor]  # labels, and classes that stand in for the others
Loss = Callable[[Tensor, Tensor, Ids], Tensor]


def _table(classes: int) -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(22)
    return torch.nn.Parameter(torch.randn(classes, SIZE, generator=generator) * 0.3)


def _batches(classes: int, sampled: tuple[int, ...]) -> list[tuple[Tensor, Ids]]:
    generator = torch.Generator().manual_seed(21)

    def ids(*shape: int) -> Tensor:
        return torch.randint(classes, shape, generator=generator)

    def batch() -> tuple[Tensor, Ids]:
        return torch.randn(BATCH, SIZE, generator=generator) * 0.3, (ids(BATCH), ids(*sampled))

    return [batch() for _ in range(DRAWS)]


def _training(classes: int, sampled: tuple[int, ...], ours: Loss, stock: Loss) -> Callable[[], dict[str, Provider]]:
    """Loss, gradients of the input and of the table, SGD on the table. Ours: rows are summed and stepped in one pass;
    torch: `stock` makes a sparse gradient."""

    def make() -> dict[str, Provider]:
        batches, found = _batches(classes, sampled), {}
        for name, loss, by in (("pykernels", ours, optim.SGD), ("eager", stock, torch.optim.SGD)):
            weight, held = _table(classes), list[Tensor]()
            optimizer: Any = by([weight], lr=LR)
            turns = cycle(batches)

            def run(
                w: Tensor = weight, o: Any = optimizer, loss: Loss = loss, turns: Any = turns, held: Any = held
            ) -> None:
                x, ids = next(turns)
                x = x.detach().requires_grad_()
                loss(x, w, ids).backward()
                o.step()
                o.zero_grad()
                held[:] = [x.grad]

            found[name] = Provider(run, lambda w=weight, held=held: [w.detach(), held[0]])  # type: ignore[misc]
        return found

    return make


def _negatives(x: Tensor, weight: Tensor, ids: Ids) -> Tensor:
    return functional.negative_sampling_loss(x, weight, *ids)


def _stock_negatives(x: Tensor, weight: Tensor, ids: Ids) -> Tensor:
    rows = F.embedding(torch.cat([ids[0].unsqueeze(1), ids[1]], 1), weight, sparse=True)
    logits = torch.bmm(rows, x.unsqueeze(2)).squeeze(2)
    return -(F.logsigmoid(logits[:, 0]) + F.logsigmoid(-logits[:, 1:]).sum(1)).mean()


def _sampled(x: Tensor, weight: Tensor, ids: Ids) -> Tensor:
    labels, sampled = ids
    expected = torch.ones(()).expand(labels.shape), torch.ones(()).expand(sampled.shape)
    values, sizes = (sampled, *expected), (len(sampled), weight.shape[0])
    return functional.sampled_softmax_loss(weight, None, labels, x, *sizes, sampled_values=values)


def _stock_sampled(x: Tensor, weight: Tensor, ids: Ids) -> Tensor:
    labels, sampled = ids
    rows = F.embedding(torch.cat(ids), weight, sparse=True)
    true = (x * rows[: len(labels)]).sum(1, keepdim=True)
    other = (x @ rows[len(labels) :].T).masked_fill(labels.unsqueeze(1) == sampled, -torch.inf)
    return F.cross_entropy(torch.cat([true, other], 1), labels.new_zeros(len(labels)))


def _linear(rows: int, size: int, classes: int) -> Callable[[], dict[str, Provider]]:
    """Forward and backward of a cross entropy over all classes; torch's own with its logits, and in chunks of rows."""

    def make() -> dict[str, Provider]:
        generator = torch.Generator().manual_seed(23)
        x, weight = (torch.randn(n, size, generator=generator) * 0.25 for n in (rows, classes))
        target = torch.randint(classes, (rows,), generator=generator)

        def stock(x: Tensor, w: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(x, w), target)

        def chunked(x: Tensor, w: Tensor) -> Tensor:
            options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=128)
            return F.linear_cross_entropy(x, w, target, options=options)

        losses: dict[str, Any] = {
            "pykernels": lambda x, w: functional.linear_cross_entropy(x, w, target),
            "eager": stock,
        }
        if hasattr(F, "linear_cross_entropy"):  # torch 2.13
            losses["chunked"] = chunked
        found = {}
        for name, loss in losses.items():
            leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
            held = list[Tensor]()

            def run(loss: Any = loss, leaves: Any = leaves, held: Any = held) -> None:
                held[:] = torch.autograd.grad(loss(*leaves), leaves)

            found[name] = Provider(run, lambda held=held: held)  # type: ignore[misc]
        return found

    return make


def _fetched(rows: int) -> Callable[[], int]:
    """Rows of the table that are read, forward and for the update, and written, with x and its gradient."""
    return lambda: (3 * rows + 3 * BATCH) * SIZE * 4


def _three_products(rows: int, size: int, classes: int) -> int:
    """Logits, and the gradients of both factors: what a loss that keeps its logits needs."""
    return 6 * rows * size * classes


def negative_step(label: str, classes: int, count: int) -> Step:
    make = _training(classes, (BATCH, count), _negatives, _stock_negatives)
    return Step("negative sampling step, SGD", label, make, _fetched(BATCH * (count + 1)))


STEPS = (
    negative_step("100kx128-K5", 100_000, 5),
    negative_step("100kx128-K64", 100_000, 64),
    negative_step("1Mx128-K5", 1_000_000, 5),
    negative_step("1Mx128-K64", 1_000_000, 64),
    Step("sampled softmax step, SGD", "100kx128-K8192", _training(100_000, (8192,), _sampled, _stock_sampled),
         flops=lambda: _three_products(BATCH, SIZE, 8192)),
    Step("linear cross entropy, fwd+bwd", "512x256-V128k", _linear(512, 256, 128_000),
         flops=lambda: _three_products(512, 256, 128_000)),
)  # fmt: skip
