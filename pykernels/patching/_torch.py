"""The rules for torch.nn."""

from __future__ import annotations

from typing import Any

from torch import nn

from .. import nn as ours
from .registry import Rule, leave, register


def _no_backend(module: nn.Module) -> dict[str, Any]:
    return {"backend": None}


def _ids(module: nn.Module) -> dict[str, Any]:
    return {"backend": None, "bounds_check": "error"}


def _sequence(module: Any) -> dict[str, Any]:
    off = {"layer_norm": False, "zoneout": 0.0, "recurrent_dropout": 0.0, "peephole": False, "recompute": False}
    return {"backend": None, "bounds_check": "error", "_names": list(module._flat_weights_names), **off}


def _linear_cross_entropy(module: nn.Module) -> dict[str, Any]:
    return {"backend": None, "bounds_check": "error", "z_loss": 0.0}


_ACTIVATIONS = ("Sigmoid", "Tanh", "ReLU", "LeakyReLU", "PReLU", "RReLU", "ELU", "GELU", "SiLU", "GLU", "Dropout")
_STACKS = ("TransformerEncoderLayer", "TransformerDecoderLayer", "TransformerEncoder", "TransformerDecoder")
_WITH_BACKEND = ("MultiheadAttention", "RNNCell", "LSTMCell", "GRUCell")
_WITH_IDS = ("Embedding", "EmbeddingBag", "AdaptiveLogSoftmaxWithLoss")

register(
    *(Rule(getattr(nn, name), getattr(ours, name)) for name in (*_ACTIVATIONS, *_STACKS)),
    *(Rule(getattr(nn, name), getattr(ours, name), attributes=_no_backend) for name in _WITH_BACKEND),
    *(Rule(getattr(nn, name), getattr(ours, name), attributes=_ids) for name in _WITH_IDS),
    *(Rule(getattr(nn, name), getattr(ours, name), attributes=_sequence) for name in ("RNN", "LSTM", "GRU")),
)
if hasattr(nn, "LinearCrossEntropyLoss"):  # torch 2.13
    register(Rule(nn.LinearCrossEntropyLoss, ours.LinearCrossEntropyLoss, attributes=_linear_cross_entropy))

for kind in (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict, nn.Transformer):
    leave(kind, "a container: what it holds is listed on its own")
leave(
    nn.CrossEntropyLoss,
    "it is given logits: the layer that makes them cannot be seen from here (pykernels.nn.LinearCrossEntropyLoss "
    "is both in one)",
)
