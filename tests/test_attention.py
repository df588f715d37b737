"""What is particular to attention: masks, queries without keys, dropout by element, MultiheadAttention."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pykernels as pk
from pykernels.reference._random import philox_words

sdpa = pk.functional.scaled_dot_product_attention
B, H, L, S, D = 2, 3, 4, 5, 8


def qkv(dtype: torch.dtype = torch.float64, heads: int = H) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (B, heads, L, D), (B, heads, S, D), (B, heads, S, D)
    q, k, v = (torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes)
    return q, k, v


def gradients(out: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    dy = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return out, *torch.autograd.grad(out, leaves, dy)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("shape", ((L, S), (1, S), (H, L, S), (B, 1, L, S), (B, 1, 1, S), (B, H, L, 1)))
@pytest.mark.parametrize("kind", ("bool", "float", "infinite"))
def test_masks_equal_torch(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    q, k, v = qkv(dtype)
    allowed = torch.rand(shape) > 0.5
    leaves: tuple[Tensor, ...] = (q, k, v)
    if kind == "bool":
        mask = allowed
    else:
        forbidden = -torch.inf if kind == "infinite" else -1.0
        mask = torch.where(allowed, torch.randn(shape, dtype=dtype), forbidden).requires_grad_()
        leaves += (mask,)
    torch.testing.assert_close(
        gradients(sdpa(q, k, v, mask), *leaves),
        gradients(F.scaled_dot_product_attention(q, k, v, mask), *leaves),
    )


def test_float32_mask_with_half_query() -> None:
    q, k, v = (x.detach().bfloat16() for x in qkv())
    mask = torch.randn(L, S)
    found, expected = sdpa(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("forbidden", (False, -torch.inf, torch.finfo(torch.float32).min))
def test_a_query_without_keys_gives_zero(forbidden: float) -> None:
    q, k, v = qkv(torch.float32)
    mask = torch.zeros(L, S) if forbidden is not False else torch.ones(L, S, dtype=torch.bool)
    mask[1] = forbidden
    out = sdpa(q, k, v, mask)
    assert out[:, :, 1].abs().sum() == 0 and (out[:, :, [0, 2, 3]] != 0).all()
    dq, dk, dv = torch.autograd.grad(out[:, :, 1].sum() + out.sum(), (q, k, v))
    assert dq[:, :, 1].abs().sum() == 0 and all(g.isfinite().all() for g in (dq, dk, dv))
    assert sdpa(q, k[:, :, :0], v[:, :, :0]).abs().sum() == 0
    assert sdpa(q[:, :, :0], k, v).shape == (B, H, 0, D)


def test_hidden_keys_may_hold_anything() -> None:
    q, k, v = qkv()
    mask = torch.ones(B, 1, 1, S, dtype=torch.bool)
    mask[0, ..., 3:] = False
    expected = gradients(sdpa(q, k, v, mask), q, k, v)
    hidden = ~mask.view(B, 1, S, 1)
    with torch.no_grad():
        k.masked_fill_(hidden, torch.nan)
        v.masked_fill_(hidden, torch.inf)
    torch.testing.assert_close(gradients(sdpa(q, k, v, mask), q, k, v), expected)


def test_nan_in_a_float_mask_is_not_swallowed() -> None:
    q, k, v = qkv(torch.float32)
    mask = torch.zeros(L, S)
    mask[2, 1] = torch.nan
    assert torch.equal(sdpa(q, k, v, mask).isnan().all((0, 1, 3)), torch.tensor([False, False, True, False]))


def test_causal_is_top_left() -> None:
    q, k, v = qkv()
    mask = torch.ones(L, S, dtype=torch.bool).tril()
    torch.testing.assert_close(sdpa(q, k, v, is_causal=True), sdpa(q, k, v, mask))
    torch.testing.assert_close(sdpa(q, k, v, is_causal=True)[:, :, 0], v[:, :, 0])


def test_metamorphic() -> None:
    q, k, v = qkv()
    out = sdpa(q, k, v)
    order = torch.randperm(S)
    torch.testing.assert_close(sdpa(q, k[:, :, order], v[:, :, order]), out)
    torch.testing.assert_close(sdpa(q, k, v, torch.full((L, 1), 3.0, dtype=torch.float64)), out)
    torch.testing.assert_close(sdpa(q, k, v, scale=0.0), v.mean(2, keepdim=True).expand_as(out))
    few = k[:, :1], v[:, :1]
    grouped = sdpa(q, *few, enable_gqa=True)
    torch.testing.assert_close(grouped, sdpa(q, *(x.expand(B, H, S, D) for x in few)))


def test_dropout_is_addressed_by_element() -> None:
    """With values = identity the output is the weights: the word at ((b * H + h) * Lq + i) * Lk + j decides."""
    p, seed = 0.3, -987654321
    q, k, _ = qkv()
    eye = torch.eye(S, dtype=torch.float64).expand(B, H, S, S)
    weights, dropped = sdpa(q, k, eye), sdpa(q, k, eye, dropout_p=p, seed=seed)
    words = torch.empty(B, H, L, S, dtype=torch.int64)
    for b, h, i, j in itertools.product(range(B), range(H), range(L), range(S)):
        words[b, h, i, j] = philox_words(torch.tensor([seed]), torch.tensor([((b * H + h) * L + i) * S + j]))
    torch.testing.assert_close(dropped, torch.where(words >= round(p * 2**32), weights / (1 - p), 0))
    assert sdpa(q, k, eye, dropout_p=1.0).abs().sum() == 0


def test_dropout_frequency_and_replay() -> None:
    q, k, v = (torch.randn(1, 4, 128, 8, requires_grad=True) for _ in range(3))
    kept = (sdpa(q, k, torch.eye(128).expand(1, 4, 128, 128), dropout_p=0.25) != 0).double().mean().item()
    assert abs(kept - 0.75) < 4 * math.sqrt(0.25 * 0.75 / (4 * 128 * 128))
    grads = []
    for replay in (False, True):
        torch.manual_seed(5)
        arguments = (q, k, v, None, 0.5)
        out = torch.utils.checkpoint.checkpoint(sdpa, *arguments, use_reentrant=False) if replay else sdpa(*arguments)
        grads.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    torch.testing.assert_close(*grads, rtol=0, atol=0)
    state = torch.get_rng_state()
    sdpa(q, k, v)
    assert torch.equal(state, torch.get_rng_state()), "no dropout, yet a seed was drawn"


Q, K, V = (torch.randn(B, H, n, D) for n in (L, S, S))
MASK = torch.zeros(L, S)


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        (([1], K, V), {}, "'query'"),
        ((Q[0, 0, 0], K, V), {}, "'query'"),
        ((Q, K.double(), V), {}, "'key'"),
        ((Q.long(), K.long(), V.long()), {}, "'query'"),
        ((Q, K, V.to("meta")), {}, "'value'"),
        ((Q, K[..., 1:], V), {}, "'key'"),
        ((Q, K[:, :2], V[:, :2]), {}, "query, key and value"),
        ((Q, K[:, :2], V[:, :2]), {"enable_gqa": True}, "'key'"),
        ((Q[0, 0], K[0, 0], V[0, 0]), {"enable_gqa": True}, "'query'"),
        ((Q, K, V), {"dropout_p": 1.5}, "'dropout_p'"),
        ((Q, K, V, MASK.long()), {}, "'attn_mask'"),
        ((Q, K, V, MASK.half()), {}, "'attn_mask'"),
        ((Q, K, V, MASK[1:]), {}, "'attn_mask'"),
        ((Q, K, V, MASK.expand(7, 1, 1, L, S)), {}, "'attn_mask'"),
        ((Q, K, V, MASK.expand(7, 1, L, S)), {}, "'attn_mask'"),
    ],
)
def test_errors_are_torchs(arguments: tuple[Any, ...], options: dict[str, Any], text: str) -> None:
    with pytest.raises((TypeError, RuntimeError, IndexError)) as theirs:
        F.scaled_dot_product_attention(*arguments, **options)
    with pytest.raises(theirs.type, match=text):
        sdpa(*arguments, **options)


def test_errors_that_torch_does_not_raise_here() -> None:
    with pytest.raises(RuntimeError, match="'value'"):
        sdpa(Q, K, V[:, :, 1:])
    with pytest.raises(RuntimeError, match="'attn_mask'"):
        sdpa(Q, K, V, MASK, is_causal=True)
    with pytest.raises(RuntimeError, match="'dropout_p'"):
        sdpa(Q, K, V, dropout_p=-0.5)
    with pytest.raises(TypeError, match="seed"):
        sdpa(Q, K, V, dropout_p=0.5, seed=1.5)
    with pytest.raises(pk.BackendError, match="attention"):
        sdpa(Q, K, V, backend="cuda")


def test_derivatives_transforms_and_compile() -> None:
    q, k, v = (x[:1, :2, :3, :3].detach().clone().requires_grad_() for x in qkv())
    mask = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        mask[0, 1] = -torch.inf

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return sdpa(q, k, v, mask, 0.3, seed=3)

    finite = mask.detach().clamp(min=-3).requires_grad_()
    assert torch.autograd.gradcheck(call, (q, k, v, finite)) and torch.autograd.gradgradcheck(call, (q, k, v, finite))
    expected = torch.autograd.grad(call(q, k, v, mask).sum(), (q, k, v, mask))
    found = torch.func.grad(lambda *x: call(*x).sum(), (0, 1, 2, 3))(q, k, v, mask)
    torch.testing.assert_close(found, expected)
    each = torch.func.vmap(sdpa)(q.expand(4, *q.shape[1:]), k.expand(4, *k.shape[1:]), v.expand(4, *v.shape[1:]))
    torch.testing.assert_close(each, sdpa(q, k, v).expand_as(each))
    torch._dynamo.reset()
    for dynamic in (False, True):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        torch.testing.assert_close(torch.autograd.grad(compiled(q, k, v, mask).sum(), (q, k, v, mask)), expected)
    drawn = torch.compile(lambda q: sdpa(q, q, q, dropout_p=0.5), fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    found = drawn(q)
    torch.manual_seed(1)
    torch.testing.assert_close(found, sdpa(q, q, q, dropout_p=0.5))


def test_autocast_lowers() -> None:
    q, k, v = qkv(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sdpa(q, k, v, MASK)
    assert out.dtype == torch.bfloat16
    assert {g.dtype for g in torch.autograd.grad(out.float().sum(), (q, k, v))} == {torch.float32}


E = 8


def mha_pair(**options: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(3)
    ours = pk.nn.MultiheadAttention(E, 2, **options)
    torch.manual_seed(3)
    return ours, nn.MultiheadAttention(E, 2, **options)


def masks(kinds: tuple[str, str], dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    padding = {
        "none": None,
        "bool": torch.tensor([[0, 0, 1, 0, 0], [0, 1, 1, 0, 1]]).bool(),
        "float": torch.randn(B, S, dtype=dtype),
    }[kinds[0]]
    attention = {
        "none": None,
        "bool": torch.arange(S) > torch.arange(L).unsqueeze(1) + 1,
        "float": torch.randn(L, S, dtype=dtype),
        "heads": torch.randn(B * 2, L, S, dtype=dtype),
    }[kinds[1]]
    return padding, attention


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("need_weights", (True, False))
@pytest.mark.parametrize("attention", ("none", "bool", "float", "heads"))
@pytest.mark.parametrize("padding", ("none", "bool", "float"))
def test_mha_equals_torch(padding: str, attention: str, need_weights: bool) -> None:
    grid = itertools.product((True, False), (True, False), (True, False), (None, 6), (torch.float64,))
    for bias, extra, first, kdim, dtype in (*grid, (True, False, False, None, torch.float32)):
        options = {"bias": bias, "add_bias_kv": extra, "add_zero_attn": extra, "batch_first": first, "kdim": kdim}
        ours, theirs = mha_pair(**options, dtype=dtype)
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
        q, k, v = (
            torch.randn(*((B, n) if first else (n, B)), size, dtype=dtype, requires_grad=True)
            for n, size in ((L, E), (S, kdim or E), (S, E))
        )
        key_mask, mask = masks((padding, attention), dtype)

        def outcome(module: nn.Module, x=(q, k, v), m=(key_mask, need_weights, mask)) -> tuple[Any, ...]:
            out, weights = module(*x, *m)
            return *gradients(out, *x, *module.parameters()), weights

        torch.testing.assert_close(outcome(ours), outcome(theirs))


@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_mha_self_attention_unbatched_and_hints() -> None:
    ours, theirs = mha_pair(dtype=torch.float64)
    assert repr(ours) == repr(theirs) and list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    shared = pk.nn.MultiheadAttention.from_torch(theirs.eval())
    assert all(a is b for a, b in zip(shared.parameters(), theirs.parameters(), strict=True)) and not shared.training
    x = torch.randn(L, E, dtype=torch.float64)
    causal = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    padding = torch.tensor([False, True, False, False])
    calls: list[dict[str, Any]] = [
        {},
        {"average_attn_weights": False},
        {"need_weights": False},
        {"key_padding_mask": padding},
        {"attn_mask": causal, "is_causal": True},
        {"attn_mask": causal, "is_causal": True, "need_weights": False},
        {"attn_mask": causal, "is_causal": True, "need_weights": False, "key_padding_mask": padding},
        {"attn_mask": torch.randn(2, L, L, dtype=torch.float64)},
    ]
    for options in calls:
        for module in (ours, shared):
            torch.testing.assert_close(module(x, x, x, **options), theirs(x, x, x, **options), msg=str(options))


def test_mha_rows_without_keys_and_dropout() -> None:
    module = pk.nn.MultiheadAttention(E, 2, dropout=0.5, batch_first=True)
    x = torch.randn(B, L, E)
    padding = torch.tensor([[True] * L, [False] * L])
    out, weights = module.eval()(x, x, x, key_padding_mask=padding)
    torch.testing.assert_close(out[0], module.out_proj.bias.expand(L, E))
    assert weights[0].abs().sum() == 0
    torch.testing.assert_close(module(x, x, x, key_padding_mask=padding, need_weights=False)[0], out)
    lowest = torch.where(padding, torch.finfo(torch.float32).min, 0.0)
    torch.testing.assert_close(module(x, x, x, key_padding_mask=lowest)[0], out)
    torch.manual_seed(1)
    dropped = module.train()(x, x, x)[0]
    torch.manual_seed(1)
    torch.testing.assert_close(module(x, x, x, need_weights=False)[0], dropped)
    assert not torch.equal(dropped, out)


def test_mha_errors_are_torchs() -> None:
    x = torch.randn(L, B, E)
    calls: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
        (AssertionError, "query", (x[0, 0], x, x), {}),
        (AssertionError, "key", (x, x[0], x), {}),
        (AssertionError, "query", (x[..., 1:], x, x), {}),
        (AssertionError, "key and value", (x, x, x[1:]), {}),
        (AssertionError, "key_padding_mask", (x, x, x), {"key_padding_mask": torch.zeros(L).bool()}),
        (AssertionError, "key_padding_mask", (x, x, x), {"key_padding_mask": torch.zeros(B, L).long()}),
        (AssertionError, "key_padding_mask", (x, x, x), {"key_padding_mask": torch.zeros(B, S).bool()}),
        (RuntimeError, "attn_mask", (x, x, x), {"attn_mask": torch.zeros(L, S)}),
        (RuntimeError, "attn_mask", (x, x, x), {"attn_mask": torch.zeros(B, L, L)}),
        (AssertionError, "attn_mask", (x, x, x), {"attn_mask": torch.zeros(B, 1, L, L)}),
        (RuntimeError, "attn_mask", (x, x, x), {"is_causal": True}),
        (RuntimeError, "key", (x, x[:, :1], x[:, :1]), {}),
    ]
    for error, text, arguments, options in calls:
        for module, pattern in zip(mha_pair(), (text, None), strict=True):
            with pytest.raises(error, match=pattern):
                module(*arguments, **options)
    with pytest.raises(ValueError, match="num_heads"):
        pk.nn.MultiheadAttention(E, 0)


def test_mha_compiles_and_explains() -> None:
    module = pk.nn.MultiheadAttention(E, 2)
    x = torch.randn(L, B, E, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for need_weights in (True, False):
        out, expected = (m(x, x, x, need_weights=need_weights)[0] for m in (compiled, module))
        torch.testing.assert_close(gradients(out, x), gradients(expected, x))
    assert pk.explain(module, x, x, x, need_weights=False).function == "scaled_dot_product_attention"
    assert pk.explain(sdpa, Q, K, V).backend == "cpu"
