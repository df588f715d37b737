"""Optimizers for embedding tables that never see a gradient: backward and step are one fused row update.

    tables = pk.nn.EmbeddingBag(1_000_000, 64, mode="sum")
    sparse = pk.optim.RowWiseAdagrad(tables.parameters(), lr=0.02)
    dense = torch.optim.Adam(mlp.parameters())
    ...
    loss.backward()
    sparse.step(), dense.step()
    sparse.zero_grad(), dense.zero_grad()

They are `torch.optim.Optimizer`s over 2-D parameters that are looked up by `embedding`, `embedding_bag`,
`embedding_bag_multi` or the modules made of them. From the moment an optimizer holds a table, the backward of such a
lookup makes no gradient for it, neither dense nor sparse: it keeps the ids and the gradient of the lookup's *output*
(no copies), and `step()` sums the rows and steps them in one pass (`pykernels.functional.embedding_sgd_`, ...).
Nothing of the table's size is touched, and only rows that were looked up are read or written: the step equals that of
torch's optimizer of the same name with the whole gradient, on those rows. (Where torch's moves rows without a gradient,
by momentum or weight decay, these do not.)

- **Several lookups of one table in a step, gradient accumulation over several backward passes:** all are kept until
  `zero_grad()`, and `step()` steps each row once, by the sum. With two and more of them each is first reduced to the
  rows it touched, in the table's dtype, as a sparse gradient would be.
- **`.grad`** of a table stays None: gradient clipping, hooks on the parameter and DistributedDataParallel do not see
  it. (Shard tables instead of replicating them; see docs/embedding.md.) A gradient that does arrive there - from a use
  other than a lookup, a lookup before the optimizer was made, `backward(create_graph=True)` - is stepped with the
  others; a dense one touches every row.
- **Ids and gradients must keep their values** until the step; in-place writes to them raise RuntimeError. Tables may
  change between forward and backward, as with torch.
- **Learning rate schedulers, parameter groups, closures, hooks, `state_dict`** work as with any torch optimizer.
  States are named as torch's and are float32 for half-precision tables (float64 for float64), saved and loaded as such.
- **`torch.amp.GradScaler`:** `scaler.step(optimizer)` unscales and skips steps that are not finite, without
  `scaler.unscale_(optimizer)`, which has no gradient to work on (`step` raises). The scaler must serve an optimizer of
  ordinary parameters too: it takes its own count of infinities from them.
- **`torch.compile`:** lookups of a table that an optimizer holds leave the graph (`fullgraph=True`: torch's error).
- **`stochastic_rounding=True`**, for bfloat16 tables: steps smaller than half a unit in the last place count in the
  mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .ops._library import draw_seed
from .ops._pending import Positions, Rule, Table, register
from .ops.embedding.update import apply_rule

__all__ = ["SGD", "Adagrad", "Adam", "RowWiseAdagrad"]


class _RowOptimizer(torch.optim.Optimizer):
    """What the optimizers share; a subclass makes the rule of a step and the states it needs."""

    _step_supports_amp_scaling = True  # GradScaler sets grad_scale and found_inf in place of unscaling .grad

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        for name in ("lr", "weight_decay", "eps", "lr_decay", "initial_accumulator_value"):
            if defaults.get(name, 0.0) < 0.0:
                raise ValueError(f"Invalid {name} value: {defaults[name]}; it must not be negative")
        self._tables: dict[Tensor, Table] = {}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            for weight in self.param_groups[-1]["params"]:
                self._add_table(weight, self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    def _add_table(self, weight: Tensor, group: dict[str, Any]) -> None:
        if weight.dim() != 2 or weight.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise ValueError(
                f"{type(self).__name__}: takes embedding tables, 2-D float32, float16, bfloat16 or float64 "
                f"parameters, not {weight.dim()}-D {weight.dtype}"
            )
        if group["stochastic_rounding"] and weight.dtype != torch.bfloat16:
            raise ValueError(f"{type(self).__name__}: stochastic_rounding is for bfloat16 tables, not {weight.dtype}")
        self._tables[weight] = register(weight)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        known = self.__dict__.setdefault("_tables", {})
        for group in self.param_groups:
            group.setdefault("stochastic_rounding", False)  # groups that torch's optimizer saved
            for weight in group["params"]:
                if weight not in known:
                    self._add_table(weight, group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the lookups since the last call, and gradients that arrived in `.grad`."""
        super().zero_grad(set_to_none)
        for table in self._tables.values():
            table.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps the rows that were looked up. Keeps what it used until `zero_grad()`, as torch keeps `.grad`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [
            (group, weight, noted)
            for group in self.param_groups
            for weight in group["params"]
            if (noted := self._noted(weight))
        ]
        if work and (found := getattr(self, "found_inf", None)) is not None:
            scale = getattr(self, "grad_scale", None)
            if scale is None:
                raise RuntimeError(
                    f"{type(self).__name__}: GradScaler.unscale_() was called for this optimizer, whose gradients it "
                    "cannot reach; leave the unscaling to scaler.step(optimizer)"
                )
            work, finite = _unscaled(work, 1.0 / scale.double())
            if float(found) or not finite:
                return loss
        for group, weight, noted in work:
            states, rule = self._rule(weight, group)
            seed = draw_seed(weight) if group["stochastic_rounding"] else None
            apply_rule(weight.detach(), states, noted, rule, seed)
        return loss

    def _noted(self, weight: Tensor) -> list[Positions]:
        noted, gradient = self._tables[weight].positions(), weight.grad
        if gradient is None:
            return noted
        if gradient.is_sparse:
            return [*noted, Positions(gradient._indices()[0], gradient._values())]
        return [*noted, Positions(torch.arange(weight.shape[0], device=weight.device), gradient)]

    def _rule(self, weight: Tensor, group: dict[str, Any]) -> tuple[tuple[Tensor, ...], Rule]:
        raise NotImplementedError

    def _state(self, weight: Tensor, value: float, *names: str, by_row: bool = False) -> tuple[int, list[Tensor]]:
        """Number of this step, from 1, and the states, made at the first one."""
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros(())
            dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
            shape = weight.shape[:1] if by_row else weight.shape
            for name in names:
                state[name] = torch.full(shape, value, dtype=dtype, device=weight.device)
        state["step"] += 1
        return int(state["step"]), [state[name] for name in names]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but states keep the dtype they were saved in (torch casts them to the parameter's)."""
        super().load_state_dict(state_dict)
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        weights = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, weight in zip(numbers, weights, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor) and self.state[weight][name].dtype != value.dtype:
                    self.state[weight][name] = value.to(weight.device, copy=True)


def _unscaled(work: list[Any], factor: Tensor) -> tuple[list[Any], bool]:
    """The same work with its gradients multiplied by `factor`, and whether all of them are finite."""
    found, finite = [], True
    for group, weight, noted in work:
        scaled = []
        for at in noted:
            dy = at.dy * factor.to(at.dy.device, at.dy.dtype if at.dy.dtype == torch.float64 else torch.float32)
            finite = finite and bool(dy.isfinite().all())
            values = {**at.__dict__, "dy": dy.to(at.dy.dtype)}
            scaled.append(Positions(**values))
        found.append((group, weight, scaled))
    return found, finite


class SGD(_RowOptimizer):
    """Stochastic gradient descent on the rows that were looked up: `pykernels.functional.embedding_sgd_`.

    Args:
        params: tables (2-D parameters) or groups of them, as for any torch optimizer.
        lr, weight_decay: as torch.optim.SGD's; weight decay acts on the rows that were looked up.
        stochastic_rounding: for bfloat16 tables.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.0,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "stochastic_rounding": stochastic_rounding})

    def _rule(self, weight: Tensor, group: dict[str, Any]) -> tuple[tuple[Tensor, ...], Rule]:
        return (), Rule("sgd", float(group["lr"]), group["weight_decay"])


class Adagrad(_RowOptimizer):
    """Adagrad on the rows that were looked up: `pykernels.functional.embedding_adagrad_`.

    Args:
        params: tables (2-D parameters) or groups of them.
        lr, lr_decay, weight_decay, initial_accumulator_value, eps: as torch.optim.Adagrad's.
        stochastic_rounding: for bfloat16 tables.
    """

    _name, _by_row = "adagrad", False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        stochastic_rounding: bool = False,
    ) -> None:
        numbers = {"lr": lr, "lr_decay": lr_decay, "weight_decay": weight_decay, "eps": eps}
        more = {"initial_accumulator_value": initial_accumulator_value, "stochastic_rounding": stochastic_rounding}
        super().__init__(params, {**numbers, **more})

    def _rule(self, weight: Tensor, group: dict[str, Any]) -> tuple[tuple[Tensor, ...], Rule]:
        step, states = self._state(weight, group["initial_accumulator_value"], "sum", by_row=self._by_row)
        lr = float(group["lr"]) / (1 + (step - 1) * group["lr_decay"])
        return tuple(states), Rule(self._name, lr, group["weight_decay"], group["eps"])


class RowWiseAdagrad(Adagrad):
    """Adagrad with one state a row, the mean square of its gradient: `pykernels.functional.embedding_rowwise_adagrad_`.

    Arguments as `Adagrad`. The usual choice for recommendation models: the state is D times as small as Adagrad's.
    """

    _name, _by_row = "rowwise_adagrad", True


class Adam(_RowOptimizer):
    """Lazy Adam: torch.optim.Adam's step on the rows that were looked up: `pykernels.functional.embedding_adam_`.

    Rows that were not looked up keep their moments (as with torch.optim.SparseAdam); the correction of the moments
    counts the steps of the table.

    Args:
        params: tables (2-D parameters) or groups of them.
        lr, betas, eps, weight_decay: as torch.optim.Adam's.
        stochastic_rounding: for bfloat16 tables.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        stochastic_rounding: bool = False,
    ) -> None:
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"Invalid betas value: {betas}; both must be in [0, 1)")
        numbers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**numbers, "stochastic_rounding": stochastic_rounding})

    def _rule(self, weight: Tensor, group: dict[str, Any]) -> tuple[tuple[Tensor, ...], Rule]:
        step, states = self._state(weight, 0.0, "exp_avg", "exp_avg_sq")
        rule = Rule("adam", float(group["lr"]), group["weight_decay"], group["eps"], tuple(group["betas"]), step)
        return tuple(states), rule
