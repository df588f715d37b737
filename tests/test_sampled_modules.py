"""Modules of the sampled_softmax room: parameters, training on a sample, evaluation on all classes, torch's twins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as TF

import pykernels as pk

B, D, V = 12, 8, 40
X, TARGET = torch.randn(B, D), torch.randint(0, V, (B,))


@pytest.mark.parametrize("kind", ("SampledSoftmaxLoss", "NCELoss"))
@pytest.mark.parametrize("sampler", ("log_uniform", "uniform", "fixed_unigram"))
def test_trains_on_a_sample_and_evaluates_on_all(kind: str, sampler: str) -> None:
    options: dict[str, Any] = {"unigrams": torch.arange(1, V + 1)} if sampler == "fixed_unigram" else {}
    module = getattr(pk.nn, kind)(D, V, 10, sampler=sampler, **options)
    name = "sampled_softmax_loss" if kind == "SampledSoftmaxLoss" else "nce_loss"
    values = module.sample(TARGET, seed=3)
    expected = getattr(pk.functional, name)(module.weight, module.bias, TARGET, X, 10, V, 1, values)
    torch.testing.assert_close(module(X, TARGET, seed=3), expected)
    module.eval()
    torch.testing.assert_close(module(X, TARGET), TF.cross_entropy(TF.linear(X, module.weight, module.bias), TARGET))
    assert sorted(module.state_dict()) == ["bias", "weight"]


def test_several_labels() -> None:
    """In evaluation each label has its share of the probability."""
    module = pk.nn.SampledSoftmaxLoss(D, V, 10, num_true=2, bias=False, reduction="none").eval()
    labels = torch.stack([TARGET, TARGET.roll(1)], 1)
    soft = TF.one_hot(labels, V).float().mean(1)
    torch.testing.assert_close(module(X, labels), TF.cross_entropy(X @ module.weight.T, soft, reduction="none"))


def test_sampled_softmax_learns() -> None:
    """Trained on 20 of 200 classes, the full cross entropy falls far below that of a guess."""
    torch.manual_seed(0)
    module = pk.nn.SampledSoftmaxLoss(16, 200, 20, sampler="uniform")
    centres, labels = torch.randn(200, 16), torch.arange(200)
    optimizer = torch.optim.Adam(module.parameters(), 0.1)
    for step in range(60):
        optimizer.zero_grad()
        module(centres, labels, seed=step).backward()
        optimizer.step()
    assert module.eval()(centres, labels).item() < 0.5  # log(200) is 5.3


def test_hierarchical_softmax_module() -> None:
    module = pk.nn.HierarchicalSoftmaxLoss(D, torch.arange(1, V + 1), reduction="none")
    torch.nn.init.normal_(module.weight)
    log_prob = module.log_prob(X)
    torch.testing.assert_close(log_prob.exp().sum(1), torch.ones(B))
    torch.testing.assert_close(module(X, TARGET), -log_prob.gather(1, TARGET.unsqueeze(1)).squeeze(1))
    other = pk.nn.HierarchicalSoftmaxLoss(D, torch.arange(1, V + 1), reduction="none")
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(other(X, TARGET), module(X, TARGET))


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyLoss"), reason="this torch has no such module")
def test_linear_cross_entropy_module_is_torchs() -> None:
    options: dict[str, Any] = {"bias": True, "weight": torch.rand(V), "ignore_index": 3, "label_smoothing": 0.1}
    theirs, ours = torch.nn.LinearCrossEntropyLoss(D, V, **options), pk.nn.LinearCrossEntropyLoss(D, V, **options)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(X, TARGET), theirs(X, TARGET))
    wide = torch.randint(0, 5, (B, 2, 3))
    theirs = torch.nn.LinearCrossEntropyLoss(D, 5, out_features=(2, 3), bias=True)
    ours = pk.nn.LinearCrossEntropyLoss(D, 5, out_features=(2, 3), bias=True)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(X, wide), theirs(X, wide))
    for wrong in ({"weight": torch.rand(2)}, {"label_smoothing": 2.0}):
        with pytest.raises(RuntimeError):
            pk.nn.LinearCrossEntropyLoss(D, V, **wrong)


@pytest.mark.parametrize("backend", (None, "reference"))
@pytest.mark.parametrize("head_bias", (False, True))
def test_adaptive_softmax_is_torchs(head_bias: bool, backend: str | None) -> None:
    arguments = (D, V, [5, 12, 30], 2.0, head_bias)
    theirs, ours = (
        torch.nn.AdaptiveLogSoftmaxWithLoss(*arguments),
        pk.nn.AdaptiveLogSoftmaxWithLoss(*arguments, backend=backend),
    )
    ours.load_state_dict(theirs.state_dict())
    some = torch.tensor([0, 4, 3])  # no row in any cluster
    for target in (TARGET, torch.arange(B) % 5, TARGET[:1], some):
        inputs = [X[: target.shape[0]].clone().requires_grad_() for _ in range(2)]
        results = [module(x, target) for module, x in zip((theirs, ours), inputs, strict=True)]
        torch.testing.assert_close(results[1].output, results[0].output)
        torch.testing.assert_close(results[1].loss, results[0].loss)
        grads = [
            torch.autograd.grad(result.loss, (x, *module.parameters()), allow_unused=True, materialize_grads=True)
            for result, x, module in zip(results, inputs, (theirs, ours), strict=True)
        ]
        torch.testing.assert_close(grads[1], grads[0])
    torch.testing.assert_close(ours.log_prob(X), theirs.log_prob(X))
    assert torch.equal(ours.predict(X), theirs.predict(X))
    torch.testing.assert_close(ours(X[0], TARGET[0]), theirs(X[0], TARGET[0]))


def test_adaptive_softmax_compiles_whole() -> None:
    """torch's asks the data how many rows a cluster has; here nothing does."""
    module = pk.nn.AdaptiveLogSoftmaxWithLoss(D, V, [5, 12], 2.0)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: tuple(module(x, y)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X, TARGET), tuple(module(X, TARGET)))


def test_adaptive_softmax_errors() -> None:
    module = pk.nn.AdaptiveLogSoftmaxWithLoss(D, V, [5, 12], 2.0)
    with pytest.raises(RuntimeError, match="Target values should be in"):
        module(X, TARGET * 0 + V)
    for x, y in ((X[0], TARGET), (X, TARGET[:3]), (X, TARGET.view(3, 4))):
        with pytest.raises(RuntimeError, match="AdaptiveLogSoftmaxWithLoss"):
            module(x, y)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sampler": "zipf"}, "'sampler'"),
        ({"sampler": "fixed_unigram"}, "'unigrams'"),
        ({"unigrams": [1] * V}, "'unigrams'"),
        ({"n_sampled": V + 1}, "'n_sampled'"),
        ({"n_sampled": 0}, "'n_sampled'"),
    ],
)
def test_errors(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        pk.nn.SampledSoftmaxLoss(**{"in_features": D, "n_classes": V, "n_sampled": 4, **options})
