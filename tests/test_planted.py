"""The suite can fail: kernels with planted mistakes, each of which the contract must find."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import DEVICE
from torch import Tensor

from pykernels.ops.activation import _functions as fn
from pykernels.ops.embedding import interaction, multi, update
from pykernels.testing.compare import assert_equal, compare
from pykernels.testing.run import check_case
from pykernels.testing.spec import OpSpec, load

NAME = {(s.name, tuple(s.cases[0].options.values())): s for s in load("activation")}
GELU, SWIGLU, GLU = NAME["gelu", ()], NAME["swiglu", ()], NAME["glu", (-1,)]
FUSED, MLP = (next(s for s in load("activation") if s.name == name) for name in ("bias_activation_dropout", "mlp"))
UPDATES = {s.name: s for s in load("embedding") if not s.differentiable}
TABLES, INTERACTION = (
    next(s for s in load("embedding") if s.name == name) for name in ("embedding_bag_multi", "dot_interaction")
)
BACKEND = "cpu" if DEVICE == "cpu" else "triton"


def caught(spec: OpSpec, dtype: torch.dtype = torch.float32) -> bool:
    return not all(c.passed for case in spec.cases for c in check_case(spec, case, BACKEND, dtype, DEVICE))


@pytest.fixture
def plant(
    monkeypatch: pytest.MonkeyPatch, poisoned: None
) -> Iterator[Callable[[dict[str, Any], Callable[..., Any]], None]]:
    """plant(kernel table, wrong): the table's kernel becomes wrong(kernel, *arguments)."""

    def planting(table: dict[str, Any], wrong: Callable[..., Any]) -> None:
        kernel = table[BACKEND]
        monkeypatch.setitem(table, BACKEND, lambda *arguments: wrong(kernel, *arguments))

    yield planting


def test_the_right_kernels_pass() -> None:
    assert not caught(GELU) and not caught(SWIGLU) and not caught(GLU)


def _as_if_contiguous(dy: Tensor) -> Tensor:
    """dy's memory read in order, whatever its strides: what a kernel without a stride check does."""
    big_enough = dy.untyped_storage().nbytes() >= dy.numel() * dy.element_size()
    return dy.as_strided(dy.shape, torch.empty(dy.shape).stride()) if big_enough else dy


MISTAKES: dict[str, tuple[OpSpec, dict[str, Any], Callable[..., Any]]] = {
    "wrong sign of the gradient": (GELU, fn.unary_backward, lambda k, *a: -k(*a)),
    "missing factor": (GELU, fn.unary_backward, lambda k, *a: k(*a) * 0.999),
    "the tanh form in place of erf": (GELU, fn.unary_forward, lambda k, x, act, alpha: k(x, "gelu_tanh", alpha)),
    "gradient reads the output": (GELU, fn.unary_backward, lambda k, dy, x, *a: k(dy, torch.nn.functional.gelu(x), *a)),
    "halves swapped": (GLU, fn.glu_forward, lambda k, x, dim, act, first: k(x, dim, act, not first)),
    "gradients swapped": (SWIGLU, fn.gated_backward, lambda k, *a: k(*a)[::-1]),
    "dropout without its factor": (FUSED, fn.fused_forward, lambda k, *a: k(*a) * (1 - a[5])),
    "another mask": (FUSED, fn.fused_forward, lambda k, x, b, s, *a: k(x, b, None if s is None else s + 1, *a)),
    "a bias that is not added": (FUSED, fn.fused_forward, lambda k, x, b, *a: k(x, None, *a)),
    "backward by another mask": (
        MLP, fn.fused_backward, lambda k, dy, x, b, s, *a: k(dy, x, b, None if s is None else s + 1, *a)
    ),
    "activated values without the bias": (
        MLP, fn.fused_backward, lambda k, dy, x, b, *a: (*k(dy, x, b, *a)[:2], k(dy, x, None, *a)[2])
    ),
    "halves of the bias gradient swapped": (
        MLP, fn.fused_backward, lambda k, *a: (lambda dx, db, y: (dx, db.roll(len(db) // 2), y))(*k(*a))
    ),
    "updates without weight decay": (
        UPDATES["embedding_sgd_"], update.embedding_update, lambda k, *a: k(*a[:14], 0.0, *a[15:])
    ),
    "padding that is stepped": (
        UPDATES["embedding_adagrad_"], update.embedding_update, lambda k, *a: k(*a[:10], -1, *a[11:])
    ),
    "a state that is not kept exactly": (
        UPDATES["embedding_rowwise_adagrad_"], update.embedding_update, lambda k, w, s, *a: k(w, s.mul_(1.01), *a)
    ),
    "moments corrected for another step": (
        UPDATES["embedding_adam_"], update.embedding_update, lambda k, *a: k(*a[:18], a[18] + 1, *a[19:])
    ),
    "columns of the first two tables swapped": (
        TABLES, multi.embedding_bag_multi_forward, lambda k, *a: (k(*a)[0].roll(1, 1), k(*a)[1])
    ),
    "products in another order": (
        INTERACTION, interaction.dot_interaction_forward, lambda k, d, s, own: k(d, s.flip(1), own)
    ),
    "the gradient of a pair for one of its rows only": (
        INTERACTION,
        interaction.dot_interaction_backward,
        lambda k, dy, d, s, *a: (dy[:, : d.shape[1]], k(dy, d, s, *a)[1]),
    ),
    "strides ignored": (
        GELU,
        fn.unary_backward,
        lambda k, dy, x, *a: k(_as_if_contiguous(dy), x, *a),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_found(mistake: str, plant: Callable[..., None]) -> None:
    spec, table, wrong = MISTAKES[mistake]
    plant(table, wrong)
    assert caught(spec)


def test_an_unwritten_element_is_found(plant: Callable[..., None]) -> None:
    def last_unwritten(kernel: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
        y = kernel(x, *rest)
        out = torch.empty_like(y)
        if y.numel() > 1:
            out.view(-1)[:-1] = y.view(-1)[:-1] if y.is_contiguous() else y.reshape(-1)[:-1]
            return out
        return y

    plant(fn.gated_forward, lambda kernel, gate, up, act: last_unwritten(kernel, gate, up, act))
    assert caught(SWIGLU)


def test_one_wrong_element_in_low_precision_is_found(plant: Callable[..., None]) -> None:
    def off_by_a_bit(kernel: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
        y = kernel(x, *rest).clone()
        if y.numel() > 500:
            y.view(-1)[499] += 0.05 * y.abs().nan_to_num(0).max()
        return y

    plant(fn.unary_forward, off_by_a_bit)
    assert caught(GELU, torch.bfloat16)


def test_the_rule_itself() -> None:
    oracle = torch.linspace(-3, 3, 101, dtype=torch.float64)
    good = oracle.float()
    assert compare("x", good, oracle, good).passed
    assert not compare("x", good * (1 + 1e-6), oracle, good).passed
    assert compare("x", good * (1 + 1e-6), oracle, good * (1 - 1e-6)).passed, "torch's own error calibrates"
    one_off = good.clone()
    one_off[0] += 1e-3  # rule 1 calibrates on torch's worst element; rule 2 does not let every element be as bad
    outcome = compare("x", good + 5e-4, oracle, one_off)
    assert not outcome.passed and "rms" in outcome.why and compare("x", good + 5e-6, oracle, one_off).passed
    assert not compare("x", good[:-1], oracle, good).passed
    assert not compare("x", good, oracle, good.half()).passed, "results have torch's dtype"
    for special in (float("nan"), float("inf")):
        spoiled = good.clone()
        spoiled[7] = special
        outcome = compare("dq", spoiled, oracle, good)
        assert not outcome.passed and outcome.why.startswith("dq: ") and "(7,)" in outcome.why
        wide = oracle.clone()
        wide[7] = special
        assert compare("dq", spoiled, wide, good).passed and not compare("dq", good, wide, good).passed
    with pytest.raises(AssertionError, match=r"dv: error .* at \(100,\)"):
        assert_equal("dv", good + torch.eye(101)[100] * 0.1, oracle, good)
    overflow = torch.full((2,), 1e5, dtype=torch.float64)
    assert compare("x", overflow.to(torch.float16), overflow).passed, "the oracle rounded to float16 is infinite too"
