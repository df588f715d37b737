"""The operators inside torch's own machinery: inductor, export, checkpointing, autocast, DTensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import pykernels as pk

f = pk.functional


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(8, 32), torch.nn.Linear(16, 8)
        self.act = pk.nn.PReLU(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.down(f.swiglu(self.up(f.gelu(x)))))


def reference_of(block: Block, x: Tensor) -> Tensor:
    gate, up = block.up(F.gelu(x)).chunk(2, -1)
    return F.prelu(block.down(F.silu(gate) * up), block.act.weight)


@pytest.mark.parametrize("dynamic", (False, True))
def test_inductor_runs_the_kernels_and_their_gradients(dynamic: bool) -> None:
    torch._dynamo.reset()
    block = Block()
    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic)
    for rows in (4, 7):
        x = torch.randn(rows, 8, requires_grad=True)
        expected = torch.autograd.grad(reference_of(block, x).square().sum(), (x, *block.parameters()))
        found = torch.autograd.grad(compiled(x).square().sum(), (x, *block.parameters()))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_inductor_takes_a_seed_that_changes() -> None:
    """From the second number on it is symbolic in the graph, where 2**64 would not fit."""
    torch._dynamo.reset()
    x = torch.ones(1, 2, 6, 8)

    def call(x: Tensor, seed: int) -> Tensor:
        return f.attention(x, x, x, dropout_p=0.5, seed=seed)

    compiled = torch.compile(call, fullgraph=True)
    for seed in (3, 4, 2**63 - 1, -1):
        assert torch.equal(compiled(x, seed), call(x, seed))


def test_no_recompilation_over_steps() -> None:
    torch._dynamo.reset()
    block = Block()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    compiled(torch.randn(4, 8))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            compiled(torch.randn(4, 8))


IDS = torch.tensor([[0, 2], [5, 2]])
ENDS = torch.tensor([0, 2, 6], dtype=torch.int32)
LABELS = torch.tensor([3, 0, 1, 1, 5, 2])
TWICE: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "attention": (lambda x: f.attention(x, x, x, causal=True), (1, 2, 5, 8)),
    "packed attention": (
        lambda x: f.attention(x, x, x, cu_seqlens_q=ENDS, cu_seqlens_k=ENDS, max_seqlen_q=4, max_seqlen_k=4), (6, 2, 8)
    ),
    "swiglu": (lambda x: f.swiglu(x, x), (6, 8)),
    "mlp": (lambda x: f.mlp(x, x, x[0], x, x[0]), (8, 8)),
    "states": (lambda x: f.lstm(x, (x[:1], x[:1]), [x.reshape(16, 4)] * 2)[0], (4, 4, 4)),
    "cell": (lambda x: f.gru_cell(x, x, x.repeat(3, 1), x.repeat(3, 1)), (4, 4)),
    "tables": (lambda x: f.embedding_bag_multi([IDS, IDS], None, [x, x]), (6, 4)),
    "cross entropy": (lambda x: f.linear_cross_entropy(x, x, LABELS), (6, 8)),
    "negatives": (lambda x: f.negative_sampling_loss(x, x, LABELS, LABELS), (6, 8)),
}  # fmt: skip


@pytest.mark.parametrize("name", TWICE)
def test_graphs_take_one_tensor_twice(name: str) -> None:
    """Dynamo refuses an autograd Function that is given a tensor twice; no caller knows that there is one."""
    torch._dynamo.reset()
    call, shape = TWICE[name]
    x = torch.randn(shape, requires_grad=True)
    expected = torch.autograd.grad(call(x).square().sum(), x)
    found = torch.autograd.grad(torch.compile(call, fullgraph=True, backend="aot_eager")(x).square().sum(), x)
    torch.testing.assert_close(found, expected)


SPARSE: dict[str, Callable[[Tensor], Tensor]] = {
    "embedding": lambda w: f.embedding(IDS, w, sparse=True),
    "embedding bag": lambda w: f.embedding_bag(IDS, w, mode="mean", sparse=True),
    "negatives": lambda w: f.negative_sampling_loss(torch.ones(6, 4), w, LABELS, LABELS[:, None], sparse=True),
    "sampled softmax": lambda w: f.sampled_softmax_loss(w, None, LABELS, torch.ones(6, 4), 3, 7, sparse=True, seed=3),
}


@pytest.mark.parametrize("dynamic", (False, True))
@pytest.mark.parametrize("name", SPARSE)
def test_graphs_give_sparse_gradients(name: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    w = torch.randn(7, 4, requires_grad=True)
    (expected,) = torch.autograd.grad(SPARSE[name](w).square().sum(), w)
    compiled = torch.compile(SPARSE[name], fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for _ in range(2):
        (found,) = torch.autograd.grad(compiled(w).square().sum(), w)
        assert found.layout == torch.sparse_coo and found.is_coalesced()
        assert torch.equal(found.to_dense(), expected.to_dense())


def test_double_backward_of_a_compiled_graph_raises() -> None:
    torch._dynamo.reset()
    x = torch.randn(5, requires_grad=True)
    y = torch.compile(f.gelu, fullgraph=True, backend="aot_eager")(x)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(torch.autograd.grad(y.sum(), x, create_graph=True)[0].sum(), x)


def test_export_keeps_the_operators() -> None:
    block = Block().eval()
    x = torch.randn(4, 8)
    exported = torch.export.export(block, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert any("pykernels.glu_forward" in str(node.target) for node in exported.graph.nodes)
    other = torch.randn(6, 8)
    torch.testing.assert_close(exported.module()(other), block(other))


@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpoint(reentrant: bool) -> None:
    block, x = Block(), torch.randn(4, 8, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)
    y.sum().backward()
    (expected,) = torch.autograd.grad(reference_of(block, x).sum(), x)
    torch.testing.assert_close(x.grad, expected)


def test_compiled_checkpoint_replays_the_seed() -> None:
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(lambda v: f.rrelu(v.sin(), training=True), x, use_reentrant=False)

    x = torch.randn(200, requires_grad=True)
    y = step(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, y.detach() / x.detach().sin() * x.detach().cos(), rtol=1e-4, atol=1e-5)


def test_elementwise_operators_take_autocast_dtypes_as_given() -> None:
    x = torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert f.gelu(x).dtype is torch.float32 and f.gelu(x.bfloat16()).dtype is torch.bfloat16
        assert f.swiglu(torch.nn.functional.linear(x, torch.randn(16, 8))).dtype is torch.bfloat16


@pytest.mark.parametrize("backend", (None, "reference"))
def test_parameters_in_float32_meet_autocasts_lower_precision(backend: str | None) -> None:
    """What a layer computed in bfloat16 meets a float32 parameter, or a float32 gate; gradients keep their dtypes."""
    x, up = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    weight = torch.rand(8, requires_grad=True)

    def run(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = function(F.linear(x, torch.eye(8)))
        return y, *torch.autograd.grad(y.float().square().sum(), (x, weight, up), allow_unused=True)

    for ours, theirs, dtype in (
        (lambda h: f.prelu(h, weight, backend=backend), lambda h: F.prelu(h, weight), torch.bfloat16),
        (lambda h: f.swish(h, weight, backend=backend), lambda h: h * torch.sigmoid(h * weight), torch.bfloat16),
        (lambda h: f.swiglu(h, up, backend=backend), lambda h: F.silu(h) * up, torch.float32),
        (lambda h: f.swiglu(up, h, backend=backend), lambda h: F.silu(up) * h, torch.float32),
    ):
        mine, torchs = run(ours), run(theirs)
        assert mine[0].dtype is dtype
        for a, b in zip(mine, torchs, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a.float(), b.float(), rtol=0.04, atol=0.04)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert f.prelu(x, weight, backend=backend).dtype is F.prelu(x, weight).dtype is torch.bfloat16


@pytest.fixture
def mesh() -> Iterator[object]:
    from torch.distributed.tensor import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_dtensor_has_a_rule_for_every_elementwise_operator(mesh: object) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    x, z = torch.randn(6, 8), torch.randn(6, 8)
    for placement in (Shard(0), Shard(1), Replicate()):
        leaf = distribute_tensor(x, mesh, [placement]).requires_grad_()
        plain = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(f.gelu(leaf).sum(), leaf)
        torch.testing.assert_close(grad.full_tensor(), torch.autograd.grad(F.gelu(plain).sum(), plain)[0])
        assert f.gelu(leaf).placements == (placement,)
        up = distribute_tensor(z, mesh, [placement])
        torch.testing.assert_close(f.swiglu(leaf, up).full_tensor(), F.silu(x) * z)
        (grad,) = torch.autograd.grad(f.swiglu(leaf, up).sum(), leaf)
        assert grad.placements == (placement,)
