"""Sequences of different lengths: a window of 256 documents, with 4,096 tokens in memory at a time and little padding.

python examples/torch_lengths.py
"""

import torch
from torch import nn

import bigbatch.torch as bb

torch.manual_seed(0)
WORDS, LONGEST, TOKENS = 64, 512, bb.tokens(4096, mask="mask")


def documents(count):
    """Documents of lognormal lengths that count up by a step of their own, padded to the longest."""
    lengths = (3.6 + torch.randn(count)).exp().long().clamp(4, LONGEST)
    start, step, place = torch.randint(WORDS, (count, 1)), torch.randint(1, 4, (count, 1)), torch.arange(LONGEST)
    mask = place < lengths[:, None]
    return {"ids": (start + step * place) % WORDS * mask, "mask": mask}


class Model(nn.Module):
    """Predicts the next word from the last two."""

    def __init__(self):
        super().__init__()
        self.words, self.head = (
            nn.Embedding(WORDS, 32),
            nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, WORDS)),
        )

    def forward(self, ids):
        words = self.words(ids)
        return self.head(torch.cat([words[:, 1:-1], words[:, :-2]], -1))


model = Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)


def loss_fn(batch):
    labels = batch["ids"].masked_fill(~batch["mask"], -100)[:, 2:]
    loss = nn.functional.cross_entropy(model(batch["ids"]).flatten(0, 1), labels.flatten(), ignore_index=-100)
    return loss, (labels != -100).sum()


batch = documents(256)
computed = sum(part["ids"].numel() for part in bb.micro_batches(batch, TOKENS))
true = int(batch["mask"].sum())
print(f"{true:,} tokens, padded {batch['ids'].numel():,}, computed {computed:,}: {computed / true:.2f} × the true ones")
for update in range(30):
    optimizer.zero_grad()
    loss = bb.backward(loss_fn, documents(256), micro_batch=TOKENS)
    optimizer.step()
    if update % 5 == 4:
        print(f"update {update + 1:2d}  loss {loss:.3f}")
