"""Embedding modules: torch.nn's constructors, parameters and state_dict, on our functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.embedding import (
    dequantize_rows,
    dot_interaction,
    embedding,
    embedding_bag,
    embedding_bag_multi,
    embedding_bag_quantized,
    quantize_rows,
)

__all__ = ["DotInteraction", "Embedding", "EmbeddingBag", "EmbeddingBagCollection", "QuantizedEmbeddingBag"]


class Embedding(torch.nn.Embedding):
    """A lookup table; `torch.nn.Embedding` with its constructor, plus keyword-only `backend`, `bounds_check`.

    Shapes: ids of any shape -> Tensor[*, embedding_dim]. Errors as `pykernels.functional.embedding`. The optimizers of
    `pykernels.optim` step the table without a gradient.
    """

    def __init__(self, *args: Any, backend: str | None = None, bounds_check: str = "error", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.backend, self.bounds_check = backend, bounds_check

    def forward(self, input: Tensor) -> Tensor:
        return embedding(
            input,
            self.weight,
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
            bounds_check=self.bounds_check,
            backend=self.backend,
        )

    @classmethod
    def from_torch(cls, module: torch.nn.Embedding, *, backend: str | None = None) -> Embedding:
        """An Embedding with the options and the very parameter of a `torch.nn.Embedding`."""
        new = cls(
            module.num_embeddings,
            module.embedding_dim,
            module.padding_idx,
            module.max_norm,
            module.norm_type,
            module.scale_grad_by_freq,
            module.sparse,
            _weight=module.weight,
            backend=backend,
        )
        new.weight = module.weight
        return new.train(module.training)


class EmbeddingBag(torch.nn.EmbeddingBag):
    """Pooled lookup; `torch.nn.EmbeddingBag` with its constructor, plus keyword-only `backend`, `bounds_check`.

    Shapes: ids Tensor[B, L], or Tensor[N] and offsets, -> Tensor[B, embedding_dim]. Errors as
    `pykernels.functional.embedding_bag`.
    """

    def __init__(self, *args: Any, backend: str | None = None, bounds_check: str = "error", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.backend, self.bounds_check = backend, bounds_check

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        return embedding_bag(
            input,
            self.weight,
            offsets,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.mode,
            self.sparse,
            per_sample_weights,
            self.include_last_offset,
            self.padding_idx,
            bounds_check=self.bounds_check,
            backend=self.backend,
        )

    @classmethod
    def from_torch(cls, module: torch.nn.EmbeddingBag, *, backend: str | None = None) -> EmbeddingBag:
        """An EmbeddingBag with the options and the very parameter of a `torch.nn.EmbeddingBag`."""
        new = cls(
            module.num_embeddings,
            module.embedding_dim,
            module.max_norm,
            module.norm_type,
            module.scale_grad_by_freq,
            module.mode,
            module.sparse,
            _weight=module.weight,
            include_last_offset=module.include_last_offset,
            padding_idx=module.padding_idx,
            backend=backend,
        )
        new.weight = module.weight
        return new.train(module.training)


class EmbeddingBagCollection(torch.nn.Module):
    """The bags of many tables side by side, in one launch: `pykernels.functional.embedding_bag_multi`.

        tables = EmbeddingBagCollection([5000, 29, 1000], 32)
        out = tables(ids.split(1, dim=1))  # ids Tensor[B, 3], one of each table -> Tensor[B, 96]

    Args:
        num_embeddings: rows of each table.
        embedding_dim: columns of each table, or one number for all.
        mode: "sum", "mean" or "max", of all tables.
        include_last_offset: as in `torch.nn.EmbeddingBag`.
        device, dtype: of the tables, which are drawn from N(0, 1) as torch.nn.EmbeddingBag's.
        bounds_check, backend: as in `pykernels.functional.embedding`.

    Shapes: T ids, each Tensor[B, L] or Tensor[N] with offsets, and T weights of ids or None -> Tensor[B, sum of
    embedding_dim]. `state_dict`: "weights.0", "weights.1", ... Errors as the function, and ValueError for lists of
    different lengths.
    """

    def __init__(
        self,
        num_embeddings: Sequence[int],
        embedding_dim: int | Sequence[int],
        mode: str = "sum",
        *,
        include_last_offset: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        bounds_check: str = "error",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        sizes = [embedding_dim] * len(num_embeddings) if isinstance(embedding_dim, int) else list(embedding_dim)
        if len(sizes) != len(num_embeddings):
            raise ValueError(
                f"EmbeddingBagCollection: num_embeddings names {len(num_embeddings)} tables, embedding_dim {len(sizes)}"
            )
        shapes = zip(num_embeddings, sizes, strict=True)
        tables = [torch.empty(shape, device=device, dtype=dtype) for shape in shapes]
        self.weights = torch.nn.ParameterList(torch.nn.Parameter(table) for table in tables)
        self.mode, self.include_last_offset = mode, include_last_offset
        self.bounds_check, self.backend = bounds_check, backend
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in self.weights:
            torch.nn.init.normal_(weight)

    def forward(
        self,
        indices: Sequence[Tensor],
        offsets: Sequence[Tensor | None] | None = None,
        per_sample_weights: Sequence[Tensor] | None = None,
    ) -> Tensor:
        return embedding_bag_multi(
            indices,
            offsets,
            list(self.weights),
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            bounds_check=self.bounds_check,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"{', '.join(f'{tuple(w.shape)}' for w in self.weights)}, mode={self.mode!r}"

    @classmethod
    def from_torch(
        cls, modules: Iterable[torch.nn.EmbeddingBag], *, backend: str | None = None
    ) -> EmbeddingBagCollection:
        """A collection of the very parameters of `torch.nn.EmbeddingBag`s that have one mode and no other options."""
        bags = list(modules)
        for bag in bags:
            plain = bag.padding_idx is None and bag.max_norm is None and not bag.scale_grad_by_freq
            if not plain or (bag.mode, bag.include_last_offset) != (bags[0].mode, bags[0].include_last_offset):
                raise ValueError("EmbeddingBagCollection.from_torch(): the bags differ in mode or have other options")
        new = cls([], [], bags[0].mode, include_last_offset=bags[0].include_last_offset, backend=backend)
        new.weights.extend(bag.weight for bag in bags)
        return new


class DotInteraction(torch.nn.Module):
    """DLRM's pairwise interaction: `pykernels.functional.dot_interaction`.

    Shapes: Tensor[B, D] and Tensor[B, F, D], or Tensor[B, F * D] as an EmbeddingBagCollection gives it, ->
    Tensor[B, D + F (F + 1) / 2], F + 1 more with `self_interaction`.
    """

    def __init__(self, self_interaction: bool = False, *, backend: str | None = None) -> None:
        super().__init__()
        self.self_interaction, self.backend = self_interaction, backend

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        if sparse.dim() == 2 and dense.dim() == 2:
            sparse = sparse.unflatten(1, (sparse.shape[1] // max(dense.shape[1], 1), dense.shape[1]))
        return dot_interaction(dense, sparse, self.self_interaction, backend=self.backend)

    def extra_repr(self) -> str:
        return "self_interaction=True" if self.self_interaction else ""


class QuantizedEmbeddingBag(torch.nn.Module):
    """A packed table for inference: `pykernels.functional.embedding_bag_quantized`.

    Args:
        packed: uint8 Tensor of `pykernels.functional.quantize_rows`, or packed by torch. Held as the buffer "weight".
        bits: 8 or 4.
        mode: "sum", "mean", or None for plain lookup.
        include_last_offset, padding_idx, dtype, bounds_check, backend: as the function's.

    Shapes: ids Tensor[B, L], or Tensor[N] and offsets, -> Tensor[B, embedding_dim]; with mode None ids of any shape ->
    Tensor[*, embedding_dim]. `dtype` is the result's; moving the module to another dtype changes nothing. Errors as
    the function.
    """

    weight: Tensor

    def __init__(
        self,
        packed: Tensor,
        *,
        bits: int = 8,
        mode: str | None = "sum",
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        dtype: torch.dtype = torch.float32,
        bounds_check: str = "error",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", packed)
        self.bits, self.mode, self.include_last_offset, self.padding_idx = bits, mode, include_last_offset, padding_idx
        self.dtype, self.bounds_check, self.backend = dtype, bounds_check, backend

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        return embedding_bag_quantized(
            self.weight,
            input,
            offsets,
            bits=self.bits,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=self.padding_idx,
            dtype=self.dtype,
            bounds_check=self.bounds_check,
            backend=self.backend,
        )

    def dequantize(self) -> Tensor:
        """The table that the packed one stands for: Tensor[V, embedding_dim] of `dtype`."""
        return dequantize_rows(self.weight, self.bits, dtype=self.dtype, backend=self.backend)

    def extra_repr(self) -> str:
        rows, width = self.weight.shape
        return f"{rows}, {(width - self.bits) * (8 // self.bits)}, bits={self.bits}, mode={self.mode!r}"

    @classmethod
    def from_float(
        cls, module: torch.nn.Embedding | torch.nn.EmbeddingBag, bits: int = 8, *, backend: str | None = None
    ) -> QuantizedEmbeddingBag:
        """The packed table of an `EmbeddingBag` (mode "sum" or "mean") or an `Embedding`, torch's or ours.

        Results have the table's dtype.

        Raises:
            ValueError: mode "max", or `max_norm` (which writes to the table); as `quantize_rows`.
        """
        mode = getattr(module, "mode", None)
        if mode == "max" or module.max_norm is not None:
            option = "mode 'max'" if mode == "max" else "max_norm"
            raise ValueError(f"QuantizedEmbeddingBag.from_float(): a table with {option} cannot be packed")
        return cls(
            quantize_rows(module.weight, bits, backend=backend),
            bits=bits,
            mode=mode,
            include_last_offset=getattr(module, "include_last_offset", False),
            padding_idx=module.padding_idx,
            dtype=module.weight.dtype,
            backend=backend,
        )
