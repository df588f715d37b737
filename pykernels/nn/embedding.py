"""Embedding modules: torch.nn's constructors, parameters and state_dict, on our functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.embedding import dot_interaction, embedding, embedding_bag, embedding_bag_multi

__all__ = ["DotInteraction", "Embedding", "EmbeddingBag", "EmbeddingBagCollection"]


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
