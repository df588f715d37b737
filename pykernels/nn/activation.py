"""Activation modules: torch.nn's constructors, `extra_repr` and state_dict, with the fused kernels inside; and the
transformer's feed-forward blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import activation as ops
from ..ops.activation.fused import check_block

__all__ = [
    "ELU", "GEGLU", "GELU", "GLU", "MLP", "Bilinear", "Dropout", "GatedMLP", "LeakyReLU", "PReLU", "RReLU", "ReGLU",
    "ReLU", "SiLU", "Sigmoid", "SwiGLU", "Swish", "Tanh",
]  # fmt: skip


class Sigmoid(nn.Sigmoid):
    """`torch.nn.Sigmoid`; see `pykernels.functional.sigmoid`."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.sigmoid(input)


class Tanh(nn.Tanh):
    """`torch.nn.Tanh`; see `pykernels.functional.tanh`."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.tanh(input)


class ReLU(nn.ReLU):
    """`torch.nn.ReLU(inplace=False)`; see `pykernels.functional.relu`."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.relu(input, self.inplace)


class LeakyReLU(nn.LeakyReLU):
    """`torch.nn.LeakyReLU(negative_slope=0.01, inplace=False)`; see `pykernels.functional.leaky_relu`."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.leaky_relu(input, self.negative_slope, self.inplace)


class PReLU(nn.PReLU):
    """`torch.nn.PReLU(num_parameters=1, init=0.25)`; see `pykernels.functional.prelu`."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.prelu(input, self.weight)


class RReLU(nn.RReLU):
    """`torch.nn.RReLU(lower=1/8, upper=1/3, inplace=False)`; see `pykernels.functional.rrelu`."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.rrelu(input, self.lower, self.upper, self.training, self.inplace)


class ELU(nn.ELU):
    """`torch.nn.ELU(alpha=1.0, inplace=False)`; see `pykernels.functional.elu`."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.elu(input, self.alpha, self.inplace)


class GELU(nn.GELU):
    """`torch.nn.GELU(approximate="none")`; see `pykernels.functional.gelu`."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.gelu(input, self.approximate)


class SiLU(nn.SiLU):
    """`torch.nn.SiLU(inplace=False)`; see `pykernels.functional.silu`."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.silu(input, self.inplace)


class Swish(nn.Module):
    """y = x * sigmoid(beta * x); see `pykernels.functional.swish`.

    Args:
        beta: initial value.
        learnable: beta becomes a parameter (state_dict entry "beta"); otherwise it is a constant.
        num_parameters: 1, or the number of channels (dimension 1 of the input); more than 1 needs learnable=True.
        device, dtype: of the parameter.

    Raises:
        ValueError: num_parameters < 1, or > 1 without learnable.
    """

    def __init__(
        self, beta: float = 1.0, learnable: bool = False, num_parameters: int = 1, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        if num_parameters < 1 or (num_parameters > 1 and not learnable):
            raise ValueError(f"Swish: num_parameters must be 1, or more with learnable=True, got {num_parameters}")
        self.init, self.num_parameters = beta, num_parameters
        if learnable:
            self.beta: float | nn.Parameter = nn.Parameter(
                torch.full((num_parameters,), beta, device=device, dtype=dtype)
            )
        else:
            self.beta = beta

    def forward(self, input: Tensor) -> Tensor:
        return ops.swish(input, self.beta)

    def extra_repr(self) -> str:
        learnable = isinstance(self.beta, nn.Parameter)
        return f"beta={self.init}" + (f", learnable=True, num_parameters={self.num_parameters}" if learnable else "")


class GLU(nn.GLU):
    """`torch.nn.GLU(dim=-1)`; see `pykernels.functional.glu`."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.glu(input, self.dim)


class Dropout(nn.Dropout):
    """`torch.nn.Dropout(p=0.5, inplace=False)`: the dropout of `pykernels.functional.bias_activation_dropout` alone. No
    mask is kept, backward makes it again. torch's own serves `inplace`, p = 1 and what is not of floating point."""

    def forward(self, input: Tensor) -> Tensor:
        ours = self.training and 0.0 < self.p < 1.0 and not self.inplace
        if ours and input.is_floating_point() and not input.is_nested:
            return ops.bias_activation_dropout(input, None, "identity", self.p)
        return super().forward(input)


class SwiGLU(nn.Module):
    """silu(gate) * up of two tensors, or of one that holds both halves; see `pykernels.functional.swiglu`."""

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        return ops.swiglu(gate, up)


class ReGLU(nn.Module):
    """relu(gate) * up of two tensors, or of one that holds both halves; see `pykernels.functional.reglu`."""

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        return ops.reglu(gate, up)


class Bilinear(nn.Module):
    """gate * up of two tensors, or of one that holds both halves; see `pykernels.functional.bilinear`."""

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        return ops.bilinear(gate, up)


class GEGLU(nn.Module):
    """gelu(gate) * up of two tensors, or of one that holds both halves; see `pykernels.functional.geglu`.

    Args:
        approximate: "none" or "tanh".
    """

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        self.approximate = approximate

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        return ops.geglu(gate, up, self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"


class MLP(nn.Module):
    """The transformer's feed-forward block, `fc2(dropout(activation(fc1(x))))`; see `pykernels.functional.mlp`.

    state_dict: "fc1.weight" (hidden, in), "fc1.bias", "fc2.weight" (out, hidden), "fc2.bias". The two `nn.Linear` hold
    the parameters and are not called: hooks on them do not run.

    Args:
        in_features, hidden_features: widths.   out_features: default in_features.
        activation: a name of `pykernels.functional.bias_activation_dropout`, not a gated one.
        bias: whether both layers have one.
        dropout: probability of 0 among the activated values, in training.
        save: "preactivation", or "input" to keep less for backward and compute more.
        alpha: of the activations that take a number.
        device, dtype: of the parameters.

    Raises:
        RuntimeError: an unknown activation.   ValueError: a gated one; dropout outside [0, 1), save or alpha wrong.
    """

    _GATED = False
    _PAIRS: tuple[tuple[str, ...], ...] = (
        ("fc1", "fc2"),
        ("c_fc", "c_proj"),
        ("linear1", "linear2"),
        ("w1", "w2"),
        ("wi", "wo"),
    )

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        activation: str = "gelu",
        bias: bool = True,
        dropout: float = 0.0,
        save: str = "preactivation",
        *,
        alpha: float | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.alpha, self.dropout = check_block(type(self).__name__, activation, alpha, dropout, save, self._GATED)
        self.activation, self.save = activation, save
        where = {"bias": bias, "device": device, "dtype": dtype}
        out_features = in_features if out_features is None else out_features
        self.fc1 = nn.Linear(in_features, (2 if self._GATED else 1) * hidden_features, **where)
        self.fc2 = nn.Linear(hidden_features, out_features, **where)

    def forward(self, x: Tensor) -> Tensor:
        return ops.mlp(
            x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, self.activation, self.save,
            p=self.dropout, training=self.training, alpha=self.alpha,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, dropout={self.dropout}, save={self.save!r}"

    @classmethod
    def from_weights(
        cls, weights: Mapping[str, Tensor], prefix: str = "", *, transposed: bool | None = None, **options: Any
    ) -> MLP:
        """A block with a copy of the weights of another implementation: a state_dict, or a part of one by its prefix.

        Names: fc1/fc2, c_fc/c_proj (GPT-2), linear1/linear2 (`nn.TransformerEncoderLayer`), w1/w2, wi/wo (T5), each
        with ".weight" and perhaps ".bias"; others among the prefix's entries are not looked at.

        Args:
            weights: name -> tensor.   prefix: of the names, its dot included ("h.0.mlp.").
            transposed: the weights are (in, out), as those of GPT-2's Conv1D; None: told by the length of the first
                bias (without one: they are (out, in)).
            options: activation, dropout, save, alpha.

        Raises:
            KeyError: no such names.   ValueError: a square weight, and `transposed` is None; weights do not fit.
        """
        names = _find(cls.__name__, weights, prefix, cls._PAIRS)
        if names[0] == f"{prefix}w1" and f"{prefix}w3.weight" in weights:
            raise ValueError(f"{cls.__name__}.from_weights(): w1/w3/w2 are a gated block's; see GatedMLP")
        first, bias1, second, bias2 = _oriented(cls.__name__, weights, names, transposed)
        return cls._filled(first, bias1, second, bias2, options)

    @classmethod
    def _filled(
        cls, first: Tensor, bias1: Tensor | None, second: Tensor, bias2: Tensor | None, options: dict[str, Any]
    ) -> Any:
        hidden = first.shape[0] // 2 if cls._GATED else first.shape[0]
        if second.shape[1] != hidden or (bias1 is None) != (bias2 is None):
            biases = [None if b is None else tuple(b.shape) for b in (bias1, bias2)]
            raise ValueError(
                f"{cls.__name__}.from_weights(): weights {tuple(first.shape)} and {tuple(second.shape)} with biases "
                f"{biases} are not those of one block"
            )
        where = {"bias": bias1 is not None, "device": first.device, "dtype": first.dtype}
        block = cls(first.shape[1], hidden, second.shape[0], **options, **where)
        state = {"fc1.weight": first, "fc1.bias": bias1, "fc2.weight": second, "fc2.bias": bias2}
        block.load_state_dict({name: value for name, value in state.items() if value is not None})
        return block


class GatedMLP(MLP):
    """The gated feed-forward block, `fc2(dropout(activation(gate) * up))` with gate and up the halves of one product;
    see `pykernels.functional.mlp`. Shazeer, "GLU variants improve transformer", 2020.

    Arguments, state_dict and errors as `MLP`, but "fc1.weight" is (2 hidden, in), gate first ("glu": gate second), and
    activation is a gated unit: "swiglu" (default), "geglu", "geglu_tanh", "reglu", "bilinear", "glu".
    """

    _GATED = True
    _TRIPLES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("wi_0", "wi_1", "wo"))
    _PAIRS = (("fc1", "fc2"), ("gate_up_proj", "down_proj"))

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        activation: str = "swiglu",
        bias: bool = False,
        dropout: float = 0.0,
        save: str = "preactivation",
        *,
        alpha: float | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            in_features, hidden_features, out_features, activation, bias, dropout, save,
            alpha=alpha, device=device, dtype=dtype,
        )  # fmt: skip

    @classmethod
    def from_weights(
        cls, weights: Mapping[str, Tensor], prefix: str = "", *, transposed: bool | None = None, **options: Any
    ) -> GatedMLP:
        """As `MLP.from_weights`. Names of three weights, of which gate and up are put into one: gate_proj/up_proj/
        down_proj (Llama, Mistral, Qwen, Gemma), w1/w3/w2 (Llama's own release), wi_0/wi_1/wo (T5 1.1); of two:
        gate_up_proj/down_proj (Phi-3), fc1/fc2. All with the gate first, whatever the unit."""
        try:
            names = _find(cls.__name__, weights, prefix, cls._TRIPLES)
        except KeyError:
            names = _find(cls.__name__, weights, prefix, (*cls._PAIRS, *cls._TRIPLES))
            first, bias1, second, bias2 = _oriented(cls.__name__, weights, names, transposed)
            halves = list(first.chunk(2)), None if bias1 is None else list(bias1.chunk(2))
        else:
            gate, gate_bias, second, bias2 = _oriented(cls.__name__, weights, (names[0], names[2]), transposed)
            up, up_bias, _, _ = _oriented(cls.__name__, weights, (names[1], names[2]), transposed)
            if (gate_bias is None) != (up_bias is None):
                raise ValueError(f"{cls.__name__}.from_weights(): one of {names[0]} and {names[1]} has no bias")
            halves = [gate, up], None if gate_bias is None or up_bias is None else [gate_bias, up_bias]
        order = -1 if options.get("activation") == "glu" else 1
        first, bias1 = (None if half is None else torch.cat(half[::order]) for half in halves)
        block: GatedMLP = cls._filled(first, bias1, second, bias2, options)
        return block


def _find(
    block: str, weights: Mapping[str, Tensor], prefix: str, alternatives: tuple[tuple[str, ...], ...]
) -> tuple[str, ...]:
    """The first of the alternatives that is there, with its prefix."""
    for names in alternatives:
        if all(f"{prefix}{name}.weight" in weights for name in names):
            return tuple(prefix + name for name in names)
    known = ", ".join("/".join(names) for names in alternatives)
    raise KeyError(f"{block}.from_weights(): no weights named {known} after the prefix {prefix!r}")


def _oriented(
    block: str, weights: Mapping[str, Tensor], names: tuple[str, ...], transposed: bool | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """First weight and bias, second weight and bias, the weights as (out, in)."""
    first, second = (weights[f"{name}.weight"] for name in names)
    bias1, bias2 = (weights.get(f"{name}.bias") for name in names)
    if transposed is None:
        transposed = False
        if bias1 is not None:
            fits = [size == len(bias1) for size in first.shape]
            if fits == [True, True]:
                raise ValueError(f"{block}.from_weights(): {names[0]}.weight is square; say whether it is `transposed`")
            transposed = fits == [False, True]
    return (first.t(), bias1, second.t(), bias2) if transposed else (first, bias1, second, bias2)
