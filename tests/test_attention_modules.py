"""CausalSelfAttention against its parts in plain torch: options, layouts of other implementations, mistakes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pykernels as pk

E, H, L, B = 24, 4, 11, 2
Module = pk.nn.CausalSelfAttention


def plain(module: Any, x: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
    """The formula with torch's functions: x (B, L, E); mask over (B, 1, L, L); rotation by complex numbers."""
    size, heads, kv_heads = module.head_dim, module.num_heads, module.num_kv_heads
    q, k, v = module.c_attn(x).split([n * size for n in (heads, kv_heads, kv_heads)], -1)
    q, k, v = (t.unflatten(-1, (-1, size)).transpose(1, 2) for t in (q, k, v))
    if module.rotary_base is not None:
        rate = module.rotary_base ** (-torch.arange(size // 2, dtype=torch.float64) * 2 / size)
        angle = (torch.arange(x.shape[1]) if positions is None else positions).double().unsqueeze(-1) * rate
        turn = torch.polar(torch.ones_like(angle), angle)
        q, k = (
            torch.cat(((z := torch.complex(*t.double().chunk(2, -1)) * turn).real, z.imag), -1).to(x.dtype)
            for t in (q, k)
        )
    k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
    distance = torch.arange(x.shape[1]).unsqueeze(1) - torch.arange(x.shape[1])
    allowed = distance >= 0
    if module.window is not None:
        allowed = allowed & (distance <= module.window)
    scores = q @ k.transpose(-1, -2) / size**0.5
    if module.softcap is not None:
        scores = module.softcap * torch.tanh(scores / module.softcap)
    scores = scores.masked_fill(~(allowed if mask is None else allowed & mask), -torch.inf)
    return module.c_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))


OPTIONS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "grouped": {"num_kv_heads": 2, "bias": False, "rotary_base": 10000.0},
    "window": {"window": 3, "num_kv_heads": 1, "softcap": 2.0},
    "wide": {"head_dim": 10, "rotary_base": 500.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_output_and_gradients_equal_the_formula(options: dict[str, Any], dtype: torch.dtype) -> None:
    module = Module(E, H, **options, dtype=dtype)
    x = torch.randn(B, L, E, dtype=dtype, requires_grad=True)
    leaves = (x, *module.parameters())
    found, expected = module(x), plain(module, x)
    dy = torch.randn_like(found)
    gradients = (torch.autograd.grad(y, leaves, dy) for y in (found, expected))
    torch.testing.assert_close((found, *next(gradients)), (expected, *next(gradients)), rtol=1e-4, atol=1e-5)


def test_one_sequence_padding_and_packing() -> None:
    """The same tokens alone, in a padded batch, and packed end to end."""
    module = Module(E, H, num_kv_heads=2, rotary_base=10000.0).eval()
    sequences = [torch.randn(n, E) for n in (L, 4, 1)]
    alone = [module(x) for x in sequences]
    packed = module(torch.cat(sequences), cu_seqlens=torch.tensor([0, L, L + 4, L + 5]))
    torch.testing.assert_close(packed, torch.cat(alone))
    padded = nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=7.0)
    real = torch.arange(L) < torch.tensor([[L], [4], [1]])
    out = module(padded, key_padding_mask=real)
    for row, x in zip(out, alone, strict=True):
        torch.testing.assert_close(row[: len(x)], x)
    torch.testing.assert_close(module(sequences[1], key_padding_mask=torch.ones(4, dtype=torch.bool)), alone[1])
    left = torch.cat([torch.zeros(3, E), sequences[1]]).unsqueeze(0)  # rotations are relative: padding may be in front
    out = module(left, key_padding_mask=torch.arange(7).unsqueeze(0) >= 3)
    torch.testing.assert_close(out[0, 3:], alone[1], rtol=1e-4, atol=1e-5)


def test_prefix_is_seen_by_all() -> None:
    module = Module(E, H)
    x = torch.randn(B, L, E)
    distance = torch.arange(L).unsqueeze(1) - torch.arange(L)
    q, k, v = module.c_attn(x).chunk(3, -1)
    q, k, v = (t.unflatten(-1, (H, -1)).transpose(1, 2) for t in (q, k, v))
    mask = (distance >= 0) | (torch.arange(L) < 5)
    expected = module.c_proj(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(-2))
    torch.testing.assert_close(module(x, prefix_length=5), expected)


def test_dropout_only_in_training() -> None:
    module, x = Module(E, H, dropout=0.5, residual_dropout=0.25), torch.randn(1, L, E)
    assert torch.equal(module.eval()(x), module(x))
    torch.manual_seed(1)
    one = module.train()(x)
    torch.manual_seed(1)
    assert torch.equal(module(x), one) and not torch.equal(module(x), one)
    assert 0 < (one == 0).float().mean() < 0.5
    module.residual_dropout = 0.0
    assert not torch.equal(module(x), module.eval()(x))


def test_other_implementations_load() -> None:
    x, module = torch.randn(B, L, E), Module(E, H)
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    mha = nn.MultiheadAttention(E, H, batch_first=True)
    nn.init.normal_(mha.in_proj_bias)
    module.load_layout(mha.state_dict())
    torch.testing.assert_close(module(x), mha(x, x, x, attn_mask=mask)[0], rtol=1e-4, atol=1e-5)
    expected = module(x)
    own = module.state_dict()
    gpt2 = {f"h.0.attn.{n}": w.t() if w.dim() == 2 else w for n, w in own.items()}
    gpt2 |= {"h.0.attn.bias": torch.ones(1, 1, L, L).tril(), "h.1.attn.c_attn.weight": torch.zeros(1)}
    q, k, v = own["c_attn.weight"].chunk(3)
    bias = own["c_attn.bias"].chunk(3)
    split = {f"{n}_proj.{kind}": w for kind, parts in (("weight", (q, k, v)), ("bias", bias))
             for n, w in zip("qkv", parts, strict=True)}  # fmt: skip
    split |= {f"o_proj.{kind}": own[f"c_proj.{kind}"] for kind in ("weight", "bias")}
    for state, prefix in ((own, ""), (gpt2, "h.0.attn."), (split, "")):
        other = Module(E, H)
        other.load_layout(state, prefix)
        torch.testing.assert_close(other(x), expected)
    assert list(own) == ["c_attn.weight", "c_attn.bias", "c_proj.weight", "c_proj.bias"]
    with pytest.raises(KeyError, match=r"no c_attn\.weight among"):
        module.load_layout({"k_proj.weight": k})
    with pytest.raises(RuntimeError, match=r"c_attn\.weight must have the shape \(48, 24\), not \(72, 24\)"):
        Module(E, H, num_kv_heads=2).load_layout(own)
    with pytest.raises(RuntimeError, match="bias=False, but given .'c_attn.bias'"):
        Module(E, H, bias=False).load_layout(own)


def test_compiles_explains_and_casts() -> None:
    module, x = Module(E, H, num_kv_heads=2, rotary_base=10000.0), torch.randn(B, L, E, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(m(x).square().sum(), (x, *module.parameters())) for m in (compiled, module))
    torch.testing.assert_close(found, expected)
    assert pk.explain(module, x).function == "attention"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = module(x)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), module(x), rtol=5e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("text", "arguments", "options"),
    [
        ("embed_dim must be positive, not 0", (0, 1), {}),
        ("num_heads must divide embed_dim 24, not 5", (E, 5), {}),
        ("num_kv_heads must divide num_heads 4, not 3", (E, H), {"num_kv_heads": 3}),
        ("head_dim must be positive, and even for a rotation, not 3", (E, 8), {"rotary_base": 1e4}),
        (r"dropout must be in \[0, 1\), not 1.0", (E, H), {"dropout": 1.0}),
        (r"residual_dropout must be in \[0, 1\], not 2", (E, H), {"residual_dropout": 2}),
        ("window must not be negative, not -1", (E, H), {"window": -1}),
    ],
)
def test_wrong_options_are_named(text: str, arguments: tuple[int, int], options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=text):
        Module(*arguments, **options)


def test_wrong_inputs_are_named() -> None:
    module = Module(E, H)
    for text, x, options in (
        (r"x must have the shape \(B, L, 24\), not \(2, 11, 23\)", torch.zeros(B, L, 23), {}),
        (
            r"x must have the shape \(L, 24\), not \(2, 11, 24\)",
            torch.zeros(B, L, E),
            {"cu_seqlens": torch.tensor([0])},
        ),
        ("'key_padding_mask' must have the shape", torch.zeros(B, L, E), {"key_padding_mask": torch.ones(B, 3).bool()}),
    ):
        with pytest.raises(RuntimeError, match=text):
            module(x, **options)
    with pytest.raises(ValueError, match="'cu_seqlens_q' must end at query's total 11, not 9"):
        module(torch.zeros(L, E), cu_seqlens=torch.tensor([0, 9]))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", (torch.strided, torch.jagged), ids=str)
def test_mha_takes_nested_tensors(layout: torch.layout) -> None:
    """As torch's fast path, which knows one layout and no gradients."""
    ours, theirs = pk.nn.MultiheadAttention(E, H, batch_first=True), nn.MultiheadAttention(E, H, batch_first=True)
    ours.load_state_dict(theirs.eval().state_dict())
    parts = [torch.randn(n, E, requires_grad=True) for n in (L, 4)]
    nested = torch.nested.as_nested_tensor(parts, layout=layout)
    out, weights = ours(nested, nested, nested)
    assert out.is_nested and out.layout == layout and weights.shape == (2, L, L)
    with torch.no_grad():
        strided = torch.nested.nested_tensor([x.detach() for x in parts])
        expected = theirs(strided, strided, strided, need_weights=False)[0]
    for one, other, x, w in zip(out.unbind(), expected.unbind(), parts, weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        alone, alone_weights = theirs(x, x, x)
        torch.testing.assert_close(w[: len(x), : len(x)], alone_weights, rtol=1e-4, atol=1e-5)
        assert w[len(x) :].eq(0).all() and w[:, len(x) :].eq(0).all()
        (gradient,) = torch.autograd.grad(one.square().sum(), x, retain_graph=True)
        torch.testing.assert_close(gradient, torch.autograd.grad(alone.square().sum(), x)[0], rtol=1e-3, atol=1e-4)
    with pytest.raises(AssertionError, match="nested tensors must be query, key and value at once"):
        ours(nested, parts[0], parts[0])
