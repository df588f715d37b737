"""What `pykernels.patch` makes of Transformers' modules: activations, gated feed-forward blocks, a model's attention.

Nearly every model file has a feed-forward class of its own, copied from a few. They are told by the compiled code of
their `forward`: where it is that of a known block, the class computes what the block computes; any other is left.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from inspect import CO_VARARGS, CO_VARKEYWORDS
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, activations

from ...ops.activation import geglu, gelu, reglu, silu, swiglu, swish
from ...patching import Rule, has_hooks
from ...patching.registry import is_ours
from . import NAME, register


class SiLUActivation(activations.SiLUActivation):
    def forward(self, input: Tensor) -> Tensor:
        return silu(input)


class GELUActivation(activations.GELUActivation):
    def forward(self, input: Tensor) -> Tensor:
        return gelu(input)


class GELUTanh(activations.GELUTanh):
    def forward(self, input: Tensor) -> Tensor:
        return gelu(input, "tanh")


class NewGELUActivation(activations.NewGELUActivation):
    def forward(self, input: Tensor) -> Tensor:
        return gelu(input, "tanh")


class FastGELUActivation(activations.FastGELUActivation):
    def forward(self, input: Tensor) -> Tensor:
        return gelu(input, "tanh")


class AccurateGELUActivation(activations.AccurateGELUActivation):
    def forward(self, input: Tensor) -> Tensor:
        return gelu(input, "tanh")


class QuickGELUActivation(activations.QuickGELUActivation):
    def forward(self, input: Tensor) -> Tensor:
        return swish(input, 1.702)


ACTIVATIONS = (
    SiLUActivation,
    GELUActivation,
    GELUTanh,
    NewGELUActivation,
    FastGELUActivation,
    AccurateGELUActivation,
    QuickGELUActivation,
)
_TANH = (
    activations.GELUTanh,
    activations.NewGELUActivation,
    activations.FastGELUActivation,
    activations.AccurateGELUActivation,
)


def _gate(activation: nn.Module) -> str | None:
    """The gated kernel for an activation module, as a name that can be copied and pickled with the module.

    Of exactly these classes and ours of them: a subclass, or an instance of another forward, may compute anything.
    """
    kind = type(activation)
    if is_ours(kind):
        kind = kind.__bases__[0]
    if "forward" in activation.__dict__:
        return None
    if kind in (activations.SiLUActivation, nn.SiLU):
        return "swiglu"
    if kind in _TANH or (kind is nn.GELU and activation.approximate == "tanh"):
        return "geglu_tanh"
    if kind in (activations.GELUActivation, nn.GELU):
        return "geglu"
    return "reglu" if kind is nn.ReLU else None


def _geglu_tanh(gate: Tensor, up: Tensor | None = None) -> Tensor:
    return geglu(gate, up, "tanh")


_GATES: dict[str, Callable[..., Tensor]] = {
    "swiglu": swiglu,
    "geglu": geglu,
    "geglu_tanh": _geglu_tanh,
    "reglu": reglu,
}


# The blocks as Transformers writes them. Their code is compared, never run.


def _llama(self, x):  # type: ignore[no-untyped-def]
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj


def _qwen2(self, hidden_state):  # type: ignore[no-untyped-def]
    return self.down_proj(self.act_fn(self.gate_proj(hidden_state)) * self.up_proj(hidden_state))


def _phi3(self, hidden_states):  # type: ignore[no-untyped-def]
    up_states = self.gate_up_proj(hidden_states)

    gate, up_states = up_states.chunk(2, dim=-1)
    up_states = up_states * self.activation_fn(gate)

    return self.down_proj(up_states)


def _t5(self, hidden_states):  # type: ignore[no-untyped-def]
    hidden_gelu = self.act(self.wi_0(hidden_states))
    hidden_linear = self.wi_1(hidden_states)
    hidden_states = hidden_gelu * hidden_linear
    hidden_states = self.dropout(hidden_states)

    if (
        isinstance(self.wo.weight, torch.Tensor)
        and hidden_states.dtype != self.wo.weight.dtype
        and self.wo.weight.dtype != torch.int8
    ):
        hidden_states = hidden_states.to(self.wo.weight.dtype)

    hidden_states = self.wo(hidden_states)
    return hidden_states


class _Llama:
    """Also Mistral, Gemma, Qwen and most others. The input may be named in the call, as in the class it replaces."""

    def forward(self: Any, *given: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*given, *named.values())
        return self.down_proj(_GATES[self._pykernels_gate](self.gate_proj(x), self.up_proj(x)))


class _Phi3:
    """Both projections in one; its halves are read where they lie."""

    def forward(self: Any, *given: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*given, *named.values())
        return self.down_proj(_GATES[self._pykernels_gate](self.gate_up_proj(x)))


class _T5:
    def forward(self: Any, *given: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*given, *named.values())
        x = self.dropout(_GATES[self._pykernels_gate](self.wi_0(x), self.wi_1(x)))
        weight = self.wo.weight
        if isinstance(weight, Tensor) and x.dtype != weight.dtype and weight.is_floating_point():
            x = x.to(weight.dtype)  # kept in float32 by some checkpoints
        return self.wo(x)


BLOCKS: tuple[tuple[Any, type, str], ...] = (  # what it looks like, ours, its activation's name
    (_llama, _Llama, "act_fn"),
    (_qwen2, _Llama, "act_fn"),
    (_phi3, _Phi3, "activation_fn"),
    (_t5, _T5, "act"),
)


def _same_code(one: CodeType, two: CodeType) -> bool:
    """Whether two functions of one argument do the same, whatever their local variables are called."""
    names = ("co_code", "co_names", "co_consts", "co_argcount", "co_kwonlyargcount", "co_freevars")
    starred = CO_VARARGS | CO_VARKEYWORDS
    same = all(getattr(one, name) == getattr(two, name) for name in names)
    return same and one.co_flags & starred == two.co_flags & starred


def rule_for(kind: type[nn.Module]) -> Rule | None:
    """The rule for a feed-forward class that is one of the known blocks; None for any other class."""
    forward = kind.forward
    if not isinstance(forward, FunctionType):
        return None
    for block, ours, activation in BLOCKS:
        if _same_code(forward.__code__, block.__code__):

            def why_not(module: nn.Module, name: str = activation) -> str | None:
                inner = getattr(module, name)
                if not isinstance(inner, nn.Module) or _gate(inner) is None:
                    return f"no gated kernel for its activation {type(inner).__name__}"
                return f"its {name} has hooks" if has_hooks(inner) else None

            def attributes(module: nn.Module, name: str = activation) -> dict[str, Any]:
                return {"_pykernels_gate": _gate(getattr(module, name))}

            return Rule(kind, _target(kind, ours), why_not, attributes)
    return None


def _target(kind: type[nn.Module], ours: type) -> type[nn.Module]:
    """`kind` with our forward, under a name by which pickle finds it again (see `__getattr__`)."""
    name = f"{kind.__module__}.{kind.__qualname__}".replace(".", "__")
    if name not in globals():
        made = type(
            kind.__name__, (ours, kind), {"__module__": __name__, "__qualname__": name, "__doc__": kind.__doc__}
        )
        globals()[name] = made
    return globals()[name]


def __getattr__(name: str) -> Any:
    """A class of `_target` that this process has not made yet: a pickled model is being loaded."""
    if name.startswith("transformers__"):
        *path, leaf = name.split("__")
        rule = rule_for(getattr(importlib.import_module(".".join(path)), leaf))
        if rule is not None:
            return rule.target
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _models(model: nn.Module) -> dict[str, PreTrainedModel]:
    return {name: part for name, part in model.named_modules() if isinstance(part, PreTrainedModel)}


def _why_no_attention(model: nn.Module) -> str | None:
    chosen = model.config._attn_implementation
    if chosen in ("sdpa", NAME):
        return None
    return f"its attention was chosen as {chosen!r}; model.set_attn_implementation({NAME!r}) changes that"


def _use_attention(model: Any) -> dict[str, str]:
    """Switches "sdpa" to ours, in the parts of the model too; returns what was there."""
    before = {name: part.config._attn_implementation for name, part in _models(model).items()}
    register()
    for name, part in _models(model).items():
        if before[name] == "sdpa":
            part.config._attn_implementation = NAME
    return {name: chosen for name, chosen in before.items() if chosen == "sdpa"}


def _use_attention_before(model: Any, saved: dict[str, str]) -> None:
    for name, chosen in saved.items():
        model.get_submodule(name).config._attn_implementation = chosen


def patch_rules() -> list[Rule]:
    attention = Rule(
        PreTrainedModel,
        None,
        why_not=_why_no_attention,
        apply=_use_attention,
        restore=_use_attention_before,
        subclasses=True,
    )
    return [attention, *(Rule(ours.__bases__[0], ours) for ours in ACTIVATIONS)]
