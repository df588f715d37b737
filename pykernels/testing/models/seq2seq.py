"""Sequence to sequence with LSTMs, without and with attention: the vowels of a line are put back.

The encoder's final state starts the decoder (Sutskever et al., 2014); with attention the decoder's states also attend
to all of the encoder's (Luong et al., 2015, the dot form).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ..text import Text
from ..training import Task
from .common import adam, functions, next_token_loss
from .vowels import Lines


class Seq2Seq(nn.Module):
    def __init__(self, functions: Any, vocabulary: int, width: int, hidden: int, attend: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.encoder = nn.LSTM(width, hidden, batch_first=True)
        self.decoder = nn.LSTM(width, hidden, batch_first=True)
        self.attention = functions.attention if attend else None
        self.head = nn.Linear(2 * hidden if attend else hidden, vocabulary)

    def logits(self, source: Tensor, lengths: Tensor, tokens: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embedding(source), lengths.cpu(), batch_first=True, enforce_sorted=False)
        states, final = self.encoder(packed)
        x, _ = self.decoder(self.embedding(tokens), final)
        if self.attention is not None:
            memory = pad_packed_sequence(states, batch_first=True)[0].unsqueeze(1)  # one head
            real = torch.arange(memory.shape[2], device=lengths.device) < lengths[:, None]
            context = self.attention(x.unsqueeze(1), memory, memory, key_padding_mask=real)
            x = torch.cat([x, context.squeeze(1)], -1)
        return self.head(x)

    def forward(self, source: Tensor, lengths: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
        return next_token_loss(self.logits(source, lengths, tokens), targets)


def task(text: Text, small: bool = False, attend: bool = False) -> Task:
    width, hidden, batch, length = (12, 20, 4, 24) if small else (64, 128, 32, 64)
    data = Lines(text, batch, length)
    return Task(
        name="seq2seq-attention" if attend else "seq2seq",
        title=f"LSTM encoder-decoder {'with' if attend else 'without'} attention",
        shape=f"{data.vocabulary} characters, LSTMs of {hidden}, {batch} lines of up to {length} a step",
        tokens=batch * length,
        functions=functions,
        build=lambda functions: Seq2Seq(functions, data.vocabulary, width, hidden, attend),
        batches=data.batches,
        optimizer=adam,
        sample=data.sample,
    )


def task_with_attention(text: Text, small: bool = False) -> Task:
    return task(text, small, attend=True)
