"""The contract: every public operator of every spec, on every backend and dtype that must serve it.

Equality with the float64 oracle, gradients, unwritten outputs, reads outside the inputs, repeatability, every subset of
gradients, second derivatives, opcheck, torch.compile, functorch. What is particular to a room is in test_<room>.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import DEVICE, kernel_grid, spec_id
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from pykernels.testing.run import check_case, evaluate
from pykernels.testing.spec import KERNEL_DTYPES, Case, Input, OpSpec, load

SPECS = load()
GRID = kernel_grid()


def over_grid(function: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.parametrize(("spec", "backend"), GRID, ids=[f"{spec_id(s)}-{b}" for s, b in GRID])(function)


def over_specs(function: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.parametrize("spec", SPECS, ids=[f"{s.room}-{spec_id(s)}" for s in SPECS])(function)


LEARNED = [(s, b) for s, b in GRID if s.differentiable]
LEARNED_SPECS = [s for s in SPECS if s.differentiable]


def over_learned_grid(function: Callable[..., None]) -> Callable[..., None]:
    ids = [f"{spec_id(s)}-{b}" for s, b in LEARNED]
    return pytest.mark.parametrize(("spec", "backend"), LEARNED, ids=ids)(function)


def over_learned_specs(function: Callable[..., None]) -> Callable[..., None]:
    ids = [f"{s.room}-{spec_id(s)}" for s in LEARNED_SPECS]
    return pytest.mark.parametrize("spec", LEARNED_SPECS, ids=ids)(function)


def sample(spec: OpSpec) -> Case:
    """The case labelled "sample", if there is one (where sizes depend on each other), otherwise one of ordinary values
    with an element count that fills no vector or tile, small enough for an interpreter."""
    for case in spec.cases:
        if case.label == "sample":
            return case
    plain = [
        c for c in spec.cases if all(i.layout == "contiguous" and i.values != "special" for i in c.inputs.values())
    ]
    return min(
        plain, key=lambda c: abs(sum(len(i.shape) and torch.Size(i.shape).numel() for i in c.inputs.values()) - 300)
    )


def bound(spec: OpSpec, case: Case, backend: str | None) -> Callable[..., Any]:
    return lambda *tensors: spec.function(
        **dict(zip(case.inputs, tensors, strict=True)), **case.options, backend=backend
    )


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=lambda d: str(d)[6:])
@over_grid
def test_equals_oracle(spec: OpSpec, backend: str, dtype: torch.dtype, poisoned: None) -> None:
    wrong = []
    for case in spec.cases:
        wrong += [f"{case.label}: {c.why}" for c in check_case(spec, case, backend, dtype, DEVICE) if not c.passed]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("dtype", (*KERNEL_DTYPES, torch.float64), ids=lambda d: str(d)[6:])
@over_specs
def test_reference_equals_torch(spec: OpSpec, dtype: torch.dtype) -> None:
    """The truth itself, against torch's own operator; and what `auto` serves where no kernel does."""
    wrong = []
    for case in spec.cases:
        for backend in ("reference", None):
            wrong += [f"{case.label}: {c.why}" for c in check_case(spec, case, backend, dtype, DEVICE) if not c.passed]
    assert not wrong, "\n".join(wrong)


WITH_PEER = [s for s in SPECS if s.peer is not None]


@pytest.mark.parametrize("spec", WITH_PEER, ids=[f"{s.room}-{spec_id(s)}" for s in WITH_PEER])
def test_oracle_is_torchs(spec: OpSpec) -> None:
    """In float64 the reference and torch's operator agree to rounding: a wrong oracle would excuse every kernel."""
    for case in spec.cases:
        inputs = case.make(torch.float64, DEVICE)
        for ours, theirs in zip(
            evaluate(spec.reference, case, inputs), evaluate(spec.call_peer, case, inputs), strict=True
        ):
            assert ours.keys() == theirs.keys(), case.label
            for name, value in ours.items():
                expected = theirs[name]
                if (spec.name, case.label, name) == ("elu", "special", "dinput"):
                    # At NaN torch's scalar code gives the gradient dy, its vector code NaN.
                    expected = torch.where(inputs["input"].isnan(), value, expected)
                label = f"{case.label} {name}"
                torch.testing.assert_close(
                    value, expected, rtol=1e-9, atol=1e-9, equal_nan=True, msg=lambda m, at=label: f"{at}: {m}"
                )


@over_grid
def test_reads_nothing_outside(spec: OpSpec, backend: str) -> None:
    """With NaN right before and after every input in memory, results are bitwise the same."""
    case = sample(spec)
    inputs = case.make(torch.float32, DEVICE)
    plain = evaluate(spec.function, case, inputs, backend=backend)

    def banded(x: Tensor) -> Tensor:
        band = torch.full(
            (x.numel() + 128,), float("nan") if x.is_floating_point() else 2**30, dtype=x.dtype, device=DEVICE
        )
        band[64:-64] = x.reshape(-1)
        return band[64:-64].view(x.shape)

    guarded = evaluate(spec.function, case, {name: banded(x) for name, x in inputs.items()}, backend=backend)
    for ours, theirs in zip(plain, guarded, strict=True):
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), f"{name} changes with what lies beside the inputs"


@over_grid
def test_repeats_bitwise(spec: OpSpec, backend: str) -> None:
    case = sample(spec)
    inputs = case.make(torch.float32, DEVICE)
    before = {name: x.clone() for name, x in inputs.items()}
    first = evaluate(spec.function, case, inputs, backend=backend)
    for _ in range(4):
        for ours, theirs in zip(first, evaluate(spec.function, case, inputs, backend=backend), strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(torch.equal(before[name], inputs[name]) for name in inputs), "an input was written to"

    if not spec.differentiable:
        return
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in case.make(torch.float32, DEVICE).values()]
    outputs = as_tuple(bound(spec, case, backend)(*leaves))
    wanted = [x for x in leaves if x.requires_grad]
    cotangents = [torch.randn_like(y) for y in outputs]
    once = torch.autograd.grad(outputs, wanted, cotangents, retain_graph=True)
    twice = torch.autograd.grad(outputs, wanted, cotangents)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True)), "a saved tensor was overwritten"


@over_learned_grid
def test_every_subset_of_gradients(spec: OpSpec, backend: str) -> None:
    case = sample(spec)
    inputs = case.make(torch.float32, DEVICE)
    full = evaluate(spec.function, case, inputs, backend=backend)[1]
    names = [name for name, x in inputs.items() if x.is_floating_point()]
    for count in range(len(names)):
        for subset in itertools.combinations(names, count):
            changed = {n: Input(i.shape, i.values, grad=n in subset, high=i.high) for n, i in case.inputs.items()}
            some = Case(case.label, changed, case.options)
            grads = evaluate(spec.function, some, inputs, backend=backend)[1]
            assert set(grads) == {f"d{n}" for n in subset}
            assert all(torch.equal(grads[n], full[n]) for n in grads)


@over_learned_specs
def test_first_and_second_derivatives(spec: OpSpec) -> None:
    """gradcheck and gradgradcheck in float64, through the autograd Functions where a kernel serves float64."""
    case = sample(spec)
    small = {
        n: Input(tuple(min(s, 4) for s in i.shape), i.values, high=i.high, scale=i.scale)
        for n, i in case.inputs.items()
    }
    tensors = Case(case.label, small, case.options).make(torch.float64, DEVICE)
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in tensors.values()]
    function = bound(spec, case, None)
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@over_learned_grid
def test_second_derivative_in_float32(spec: OpSpec, backend: str) -> None:
    """The kernels' gradient, differentiated once more, against the reference's in float64."""
    case = sample(spec)
    inputs = case.make(torch.float32, DEVICE)

    def twice(function: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
        wanted = [x for x in tensors if x.requires_grad]
        total = sum(y.square().sum() for y in as_tuple(function(*tensors)))
        first = torch.autograd.grad(total, wanted, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), wanted))

    ours = twice(bound(spec, case, backend), [x.requires_grad_(x.is_floating_point()) for x in inputs.values()])
    wide = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in inputs.values()]
    truth = twice(bound(spec, case, "reference"), wide)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * float(b.abs().max()) + 1e-6)


class _Recorder(TorchDispatchMode):
    """Collects the pykernels operators that run, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "pykernels":
            self.calls.setdefault(str(func), (func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@over_grid
def test_opcheck(spec: OpSpec, backend: str) -> None:
    case = sample(spec)
    with _Recorder() as recorder:
        evaluate(spec.function, case, case.make(torch.float32, DEVICE), backend=backend)
    assert recorder.calls, "no operator of ours ran"
    for func, args, kwargs in recorder.calls.values():
        detached = tree_map_only(Tensor, Tensor.detach, args)
        outcome = torch.library.opcheck(func, detached, kwargs)
        assert set(outcome.values()) == {"SUCCESS"}, (func, outcome)


@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
@over_grid
def test_compiles_whole(spec: OpSpec, backend: str, dynamic: bool) -> None:
    """fullgraph, and the kernel is what runs in the graph: same bits as eager, forward and backward."""
    case = sample(spec)
    inputs = case.make(torch.float32, DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(spec.function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    eager = evaluate(spec.function, case, inputs, backend=backend)
    for ours, theirs in zip(eager, evaluate(compiled, case, inputs, backend=backend), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(theirs[name], ours[name], rtol=0, atol=0)


@over_learned_specs
def test_functorch_is_served_by_the_reference(spec: OpSpec) -> None:
    case = sample(spec)
    tensors = list(case.make(torch.float64, DEVICE).values())
    floats = [i for i, x in enumerate(tensors) if x.is_floating_point()]

    def total(*chosen: Tensor) -> Tensor:
        full = list(tensors)
        for i, x in zip(floats, chosen, strict=True):
            full[i] = x
        return sum(y.sum() for y in as_tuple(bound(spec, case, None)(*full)))

    chosen = [tensors[i] for i in floats]
    grads = torch.func.grad(total, tuple(range(len(chosen))))(*chosen)
    leaves = [x.clone().requires_grad_() for x in chosen]
    expected = torch.autograd.grad(total(*leaves), leaves)
    assert all(torch.allclose(a, b) for a, b in zip(grads, expected, strict=True))
    tangent = torch.func.jvp(total, tuple(chosen), tuple(torch.ones_like(x) for x in chosen))[1]
    assert torch.allclose(tangent, sum(g.sum() for g in expected))
