"""A small Llama of Hugging Face Transformers over characters, in an Accelerate training loop that nothing changes in.

Needs `pip install transformers accelerate`. Trained twice from one start, as it is and after `pykernels.patch`.
"""

from __future__ import annotations

from typing import Any

import torch

import pykernels as pk
from pykernels.testing.text import Text, default_text


def model(vocabulary: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def train(text: Text, steps: int = 20, patched: bool = True) -> list[float]:
    """The losses of the steps."""
    from accelerate import Accelerator

    characters = text.characters()
    llama = model(len(characters.vocabulary))
    if patched:
        print(pk.patch(llama))
    windows = characters.ids[: steps * 4 * 64].view(-1, 64)
    loader = torch.utils.data.DataLoader(windows, batch_size=4)
    accelerator = Accelerator()
    llama, optimizer, loader = accelerator.prepare(llama, torch.optim.AdamW(llama.parameters(), lr=3e-3), loader)
    losses = []
    for ids in loader:
        loss = llama(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(llama.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    stock, ours = (train(default_text(), patched=patched) for patched in (False, True))
    print(f"loss, Transformers as it is: {stock[0]:.4f} -> {stock[-1]:.4f}; patched: {ours[0]:.4f} -> {ours[-1]:.4f}")
