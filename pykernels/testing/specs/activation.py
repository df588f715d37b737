"""The activation room's contract."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ... import reference
from .. import stock
from ..spec import Case, Input, OpSpec

KERNELS = ("cpu", "triton", "cuda", "emulator")

# Below and above one vector, one tile of every backend, and primes; zero, one and many rows.
_SIZES = ((), (0,), (1,), (3,), (63,), (65, 17), (0, 5), (2, 0, 3), (129, 7), (1025,), (2, 3, 1000), (4, 1023))


def _label(prefix: str, parts: object) -> str:
    return f"{prefix} {parts}".replace(" ", "")


def _unary_cases(options: Mapping[str, Any]) -> tuple[Case, ...]:
    """Sizes; then every kind of values and layout, on a shape with an odd tail."""
    shape = (5, 7, 33)
    cases = [Case(_label("shape", size), {"input": Input(size)}, options) for size in _SIZES]
    cases += [Case(f"x{scale}", {"input": Input(shape, scale=scale)}, options) for scale in (5.0, 50.0)]
    cases += [Case(values, {"input": Input(shape, values)}, options) for values in ("special", "outlier", "constant")]
    for layout in ("transposed", "expanded", "rows", "offset", "every_other"):
        cases.append(Case(layout, {"input": Input(shape, layout=layout)}, options))
        cases.append(Case(f"dy-{layout}", {"input": Input(shape)}, options, dy_layout=layout))
    cases.append(Case("rows-dy-expanded", {"input": Input(shape, layout="rows")}, options, dy_layout="expanded"))
    return tuple(cases)


def _gated_cases(options: Mapping[str, Any]) -> tuple[Case, ...]:
    shape = (5, 3, 33)

    def case(label: str, size: tuple[int, ...], dy: str = "contiguous", **both: Any) -> Case:
        return Case(label, {"gate": Input(size, **both), "up": Input(size, **both)}, options, dy)

    cases = [case(_label("shape", size), size) for size in _SIZES]
    cases += [case("x5", shape, scale=5.0), case("x50", shape, scale=50.0), case("special", shape, values="special")]
    for layout in ("transposed", "expanded", "rows", "offset", "every_other"):
        cases += [case(layout, shape, layout=layout), case(f"dy-{layout}", shape, dy=layout)]
    mixed = {"gate": Input(shape, layout="rows"), "up": Input(shape, layout="transposed")}
    cases += [Case("mixed", mixed, options), Case("mixed-dy-expanded", mixed, options, "expanded")]
    cases += [
        Case(_label("fused", size), {"gate": Input(size)}, options) for size in ((2,), (7, 66), (3, 1, 2048), (0, 4))
    ]
    cases.append(Case("fused-rows", {"gate": Input((7, 66), layout="rows")}, options, "transposed"))
    return tuple(cases)


def _glu_cases() -> tuple[Case, ...]:
    sizes = (
        ((2,), -1),
        ((6, 5), 0),
        ((3, 66), 1),
        ((2, 4, 33), 1),
        ((5, 0), 1),
        ((0, 2), 1),
        ((4, 2050), -1),
        ((2, 3, 4, 6), -2),
    )
    cases = [Case(_label("shape", (*size, "dim", dim)), {"input": Input(size)}, {"dim": dim}) for size, dim in sizes]
    for layout in ("transposed", "expanded", "rows", "offset", "every_other"):
        cases.append(Case(layout, {"input": Input((4, 6, 34), layout=layout)}, {"dim": 1}))
        cases.append(Case(f"last-{layout}", {"input": Input((4, 6, 34), layout=layout)}, {"dim": -1}, dy_layout=layout))
    cases.append(Case("special", {"input": Input((2, 64), "special")}, {"dim": -1}))
    return tuple(cases)


def _parametric_cases(weight: str) -> tuple[Case, ...]:
    def case(label: str, size: tuple[int, ...], weights: tuple[int, ...], dy: str = "contiguous", **x: Any) -> Case:
        return Case(label, {"input": Input(size, **x), weight: Input(weights, scale=0.5)}, {}, dy)

    cases = [case(_label("one", size), size, (1,)) for size in _SIZES]
    cases += [case("scalar", (3, 5), ()), case("channels", (4, 6), (6,)), case("channels-3d", (3, 5, 70), (5,))]
    cases += [
        case("long-sum", (600, 3, 11), (3,)),
        case("one-channel-long", (40, 1, 300), (1,)),
        case("empty", (0, 3), (3,)),
        case("special", (7, 33), (1,), values="special"),
        case("special-rows", (21, 2, 70), (2,), values="special"),
    ]
    for layout in ("transposed", "expanded", "rows", "offset", "every_other"):
        cases += [case(layout, (4, 5, 9), (5,), layout=layout), case(f"dy-{layout}", (4, 5, 9), (5,), dy=layout)]
    return tuple(cases)


def _rrelu_cases() -> tuple[Case, ...]:
    training = {"training": True, "seed": torch.tensor([0x1234_5678_9ABC_DEF])}
    cases = [Case(_label("shape", size), {"input": Input(size)}, training) for size in _SIZES]
    cases += [
        Case(layout, {"input": Input((5, 7, 33), layout=layout)}, training)
        for layout in ("transposed", "expanded", "rows")
    ]
    cases += [Case("bounds", {"input": Input((9, 65), scale=5.0)}, {**training, "lower": 0.01, "upper": 2.5})]
    cases += [Case("negative-seed", {"input": Input((70,))}, {**training, "seed": torch.tensor([-2])})]
    cases += [Case("special", {"input": Input((40,), values="special")}, training)]
    cases += [Case("evaluation", {"input": Input((4, 33))}, {"training": False})]
    return tuple(cases)


# Each activation and gated unit, with and without bias and dropout in turns.
_FUSED = (
    "identity", "sigmoid", "tanh", "relu", "leaky_relu", "elu", "gelu", "gelu_tanh", "silu", "swish",
    "glu", "reglu", "geglu", "geglu_tanh", "swiglu", "bilinear",
)  # fmt: skip
_ALPHA = {"leaky_relu": 0.2, "elu": 1.5, "swish": 1.702}


def _fused_cases() -> tuple[Case, ...]:
    seed = torch.tensor([0x1234_5678_9ABC_DEF])

    def case(
        label: str,
        size: tuple[int, ...],
        activation: str,
        p: float,
        bias: bool = True,
        dy: str = "contiguous",
        **x: Any,
    ) -> Case:
        inputs = {"input": Input(size, **x)}
        if bias:
            inputs["bias"] = Input(size[-1:], scale=0.5)
        options = {"activation": activation, "p": p, "seed": seed}
        if activation in _ALPHA:
            options["alpha"] = _ALPHA[activation]
        return Case(label, inputs, options, dy)

    cases = [case(name, (7, 66), name, 0.0 if i % 2 else 0.3) for i, name in enumerate(_FUSED)]
    cases += [
        case(f"{name}-x50", (3, 34), name, 0.1, scale=50.0) for name in ("tanh", "elu", "gelu", "silu", "geglu_tanh")
    ]
    cases += [
        case(_label("shape", (name, *size)), size, name, 0.25)
        for name in ("gelu", "swiglu")
        for size in ((2,), (0, 2), (5, 0), (1, 1026), (2, 3, 4, 6), (130, 2))
    ]
    cases += [case("odd", (5, 1, 33), "silu", 0.5), case("many-rows", (600, 18), "gelu", 0.1)]
    cases += [case("many-rows-gated", (600, 18), "geglu", 0.1), case("wide-gated", (3, 2 * 1031), "glu", 0.1)]
    cases += [case("no-bias", (4, 1023), "gelu", 0.2, bias=False), case("scalar", (), "elu", 0.0, bias=False)]
    cases += [case("no-bias-gated", (5, 2 * 33), "swiglu", 0.2, bias=False)]
    cases += [case("nothing-kept", (9, 7), "relu", 1 - 2.0**-40), case("nothing-dropped", (9, 7), "relu", 2.0**-40)]
    for layout in ("transposed", "expanded", "rows", "offset", "every_other"):
        cases.append(case(layout, (4, 5, 18), "swiglu", 0.3, layout=layout))
        cases.append(case(f"dy-{layout}", (4, 5, 18), "silu", 0.3, dy=layout))
    cases.append(case("silu-rows-dy-transposed", (4, 5, 18), "silu", 0.3, dy="transposed", layout="rows"))
    cases.append(case("no-bias-rows", (4, 5, 18), "tanh", 0.3, bias=False, layout="rows"))
    cases.append(case("special", (3, 40), "gelu", 0.0, values="special"))
    cases.append(case("sample", (9, 34), "gelu", 0.2))
    return tuple(cases)


def _fused_peer(
    input: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "gelu",
    p: float = 0.0,
    seed: torch.Tensor | None = None,
    alpha: float = 1.0,
) -> torch.Tensor:
    """Torch's operators one after another, but with our mask: torch's dropout draws another."""
    y = stock.ACTIVATIONS[activation](input if bias is None else input + bias, alpha)
    return y * reference.bias_activation_dropout(torch.ones_like(y), None, "identity", p, True, seed)


def _mlp_cases() -> tuple[Case, ...]:
    def case(
        label: str, x: tuple[int, ...], hidden: int, activation: str, p: float = 0.0, save: str = "preactivation",
        biases: bool = True, **more: Any,
    ) -> Case:  # fmt: skip
        width = 2 * hidden if activation in _FUSED[10:] else hidden
        inputs = {"x": Input(x, **more), "w1": Input((width, x[-1]), scale=0.5)}
        inputs["b1"] = Input((width,), scale=0.5)
        inputs |= {"w2": Input((5, hidden), scale=0.5), "b2": Input((5,))}
        if not biases:
            inputs = {name: value for name, value in inputs.items() if name[0] != "b"}
        options = {"activation": activation, "p": p, "save": save}
        return Case(label, inputs, {**options, "seed": torch.tensor([7])} if p else options)

    return (
        case("gelu", (3, 7, 6), 33, "gelu"),
        case("gelu-dropout-input", (17, 6), 33, "gelu", 0.2, "input"),
        case("swiglu", (17, 6), 35, "swiglu"),
        case("swiglu-dropout-input", (3, 7, 6), 35, "swiglu", 0.2, "input"),
        case("glu", (9, 4), 5, "glu", 0.1),
        case("no-bias", (9, 4), 16, "relu", biases=False),
        case("no-bias-gated", (9, 4), 16, "geglu_tanh", 0.3, "input", biases=False),
        case("one-row", (4,), 7, "tanh"),
        case("no-row", (0, 4), 7, "silu"),
        case("rows", (4, 9), 7, "silu", layout="rows"),
        case("expanded", (6, 9), 7, "silu", layout="expanded"),
        case("sample", (5, 6), 8, "gelu", 0.2),
    )


def _without_biases(function: Callable[..., Any]) -> Callable[..., Any]:
    """Cases without biases pass none."""

    def call(b1: torch.Tensor | None = None, b2: torch.Tensor | None = None, **arguments: Any) -> torch.Tensor:
        result: torch.Tensor = function(b1=b1, b2=b2, **arguments)
        return result

    return call


def _mlp_peer(
    x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, b1: torch.Tensor | None = None, b2: torch.Tensor | None = None,
    save: str = "preactivation", **options: Any,
) -> torch.Tensor:  # fmt: skip
    return F.linear(_fused_peer(F.linear(x, w1, b1), **options), w2, b2)


def _mlp_bench(activation: str, p: float, save: str) -> Case:
    rows, width, hidden = 512, 512, 2048
    first = 2 * hidden if activation in _FUSED[10:] else hidden
    shapes = {"x": (rows, width), "w1": (first, width), "b1": (first,), "w2": (width, hidden), "b2": (width,)}
    options = {"activation": activation, "p": p, "save": save, **({"seed": torch.tensor([5])} if p else {})}
    label = f"{activation} p={p} {save} {rows}x{width}x{hidden}"
    return Case(label, {name: Input(shape, scale=0.05) for name, shape in shapes.items()}, options)


def _mlp_flops(case: Case, dtype: torch.dtype) -> dict[str, int]:
    """The matrix products; `save="input"` makes the first one again."""
    rows = math.prod(case.inputs["x"].shape[:-1])
    first, second = (2 * rows * math.prod(case.inputs[name].shape) for name in ("w1", "w2"))
    again = first if case.options["save"] == "input" else 0
    return {"forward": first + second, "backward": 2 * (first + second) + again}


def _mlp_bytes(case: Case, dtype: torch.dtype) -> dict[str, int]:
    """x and the parameters are read, y, as large as x, written; backward: x, parameters and dy, and their gradients."""
    x = math.prod(case.inputs["x"].shape)
    inputs = sum(math.prod(one.shape) for one in case.inputs.values())
    return {"forward": (inputs + x) * _size(dtype), "backward": (2 * inputs + x) * _size(dtype)}


def _mlp_saved(case: Case, dtype: torch.dtype) -> int:
    """Beyond x and the parameters: the first product, unless it is made again, and the seed."""
    rows = math.prod(case.inputs["x"].shape[:-1])
    kept = 0 if case.options["save"] == "input" else rows * case.inputs["w1"].shape[0] * _size(dtype)
    return kept + (8 if case.options["p"] else 0)


def _fused_bytes(case: Case, dtype: torch.dtype) -> dict[str, int]:
    """Forward reads x, writes y; backward reads x and dy, writes dx; the bias is small beside them."""
    n = math.prod(case.inputs["input"].shape) * _size(dtype)
    out = n // 2 if case.options["activation"] in _FUSED[10:] else n
    return {"forward": n + out, "backward": 2 * n + out}


def _fused_bench(activation: str, cols: int) -> tuple[Case, ...]:
    options = {"activation": activation, "p": 0.1, "seed": torch.tensor([5])}
    return tuple(
        Case(f"{activation} {rows}x{cols}", {"input": Input((rows, cols)), "bias": Input((cols,))}, options)
        for rows in (256, 2048)
    )


def _count(case: Case) -> int:
    return math.prod(next(iter(case.inputs.values())).shape)


def _size(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits // 8


def _unary_bytes(case: Case, dtype: torch.dtype) -> dict[str, int]:
    """Forward reads x, writes y; backward reads dy and x (or y), writes dx."""
    n = _count(case) * _size(dtype)
    return {"forward": 2 * n, "backward": 3 * n}


def _gated_bytes(case: Case, dtype: torch.dtype) -> dict[str, int]:
    """n the elements of gate and up together: forward reads n, writes n/2; backward reads n and n/2, writes n."""
    n = sum(math.prod(x.shape) for x in case.inputs.values()) * _size(dtype)
    return {"forward": n + n // 2, "backward": 2 * n + n // 2}


def _unary_saved(case: Case, dtype: torch.dtype) -> int:
    return _count(case) * _size(dtype)


def _gated_saved(case: Case, dtype: torch.dtype) -> int:
    return sum(math.prod(x.shape) for x in case.inputs.values()) * _size(dtype)


#: Near the processor (L2), in L3, and past it: from 32 MiB on malloc maps a result anew for every call.
_ROWS = (32, 256, 2048)
_BENCH = tuple(Case(f"{r}x4096", {"input": Input((r, 4096))}) for r in _ROWS)
_BENCH_GATED = tuple(Case(f"{r}x8192", {"gate": Input((r, 8192))}) for r in _ROWS)
# 64 MiB in bfloat16, more than an H100's second-level cache
_GPU_BENCH = (Case("8192x4096", {"input": Input((8192, 4096))}),)
_GPU_BENCH_GATED = (Case("8192x8192", {"gate": Input((8192, 8192))}),)


def _rows_of(case: Case) -> int:
    return next(iter(case.inputs.values())).shape[0]


def _compiled(case: Case, dtype: torch.dtype) -> tuple[str, ...] | None:
    """Not compiled, and the largest size in float32 only: a benchmark of the room should take minutes."""
    return None if dtype is not torch.float32 and _rows_of(case) == 2048 else ()


def _compiled_main(case: Case, dtype: torch.dtype) -> tuple[str, ...] | None:
    """The rows that have a target; max-autotune, whose times do not differ from the default's, once each."""
    if dtype is torch.float16 or _rows_of(case) not in (256, 2048):
        return _compiled(case, dtype)
    return ("default", "max-autotune") if dtype is torch.float32 and _rows_of(case) == 256 else ("default",)


def _compiled_rrelu(case: Case, dtype: torch.dtype) -> tuple[str, ...] | None:
    """torch has no rrelu for float16 on a CPU."""
    return None if dtype is torch.float16 else ()


def _compiled_float32(case: Case, dtype: torch.dtype) -> tuple[str, ...] | None:
    return ("default",) if dtype is torch.float32 else _compiled(case, dtype)


_COMPILED = {"gelu": _compiled_main, "silu": _compiled_main, "geglu": _compiled_main, "swiglu": _compiled_main}


def _unary(name: str, peer: Callable[..., Any] | None, options: Mapping[str, Any] | None = None) -> OpSpec:
    options = options or {}
    bench, gpu = (tuple(Case(c.label, c.inputs, options) for c in cases) for cases in (_BENCH, _GPU_BENCH))
    return OpSpec(
        name, "activation", _unary_cases(options), bench, peer, KERNELS, bytes_moved=_unary_bytes, saved=_unary_saved,
        compiled=_compiled if options else _COMPILED.get(name, _compiled), rowwise=True, gpu_bench=gpu,
    )  # fmt: skip


def _gated(name: str, activation: Callable[..., Any], options: Mapping[str, Any] | None = None) -> OpSpec:
    options = options or {}

    def eager(gate: torch.Tensor, up: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
        if up is None:
            gate, up = gate.chunk(2, -1)
        return activation(gate, **options) * up

    eager.__name__ = name
    bench, gpu = (tuple(Case(c.label, c.inputs, options) for c in cases) for cases in (_BENCH_GATED, _GPU_BENCH_GATED))
    return OpSpec(
        name, "activation", _gated_cases(options), bench, eager, KERNELS, bytes_moved=_gated_bytes, saved=_gated_saved,
        compiled=_compiled if options else _COMPILED.get(name, _compiled), rowwise=True, gpu_bench=gpu,
    )  # fmt: skip


def _parametric_bench(weight: str) -> tuple[Case, ...]:
    """A weight for each channel; its gradient is a sum over the rows."""
    return tuple(
        Case(f"{rows}x4096", {"input": Input((rows, 4096)), weight: Input((4096,), scale=0.5)}) for rows in _ROWS[:2]
    )


def _swish(input: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    per_channel = beta.reshape(()) if beta.numel() == 1 else beta.reshape(-1, *(1,) * (input.dim() - 2))
    return input * torch.sigmoid(per_channel * input)


SPECS = (
    _unary("sigmoid", torch.sigmoid),
    _unary("tanh", torch.tanh),
    _unary("relu", F.relu),
    _unary("leaky_relu", F.leaky_relu, {"negative_slope": 0.2}),
    _unary("elu", F.elu, {"alpha": 1.5}),
    _unary("gelu", F.gelu),
    _unary("gelu", F.gelu, {"approximate": "tanh"}),
    _unary("silu", F.silu),
    _unary("swish", None, {"beta": 1.702}),
    OpSpec(
        "swish", "activation", _parametric_cases("beta"), _parametric_bench("beta"), _swish, KERNELS,
        bytes_moved=_unary_bytes, long_sums=frozenset(("beta",)), compiled=_compiled,
    ),
    OpSpec(
        "prelu", "activation", _parametric_cases("weight"), _parametric_bench("weight"), F.prelu, KERNELS,
        bytes_moved=_unary_bytes, long_sums=frozenset(("weight",)), compiled=_compiled,
    ),
    OpSpec(
        "bias_activation_dropout", "activation", _fused_cases(),
        (*_fused_bench("gelu", 4096), *_fused_bench("swiglu", 8192)), _fused_peer, KERNELS,
        bytes_moved=_fused_bytes, saved=lambda case, dtype: _count(case) * _size(dtype) + 8,
        long_sums=frozenset(("bias",)), timed_peer=stock.bias_activation_dropout, compiled=_compiled_float32,
    ),
    OpSpec(
        "mlp", "activation", _mlp_cases(),
        (_mlp_bench("gelu", 0.0, "preactivation"), _mlp_bench("gelu", 0.1, "preactivation"),
         _mlp_bench("swiglu", 0.0, "preactivation"), _mlp_bench("swiglu", 0.0, "input")),
        _mlp_peer, KERNELS, bytes_moved=_mlp_bytes, flops=_mlp_flops, saved=_mlp_saved,
        long_sums=frozenset(("w1", "b1", "w2", "b2")),
        timed_peer=_without_biases(stock.mlp), wrap=_without_biases, compiled=_compiled_float32,
    ),
    OpSpec(
        "rrelu", "activation", _rrelu_cases(),
        tuple(Case(case.label, case.inputs, {"training": True, "seed": torch.tensor([5])}) for case in _BENCH), None,
        KERNELS, bytes_moved=_unary_bytes, extra=frozenset(("seed",)), timed_peer=F.rrelu, compiled=_compiled_rrelu,
    ),
    OpSpec(
        "glu", "activation", _glu_cases(),
        tuple(Case(case.label, {"input": case.inputs["gate"]}) for case in _BENCH_GATED), F.glu, KERNELS,
        bytes_moved=_gated_bytes, saved=_gated_saved, compiled=_compiled, rowwise=True,
    ),
    _gated("reglu", F.relu),
    _gated("geglu", F.gelu),
    _gated("geglu", F.gelu, {"approximate": "tanh"}),
    _gated("swiglu", F.silu),
    _gated("bilinear", lambda gate: gate),
)  # fmt: skip
