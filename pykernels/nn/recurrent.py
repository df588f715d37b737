"""Recurrent modules: torch.nn's constructors, parameters and state_dict, on our functions.

The sequence modules derive from `torch.nn.RNNBase` and not from `torch.nn.LSTM` etc., which torch.compile refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..ops import _autocast
from ..ops import recurrent as ops

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]


def _adopt(new: nn.Module, module: nn.Module) -> None:
    """Makes `new` hold the very parameters and the training mode of `module`."""
    for name, parameter in module.named_parameters():
        setattr(new, name, parameter)
    new.train(module.training)


def _cell_forward(
    self: nn.RNNCellBase, function: Callable[..., Any], input: Tensor, hx: Any, states: int
) -> tuple[Tensor, ...]:
    """One step with torch's shape rules: (I,) or (B, I), missing states are zeros. Always a tuple of states."""
    name = type(self).__name__
    if input.dim() not in (1, 2):
        raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
    batched = input.dim() == 2
    if not batched:
        input = input.unsqueeze(0)
    if hx is None:
        hx = (input.new_zeros(input.shape[0], self.hidden_size),) * states
    else:
        hx = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        for i, h in enumerate(hx):
            if h.dim() not in (1, 2):
                where = "hidden" if states == 1 else f"hx[{i}]"
                raise ValueError(f"{name}: Expected {where} to be 1D or 2D, got {h.dim()}D instead")
        hx = hx if batched else tuple(h.unsqueeze(0) for h in hx)
    weights = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
    out = function(input, hx[0] if states == 1 else hx, *weights, backend=self.backend)
    out = (out,) if states == 1 else out
    return out if batched else tuple(h.squeeze(0) for h in out)


class RNNCell(nn.RNNCell):
    """One step of a vanilla RNN; `torch.nn.RNNCell` with its constructor, plus keyword-only `backend`.

    Shapes: input Tensor[B, I] or Tensor[I], hx Tensor[B, H] or Tensor[H] -> shaped as hx. Errors as `rnn_tanh_cell`.
    """

    def __init__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.backend = backend

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"RNNCell: nonlinearity must be 'tanh' or 'relu', not {self.nonlinearity!r}")
        function = ops.rnn_tanh_cell if self.nonlinearity == "tanh" else ops.rnn_relu_cell
        return _cell_forward(self, function, input, hx, 1)[0]

    @classmethod
    def from_torch(cls, module: nn.RNNCell, *, backend: str | None = None) -> RNNCell:
        """An RNNCell with the options and the very parameters of a `torch.nn.RNNCell`."""
        size = module.input_size, module.hidden_size
        new = cls(*size, module.bias, module.nonlinearity, device="meta", backend=backend)
        _adopt(new, module)
        return new


class LSTMCell(nn.LSTMCell):
    """One step of an LSTM; `torch.nn.LSTMCell` with its constructor, plus keyword-only `backend`.

    Shapes: input Tensor[B, I] or Tensor[I], hx a pair of Tensor[B, H] or Tensor[H] -> a pair like hx. Errors as
    `lstm_cell`.
    """

    def __init__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.backend = backend

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        h, c = _cell_forward(self, ops.lstm_cell, input, hx, 2)
        return h, c

    @classmethod
    def from_torch(cls, module: nn.LSTMCell, *, backend: str | None = None) -> LSTMCell:
        """An LSTMCell with the options and the very parameters of a `torch.nn.LSTMCell`."""
        new = cls(module.input_size, module.hidden_size, module.bias, device="meta", backend=backend)
        _adopt(new, module)
        return new


class GRUCell(nn.GRUCell):
    """One step of a GRU; `torch.nn.GRUCell` with its constructor, plus keyword-only `backend`.

    Shapes: input Tensor[B, I] or Tensor[I], hx Tensor[B, H] or Tensor[H] -> shaped as hx. Errors as `gru_cell`.
    """

    def __init__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.backend = backend

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return _cell_forward(self, ops.gru_cell, input, hx, 1)[0]

    @classmethod
    def from_torch(cls, module: nn.GRUCell, *, backend: str | None = None) -> GRUCell:
        """A GRUCell with the options and the very parameters of a `torch.nn.GRUCell`."""
        new = cls(module.input_size, module.hidden_size, module.bias, device="meta", backend=backend)
        _adopt(new, module)
        return new


class _Sequence(nn.RNNBase):
    """What RNN, LSTM and GRU share: layouts in, layouts out. `states` is how many tensors the state has."""

    states = 1

    def __init__(self, mode: str, *args: Any, backend: str | None = None, **kwargs: Any) -> None:
        super().__init__(mode, *args, **kwargs)
        self.backend = backend

    def _call(self, input: Tensor, hx: Any, **options: Any) -> tuple[Any, Any]:
        raise NotImplementedError

    def _options(self) -> dict[str, Any]:
        return {
            "num_layers": self.num_layers,
            "bidirectional": self.bidirectional,
            "dropout": self.dropout,
            "training": self.training,
            "backend": self.backend,
        }

    def _flat(self) -> list[Tensor]:
        # Read from the module and not from torch's cached list: right under functional_call and parametrisation.
        return [getattr(self, name) for name in self._flat_weights_names]

    def _check_input(self, input: Tensor) -> None:
        dtype = getattr(self, self._flat_weights_names[0]).dtype
        if input.dtype != dtype and not _autocast.enabled(input.device):
            raise ValueError(f"RNN input dtype ({input.dtype}) does not match weight dtype ({dtype})")
        if input.size(-1) != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.size(-1)}"
            )

    def _unbatched_state(self, hx: Any) -> Any:
        hx = (hx,) if self.states == 1 else hx
        for h in hx:
            if h.dim() != 2:
                raise RuntimeError(f"For unbatched 2-D input, hx should also be 2-D but got {h.dim()}-D tensor")
        hx = tuple(h.unsqueeze(1) for h in hx)
        return hx[0] if self.states == 1 else hx

    def _map(self, state: Any, function: Callable[[Tensor], Tensor]) -> Any:
        return function(state) if self.states == 1 else tuple(function(s) for s in state)

    def forward(self, input: Any, hx: Any = None, *, lengths: Tensor | None = None) -> tuple[Any, Any]:
        """Runs the sequences.

        Args:
            input: Tensor[T, B, I] (Tensor[B, T, I] with batch_first), Tensor[T, I], or a PackedSequence.
            hx: the initial state, zeros by default: Tensor[num_layers * directions, B, H], without B for unbatched
                input; for LSTM a pair (h_0, c_0), h_0 of the projections' size if there are any.
            lengths: Tensor[B] of the sequences' lengths, in any order; padded input only. See
                `pykernels.functional.lstm`.

        Returns:
            (output, final state), laid out as `input` and `hx`.
        """
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError(f"{type(self).__name__}: lengths must be None with a PackedSequence")
            return self._packed(input, hx)
        if input.dim() not in (2, 3):
            raise ValueError(f"{type(self).__name__}: Expected input to be 2D or 3D, got {input.dim()}D instead")
        self._check_input(input)
        if input.dim() == 3:
            return self._call(input, hx, lengths=lengths, batch_first=self.batch_first, **self._options())
        hx = None if hx is None else self._unbatched_state(hx)
        if lengths is not None:
            lengths = lengths.reshape(1)
        output, state = self._call(input.unsqueeze(1), hx, lengths=lengths, **self._options())
        return output.squeeze(1), self._map(state, lambda s: s.squeeze(1))

    def _packed(self, input: PackedSequence, hx: Any) -> tuple[Any, Any]:
        data, batch_sizes, order, back = input
        self._check_input(data)
        if hx is not None and order is not None:
            hx = self._map(hx, lambda s: s.index_select(1, order))
        output, state = self._call(data, hx, batch_sizes=batch_sizes, **self._options())
        if back is not None:
            state = self._map(state, lambda s: s.index_select(1, back))
        return PackedSequence(output, batch_sizes, order, back), state

    @classmethod
    def from_torch(cls, module: Any, *, backend: str | None = None) -> Any:
        """A module with the options and the very parameters of torch.nn's module of the same name."""
        options = {name: getattr(module, name) for name in ("bias", "batch_first", "dropout", "bidirectional")}
        if module.proj_size:
            options["proj_size"] = module.proj_size
        if hasattr(module, "nonlinearity"):
            options["nonlinearity"] = module.nonlinearity
        size = module.input_size, module.hidden_size, module.num_layers
        new = cls(*size, **options, device="meta", backend=backend)
        _adopt(new, module)
        return new


class RNN(_Sequence):
    """Vanilla RNN; `torch.nn.RNN` with its constructor, plus keyword-only `backend`. See `forward` for shapes.

    Errors as `pykernels.functional.rnn`; ValueError for an unknown `nonlinearity` or a wrong input dtype.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        self.nonlinearity = nonlinearity
        super().__init__(f"RNN_{nonlinearity.upper()}", input_size, hidden_size, num_layers, *args, **kwargs)

    def _call(self, input: Tensor, hx: Any, **options: Any) -> tuple[Any, Any]:
        return ops.rnn(input, hx, self._flat(), nonlinearity=self.nonlinearity, **options)


class LSTM(_Sequence):
    """LSTM; `torch.nn.LSTM` with its constructor, plus keyword-only `backend`. See `forward` for shapes.

    Errors as `pykernels.functional.lstm`; ValueError for a wrong input dtype.
    """

    states = 2

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)

    def _call(self, input: Tensor, hx: Any, **options: Any) -> tuple[Any, Any]:
        return ops.lstm(input, hx, self._flat(), proj_size=self.proj_size, **options)


class GRU(_Sequence):
    """GRU; `torch.nn.GRU` with its constructor, plus keyword-only `backend`. See `forward` for shapes.

    Errors as `pykernels.functional.gru`; ValueError for a wrong input dtype.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__("GRU", *args, **kwargs)

    def _call(self, input: Tensor, hx: Any, **options: Any) -> tuple[Any, Any]:
        return ops.gru(input, hx, self._flat(), **options)
