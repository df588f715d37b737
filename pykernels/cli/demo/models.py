"""Three small language models of stock PyTorch modules; ours are the same, patched."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pykernels

from ...testing import stock
from ...testing.training import Kind


def negative_sampling_loss(kind: Kind) -> Callable[..., Tensor]:
    """The one function that torch has no name for."""
    return stock.negative_sampling_loss if kind == "torch" else pykernels.functional.negative_sampling_loss


class SkipGram(nn.Module):
    """Skip-gram with negative sampling (Mikolov et al., 2013)."""

    def __init__(self, loss: Callable[..., Tensor], vocabulary: int, width: int) -> None:
        super().__init__()
        self.word = nn.Embedding(vocabulary, width)
        self.context = nn.Parameter(torch.empty(vocabulary, width))
        self.loss = loss
        # word2vec starts `context` at 0, which makes the first gradients 0 and the check of step 1 empty.
        for weight in (self.word.weight, self.context):
            nn.init.normal_(weight, std=0.1)

    def forward(self, center: Tensor, context: Tensor, negatives: Tensor) -> Tensor:
        """The loss of each pair, (N,)."""
        return self.loss(self.word(center), self.context, context, negatives, reduction="none")


class LSTMLanguageModel(nn.Module):
    """Embedding, LSTM, linear: the next character from all before it."""

    def __init__(self, vocabulary: int, width: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, hidden, batch_first=True)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The loss of each target, (B * L,)."""
        output, _ = self.lstm(self.embedding(tokens))
        return F.cross_entropy(self.head(output).flatten(0, 1), targets.flatten(), reduction="none")


class Block(nn.Module):
    """A pre-norm transformer block: causal self-attention, then a GELU feed-forward network."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, attn_mask=mask, is_causal=True, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A pre-norm decoder with learned positions (Radford et al., 2019)."""

    def __init__(self, vocabulary: int, width: int, heads: int, layers: int, length: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=0.02)
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The loss of each target, (B * L,)."""
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x, self.mask)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten(), reduction="none")
