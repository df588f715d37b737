"""Losses over many classes as modules: most train on a sample of the classes and are evaluated on all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.adaptive import _ASMoutput

from ..ops import _ids
from ..ops import sampled_softmax as ops
from ..ops.sampled_softmax import AliasTable, HuffmanTree, linear_cross_entropy
from ..ops.sampled_softmax.linear import checked_target

__all__ = [
    "AdaptiveLogSoftmaxWithLoss",
    "HierarchicalSoftmaxLoss",
    "LinearCrossEntropyLoss",
    "NCELoss",
    "NegativeSamplingLoss",
    "SampledSoftmaxLoss",
]


class NegativeSamplingLoss(nn.Module):
    """word2vec's negative sampling loss; see `pykernels.functional.negative_sampling_loss`.

    The table of the classes stays where it is (often an `Embedding`'s weight) and is an argument of the call.

    Args:
        reduction: "none", "mean" or "sum".
        sparse: give `weight` a row-sparse gradient.
        bounds_check, backend: as the function's.

    Shapes: input Tensor[B, D], weight Tensor[V, D], target Tensor[B], negatives Tensor[B, K] or Tensor[K] -> a scalar,
    or Tensor[B] with reduction "none".
    """

    __constants__ = ["reduction"]

    def __init__(
        self,
        reduction: str = "mean",
        *,
        sparse: bool = False,
        bounds_check: str = "error",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.reduction = reduction
        self.sparse = sparse
        self.bounds_check, self.backend = bounds_check, backend

    def forward(self, input: Tensor, weight: Tensor, target: Tensor, negatives: Tensor) -> Tensor:
        options: dict[str, Any] = {"sparse": self.sparse, "bounds_check": self.bounds_check, "backend": self.backend}
        return ops.negative_sampling_loss(input, weight, target, negatives, self.reduction, **options)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"


class _SampledLoss(nn.Module):
    """A table of classes, a sampler, and a loss over a fresh sample in training."""

    remove_accidental_hits = True
    function = "sampled_softmax_loss"

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        n_sampled: int,
        *,
        bias: bool = True,
        num_true: int = 1,
        sampler: str = "log_uniform",
        unique: bool = True,
        unigrams: AliasTable | Tensor | Sequence[float] | None = None,
        distortion: float = 0.75,
        remove_accidental_hits: bool | None = None,
        reduction: str = "mean",
        sparse: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        bounds_check: str = "error",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if sampler not in ("log_uniform", "uniform", "fixed_unigram"):
            allowed = "log_uniform, uniform, fixed_unigram"
            raise ValueError(f"{name}(): argument 'sampler' must be one of {allowed}, not {sampler!r}")
        if (unigrams is None) == (sampler == "fixed_unigram"):
            raise ValueError(f"{name}(): argument 'unigrams' goes with, and is needed by, the sampler 'fixed_unigram'")
        if n_sampled < 1:
            raise ValueError(f"{name}(): argument 'n_sampled' must be at least 1, not {n_sampled}")
        if unique and n_sampled > n_classes:
            raise ValueError(
                f"{name}(): argument 'n_sampled' must be at most n_classes = {n_classes} with unique=True, "
                f"not {n_sampled}"
            )
        self.in_features, self.n_classes, self.n_sampled, self.num_true = in_features, n_classes, n_sampled, num_true
        self.sampler, self.unique, self.reduction, self.sparse = sampler, unique, reduction, sparse
        self.bounds_check, self.backend = bounds_check, backend
        if remove_accidental_hits is not None:
            self.remove_accidental_hits = remove_accidental_hits
        self.weight = nn.Parameter(torch.empty(n_classes, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(n_classes, device=device, dtype=dtype)) if bias else None
        table = unigrams
        if unigrams is not None and not isinstance(unigrams, AliasTable):
            table = AliasTable.from_counts(unigrams, distortion)
        self._table: AliasTable | None = table  # type: ignore[assignment]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `torch.nn.Linear`: uniform within +-1 / sqrt(in_features); the bias too."""
        bound = self.in_features**-0.5 if self.in_features else 0.0
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def sample(self, target: Tensor, seed: int | Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(sampled, true_expected_count, sampled_expected_count) for these targets."""
        return self._sample(target, seed, self.bounds_check)

    def _sample(self, target: Tensor, seed: int | Tensor | None, bounds_check: str) -> tuple[Tensor, Tensor, Tensor]:
        given = (target.reshape(-1, self.num_true), self.num_true, self.n_sampled, self.unique, self.n_classes)
        options: dict[str, Any] = {"seed": seed, "bounds_check": bounds_check}
        if self._table is not None:
            self._table = self._table.to(target.device)
            return ops.fixed_unigram_candidate_sampler(*given, self._table, **options)
        if self.sampler == "uniform":
            return ops.uniform_candidate_sampler(*given, **options)
        return ops.log_uniform_candidate_sampler(*given, **options)

    def forward(self, input: Tensor, target: Tensor, *, seed: int | Tensor | None = None) -> Tensor:
        if not self.training:
            return self._full(input, target)
        loss: Tensor = getattr(ops, self.function)(
            self.weight,
            self.bias,
            target,
            input,
            self.n_sampled,
            self.n_classes,
            self.num_true,
            self._sample(target, seed, "none"),  # the loss looks at the targets
            self.remove_accidental_hits,
            self.reduction,
            sparse=self.sparse,
            bounds_check=self.bounds_check,
            backend=self.backend,
        )
        return loss

    def _full(self, input: Tensor, target: Tensor) -> Tensor:
        """Cross entropy over all classes, uncorrected; labels share the probability."""
        losses = [
            linear_cross_entropy(
                input,
                self.weight,
                label,
                linear_bias=self.bias,
                reduction=self.reduction,
                bounds_check=self.bounds_check,
                backend=self.backend,
            )
            for label in target.reshape(-1, self.num_true).unbind(1)
        ]
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean(0)

    def extra_repr(self) -> str:
        text = f"{self.in_features}, {self.n_classes}, {self.n_sampled}, sampler={self.sampler!r}"
        return f"{text}, bias={self.bias is not None}, num_true={self.num_true}, reduction={self.reduction!r}"


class SampledSoftmaxLoss(_SampledLoss):
    """Trains the softmax of a large output layer on a fresh sample of the classes, evaluates it on all of them.

    In training: `pykernels.functional.sampled_softmax_loss`. In `eval()`: the cross entropy over all classes
    (`linear_cross_entropy`), so that its exponential is a perplexity.

    Args:
        in_features: D.
        n_classes: V.
        n_sampled: K, classes sampled for each batch.
        bias: whether classes have one.
        num_true: labels a row.
        sampler: "log_uniform" (class ids by descending frequency), "uniform" or "fixed_unigram".
        unique: whether the sample's classes all differ.
        unigrams, distortion: of the sampler "fixed_unigram".
        remove_accidental_hits: leave sampled labels out; default as the function's.
        reduction: "none", "mean" or "sum".
        sparse: give the weight a row-sparse gradient in training.
        device, dtype: of the parameters `weight` (V, D) and `bias` (V).
        bounds_check, backend: as the function's.

    Shapes: input Tensor[B, D], target Tensor[B] or Tensor[B, num_true] -> a scalar, or Tensor[B] with reduction "none".

    Raises:
        ValueError: unknown `sampler`; `unigrams` missing or not wanted; `n_sampled` below 1, or above n_classes with
            `unique`; and at the call what the functions raise.
    """


class NCELoss(_SampledLoss):
    """As `SampledSoftmaxLoss`, with noise-contrastive estimation (`pykernels.functional.nce_loss`) in training."""

    remove_accidental_hits = False
    function = "nce_loss"


class HierarchicalSoftmaxLoss(nn.Module):
    """Cross entropy of a softmax over a Huffman tree; see `pykernels.functional.hierarchical_softmax_loss`.

    Args:
        in_features: D.
        tree: of the V classes, or their counts.
        reduction: "none", "mean" or "sum".
        sparse: give the weight a row-sparse gradient.
        device, dtype: of the parameter `weight` (V - 1, D), which begins as zeros, as word2vec's.
        bounds_check, backend: as the function's.

    Shapes: input Tensor[B, D], target Tensor[B] -> a scalar, or Tensor[B] with reduction "none". The tree is part of
    the state_dict.
    """

    starts: Tensor
    points: Tensor
    codes: Tensor

    def __init__(
        self,
        in_features: int,
        tree: HuffmanTree | Tensor | Sequence[float],
        *,
        reduction: str = "mean",
        sparse: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        bounds_check: str = "error",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(tree, HuffmanTree):
            tree = HuffmanTree.from_counts(tree)
        self.in_features, self.n_classes, self.depth = in_features, tree.classes, tree.depth
        self.reduction, self.sparse, self.bounds_check, self.backend = reduction, sparse, bounds_check, backend
        self.weight = nn.Parameter(torch.zeros(tree.classes - 1, in_features, device=device, dtype=dtype))
        for name in ("starts", "points", "codes"):
            self.register_buffer(name, getattr(tree, name).to(self.weight.device))

    @property
    def tree(self) -> HuffmanTree:
        return HuffmanTree(self.starts, self.points, self.codes, self.depth)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        options: dict[str, Any] = {"sparse": self.sparse, "bounds_check": self.bounds_check, "backend": self.backend}
        return ops.hierarchical_softmax_loss(input, self.weight, target, self.tree, self.reduction, **options)

    def log_prob(self, input: Tensor) -> Tensor:
        """Log-probabilities of all classes: Tensor[B, D] -> Tensor[B, V]. B x (sum of path lengths) numbers on the
        way: for evaluation of a few rows."""
        steps = nn.functional.logsigmoid((input @ self.weight.T)[:, self.points.long()] * self.codes.to(input.dtype))
        owner = torch.repeat_interleave(self.starts.diff(), output_size=self.points.shape[0])
        return steps.new_zeros(input.shape[0], self.n_classes).index_add(1, owner, steps)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.n_classes}, depth={self.depth}, reduction={self.reduction!r}"


class LinearCrossEntropyLoss(nn.Module):
    """A linear layer and the cross entropy of its outputs, without the outputs. As `torch.nn.LinearCrossEntropyLoss` of
    torch 2.13: the same constructor, parameters (`linear.weight`, `linear.bias`) and buffer (`weight`); see
    `pykernels.functional.linear_cross_entropy`.

    Args:
        in_features, num_classes, out_features, bias, device, dtype, reduction, weight, ignore_index, label_smoothing,
            options: as torch's.
        z_loss: see the function.
        bounds_check, backend: as the function's.

    Raises:
        RuntimeError: `weight` is not of the shape (num_classes,); `label_smoothing` outside [0, 1].
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        z_loss: float = 0.0,
        bounds_check: str = "error",
        backend: str | None = None,
    ) -> None:
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(
                f"LinearCrossEntropyLoss(): argument 'weight' must have the shape ({num_classes},), "
                f"not {tuple(weight.shape)}"
            )
        if not 0 <= label_smoothing <= 1:
            raise RuntimeError(
                f"LinearCrossEntropyLoss(): argument 'label_smoothing' must be in [0, 1], not {label_smoothing}"
            )
        super().__init__()
        self.register_buffer("weight", weight)
        self.num_classes, self.out_features = num_classes, tuple(out_features)
        self.reduction, self.ignore_index, self.label_smoothing = reduction, ignore_index, label_smoothing
        self.options, self.z_loss, self.bounds_check, self.backend = options, z_loss, bounds_check, backend
        rows = math.prod(self.out_features, start=num_classes)
        self.linear = nn.Linear(in_features, rows, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        linear_weight, linear_bias = self.linear.weight, self.linear.bias
        if self.out_features:
            linear_weight = linear_weight.view(self.num_classes, *self.out_features, -1)
            linear_bias = None if linear_bias is None else linear_bias.view(self.num_classes, *self.out_features)
        return linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            z_loss=self.z_loss,
            bounds_check=self.bounds_check,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        text = f"{self.linear.in_features}, {self.num_classes}, bias={self.linear.bias is not None}"
        return f"{text}, reduction={self.reduction!r}"


class AdaptiveLogSoftmaxWithLoss(nn.AdaptiveLogSoftmaxWithLoss):
    """`torch.nn.AdaptiveLogSoftmaxWithLoss` (constructor, state_dict, `log_prob`, `predict`) without logits in memory
    and without waiting for the device: which rows belong to which cluster is said by targets that are ignored.

    The head and each cluster are one `linear_cross_entropy`, whose native CPU kernel skips the rows that are ignored.
    Source: Grave et al., "Efficient softmax approximation for GPUs" (2017).

    Args:
        in_features, n_classes, cutoffs, div_value, head_bias, device, dtype: as torch's.
        bounds_check, backend: as those of `pykernels.functional.linear_cross_entropy`.

    Shapes: input Tensor[N, D] or Tensor[D], target Tensor[N] or a scalar tensor -> (output Tensor[N] of the targets'
    log-probabilities, loss: minus their mean).

    Raises:
        RuntimeError: sizes of input and target that do not fit; a target outside [0, n_classes) (as torch).
        IndexError: the same in graphs and, as `bounds_check` says, on a GPU.
    """

    def __init__(
        self,
        in_features: int,
        n_classes: int,
        cutoffs: Sequence[int],
        div_value: float = 4.0,
        head_bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bounds_check: str = "error",
        backend: str | None = None,
    ) -> None:
        super().__init__(in_features, n_classes, cutoffs, div_value, head_bias, device, dtype)
        self.bounds_check, self.backend = bounds_check, backend

    def forward(self, input_: Tensor, target_: Tensor) -> Any:
        batched = target_.dim() > 0
        if target_.dim() > 1 or input_.dim() != target_.dim() + 1:
            raise RuntimeError(
                "AdaptiveLogSoftmaxWithLoss: expected input of (N, in_features) with targets (N,) or (in_features,) "
                f"with a scalar target, got {tuple(input_.shape)} and {tuple(target_.shape)}"
            )
        input, target = (input_, target_) if batched else (input_.unsqueeze(0), target_.unsqueeze(0))
        if input.shape[0] != target.shape[0]:
            raise RuntimeError(
                f"AdaptiveLogSoftmaxWithLoss: input and target must have as many rows, not {input.shape[0]} and "
                f"{target.shape[0]}"
            )
        self._check(target)
        chosen: dict[str, Any] = {"bounds_check": self.bounds_check, "backend": self.backend}
        target = checked_target("AdaptiveLogSoftmaxWithLoss", "target", input, target, self.n_classes, **chosen)
        bounds = [self.shortlist_size, *self.cutoffs[1:]]
        cluster = torch.bucketize(target, torch.tensor(bounds[:-1], device=target.device), right=True)
        head = torch.where(cluster == 0, target, self.shortlist_size + cluster - 1)
        total = self._loss(input, self.head.weight, head, self.head.bias)
        for i, tail in enumerate(self.tail):
            own = torch.where(cluster == i + 1, target - bounds[i], -100)
            total = total + self._loss(tail[0](input), tail[1].weight, own, None)
        output = -total
        _ids.after(self.bounds_check)
        return _ASMoutput(output if batched else output.squeeze(0), total.mean())

    def _loss(self, input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> Tensor:
        options: dict[str, Any] = {"linear_bias": bias, "reduction": "none", "bounds_check": "none"}
        return linear_cross_entropy(input, weight, target, backend=self.backend, **options)

    def _check(self, target: Tensor) -> None:
        if target.numel() == 0 or not _ids.readable(target):
            return
        low, high = (int(t) for t in torch.aminmax(target))
        if low < 0 or high >= self.n_classes:
            raise RuntimeError(
                f"Target values should be in [0, {self.n_classes - 1}], but values in range [{low}, {high}] were found."
            )
