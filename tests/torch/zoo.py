"""Models and losses whose truth is known: is accumulation exact, and if not, why?

Each entry is a function that returns (loss_fn, model, batch), with what an audit must say of it.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specimens import Zoo

N, D, CLASSES, MICRO_BATCH = 14, 6, 4, 4  # the last micro-batch is ragged


ZOO = Zoo()
specimen = ZOO.specimen


def examples() -> tuple[Tensor, Tensor]:
    return torch.randn(N, D), torch.randint(CLASSES, (N,))


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 3, 5, 5), torch.randint(CLASSES, (N,))


def sentences() -> tuple[Tensor, Tensor]:
    """Token ids and labels, of 1 to 6 tokens each; the rest is padding."""
    ids = torch.randint(1, 12, (N, 6))
    lengths = torch.randint(1, 7, (N, 1))
    return ids, torch.where(torch.arange(6) < lengths, torch.randint(CLASSES, (N, 6)), -100)


def classified(model: nn.Module) -> Callable[[Any], Tensor]:
    return lambda batch: F.cross_entropy(model(batch[0]), batch[1])


def tagger() -> nn.Module:
    return nn.Sequential(nn.Embedding(12, D), nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def token_loss(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1), labels.flatten())


# Exact.


@specimen(exact=True)
def a_plain_network():
    model = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    return classified(model), model, examples()


@specimen(exact=True)
def layer_and_group_norm():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.GELU(), nn.Flatten(), nn.LayerNorm(36), nn.Linear(36, CLASSES)
    )
    return classified(model), model, images()


@specimen(exact=True)
def batch_norm_in_evaluation_mode():
    model = nn.Sequential(nn.Linear(D, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES))
    return classified(model), model.eval(), examples()


@specimen(exact=True)
def token_mean_with_items():
    model = tagger()
    return lambda b: (token_loss(model, *b), (b[1] != -100).sum()), model, sentences()


@specimen(exact=True)
def a_micro_batch_of_padding_alone_with_items():
    model, (ids, labels) = tagger(), sentences()
    labels[MICRO_BATCH : 2 * MICRO_BATCH] = -100
    return lambda b: (token_loss(model, *b), (b[1] != -100).sum()), model, (ids, labels)


@specimen(exact=True)
def a_penalty_on_the_weights():
    model = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    loss = classified(model)
    return lambda b: loss(b) + 0.1 * sum(p.square().sum() for p in model.parameters()), model, examples()


@specimen(exact=True)
def tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mix = nn.Embedding(12, D), nn.Linear(D, D)
            self.head = nn.Linear(D, 12, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(torch.tanh(self.mix(self.embed(ids))))

    model = Tied()
    return lambda b: F.cross_entropy(model(b[0][:, :-1]).flatten(0, 1), b[0][:, 1:].flatten()), model, sentences()


# The model's doing.


@specimen(exact=False, module=("1",))
def batch_norm_behind_the_first_layer():
    model = nn.Sequential(nn.Linear(D, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES))
    return classified(model), model, examples()


@specimen(exact=False, module=("0.1", "1.1", "2.1"))
def batch_norm_at_three_depths():
    def block(i, o):
        return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.Tanh())

    model = nn.Sequential(block(3, 4), block(4, 4), block(4, 2), nn.Flatten(), nn.Linear(50, CLASSES))
    return classified(model), model, images()


@specimen(exact=False, module=("norm",))
def a_batch_norm_that_no_list_of_names_has():
    class Whitened(nn.Module):
        def forward(self, x):
            return (x - x.mean(0)) / (x.std(0) + 1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(D, 8), Whitened(), nn.Linear(8, CLASSES)

        def forward(self, x):
            return self.last(torch.tanh(self.norm(self.first(x))))

    model = Net()
    return classified(model), model, examples()


@specimen(exact=True, stochastic=("2",))
def dropout():
    model = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, CLASSES))
    return classified(model), model, examples()


@specimen(exact=False, stochastic=("3",), module=("1",))
def dropout_and_batch_norm():
    model = nn.Sequential(
        nn.Linear(D, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, CLASSES)
    )  # fmt: skip
    return classified(model), model, examples()


@specimen(exact=False, state=())
def a_model_that_remembers():
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = nn.Linear(2 * D, D), nn.Linear(D, CLASSES)
            self.register_buffer("last", torch.zeros(D))

        def forward(self, x):
            hidden = torch.tanh(self.cell(torch.cat([x, self.last.expand(len(x), D)], 1)))
            self.last = hidden.detach().mean(0)
            return self.head(hidden)

    model = Remembers()
    return classified(model), model, examples()


# The loss's doing.


@specimen(exact=False, sum=())
def a_sum():
    model = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    return lambda b: F.cross_entropy(model(b[0]), b[1], reduction="sum"), model, examples()


@specimen(exact=False, sum=())
def divided_by_a_constant():
    model = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    return lambda b: F.cross_entropy(model(b[0]), b[1], reduction="sum") / 64, model, examples()


@specimen(exact=False, sum=())
def a_mean_and_a_sum():
    model = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    return lambda b: F.cross_entropy(model(b[0]), b[1]) + 1e-2 * model(b[0]).square().sum(), model, examples()


@specimen(exact=False, items=())
def token_mean_without_items():
    model = tagger()
    return lambda b: token_loss(model, *b), model, sentences()


@specimen(exact=False, items=())
def items_that_are_not_the_losss():
    """A mean over sentences of means over tokens, said to be a mean over tokens."""
    model = tagger()

    def loss_fn(batch):
        ids, labels = batch
        each = F.cross_entropy(model(ids).transpose(1, 2), labels, reduction="none")
        counted = labels != -100
        return (each.sum(1) / counted.sum(1)).mean(), counted.sum()

    return loss_fn, model, sentences()


@specimen(exact=False, not_finite=())
def a_micro_batch_of_padding_alone_without_items():
    model, (ids, labels) = tagger(), sentences()
    labels[MICRO_BATCH : 2 * MICRO_BATCH] = -100
    return lambda b: token_loss(model, *b), model, (ids, labels)


@specimen(exact=False, terms=())
def an_auxiliary_loss_with_another_denominator():
    """Tokens for the loss, and an auxiliary mean over examples."""
    model = tagger()

    def loss_fn(batch):
        ids, labels = batch
        auxiliary = model[0](ids).mean(1).square().sum(1).mean()
        return token_loss(model, ids, labels) + 0.5 * auxiliary, (labels != -100).sum()

    return loss_fn, model, sentences()


@specimen(exact=False, coupling=())
def info_nce():
    model = nn.ModuleDict({"a": nn.Linear(D, 5), "b": nn.Linear(D, 5)})

    def loss_fn(batch):
        a, b = (F.normalize(model[k](x)) for k, x in zip("ab", batch, strict=True))
        return F.cross_entropy(a @ b.T / 0.2, torch.arange(len(a)))

    return loss_fn, model, (torch.randn(N, D), torch.randn(N, D))


@specimen(exact=False, coupling=())
def a_load_balancing_loss():
    """A mixture of experts: the share of examples that an expert gets, times its mean probability."""

    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.router, self.head = nn.Linear(D, 3), nn.Linear(D, CLASSES)
            self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(3))

    model = Mixture()

    def loss_fn(batch):
        x, y = batch
        gates = model.router(x).softmax(1)
        outputs = torch.stack([expert(x) for expert in model.experts], 1)
        mixed = (gates[:, :, None] * outputs).sum(1)
        share = F.one_hot(gates.argmax(1), 3).to(x.dtype).mean(0)
        return F.cross_entropy(model.head(mixed), y) + 0.1 * 3 * (share * gates.mean(0)).sum()

    return loss_fn, model, examples()


@specimen(exact=False, coupling=())
def a_ranking_loss():
    model = nn.Linear(D, 1)

    def loss_fn(batch):
        scores = model(batch[0]).squeeze(1)
        above = (batch[1][:, None] > batch[1][None, :]).to(scores.dtype)
        return (above * F.softplus(scores[None, :] - scores[:, None])).mean()

    return loss_fn, model, examples()


@specimen(exact=True, stochastic=())
def noise_in_the_loss():
    model = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    return lambda b: F.cross_entropy(model(b[0] + 0.3 * torch.randn_like(b[0])), b[1]), model, examples()


@specimen(exact=False, order=())
def a_loss_that_looks_at_places():
    model = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, CLASSES))

    def loss_fn(batch):
        each = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        weights = torch.linspace(1, 2, len(each), dtype=each.dtype)
        return (each * weights).sum() / weights.sum()

    return loss_fn, model, examples()
