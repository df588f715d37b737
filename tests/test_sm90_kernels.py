"""`sm90_kernels`: one switch for the kernels of compute capability 9.0 alone, in attention and the recurrent room;
which kernels `explain` says would serve; GPUs that have not the instructions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import BACKENDS, DEVICE

import pykernels.functional as pk
from pykernels import explain, nn, sm90_kernels
from pykernels._cuda import _sm90, attention, recurrent
from pykernels._cuda._extension import Extension
from pykernels._cuda._sm90 import Kernels

BACKEND = "cuda" if DEVICE == "cuda" else "emulator"
HOPPER = DEVICE == "cpu" or torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(BACKEND not in BACKENDS or not HOPPER, reason="no emulator, and no GPU of 9.0")
OTHERS, OURS = "kernels for every GPU", "kernels for sm_90a"


def of_attention(size: int = 64, dtype: torch.dtype = torch.float16, keys: int = 30, **options: Any) -> str:
    q, k = (torch.randn(1, 2, n, size, device=DEVICE).to(dtype) for n in (30, keys))
    return explain(pk.attention, q, k, k, backend=BACKEND, **options).kernels


def of_layer(kind: str, hidden: int, dtype: torch.dtype = torch.bfloat16, rows: int = 16, **options: Any) -> str:
    x = torch.randn(3, rows, 4, device=DEVICE).to(dtype)
    weights = list(getattr(nn, kind.upper())(4, hidden, device=DEVICE, dtype=dtype).parameters())
    return explain(getattr(pk, kind), x, None, weights, backend=BACKEND, **options).kernels


def test_modes() -> None:
    assert not _sm90.FASTER
    for found in (of_attention(), of_layer("lstm", 40)):
        assert found.startswith(OTHERS) and "no GPU record" in found
    with sm90_kernels("never"):
        assert "never" in of_attention() and "never" in of_layer("gru", 40)
    with sm90_kernels("always"):
        assert of_attention() == OURS and of_layer("lstm", 40) == f"{OURS} (a cluster for 16 rows)"
        with pytest.raises(KeyError), sm90_kernels("auto"):
            assert "no GPU record" in of_attention()
            raise KeyError
        assert of_attention() == OURS
    assert "no GPU record" in of_attention()
    with pytest.raises(ValueError, match="auto, always, never"), sm90_kernels("sometimes"):
        pass


def test_what_attention_is_refused_and_why() -> None:
    with sm90_kernels("always"):
        slopes = torch.ones(2, device=DEVICE)
        assert of_attention(160, causal=True) == of_attention(softcap=2.0, alibi_slopes=slopes) == OURS
        assert "they have no dropout" in of_attention(dropout_p=0.5)
        assert "they have no float32" in of_attention(dtype=torch.float32)
        assert "they need queries and keys" in of_attention(keys=0)
        q = torch.randn(2, 30, 64, device=DEVICE).half()
        sdpa = pk.scaled_dot_product_attention
        assert explain(sdpa, q, q, q, backend=BACKEND).kernels == OURS
        assert "dropout" in explain(sdpa, q, q, q, dropout_p=0.5, backend=BACKEND).kernels


def test_what_layers_are_refused_and_why() -> None:
    with sm90_kernels("always"):
        assert "they have no vanilla RNN" in of_layer("rnn", 40)
        assert "they have no float32" in of_layer("lstm", 40, torch.float32)
        assert "multiples of 8, not 12" in of_layer("gru", 12)
        big = of_layer("lstm", 520)
        assert "the weights of hidden size 520 do not fit a cluster" in big and "a cooperative grid" in big
        assert of_layer("lstm", 40, zoneout=0.1, training=True) == f"{OTHERS} (a launch a step)"
        h = torch.zeros(3, 40, device=DEVICE).bfloat16()
        cell = nn.LSTMCell(4, 40, device=DEVICE, dtype=torch.bfloat16)
        called = explain(pk.lstm_cell, h[:, :4], (h, h), *cell.parameters(), backend=BACKEND)
        assert called.kernels.startswith(OURS)
        assert of_layer("lstm", 40, rows=0) == ""


def test_auto_takes_what_a_record_shows_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain and general, forward and backward, dtypes and sizes are told apart."""

    def faster(name: str, backward: bool, general: bool = False) -> None:
        monkeypatch.setitem(_sm90.FASTER, Kernels(name, backward, torch.bfloat16, general), (64, 128))

    half = torch.bfloat16
    faster("attention", backward=False)
    assert of_attention(128, half).startswith(f"{OURS}; backward those for every GPU: no GPU record")
    for other in (of_attention(64), of_attention(256, half), of_attention(64, half, scale=-1.0)):
        assert other.startswith(OTHERS)
    faster("attention", backward=True)
    assert of_attention(64, half) == OURS
    for terms in (
        {"bias": torch.zeros(30, device=DEVICE)},
        {"mask": torch.ones(30, 30, dtype=torch.bool, device=DEVICE)},
        {"key_padding_mask": torch.ones(1, 30, dtype=torch.bool, device=DEVICE)},
        {"alibi_slopes": torch.ones(2, device=DEVICE)},
        {"softcap": 1.0},
    ):
        assert of_attention(64, half, **terms).startswith(OTHERS), terms
    faster("attention", backward=True, general=True)
    assert of_attention(64, half, softcap=1.0).endswith("backward those for sm_90a")
    faster("lstm", backward=True)
    assert of_layer("lstm", 128).startswith(OTHERS) and of_layer("lstm", 128).endswith("backward those for sm_90a")
    assert "backward" not in of_layer("lstm", 136) and "backward" not in of_layer("gru", 128)


@pytest.mark.parametrize(("mode", "suffix", "way"), (("always", "_sm90", 4), ("never", "", 1)))
def test_what_explain_says_is_what_runs(mode: str, suffix: str, way: int, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: dict[str, tuple[Any, ...]] = {}
    original = Extension.call

    def noted(self: Extension, launcher: str, *args: Any, **options: Any) -> None:
        launched[launcher] = args
        original(self, launcher, *args, **options)

    monkeypatch.setattr(Extension, "call", noted)
    q = torch.randn(1, 1, 8, 64, device=DEVICE).half().requires_grad_()
    layer = nn.LSTM(4, 16, device=DEVICE, dtype=torch.bfloat16, backend=BACKEND)
    with sm90_kernels(mode):
        pk.attention(q, q, q, backend=BACKEND).sum().backward()
        layer(torch.randn(2, 3, 4, device=DEVICE).bfloat16())[0].sum().backward()
    names = {name for name in launched if name.startswith("attention") and name != "attention_rows"}
    assert names == {f"attention_{which}{suffix}" for which in ("forward", "dq", "dkdv")}
    assert [launched[f"recurrent_{direction}"][-6] for direction in ("forward", "backward")] == [way, way]


@pytest.mark.parametrize(
    ("capability", "built", "reason"),
    (
        ((8, 0), ["80", "90a"], "this GPU has 8.0"),
        ((10, 0), ["90a", "90+PTX"], "this GPU has 10.0"),
        ((9, 0), ["80", "90+PTX"], "built without sm_90a"),
        ((9, 0), ["80", "90a"], None),
    ),
)
def test_a_gpu_without_the_instructions_is_refused(
    capability: tuple[int, int], built: list[str], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu, kernels = torch.device("cuda"), Kernels("lstm", False, torch.bfloat16)
    ext: Any = SimpleNamespace(
        name="_cuda_ext", available=True, architectures=built, device_reason=lambda device: None
    )  # fmt: skip
    x: Any = SimpleNamespace(dtype=torch.bfloat16, device=gpu)
    monkeypatch.setitem(_sm90.FASTER, kernels, (8, 512))
    for mode in ("auto", "always"):
        with sm90_kernels(mode):
            for room in (attention, recurrent):
                refused = room.unsupported(ext, x)
                if mode == "auto" or reason is None:
                    assert refused is None  # the other kernels serve
                else:
                    assert refused is not None and reason in refused
            declined = _sm90.declined(ext, gpu, kernels, 64)  # "always": of a backward whose forward ran before
            assert declined is None if reason is None else declined is not None and reason in declined
