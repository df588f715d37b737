"""DLRM's pairwise interaction: schemas and fakes of the operators, their autograd Function, the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import reference
from .. import _autocast, _check
from .._function import differentiable
from .._library import define
from ._functions import ROOM

__all__ = ["dot_interaction"]


def _fake_forward(dense: Tensor, sparse: Tensor, self_interaction: bool) -> Tensor:
    rows = sparse.shape[1] + 1
    pairs = rows * (rows + 1) // 2 if self_interaction else rows * (rows - 1) // 2
    return dense.new_empty((dense.shape[0], dense.shape[1] + pairs))


def _fake_backward(
    dy: Tensor, dense: Tensor, sparse: Tensor, self_interaction: bool, output_mask: list[bool]
) -> tuple[Tensor, Tensor]:
    none = (0,)
    return (
        dense.new_empty(dense.shape if output_mask[0] else none),
        sparse.new_empty(sparse.shape if output_mask[1] else none),
    )


dot_interaction_forward = define(
    ROOM,
    "dot_interaction_forward(Tensor dense, Tensor sparse, bool self_interaction) -> Tensor",
    _fake_forward,
)
dot_interaction_backward = define(
    ROOM,
    # With x = (dense, sparse) of a sample and G the (F + 1, F + 1) lower triangle of dy's products (0 elsewhere):
    # dx = (G + G^T) x, and dense adds dy's first D columns. A gradient that output_mask leaves out is empty, (0,).
    "dot_interaction_backward(Tensor dy, Tensor dense, Tensor sparse, bool self_interaction, bool[] output_mask) "
    "-> (Tensor, Tensor)",
    _fake_backward,
)
DotInteraction = differentiable(
    "DotInteraction",
    dot_interaction_forward,
    dot_interaction_backward,
    reference.dot_interaction,
    tensors=2,
    masked=True,
)


def dot_interaction(
    dense: Tensor, sparse: Tensor, self_interaction: bool = False, *, backend: str | None = None
) -> Tensor:
    """The dense features and the products of all pairs of features: `[dense | x_i . x_j for j < i]`, sample by sample.

    x are the F + 1 rows (dense, sparse[0], ..., sparse[F - 1]) of a sample; the pairs are in the order of
    torch.tril_indices: (1, 0), (2, 0), (2, 1), (3, 0), ... One kernel each way; nothing of size (F + 1) x (F + 1) per
    sample is stored. Source: Naumov et al., "Deep learning recommendation model for personalization and recommendation
    systems" (2019).

    Args:
        dense: Tensor[B, D]; float32, float16, bfloat16, float64; any strides.
        sparse: Tensor[B, F, D] of `dense`'s dtype and device. `embedding_bag_multi(...).view(B, F, D)` is one.
        self_interaction: also the products of each row with itself (j <= i).
        backend: see `pykernels.explain`.

    Returns:
        Tensor[B, D + F (F + 1) / 2] (with `self_interaction` F + 1 more) of `dense`'s dtype; products are summed in
        float32 (float64 for float64). Under autocast its lower precision, as torch's matrix products.

    Raises:
        TypeError: an argument is not a Tensor.   NotImplementedError: another dtype.
        RuntimeError: the two differ in dtype or device.   ValueError: wrong shapes.
        BackendError: the named backend cannot serve the call.
    """
    name = "dot_interaction"
    for argument, value in (("dense", dense), ("sparse", sparse)):
        _check.tensor(name, argument, value)
        _check.floating(name, argument, value)
    dense, sparse = _autocast.lower((dense, sparse), dense.device)
    _check.same(name, "sparse", sparse, "dense", dense)
    if dense.dim() != 2:
        raise ValueError(f"{name}(): argument 'dense' must have the shape (B, D), not {tuple(dense.shape)}")
    if sparse.dim() != 3 or (sparse.shape[0], sparse.shape[2]) != tuple(dense.shape):
        batch, size = dense.shape
        raise ValueError(
            f"{name}(): argument 'sparse' must have the shape ({batch}, F, {size}), not {tuple(sparse.shape)}"
        )
    backend = ROOM.resolve(name, backend, dense, *_features(dense, sparse, self_interaction))
    if backend == "reference":
        return reference.dot_interaction(dense, sparse, self_interaction)
    if torch.is_grad_enabled() and (dense.requires_grad or sparse.requires_grad):
        result: Tensor = DotInteraction.apply(backend, dense, sparse, self_interaction)
        return result
    return dot_interaction_forward[backend](dense, sparse, self_interaction)


def _features(dense: Tensor, sparse: Tensor, self_interaction: bool) -> tuple[str, ...]:
    """What a kernel that keeps a sample and the gradients of its products in a block's memory cannot serve."""
    rows, cols = sparse.shape[1] + 1, dense.shape[1]
    pairs = rows * (rows - 1) // 2 + (rows if self_interaction else 0)
    return ("samples of more than 160 KiB",) if 4 * (rows * (cols + 1) + pairs) > 160 * 1024 else ()
