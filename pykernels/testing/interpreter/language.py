"""The parts of the Triton language that the stock interpreter lacks or gets wrong: libdevice, autotune, arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as stock
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import TensorHandle as Handle

from .state import UnsupportedError


def _torch_special(name: str) -> Callable[[np.ndarray], np.ndarray]:
    function = getattr(torch.special, name)
    return lambda x: function(torch.from_numpy(np.array(x, dtype=np.float64))).numpy()


def _round_half_away(x: np.ndarray) -> np.ndarray:
    return np.copysign(np.floor(np.abs(x) + 0.5), x)


erf = _torch_special("erf")


def _named(
    names: str, lookup: Callable[[str], Callable[..., Any]], prefix: str = "", suffix: str = ""
) -> dict[str, Callable[..., Any]]:
    return {f"{prefix}{name}{suffix}": lookup(name) for name in names.split()}


def _numpy(name: str) -> Callable[..., Any]:
    return getattr(np, name)


#: libdevice function -> its value on float64 arrays. The result is rounded to the operands' type, so it is the exact
#: value to within half a unit; the GPU's own functions are within one or two units of it.
LIBDEVICE: dict[str, Callable[..., np.ndarray]] = {
    **_named("tanh sinh cosh tan sin cos exp exp2 expm1 log log2 log10 log1p sqrt", _numpy),
    **_named("floor ceil trunc rint cbrt abs hypot fmod copysign nextafter", _numpy),
    **_named("asin acos atan asinh acosh atanh atan2", lambda name: _numpy("arc" + name[1:])),
    **_named("erf erfc erfinv erfcx", _torch_special),
    **_named("sin cos tan exp log log2 log10", _numpy, prefix="fast_", suffix="f"),
    "lgamma": _torch_special("gammaln"),
    "normcdf": _torch_special("ndtr"),
    "normcdfinv": _torch_special("ndtri"),
    "nearbyint": np.rint,
    "round": _round_half_away,
    "exp10": lambda x: np.power(10.0, x),
    "pow": np.power,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "fma": lambda x, y, z: x * y + z,
    "fdim": lambda x, y: np.where(x > y, x - y, np.where(np.isnan(x) | np.isnan(y), np.nan, 0.0)),
    "saturatef": lambda x: np.fmin(np.fmax(x, 0.0), 1.0),
    "add_rn": np.add,
    "sub_rn": np.subtract,
    "mul_rn": np.multiply,
    "div_rn": np.divide,
    "sqrt_rn": np.sqrt,
    "rcp_rn": np.reciprocal,
    "isnan": np.isnan,
    "isinf": np.isinf,
    "finitef": np.isfinite,
    "isfinited": np.isfinite,
    "signbit": np.signbit,
    "fast_exp10f": lambda x: np.power(10.0, x),
    "fast_powf": np.power,
    "fast_dividef": np.divide,
}
LIBDEVICE["fma_rn"] = LIBDEVICE["fma"]


def libdevice_function(name: str) -> Callable[..., Any]:
    """What stands for `libdevice.<name>` in an interpreted kernel."""
    function = LIBDEVICE.get(name)

    def call(*args: Any, _semantic: Any = None, **kwargs: Any) -> Any:
        if function is None:
            raise UnsupportedError(
                f"libdevice.{name} has no interpreted counterpart; mapped are: {', '.join(sorted(LIBDEVICE))}"
            )
        tensors = [stock.interpreter_semantic.to_tensor(a) for a in args]
        kinds = {t.dtype for t in tensors}
        if len(kinds) != 1 or not kinds <= {tl.float32, tl.float64}:
            raise TypeError(
                f"libdevice.{name} takes operands of one type, fp32 or fp64, as on a GPU; got "
                f"{', '.join(str(t.dtype) for t in tensors)}: convert with .to(tl.float32)"
            )
        scalar = kinds.pop()
        data = function(*(t.handle.data.astype(np.float64) for t in tensors))
        if data.dtype == np.bool_:
            scalar = tl.int1
        data = data.astype(stock._get_np_dtype(scalar))
        block = any(t.type.is_block() for t in tensors)
        return tl.tensor(Handle(data, scalar), tl.block_type(scalar, list(data.shape)) if block else scalar)

    call.__name__ = name
    return call


def replace_libdevice(module: ModuleType) -> None:
    for name, _ in inspect.getmembers(module, callable):
        if not name.startswith("_"):
            setattr(module, name, libdevice_function(name))


def run_first_config(self: Autotuner, *args: Any, **kwargs: Any) -> Any:
    """`@triton.autotune` without a clock: the first configuration that the kernel's own pruning keeps."""
    self.nargs = dict(zip(self.arg_names, args, strict=False))
    configs = self.prune_configs(kwargs) if len(self.configs) > 1 else self.configs
    self.best_config = config = configs[0]
    if config.pre_hook is not None:
        config.pre_hook({**self.nargs, **kwargs, **config.all_kwargs()})
    try:
        return self.fn.run(*args, **kwargs, **config.all_kwargs())
    finally:
        self.nargs = None


def implicit_cvt(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Run-time arguments as a launch passes them: bool as int1, float as fp32 (stock: a Python double)."""

    def implicit_cvt(arg: Any) -> Any:
        if isinstance(arg, bool):
            return tl.tensor(Handle(np.array([arg], dtype=np.bool_), tl.int1), tl.int1)
        if isinstance(arg, float):
            return tl.tensor(Handle(np.array([arg], dtype=np.float32), tl.float32), tl.float32)
        return original(arg)

    return implicit_cvt


def create_inline_asm(self: Any, asm: str, *args: Any) -> Any:
    raise UnsupportedError(
        f"inline assembly cannot be interpreted: {asm.strip()!r}; choose it by a tl.constexpr argument and give the "
        "kernel a second branch in plain Triton"
    )


def create_extern_elementwise(self: Any, library: str, path: str, symbol: str, *args: Any) -> Any:
    raise UnsupportedError(f"the external function {symbol} of {library or path} cannot be interpreted")


def create_erf(self: Any, arg: Handle) -> Handle:
    return Handle(erf(arg.data).astype(arg.data.dtype), arg.dtype.scalar)


def patch_lang_tensor(original: Callable[..., None]) -> Callable[..., None]:
    """Stock 3.6 converts a one-element array to an index by `int(array)`, which numpy 2.4 refuses."""

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    return patch_lang_tensor


def install() -> None:
    from triton.language.extra import libdevice

    replace_libdevice(libdevice)
    try:
        from triton.language.extra.cuda import libdevice as cuda_libdevice
    except ImportError:  # a Triton built without the NVIDIA backend
        pass
    else:
        replace_libdevice(cuda_libdevice)
    Autotuner.run = run_first_config
    stock._implicit_cvt = implicit_cvt(stock._implicit_cvt)
    stock._patch_lang_tensor = patch_lang_tensor(stock._patch_lang_tensor)
    stock.InterpreterBuilder.create_inline_asm = create_inline_asm
    stock.InterpreterBuilder.create_extern_elementwise = create_extern_elementwise
    stock.InterpreterBuilder.create_erf = create_erf
