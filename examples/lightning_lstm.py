"""An LSTM language model over characters in Lightning's Trainer, which takes a patched model as any other.

Needs `pip install lightning`. Trained twice from one start, as it is and after `pykernels.patch`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import pykernels as pk
from pykernels.testing.text import Text, default_text


class Network(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, 32)
        self.lstm = nn.LSTM(32, 48, batch_first=True)
        self.head = nn.Linear(48, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.table(ids))[0])


def train(text: Text, steps: int = 20, patched: bool = True) -> list[float]:
    """The losses of the steps."""
    import lightning

    class Language(lightning.LightningModule):
        def __init__(self, vocabulary: int) -> None:
            super().__init__()
            self.network = Network(vocabulary)
            self.losses: list[float] = []

        def training_step(self, ids: Tensor, index: int) -> Tensor:
            logits = self.network(ids[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    torch.manual_seed(0)
    characters = text.characters()
    model = Language(len(characters.vocabulary))
    if patched:
        print(pk.patch(model))
    loader = torch.utils.data.DataLoader(characters.ids[: steps * 8 * 40].view(-1, 40), batch_size=8)
    quiet = {name: False for name in ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")}
    lightning.Trainer(max_steps=steps, devices=1, gradient_clip_val=1.0, **quiet).fit(model, loader)
    return model.losses


if __name__ == "__main__":
    stock, ours = (train(default_text(), patched=patched) for patched in (False, True))
    print(f"loss, torch.nn: {stock[0]:.4f} -> {stock[-1]:.4f}; patched: {ours[0]:.4f} -> {ours[-1]:.4f}")
