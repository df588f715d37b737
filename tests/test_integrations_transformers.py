"""Transformers' models on our attention and our modules, against their own eager implementation.

Small random configurations, nothing is downloaded. One group: importing Transformers takes seconds, once is enough.
"""

from __future__ import annotations

import importlib
import pickle
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import pykernels as pk
from pykernels.patching import registry
from pykernels.testing.compare import assert_equal

pytestmark = pytest.mark.xdist_group("transformers")

IDS, PAD, LAYERS = 67, 0, 2
TOKENS = {"vocab_size": IDS, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": None}
GROUPED = {
    **TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {**TOKENS, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64},
    ),
    "bert": (
        "BertForMaskedLM",
        "BertConfig",
        {**TOKENS, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 48},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            **TOKENS,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": LAYERS,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
            "decoder_start_token_id": PAD,
        },
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 5}),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {
            **GROUPED,
            "sliding_window": 5,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 2.0,
            "tie_word_embeddings": False,
        },
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            **GROUPED,
            "sliding_window": 5,
            "num_local_experts": 4,
            "experts_implementation": "eager",  # the default has no float64
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
}
DECODERS = [name for name in MODELS if name not in ("bert", "t5")]


@pytest.fixture(scope="module")
def transformers() -> Any:
    pytest.importorskip("transformers", reason="transformers is not installed (the `test` extra has it)")
    pk.integrations.transformers.register()
    return importlib.import_module("transformers")  # which puts a module of another kind in its place


def make(transformers: Any, name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model with weights large enough for masks, caps and sinks to matter, without dropout."""
    torch.manual_seed(3)
    kind, config, options = MODELS[name]
    model = getattr(transformers, kind)(getattr(transformers, config)(**options, attn_implementation="eager"))
    for key, parameter in model.named_parameters():
        if parameter.dim() > 1 or key.endswith("sinks"):
            torch.nn.init.normal_(parameter, std=1.0 if key.endswith("sinks") else 0.2)
    return model.eval().to(dtype)


def batch(name: str, side: str) -> dict[str, Tensor]:
    """Three rows, two of them padded on a side. What would be predicted from padding is no label."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(2, IDS, (3, 11), generator=generator)
    mask = torch.ones_like(ids)
    for row, padding in ((0, 4), (1, 1)):
        mask[row, slice(padding) if side == "left" else slice(-padding, None)] = 0
    labels = ids.masked_fill(mask == 0, -100)
    if name == "t5":
        labels = torch.randint(2, IDS, (3, 7), generator=generator)
    elif name != "bert":
        labels[mask.cumsum(1) == 1] = -100
    given = {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask, "labels": labels}
    if name != "t5":  # whose positions are relative
        given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return given


def padded(model: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits of the real tokens, loss and all gradients."""
    result = model(**given)
    result.loss.backward()
    logits = result.logits
    return gathered(
        model, logits if "T5" in type(model).__name__ else logits[given["attention_mask"].bool()], result.loss
    )


def row_by_row(model: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same of a model that never sees padding."""
    predicted = int((given["labels"] != -100).sum())
    logits, loss = [], 0.0
    for row in range(len(given["input_ids"])):
        kept = given["attention_mask"][row].bool()
        one = {
            name: x[row][kept if x.shape == given["input_ids"].shape else slice(None)][None]
            for name, x in given.items()
        }
        del one["attention_mask"]
        result = model(**one, use_cache=True) if model.config.is_encoder_decoder else model(**one)
        share = result.loss * (int((one["labels"] != -100).sum()) / predicted)
        share.backward()
        logits.append(result.logits[0])
        loss = loss + share
    return gathered(model, torch.stack(logits) if "T5" in type(model).__name__ else torch.cat(logits), loss)


def gathered(model: Any, logits: Tensor, loss: Any) -> dict[str, Tensor]:
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), "loss": loss.detach(), **grads}


def zero_by_algebra(name: str, oracle: dict[str, Tensor]) -> bool:
    """Whether a bias has no gradient but rounding, in float64 too: that of keys, which moves all scores of a row alike.

    What is computed for it is the rounding of a sum that cancels, and of two roundings neither is the measure of the
    other. A bias is the weight of an input that is always 1, so it is judged as that column of its layer's weight.
    """
    weight = oracle.get(name.removesuffix("bias") + "weight") if name.endswith("bias") else None
    return weight is not None and bool(oracle[name].abs().max() < 1e-12 * weight.abs().max())


def same(ours: dict[str, Tensor], oracle: dict[str, Tensor], eager: dict[str, Tensor]) -> None:
    assert ours.keys() == oracle.keys() == eager.keys()
    for name in ours:
        tensors = [one[name] for one in (ours, oracle, eager)]
        if zero_by_algebra(name, oracle):
            weight = name.removesuffix("bias") + "weight"
            tensors = [torch.cat([one[weight], one[name][:, None]], 1) for one in (ours, oracle, eager)]
        assert_equal(name, *tensors, long_sum=name not in ("logits", "loss"))


def test_which_gradients_are_judged_with_their_layers(transformers: Any) -> None:
    """The keys' biases of BERT, no others of any model; and there too a gradient that is no rounding is found."""
    for name in MODELS:
        oracle = row_by_row(make(transformers, name, torch.float64), batch(name, "right"))
        cancelled = [key for key in oracle if zero_by_algebra(key, oracle)]
        assert len(cancelled) == (LAYERS if name == "bert" else 0) and all("key.bias" in key for key in cancelled)
    eager = row_by_row(make(transformers, "bert"), batch("bert", "right"))
    oracle = row_by_row(make(transformers, "bert", torch.float64), batch("bert", "right"))
    wrong = dict(eager)
    (key, *_) = (key for key in oracle if zero_by_algebra(key, oracle))
    wrong[key] = eager[key] + 1e-5 * float(oracle[key.removesuffix("bias") + "weight"].abs().max())
    same(eager, oracle, eager)
    with pytest.raises(AssertionError, match=key):
        same(wrong, oracle, eager)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_loss_and_gradients(transformers: Any, name: str, side: str) -> None:
    given = batch(name, side)
    oracle, eager = (row_by_row(make(transformers, name, dtype), given) for dtype in (torch.float64, torch.float32))
    model = make(transformers, name)
    model.set_attn_implementation("pykernels")
    same(padded(model, given), oracle, eager)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "bert"])
def test_generation(transformers: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the sliding window, a batch padded on the left and one without padding (steps by `attention_decode`);
    caches that grow, that do not, that beams reorder, and none."""
    from pykernels.integrations.transformers import attention as served

    model, steps = make(transformers, name), []
    given = {key: x for key, x in batch(name, "left").items() if key in ("input_ids", "attention_mask")}
    decode = served.attention_decode
    monkeypatch.setattr(served, "attention_decode", lambda *a, **k: steps.append(1) or decode(*a, **k))

    def tokens(padded: bool = True, **options: Any) -> Tensor:
        mask = given["attention_mask"]
        chosen = given if padded else {**given, "attention_mask": torch.ones_like(mask)}
        with torch.no_grad():
            return model.generate(**chosen, max_new_tokens=9, do_sample=False, **options)

    expected, beams, whole = tokens(), tokens(num_beams=2), tokens(padded=False)
    assert len(expected[:, -9:].unique()) > 5, "one token over and over would prove nothing"
    model.set_attn_implementation("pykernels")
    assert torch.equal(tokens(), expected)
    assert torch.equal(tokens(cache_implementation="static"), expected)
    assert torch.equal(tokens(use_cache=False), expected)
    assert torch.equal(tokens(num_beams=2), beams)
    steps.clear()
    assert torch.equal(tokens(padded=False), whole)
    assert len(steps) > 0 or name not in ("llama", "mistral", "gpt2")


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_packed_sequences(transformers: Any, name: str) -> None:
    """Positions that start again separate sequences in a row; no dense mask is made for them."""
    model = make(transformers, name)
    ids = torch.randint(2, IDS, (2, 12), generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([[*range(7), *range(5)], [*range(2), *range(10)]])
    given = {"input_ids": ids, "position_ids": positions, "labels": ids, "use_cache": False}

    def result() -> dict[str, Tensor]:
        model.zero_grad()
        found = model(**given)
        found.loss.backward()
        return gathered(model, found.logits, found.loss)

    eager = {key: x.clone() for key, x in result().items()}
    model.set_attn_implementation("pykernels")
    ours = result()
    for key, x in ours.items():
        torch.testing.assert_close(x, eager[key], msg=lambda text, k=key: f"{k}: {text}")
    alone = model(input_ids=ids[:1, 7:], use_cache=False).logits
    torch.testing.assert_close(ours["logits"][:1, 7:], alone.detach())
    ends = torch.tensor([0, 7, 12, 14, 24])  # the same said in the other way
    positions = {"position_ids": torch.arange(12).expand(2, -1), "use_cache": False}
    del given["position_ids"]
    if name == "llama":  # a rotation is relative: positions that go on change nothing
        named = model(input_ids=ids, **positions, cu_seq_lens_q=ends, cu_seq_lens_k=ends).logits
        torch.testing.assert_close(named.detach(), ours["logits"])


def dense(pattern: Any, lengths: tuple[int, int], batch_size: int) -> Tensor:
    """What a Pattern allows, written down: (batch, 1, queries, keys)."""
    queries, total = lengths
    place = torch.arange(queries)[:, None] + pattern.keys - queries
    key = torch.arange(total)[None]
    allowed = (key < pattern.keys).expand(queries, -1)
    if pattern.left >= 0:
        allowed = allowed & (key >= place - pattern.left)
    if pattern.right >= 0:
        allowed = allowed & (key <= place + pattern.right)
    allowed = allowed.expand(batch_size, 1, -1, -1)
    if pattern.key_padding_mask is not None:
        allowed = allowed & torch.nn.functional.pad(pattern.key_padding_mask, (0, total - pattern.keys))[:, None, None]
    return allowed


def test_masks_are_told_by_what_they_are(transformers: Any) -> None:
    """Every call's Pattern allows what Transformers' dense mask allows; what cannot be told stays dense."""
    from transformers import masking_utils as theirs

    from pykernels.integrations.transformers.masks import Pattern, make_mask

    functions = {
        "causal": theirs.causal_mask_function,
        "window": theirs.sliding_window_causal_mask_function(4),
        "both ways": theirs.bidirectional_mask_function,
        "window both ways": theirs.sliding_window_bidirectional_mask_function(3),
        "chunks": theirs.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int64)),
    }
    made: dict[str, set[str]] = {name: set() for name in functions}
    for name, function in functions.items():
        for queries, keys, offset in ((9, 9, 0), (1, 9, 8), (3, 9, 6), (5, 9, 0), (3, 9, 2), (9, 3, 0)):
            for padding in ("none", "full", "left", "right"):
                mask = torch.ones(2, keys, dtype=torch.bool)
                mask[0, :2] = padding != "left"
                mask[0, -2:] &= padding != "right"
                call: dict[str, Any] = {"batch_size": 2, "q_length": queries, "kv_length": keys, "q_offset": offset}
                call |= {"mask_function": function, "attention_mask": None if padding == "none" else mask}
                found = make_mask(**call, allow_is_causal_skip=True, allow_is_bidirectional_skip=True)
                expected = theirs.sdpa_mask(**call, allow_is_causal_skip=False)
                made[name].add(type(found).__name__)
                if found is None:  # then the module's is_causal decides, for more than one query
                    causal = "both ways" not in name and queries > 1
                    found = Pattern(-1, 0 if causal else -1, keys)
                    assert queries in (1, keys) or not causal
                if isinstance(found, Pattern):
                    found = dense(found, (queries, keys), 2)
                assert torch.equal(found, expected), (name, queries, keys, offset, padding)
    assert made["chunks"] == {"Tensor"} and made["both ways"] == {"NoneType", "Pattern"}
    assert all("Pattern" in made[name] for name in ("causal", "window", "window both ways"))


def test_masks_that_a_model_computes_with_stay_tensors(transformers: Any) -> None:
    from transformers import masking_utils as theirs

    from pykernels.integrations.transformers.masks import make_mask

    assert make_mask(1, 5, 5, allow_is_causal_skip=False).shape == (1, 1, 5, 5)
    both = theirs.bidirectional_mask_function
    assert make_mask(1, 5, 5, mask_function=both, allow_is_bidirectional_skip=False).shape == (1, 1, 5, 5)
    padded = torch.tensor([[False, True, True, True], [True] * 4])
    step = make_mask(2, 1, 8, q_offset=torch.tensor(3), attention_mask=padded)
    assert step.shape == (2, 1, 1, 8) and step[0, 0, 0].tolist() == [False, *[True] * 3, *[False] * 4]


def test_compiled_whole(transformers: Any) -> None:
    model = make(transformers, "llama")
    model.set_attn_implementation("pykernels")
    pk.patch(model)
    given = batch("llama", "right")
    expected = model(**given).loss
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(**given).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)


def test_what_is_not_served_says_so(transformers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from pykernels.integrations.transformers.attention import attention_forward
    from pykernels.integrations.transformers.masks import Pattern

    q = torch.randn(1, 2, 3, 4)
    module = torch.nn.Module()
    with pytest.raises(RuntimeError, match="made for 5 keys, and there are 3"):
        attention_forward(module, q, q, q, Pattern(-1, 0, 5))
    with pytest.raises(NotImplementedError, match="paged caches"):
        attention_forward(module, q, q, q, None, cache=object())
    with pytest.raises(NotImplementedError, match="without a bias"):
        attention_forward(module, q, q, q, None, position_bias=q[:, :1, :, :3], cu_seq_lens_q=torch.tensor([0, 3]))
    with pytest.raises(pk.BackendError, match="cuda"):
        attention_forward(module, q, q, q, None, backend="cuda")
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.1")
    with pytest.raises(ImportError, match=r"needs transformers >= 5.4, not 4.57.1: pip install --upgrade transformers"):
        pk.integrations.transformers.register()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs transformers >= 5.4: pip install transformers"):
        pk.integrations.transformers.register()


FUSED = {
    "gpt2": "NewGELUActivation",
    "bert": "GELUActivation",
    "t5": "T5DenseGatedActDense",
    "llama": "LlamaMLP",
    "mistral": "MistralMLP",
    "gemma2": "Gemma2MLP",
}


@pytest.mark.parametrize("name", FUSED)
def test_patched(transformers: Any, name: str) -> None:
    """Feed-forward blocks, activations, embeddings and the attention of a whole model; then copied, and put back."""
    given = batch(name, "left")
    oracle, eager = (row_by_row(make(transformers, name, dtype), given) for dtype in (torch.float64, torch.float32))
    model = make(transformers, name)
    model.set_attn_implementation("sdpa" if name != "gemma2" else "pykernels")  # whose soft cap "sdpa" does not have
    state = {key: id(x) for key, x in model.named_parameters()}
    report = pk.patch(model)
    fused = [entry for entry in report.entries if entry.kind == FUSED[name]]
    assert len(fused) >= LAYERS and all(entry.status == "patched" for entry in fused), report
    assert model.config._attn_implementation == "pykernels"
    assert {key: id(x) for key, x in model.named_parameters()} == state
    same(padded(model, given), oracle, eager)
    again = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(again(**given).logits, model(**given).logits)
    assert not pk.patch(model).patched
    pk.unpatch(model)
    assert not any("pykernels" in type(part).__module__ for part in model.modules())
    assert model.config._attn_implementation == ("sdpa" if name != "gemma2" else "pykernels")


def test_what_patch_leaves(transformers: Any) -> None:
    model = make(transformers, "llama")
    first, second = (layer.mlp for layer in model.model.layers)
    first.act_fn.register_forward_hook(lambda *given: None)
    second.act_fn = torch.nn.Hardswish()
    left = pk.patch(model).left
    assert "act_fn has hooks" in left["model.layers.0.mlp"]
    assert "no gated kernel for its activation Hardswish" in left["model.layers.1.mlp"]
    assert "chosen as 'eager'" in left[""]


def test_patch_knows_activations_by_their_exact_class(transformers: Any) -> None:
    class Doubled(torch.nn.SiLU):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = make(transformers, "llama")
    first, second = (layer.mlp for layer in model.model.layers)
    first.act_fn, second.act_fn = Doubled(), torch.nn.SiLU()
    second.act_fn.forward = lambda x: 3 * x  # type: ignore[method-assign]
    x = torch.randn(2, first.gate_proj.in_features)
    expected = first(x), second(x)
    left = pk.patch(model).left
    assert "Doubled" in left["model.layers.0.mlp"] and "SiLU" in left["model.layers.1.mlp"]
    torch.testing.assert_close((first(x), second(x)), expected)
    again = make(transformers, "llama")
    pk.patch(again, only="*.act_fn")  # ours of that class are known as well
    assert "model.layers.0.mlp" in pk.patch(again).patched


def test_patch_says_why_a_version_is_left(transformers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(transformers, "llama")
    monkeypatch.setattr(registry, "_provided", {})
    monkeypatch.setattr(registry, "_rules", {})
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.3.0")
    left = pk.patch(model).left
    assert "needs transformers >= 5.4, not 5.3.0: pip install --upgrade transformers" in left["model.layers.0.mlp"]


def test_a_block_is_told_by_what_it_computes(transformers: Any) -> None:
    from pykernels.integrations.transformers.modules import rule_for

    class Added(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))

    class Swapped(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))

    class Chunks(torch.nn.Module):
        def forward(self, hidden_states: Tensor) -> Tensor:
            up_states = self.gate_up_proj(hidden_states)
            gate, up_states = up_states.chunk(2, dim=0)
            up_states = up_states * self.activation_fn(gate)
            return self.down_proj(up_states)

    assert [rule_for(kind) is None for kind in (Added, Swapped, Chunks, torch.nn.Module)] == [True] * 4
    assert rule_for(transformers.models.llama.modeling_llama.LlamaMLP) is not None
