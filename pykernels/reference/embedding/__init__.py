"""Embedding lookup, pooled lookup, fused row updates and pairwise interaction in plain torch: the truth of the room."""

from __future__ import annotations

from .interaction import dot_interaction
from .lookup import embedding, embedding_bag, embedding_bag_multi
from .quantized import dequantize_rows, embedding_bag_quantized, quantize_rows
from .update import embedding_adagrad_, embedding_adam_, embedding_rowwise_adagrad_, embedding_sgd_

__all__ = [
    "dequantize_rows", "dot_interaction", "embedding", "embedding_adagrad_", "embedding_adam_", "embedding_bag",
    "embedding_bag_multi", "embedding_bag_quantized", "embedding_rowwise_adagrad_", "embedding_sgd_", "quantize_rows",
]  # fmt: skip
