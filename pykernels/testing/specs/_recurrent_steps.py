"""Layers over ragged sequences, timed whole: forward and backward of a PackedSequence, with all gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ... import nn as ours
from ..run import outputs_of
from ..step import Provider, Step


def _ragged(name: str, steps: int, batch: int, hidden: int) -> Callable[[], dict[str, Provider]]:
    """Lengths are uniform in [1, steps]; one layer, input size = hidden."""

    def make() -> dict[str, Provider]:
        generator = torch.Generator().manual_seed(31)
        lengths = torch.randint(1, steps + 1, (batch,), generator=generator).sort(descending=True).values
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


STEPS = (
    Step("LSTM ragged, fwd+bwd", "T200-B8-H128", _ragged("LSTM", 200, 8, 128)),
    Step("LSTM ragged, fwd+bwd", "T100-B32-H256", _ragged("LSTM", 100, 32, 256)),
    Step("GRU ragged, fwd+bwd", "T100-B32-H256", _ragged("GRU", 100, 32, 256)),
)
