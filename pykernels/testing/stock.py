"""What PyTorch has no name for, as one writes it there: the other side of demos, examples and benchmarks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _gated(activation: Callable[..., Tensor], gate_first: bool = True) -> Callable[..., Tensor]:
    def unit(x: Tensor, alpha: float) -> Tensor:
        first, second = x.chunk(2, -1)
        return activation(first) * second if gate_first else activation(second) * first

    return unit


ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "identity": lambda x, alpha: x,
    "sigmoid": lambda x, alpha: torch.sigmoid(x),
    "tanh": lambda x, alpha: torch.tanh(x),
    "relu": lambda x, alpha: F.relu(x),
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "gelu": lambda x, alpha: F.gelu(x),
    "gelu_tanh": lambda x, alpha: F.gelu(x, approximate="tanh"),
    "silu": lambda x, alpha: F.silu(x),
    "swish": lambda x, alpha: x * torch.sigmoid(alpha * x),
    "glu": lambda x, alpha: F.glu(x),
    "reglu": _gated(F.relu),
    "geglu": _gated(F.gelu),
    "geglu_tanh": _gated(functools.partial(F.gelu, approximate="tanh")),
    "swiglu": _gated(F.silu),
    "bilinear": _gated(lambda gate: gate),
}
"""`pykernels.functional.bias_activation_dropout`'s names: functions of (x, alpha)."""
_ALPHA = {"leaky_relu": 0.01}


def bias_activation_dropout(
    input: Tensor,
    bias: Tensor | None = None,
    activation: str = "gelu",
    p: float = 0.0,
    training: bool = True,
    *,
    alpha: float | None = None,
) -> Tensor:
    """dropout(activation(input + bias)), one operator after another."""
    x = input if bias is None else input + bias
    y = ACTIVATIONS[activation](x, _ALPHA.get(activation, 1.0) if alpha is None else alpha)
    return F.dropout(y, p, training) if p else y


def mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str = "gelu",
    save: str = "preactivation",
    *,
    p: float = 0.0,
    training: bool = True,
    alpha: float | None = None,
) -> Tensor:
    """The feed-forward block: the first bias within the product, as torch has it. `save` is ours alone."""
    hidden = bias_activation_dropout(F.linear(x, w1, b1), None, activation, p, training, alpha=alpha)
    return F.linear(hidden, w2, b2)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    prefix_length: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """`pykernels.functional.attention` with a dense mask for everything.

    Shapes: query (B, H, Lq, D), key and value (B, H, Lk, D), prefix_length (B,), key_padding_mask (B, Lk), True = real.
    """
    rows, columns = query.shape[2], key.shape[2]
    mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device)
    if causal:
        mask = mask.tril(columns - rows)
    if prefix_length is not None:
        within = torch.arange(columns, device=query.device) < prefix_length[:, None]
        mask = mask | within[:, None, None]
    if key_padding_mask is not None:
        mask = mask & key_padding_mask[:, None, None]
    return F.scaled_dot_product_attention(query, key, value, mask)


def negative_sampling_loss(
    input: Tensor, weight: Tensor, target: Tensor, negatives: Tensor, reduction: str = "mean"
) -> Tensor:
    """word2vec's loss: -log s(x.w_t) - sum_k log s(-x.w_k), s the logistic function.

    Shapes: input (N, D), weight (V, D), target (N,), negatives (N, K).
    """
    positive = (input * F.embedding(target, weight)).sum(-1)
    negative = torch.bmm(F.embedding(negatives, weight), input.unsqueeze(2)).squeeze(2)
    loss = -(F.logsigmoid(positive) + F.logsigmoid(-negative).sum(-1))
    return {"none": loss, "mean": loss.mean(), "sum": loss.sum()}[reduction]


def sampled_softmax_loss(
    weights: Tensor,
    biases: Tensor,
    labels: Tensor,
    inputs: Tensor,
    num_sampled: int,
    num_classes: int,
    num_true: int,
    sampled_values: tuple[Tensor, Tensor, Tensor],
    remove_accidental_hits: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """TensorFlow's loss over one label a row and a shared sample, accidental hits removed."""
    sampled, true_expected, sampled_expected = sampled_values
    true = (inputs * weights[labels]).sum(1) + biases[labels] - true_expected.view(-1).log().to(inputs.dtype)
    others = F.linear(inputs, weights[sampled], biases[sampled]) - sampled_expected.log().to(inputs.dtype)
    others = others.masked_fill(labels.unsqueeze(1) == sampled, -torch.inf)
    logits = torch.cat([true.unsqueeze(1), others], 1)
    return F.cross_entropy(logits, torch.zeros_like(labels), reduction=reduction)


def embedding_bag_multi(indices: Sequence[Tensor], offsets: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Sums of bags of several tables, side by side."""
    return torch.cat(
        [F.embedding_bag(i, w, o, mode="sum") for i, o, w in zip(indices, offsets, weights, strict=True)], 1
    )


def dot_interaction(dense: Tensor, sparse: Tensor) -> Tensor:
    """DLRM's pairwise products: dense (B, D) and sparse (B, F, D) -> (B, D + F (F + 1) / 2)."""
    x = torch.cat([dense.unsqueeze(1), sparse], 1)
    rows, columns = torch.tril_indices(x.shape[1], x.shape[1], -1, device=x.device)
    return torch.cat([dense, torch.bmm(x, x.transpose(1, 2))[:, rows, columns]], 1)


class RowWiseAdagrad(torch.optim.Optimizer):
    """Adagrad with one state a row, the mean square of its gradient, over dense gradients of tables."""

    def __init__(self, params: Any, lr: float = 1e-2, eps: float = 1e-10) -> None:
        super().__init__(params, {"lr": lr, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["sum"] = weight.new_zeros(weight.shape[0])
                state["sum"] += weight.grad.square().mean(1)
                weight -= group["lr"] * weight.grad / (state["sum"].sqrt() + group["eps"]).unsqueeze(1)
