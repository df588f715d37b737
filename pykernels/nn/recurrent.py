"""Recurrent modules: torch.nn's constructors, parameters and state_dict, on our functions.

The sequence modules derive from `torch.nn.RNNBase` and not from `torch.nn.LSTM` etc., which torch.compile refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.rnn import PackedSequence

from ..ops import _autocast
from ..ops import recurrent as ops
from ..ops.recurrent import extra_names

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]


def _check_class(kind: type[nn.Module], module: Any) -> None:
    if not isinstance(module, kind):
        given = type(module).__name__
        raise TypeError(f"from_torch(): argument 'module' must be torch.nn.{kind.__name__}, not {given}")
    if is_parametrized(module):
        raise ValueError("from_torch(): argument 'module' has parametrizations; pykernels.patch() keeps them")


def _adopt(new: nn.Module, module: nn.Module) -> None:
    """Makes `new` hold the very parameters and the training mode of `module`."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
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
        """An RNNCell with the options and the very parameters of a `torch.nn.RNNCell` (TypeError for another;
        ValueError where it has parametrizations)."""
        _check_class(nn.RNNCell, module)
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
        """An LSTMCell with the options and the very parameters of a `torch.nn.LSTMCell` (TypeError for another;
        ValueError where it has parametrizations)."""
        _check_class(nn.LSTMCell, module)
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
        """A GRUCell with the options and the very parameters of a `torch.nn.GRUCell` (TypeError for another;
        ValueError where it has parametrizations)."""
        _check_class(nn.GRUCell, module)
        new = cls(module.input_size, module.hidden_size, module.bias, device="meta", backend=backend)
        _adopt(new, module)
        return new


# The options that torch.nn has not, with what switches them off.
_OPTIONS: dict[str, Any] = {
    "layer_norm": False,
    "zoneout": 0.0,
    "recurrent_dropout": 0.0,
    "peephole": False,
    "recompute": False,
}
_EXTRA_NAMES = {
    "peephole": "weight_peephole",
    "norm_ih": "weight_norm_ih",
    "norm_hh": "weight_norm_hh",
    "norm_c": "weight_norm_c",
    "norm_c_bias": "bias_norm_c",
}


class _Sequence(nn.RNNBase):
    """What RNN, LSTM and GRU share: layouts in, layouts out. `states` is how many tensors the state has, `twin` torch's
    module of the same name."""

    states = 1
    gates = 1
    twin: type[nn.RNNBase] = nn.RNN

    def __init__(
        self, mode: str, *args: Any, bounds_check: str = "error", backend: str | None = None, **kwargs: Any
    ) -> None:
        chosen = {name: kwargs.pop(name, off) for name, off in _OPTIONS.items()}
        super().__init__(mode, *args, **kwargs)
        self.bounds_check, self.backend = bounds_check, backend
        for name, value in chosen.items():
            setattr(self, name, value)
        if self.peephole and mode != "LSTM":
            raise ValueError("peephole argument is only supported for LSTM, not RNN or GRU")
        self._check_probabilities()
        self._names = self._add_parameters()

    def _check_probabilities(self) -> None:
        """As torch checks `dropout`: when the module is made."""
        pair = self.mode == "LSTM" and isinstance(self.zoneout, (tuple, list)) and len(self.zoneout) == 2
        for name, values in (("zoneout", self.zoneout if pair else (self.zoneout,)),
                             ("recurrent_dropout", (self.recurrent_dropout,))):  # fmt: skip
            for value in values:
                if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
                    raise ValueError(f"{name} should be a number in range [0, 1] being a probability, not {value!r}")

    def _add_parameters(self) -> list[str]:
        """Adds what the options need; returns the names of all parameters in the order of the flat weights."""
        like, hidden = getattr(self, self._flat_weights_names[0]), self.hidden_size
        rows = self.num_layers * (2 if self.bidirectional else 1)
        each, names = len(self._flat_weights_names) // rows, []
        sizes = {"peephole": 3 * hidden, "norm_c": hidden, "norm_c_bias": hidden}
        extra = extra_names(self.mode.lower(), False, self.peephole, self.layer_norm)
        for k in range(rows):
            names += self._flat_weights_names[k * each : (k + 1) * each]
            suffix = names[-1][names[-1].index("_l") :]
            for key in extra:
                name = _EXTRA_NAMES[key] + suffix
                self.register_parameter(name, nn.Parameter(like.new_empty(sizes.get(key, self.gates * hidden))))
                names.append(name)
        if extra:
            self.reset_parameters()
        return names

    def reset_parameters(self) -> None:
        """As torch.nn's; gains of layer normalisation are 1, its offset 0."""
        super().reset_parameters()
        for name, parameter in self.named_parameters():
            if "_norm_" in name:
                nn.init.constant_(parameter, float(name.startswith("weight")))

    def extra_repr(self) -> str:
        changed = [f", {name}={getattr(self, name)}" for name, off in _OPTIONS.items() if getattr(self, name) != off]
        return super().extra_repr() + "".join(changed)

    def _call(self, input: Tensor, hx: Any, **options: Any) -> tuple[Any, Any]:
        raise NotImplementedError

    def _options(self) -> dict[str, Any]:
        return {
            "num_layers": self.num_layers,
            "bidirectional": self.bidirectional,
            "dropout": self.dropout,
            "training": self.training,
            "layer_norm": self.layer_norm,
            "zoneout": self.zoneout,
            "recurrent_dropout": self.recurrent_dropout,
            "recompute": self.recompute,
            "bounds_check": self.bounds_check,
            "backend": self.backend,
        }

    def _flat(self) -> list[Tensor]:
        # Read from the module and not from torch's cached list: right under functional_call and parametrisation.
        return [getattr(self, name) for name in self._names]

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
            if not isinstance(h, Tensor):
                raise TypeError(f"{type(self).__name__}: hx must be made of Tensor, not {type(h).__name__}")
            if h.dim() != 2:
                raise RuntimeError(f"For unbatched 2-D input, hx should also be 2-D but got {h.dim()}-D tensor")
        hx = tuple(h.unsqueeze(1) for h in hx)
        return hx[0] if self.states == 1 else hx

    def _map(self, state: Any, function: Callable[[Tensor], Tensor]) -> Any:
        return function(state) if self.states == 1 else tuple(function(s) for s in state)

    def forward(
        self, input: Any, hx: Any = None, *, lengths: Tensor | None = None, resets: Tensor | None = None
    ) -> tuple[Any, Any]:
        """Runs the sequences.

        Args:
            input: Tensor[T, B, I] (Tensor[B, T, I] with batch_first), Tensor[T, I], or a PackedSequence.
            hx: the initial state, zeros by default: Tensor[num_layers * directions, B, H], without B for unbatched
                input; for LSTM a pair (h_0, c_0), h_0 of the projections' size if there are any.
            lengths: Tensor[B] of the sequences' lengths, in any order; padded input only.
            resets: bool, of the input's shape without its last dimension (of a PackedSequence: of its data's), True
                where the sequence is cut before the step. For both see `pykernels.functional.lstm`.

        Returns:
            (output, final state), laid out as `input` and `hx`.
        """
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError(f"{type(self).__name__}: lengths must be None with a PackedSequence")
            return self._packed(input, hx, resets)
        if not isinstance(input, Tensor):
            raise TypeError(
                f"{type(self).__name__}: input must be Tensor or PackedSequence, not {type(input).__name__}"
            )
        if input.dim() not in (2, 3):
            raise ValueError(f"{type(self).__name__}: Expected input to be 2D or 3D, got {input.dim()}D instead")
        self._check_input(input)
        if input.dim() == 3:
            given = self._options()
            return self._call(input, hx, lengths=lengths, resets=resets, batch_first=self.batch_first, **given)
        hx = None if hx is None else self._unbatched_state(hx)
        lengths, resets = (
            None if lengths is None else lengths.reshape(1),
            None if resets is None else resets.unsqueeze(1),
        )
        output, state = self._call(input.unsqueeze(1), hx, lengths=lengths, resets=resets, **self._options())
        return output.squeeze(1), self._map(state, lambda s: s.squeeze(1))

    def _packed(self, input: PackedSequence, hx: Any, resets: Tensor | None) -> tuple[Any, Any]:
        data, batch_sizes, order, back = input
        self._check_input(data)
        if hx is not None and order is not None:
            hx = self._map(hx, lambda s: s.index_select(1, order))
        output, state = self._call(data, hx, batch_sizes=batch_sizes, resets=resets, **self._options())
        if back is not None:
            state = self._map(state, lambda s: s.index_select(1, back))
        return PackedSequence(output, batch_sizes, order, back), state

    @classmethod
    def from_torch(
        cls,
        module: Any,
        *,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        recompute: bool = False,
        backend: str | None = None,
    ) -> Any:
        """A module with the options and the very parameters of torch.nn's module of the same name.

        The other arguments are those that need no parameters. TypeError for another module; ValueError
        for one with parametrizations.
        """
        _check_class(cls.twin, module)
        options = {name: getattr(module, name) for name in ("bias", "batch_first", "dropout", "bidirectional")}
        options |= {"zoneout": zoneout, "recurrent_dropout": recurrent_dropout, "recompute": recompute}
        if module.proj_size:
            options["proj_size"] = module.proj_size
        if hasattr(module, "nonlinearity"):
            options["nonlinearity"] = module.nonlinearity
        size = module.input_size, module.hidden_size, module.num_layers
        new = cls(*size, **options, device="meta", backend=backend)
        _adopt(new, module)
        return new


class RNN(_Sequence):
    """Vanilla RNN; `torch.nn.RNN` with its constructor. See `forward` for shapes.

    Keyword-only beside it: `layer_norm`, `zoneout`, `recurrent_dropout`, `recompute`, `bounds_check` and `backend`, as
    `pykernels.functional.rnn` has them; parameters of layer normalisation are `weight_norm_ih_l0`, `weight_norm_hh_l0`.

    Errors as `pykernels.functional.rnn`; ValueError for an unknown `nonlinearity`, a wrong input dtype, and, when made,
    for a probability outside [0, 1].
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
    """LSTM; `torch.nn.LSTM` with its constructor. See `forward` for shapes.

    Keyword-only beside it: `layer_norm`, `zoneout`, `recurrent_dropout`, `peephole`, `recompute`, `bounds_check` and
    `backend`, as `pykernels.functional.lstm` has them. They add the parameters `weight_peephole_l0`, and
    `weight_norm_ih_l0`, `weight_norm_hh_l0`, `weight_norm_c_l0`, `bias_norm_c_l0`.

    Errors as `pykernels.functional.lstm`; ValueError for a wrong input dtype and, when made, for a probability outside
    [0, 1].
    """

    states = 2
    gates = 4
    twin = nn.LSTM

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)

    def _call(self, input: Tensor, hx: Any, **options: Any) -> tuple[Any, Any]:
        return ops.lstm(input, hx, self._flat(), proj_size=self.proj_size, peephole=self.peephole, **options)


class GRU(_Sequence):
    """GRU; `torch.nn.GRU` with its constructor. See `forward` for shapes. Options as `RNN`.

    Errors as `pykernels.functional.gru`; ValueError for a wrong input dtype and, when made, for a probability outside
    [0, 1].
    """

    gates = 3
    twin = nn.GRU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__("GRU", *args, **kwargs)

    def _call(self, input: Tensor, hx: Any, **options: Any) -> tuple[Any, Any]:
        return ops.gru(input, hx, self._flat(), **options)
