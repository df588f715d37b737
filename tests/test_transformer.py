"""torch.nn's Transformer stacks on our kernels: masks, padding that inference leaves out, nested tensors."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pykernels as pk
from pykernels.testing.compare import assert_equal

E, H, B, L = 16, 2, 4, 9
CAUSAL = nn.Transformer.generate_square_subsequent_mask(L)
BAND = (torch.arange(L)[:, None] - torch.arange(L)).abs() > 2
BAND[:, 0] = False  # no query without a key: torch's fast path gives NaN for it, its slow one and ours 0
SHORT = torch.arange(L) >= torch.tensor([[L], [3], [1], [7]])

MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"mask": CAUSAL},
    "causal-hint": {"mask": CAUSAL, "is_causal": True},
    "causal-bool": {"mask": CAUSAL.isinf()},
    "band": {"mask": BAND},
    "padding": {"src_key_padding_mask": SHORT},
    "padding-in-front": {"src_key_padding_mask": SHORT.flip(1)},
    "padding-added": {"src_key_padding_mask": torch.zeros(B, L).masked_fill(SHORT, -torch.inf)},
    "padding-and-causal": {"src_key_padding_mask": SHORT, "mask": CAUSAL},
    "padding-and-band": {"src_key_padding_mask": SHORT, "mask": BAND},
}


def stack(norm_first: bool = False, **options: Any) -> nn.TransformerEncoder:
    options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": norm_first, **options}
    layer = nn.TransformerEncoderLayer(E, H, 24, **options)
    return nn.TransformerEncoder(layer, 2, nn.LayerNorm(E), enable_nested_tensor=not norm_first)


def judged(stock: nn.Module, ours: nn.Module, *args: Tensor, **options: Any) -> Tensor:
    oracle = copy.deepcopy(stock).double()
    wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in options.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's remarks on nested tensors and on masks of two kinds
        truth, peer = oracle(*(x.double() for x in args), **wide), stock(*args, **options)
    found = ours(*args, **options)
    assert_equal("out", found, truth, peer)
    return found


def patched(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    pk.patch(other)
    return other


@pytest.mark.parametrize("training", (False, True), ids=("eval", "train"))
@pytest.mark.parametrize("norm_first", (False, True))
@pytest.mark.parametrize("masks", MASKS)
def test_masks(masks: str, norm_first: bool, training: bool) -> None:
    options = MASKS[masks]
    stock = stack(norm_first).train(training)
    ours, x = patched(stock), torch.randn(B, L, E)
    with torch.set_grad_enabled(training):
        judged(stock, ours, x, **options)


@pytest.mark.parametrize("activation", ("relu", nn.GELU(), torch.tanh))
def test_padding_is_not_computed_in_inference(activation: Any) -> None:
    stock = stack(activation=activation).eval()
    ours, x = patched(stock), torch.randn(B, L, E)
    rows: list[torch.Size] = []
    dropped = activation is not torch.tanh
    assert stock.use_nested_tensor == dropped
    with torch.no_grad():
        out = judged(stock, ours, x, src_key_padding_mask=SHORT)
        ours.layers[1].linear1.register_forward_hook(lambda module, args, y: rows.append(y.shape))
        ours(x, src_key_padding_mask=SHORT)
    assert (rows[0][0] == int((~SHORT).sum())) == dropped
    if dropped:
        assert torch.equal(out[SHORT], ours.norm.bias.expand_as(out[SHORT]))
    found = judged(stock, ours, x, src_key_padding_mask=SHORT)
    assert found.requires_grad and rows[1] == (B, L, 24)


def test_inference_computes_the_activation_of_training() -> None:
    """torch's fast path takes the exact GELU for GELU("tanh"); ours stays with what was trained."""
    stock, x = stack(activation=nn.GELU("tanh")).eval(), torch.randn(B, L, E)
    ours = patched(stock)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            judged(stock, ours, x)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_a_listener_of_the_attention_is_heard_and_padding_is_zero() -> None:
    stock = stack().eval()
    ours, heard = patched(stock), []
    ours.layers[0].self_attn.register_forward_hook(lambda *_: heard.append(1))
    with torch.no_grad():
        judged(stock, ours, torch.randn(B, L, E), src_key_padding_mask=SHORT)
    assert heard == [1]


@pytest.mark.parametrize("listened", (False, True))
def test_nested_tensors(listened: bool) -> None:
    stock = nn.TransformerEncoderLayer(E, H, 24, 0.0, batch_first=True).eval()
    ours = patched(stock)
    if listened:
        ours.self_attn.register_forward_hook(lambda *_: None)
    parts = [torch.randn(n, E) for n in (L, 1, 4)]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor(parts)
        for mine, theirs in zip(ours(nested).unbind(), stock(nested).unbind(), strict=True):
            torch.testing.assert_close(mine, theirs)
        with pytest.raises(RuntimeError, match="masks must be None"):
            ours(nested, src_mask=CAUSAL)
    leaves = [x.requires_grad_() for x in parts]
    ours.train()
    nested = torch.nested.as_nested_tensor(leaves)
    sum(y.square().sum() for y in ours(nested).unbind()).backward()
    for x in parts:
        (expected,) = torch.autograd.grad(stock.train()(x.unsqueeze(0)).square().sum(), x)
        torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-5)


def test_inference_overwrites_nothing_that_somebody_holds() -> None:
    ours = pk.nn.TransformerEncoderLayer(E, H, 24, batch_first=True, norm_first=True).eval()
    x, seen = torch.randn(B, L, E), []
    kept = x.clone()
    with torch.no_grad():
        plain = ours(x)
        assert torch.equal(x, kept)
        ours.linear1.register_forward_hook(lambda module, args, y: seen.append((y, y.clone())))
        assert torch.equal(ours(x), plain)
    assert all(torch.equal(y, before) for y, before in seen) and seen


@pytest.mark.parametrize("batch_first", (False, True))
@pytest.mark.parametrize("hint", (None, True))
def test_decoder(batch_first: bool, hint: bool | None) -> None:
    layer = nn.TransformerDecoderLayer(E, H, 24, 0.0, nn.functional.gelu, batch_first=batch_first)
    stock = nn.TransformerDecoder(layer, 2)
    ours = patched(stock)
    shape = (B, L, E) if batch_first else (L, B, E)
    x, memory = torch.randn(shape), torch.randn(shape)
    options = {"tgt_mask": CAUSAL, "tgt_is_causal": hint}
    judged(stock, ours, x, memory, **options, memory_key_padding_mask=SHORT)
    assert {type(m).__module__ for m in ours.layers} == {"pykernels.nn.transformer"}


def test_the_causal_mask_is_recognised_and_no_mask_is_read() -> None:
    """Where the mask is the causal one our attention takes the causal kernel and never sees it."""
    from pykernels.nn.transformer import _says_causal

    assert _says_causal(CAUSAL, None, L) and _says_causal(CAUSAL.isinf(), None, L) and _says_causal(BAND, True, L)
    for mask in (BAND, CAUSAL[:5], CAUSAL.expand(B, L, L), CAUSAL.masked_fill(CAUSAL.isinf(), -9.0), None):
        assert not _says_causal(mask, None, L)
    assert not _says_causal(CAUSAL, False, L)


def test_constructed_directly() -> None:
    torch.manual_seed(0)
    stock = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 24, 0.0), 2, enable_nested_tensor=False)
    torch.manual_seed(0)
    layer = pk.nn.TransformerEncoderLayer(E, H, 24, 0.0, backend="reference")
    ours = pk.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    ours.load_state_dict(stock.state_dict())
    judged(stock, ours, torch.randn(L, B, E))
    assert ours.layers[1].self_attn.backend == "reference"
    decoder = pk.nn.TransformerDecoderLayer(E, H, 24, backend="reference")
    assert decoder.self_attn.backend == decoder.multihead_attn.backend == "reference"
