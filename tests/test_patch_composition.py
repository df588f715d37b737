"""Patched models inside torch's own machinery: compile, export, autocast, checkpointing, torch.func, FSDP2, DDP."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

import pykernels as pk
from pykernels.cli.demo.models import GPT, LSTMLanguageModel, SkipGram

V, L = 11, 6


class Translation(nn.Module):
    """torch.nn.Transformer with padding and a causal mask; torch's own breaks the graph to read the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.head = nn.Embedding(V, 16), nn.Linear(16, V)
        self.transformer = nn.Transformer(16, 2, 1, 1, 24, 0.0, batch_first=True)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(L))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        masks = {"tgt_mask": self.mask, "src_key_padding_mask": source == 0}
        x = self.transformer(self.token(source), self.token(target), **masks)
        return F.cross_entropy(self.head(x).flatten(0, 1), target.flatten(), reduction="none")


class DLRM(nn.Module):
    """Bags of three tables, pairwise products, two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(V, 8, mode="sum") for _ in range(3))
        self.bottom = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(8 + 6, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, numbers: Tensor, *bags: Tensor) -> Tensor:
        dense = self.bottom(numbers)
        x = torch.stack([dense, *(table(bag) for table, bag in zip(self.tables, bags, strict=True))], 1)
        rows, columns = torch.tril_indices(4, 4, -1)
        return self.top(torch.cat([dense, (x @ x.transpose(1, 2))[:, rows, columns]], 1)).squeeze(1)


def ids(*shape: int) -> Tensor:
    return torch.randint(V, shape)


Case = tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]
MODELS: dict[str, Case] = {
    "gpt": (lambda: GPT(V, 16, 2, 1, L), lambda: (ids(2, L), ids(2, L))),
    "lstm-lm": (lambda: LSTMLanguageModel(V, 8, 8), lambda: (ids(2, L), ids(2, L))),
    "word2vec": (
        lambda: SkipGram(pk.functional.negative_sampling_loss, V, 8),
        lambda: (ids(5), ids(5), ids(5, 3)),
    ),
    "transformer": (Translation, lambda: (ids(2, L), ids(2, L))),
    "dlrm": (DLRM, lambda: (torch.randn(5, 4), ids(5, 3), ids(5, 3), ids(5, 3))),
}
every = pytest.mark.parametrize("name", MODELS)


def patched(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    model = make()
    assert pk.patch(model).patched
    return model, inputs()


@every
def test_compiled_whole_once_for_all_steps(name: str) -> None:
    torch._dynamo.reset()
    model, _ = patched(name)
    eager, counter = copy.deepcopy(model), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(3):
        args, losses = MODELS[name][1](), []
        for run, parameters in ((compiled, model), (eager, eager)):
            loss = run(*args).mean()
            loss.backward()
            with torch.no_grad():
                for p in parameters.parameters():
                    p -= 0.1 * p.grad
            parameters.zero_grad()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses)
    torch.testing.assert_close(list(model.parameters()), list(eager.parameters()))
    assert counter.frame_count == 1


@every
def test_exported_for_inference(name: str) -> None:
    model, args = patched(name)
    exported = torch.export.export(model.eval(), args)
    assert any("pykernels." in str(node.target) for node in exported.graph.nodes)
    args = MODELS[name][1]()
    torch.testing.assert_close(exported.module()(*args), model(*args))


@every
def test_autocast(name: str) -> None:
    torch._dynamo.reset()
    model, args = patched(name)
    expected = model(*args).mean()
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")) if name == "gpt" else (model,):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = run(*args).mean()
        loss.backward()
        torch.testing.assert_close(loss.float(), expected, rtol=0.05, atol=0.01)
        assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


@every
@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpoint(name: str, reentrant: bool) -> None:
    model, args = patched(name)
    expected = torch.autograd.grad(model(*args).mean(), list(model.parameters()))

    def run(carrier: Tensor) -> Tensor:
        return model(*args) * carrier  # the reentrant kind wants an input that requires grad

    checkpoint(run, torch.ones((), requires_grad=True), use_reentrant=reentrant).mean().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], list(expected))


@every
def test_func_grad_vmap_jvp(name: str) -> None:
    """Gradients, gradients of each sample, and a directional derivative, against autograd."""
    model, args = patched(name)
    buffers, parameters = dict(model.named_buffers()), dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], *args: Tensor) -> Tensor:
        return functional_call(model, (parameters, buffers), args).mean()

    expected = torch.autograd.grad(loss(parameters, *args), list(parameters.values()))
    plain = {key: p.detach() for key, p in parameters.items()}
    torch.testing.assert_close(tuple(grad(loss)(plain, *args).values()), expected)

    def one(parameters: dict[str, Tensor], *sample: Tensor) -> Tensor:
        return loss(parameters, *(x.unsqueeze(0) for x in sample))

    each = vmap(grad(one), (None, *(0 for _ in args)))(plain, *args)
    torch.testing.assert_close(tuple(g.mean(0) for g in each.values()), expected, rtol=1e-3, atol=1e-5)
    tangents = {key: torch.randn_like(p) for key, p in plain.items()}
    found = jvp(lambda p: loss(p, *args), (plain,), (tangents,))[1]
    along = sum((g * t).sum() for g, t in zip(expected, tangents.values(), strict=True))
    torch.testing.assert_close(found, along, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("wrapped", (False, True), ids=("model.compile()", "torch.compile"))
def test_patched_after_compiling_it_compiles_anew(wrapped: bool) -> None:
    torch._dynamo.reset()
    model = SkipGram(pk.functional.negative_sampling_loss, V, 8)
    counter = CompileCounterWithBackend("aot_eager")
    run: Any = model
    if wrapped:
        run = torch.compile(model, backend=counter)
    else:
        model.compile(backend=counter)
    args = MODELS["word2vec"][1]()
    expected = run(*args)
    assert len(pk.patch(run).patched) == 1
    torch.testing.assert_close(run(*args), expected)
    assert counter.frame_count == 2
    pk.unpatch(run)
    assert torch.equal(run(*args), expected) and counter.frame_count == 2


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("order", ("patch first", "shard first", "replicas"))
def test_sharded_and_replicated(order: str) -> None:
    """Two processes are the business of the distributed tests; here: classes and hooks of FSDP2 and DDP fit."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    model: Any = nn.Sequential(nn.Embedding(9, 8), layer, nn.Sequential(nn.Linear(8, 4), nn.GELU()))
    tokens = torch.randint(9, (2, 5))
    out = model(tokens)
    expected = torch.autograd.grad(out.square().sum(), list(model.parameters()))
    if order == "patch first":
        assert len(pk.patch(model).patched) == 7
    if order == "replicas":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        for part in (*model, model):
            fully_shard(part, mesh=init_device_mesh("cpu", (1,)))
    if order != "patch first":
        assert len(pk.patch(model).patched) == 7
    found = model(tokens)
    torch.testing.assert_close(found, out)
    found.square().sum().backward()
    grads = [p.grad if order == "replicas" else p.grad.full_tensor() for p in model.parameters()]
    torch.testing.assert_close(grads, list(expected))
    pk.unpatch(model)
    assert (
        isinstance(layer, FSDPModule) == (order != "replicas") and "pykernels" not in type(layer).__mro__[2].__module__
    )
    torch.testing.assert_close(model(tokens), out)
