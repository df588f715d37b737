"""Layers over ragged sequences, timed whole: forward and backward of a PackedSequence, with all gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ... import nn as ours
from ..run import outputs_of
from ..step import Provider, Step


def _lengths(steps: int, batch: int) -> Tensor:
    """Uniform in [1, steps], the longest first."""
    drawn = torch.randint(1, steps + 1, (batch,), generator=torch.Generator().manual_seed(31))
    return drawn.sort(descending=True).values


def _ragged(name: str, steps: int, batch: int, hidden: int) -> Callable[[], dict[str, Provider]]:
    """One layer, input size = hidden."""

    def make() -> dict[str, Provider]:
        lengths, generator = _lengths(steps, batch), torch.Generator().manual_seed(32)
        x = torch.randn(int(lengths[0]), batch, hidden, generator=generator)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths)
        dy = torch.randn(packed.data.shape, generator=generator)
        found, state = {}, None
        for provider, module in (("pykernels", ours), ("eager", nn)):
            layer = getattr(module, name)(hidden, hidden)
            state = state or layer.state_dict()
            layer.load_state_dict(state)
            data, held = packed.data.clone().requires_grad_(), list[Tensor]()

            def run(layer: Any = layer, data: Tensor = data, held: list[Tensor] = held) -> None:
                sequence = nn.utils.rnn.PackedSequence(data, packed.batch_sizes)
                y = outputs_of(layer(sequence))[0]
                held[:] = torch.autograd.grad(y, [data, *layer.parameters()], dy)

            found[provider] = Provider(run, lambda held=held: held)  # type: ignore[misc]
        return found

    return make


def _step(name: str, steps: int, batch: int, hidden: int) -> Step:
    def flops() -> int:
        """The matrix products of the steps that there are: two forward, four backward."""
        gates = {"LSTM": 4, "GRU": 3}[name]
        return 6 * int(_lengths(steps, batch).sum()) * 2 * gates * hidden * hidden

    make, shape = _ragged(name, steps, batch, hidden), f"T{steps}-B{batch}-H{hidden}"
    return Step(f"{name} ragged, fwd+bwd", shape, make, flops=flops)


STEPS = (_step("LSTM", 200, 8, 128), _step("LSTM", 100, 32, 256), _step("GRU", 100, 32, 256))
