"""A language model's head in pieces: the logits of 64 tokens in memory at a time, and never those of all.

With a large vocabulary the logits are the largest tensor of a training step.

python examples/torch_head.py
"""

import inspect
import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bigbatch.torch as bb

LENGTH, WIDTH = 32, 64
torch.manual_seed(0)
text = torch.tensor(list(inspect.getsource(random).encode()))  # some text that is there: bytes are the vocabulary

body = nn.GRU(WIDTH, WIDTH, batch_first=True)
words, head = nn.Embedding(256, WIDTH), nn.Linear(WIDTH, 256)
optimizer = torch.optim.AdamW([*words.parameters(), *body.parameters(), *head.parameters()], lr=1e-2)


def token_loss(x: Tensor, target: Tensor) -> Tensor:
    """One loss for each token."""
    return F.cross_entropy(head(x), target, reduction="none")


token_losses = bb.chunked(token_loss, micro_batch=64)

for step in range(60):
    starts = torch.randint(len(text) - LENGTH - 1, (16, 1))
    tokens = text[starts + torch.arange(LENGTH + 1)]
    optimizer.zero_grad()
    hidden, _ = body(words(tokens[:, :-1]))
    loss = token_losses(hidden.flatten(0, 1), tokens[:, 1:].flatten()).mean()  # was: token_loss(…).mean()
    loss.backward()
    optimizer.step()
    if step % 10 == 9:
        print(f"step {step + 1}  loss {loss.item():.4f}")
