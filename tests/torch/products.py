"""What the tests of products share: a model, its gradients through either door, and how near they have to be."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import bigbatch.torch as bb

# Of deferred rows, where a test counts products; buffers for such small weights would be larger than a gradient.
CAPACITY = 4


class Calls(TorchDispatchMode):
    """Counts the operations that reach the device, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Tied(nn.Module):
    """A language model in small: one table for both ends, and a layer used twice."""

    def __init__(self, bias=True, padding_idx=None):
        super().__init__()
        self.embedding = nn.Embedding(11, 6, padding_idx=padding_idx)
        self.middle = nn.Linear(6, 6, bias=bias)
        self.out = nn.Linear(6, 11, bias=bias)
        self.out.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.out(torch.tanh(self.middle(torch.tanh(self.middle(x)))))


def gradients(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def by(door, model, loss_fn, batch, micro_batch, **options):
    """The window's gradient through one of the doors; `fused` says which way."""
    on = options.pop("on")
    if door == "split":
        bb.backward(loss_fn, batch, micro_batch=micro_batch, fused=on, **options)
        found = gradients(model)
        model.zero_grad()
        return found
    found = {}

    class Look(torch.optim.SGD):
        def step(self, closure=None):
            found.update(gradients(model))

    acc = bb.Accumulator(Look(model.parameters(), lr=1.0), every=10**6, fused=on, **options)
    for part in zip(*(t.split(micro_batch) for t in batch), strict=True):
        acc.backward(loss_fn(part), items=len(part[0]))
    acc.flush()
    return found


def language(model):
    return lambda b: F.cross_entropy(model(b[0]).flatten(0, -2), b[1].flatten())


def agree(found, wanted, dtype):
    """Both are sums of at most a hundred rounded terms."""
    for name, w in wanted.items():
        if w is None:
            assert found[name] is None, name
            continue
        tolerance = 100 * torch.finfo(dtype).eps * w.abs().max().item()
        torch.testing.assert_close(found[name], w, rtol=0, atol=tolerance, msg=name)


def called(acc, model, rows=2):
    """The products of one micro-batch's backward."""
    loss = model(torch.randn(rows, 8)).square().mean()
    with Calls() as calls:
        acc.backward(loss, items=rows)
    return [name for name in calls.names if "mm" in name]


def prove(acc, model):
    """The first micro-batch, in which products are compared with autograd's gradients; the window is dropped."""
    called(acc, model)
    acc.reset()
