"""Accelerate's own loop, with `bb.backward` in place of `accelerator.backward`.

python examples/accelerate_accumulate.py
torchrun --nproc-per-node 2 examples/accelerate_accumulate.py
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

import bigbatch.accelerate as bb
from bigbatch.torch import causal_items

WORDS, PAD = 32, -100


class Model(nn.Module):
    """A tiny language model that shifts the labels itself, as Hugging Face's do."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(WORDS, 32), nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, WORDS))

    def forward(self, labels):
        scores = self.net(labels[:, :-1].clamp(min=0))
        return nn.functional.cross_entropy(scores.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=PAD)


def texts(count):
    """Each token is the one before, plus three; ragged, and padded to 12."""
    labels = (torch.randint(WORDS, (count, 1)) + 3 * torch.arange(12)) % WORDS
    return labels.masked_fill(torch.arange(12) >= torch.randint(3, 13, (count, 1)), PAD)


torch.manual_seed(0)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
model = Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
loader = DataLoader(texts(256), batch_size=8, shuffle=True)
model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)

for epoch in range(8):
    for labels in loader:
        with accelerator.accumulate(model):
            update = bb.backward(accelerator, model(labels), items=causal_items(labels))  # was: accelerator.backward
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    accelerator.print(f"epoch {epoch}  loss {update.loss:.4f} over {update.items:.0f} tokens")
accelerator.end_training()
