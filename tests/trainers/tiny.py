"""A tiny language model and its ragged texts, and training on the true batches that a trainer's windows stand for."""

import torch
import torch.nn.functional as F
from torch import nn

from bigbatch.engines.torch_fsdp import whole

WORDS, LENGTH, PAD = 11, 7, -100


class Model(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Embedding(WORDS, 6), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, WORDS)).to(dtype)

    def forward(self, tokens):
        return self.net(tokens.clamp(min=0))


def texts(count=21, ragged=True, seed=0):
    """Token rows of 2 to 7 tokens, padded; all of 7 where they are not `ragged`."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(WORDS, (count, LENGTH), generator=draw)
    if ragged:
        for row in tokens:
            row[int(torch.randint(2, LENGTH + 1, (), generator=draw)) :] = PAD
    return tokens


def loss_of(model, tokens):
    """The mean over the tokens to be predicted."""
    scores = model(tokens[:, :-1])
    return F.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=PAD)


def items(tokens):
    return (tokens[:, 1:] != PAD).sum()


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)


def decay(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)


def windows_of(parts, every=4):
    """Each window's whole batch, of the micro-batches of one epoch."""
    return [torch.cat(parts[i : i + every]) for i in range(0, len(parts), every)]


def trained(windows, optimizer=sgd, clip=None, schedule=False, dtype=torch.float64):
    """The true batch of each window in one piece: the parameters, and each one's loss and gradient norm."""
    model, seen = Model(dtype), []
    step = optimizer(model)
    scheduler = decay(step) if schedule else None
    for tokens in windows:
        loss = loss_of(model, tokens)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))
        step.step()
        if scheduler:
            scheduler.step()
        step.zero_grad()
        seen.append((loss.item(), norm.item()))
    return flat(model), seen


def flat(model):
    return torch.cat([whole(p.detach()).flatten() for p in model.parameters()])


def distance(got, wanted):
    return ((got - wanted).norm() / wanted.norm()).item()


BOUND = {torch.float32: 1e-6, torch.float64: 1e-12}
CASES = {
    "equal windows": {"ragged": False, "count": 16},
    "ragged tokens and a partial last window": {},
    "clipping": {"clip": 0.1},
    "AdamW with a schedule": {"optimizer": adamw, "schedule": True, "clip": 0.5},
}
