"""Embedding modules: torch.nn's constructors, parameters and state_dict, on our functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.embedding import embedding, embedding_bag

__all__ = ["Embedding", "EmbeddingBag"]


class Embedding(torch.nn.Embedding):
    """A lookup table; `torch.nn.Embedding` with its constructor, plus keyword-only `backend`.

    Shapes: ids of any shape -> Tensor[*, embedding_dim]. Errors as `pykernels.functional.embedding`.
    """

    def __init__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.backend = backend

    def forward(self, input: Tensor) -> Tensor:
        return embedding(
            input,
            self.weight,
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
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
    """Pooled lookup; `torch.nn.EmbeddingBag` with its constructor, plus keyword-only `backend`.

    Shapes: ids Tensor[B, L], or Tensor[N] and offsets, -> Tensor[B, embedding_dim]. Errors as
    `pykernels.functional.embedding_bag`.
    """

    def __init__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.backend = backend

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
