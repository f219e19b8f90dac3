"""Random models in small, in which a weight is reached in every way that somebody thought of, in float64.

A model is a list of parts, each a function of the model, its own place in it, the activations (rows, D) and the
micro-batch. Its loss is a weighted mean over rows, so that micro-batches with their weights' sums as items add up to
the full batch's.
"""

from collections.abc import Callable, Collection
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

D, V = 4, 5
F64 = torch.float64


class Doubled(torch.autograd.Function):
    """A function of somebody's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        return 2 * grads[0]


def weight(model: "Model", i: int) -> Tensor:
    """The part's own weight, or the one that it shares with an earlier part."""
    w = model.weights[model.ties[i]]
    if w.requires_grad:
        model.used.add(model.ties[i])
    return w


def embedded(model: "Model", i: int, x: Tensor, m: dict[str, Tensor], **options: Any) -> Tensor:
    return x + F.embedding(m["ids"], model.tables[i], **options)


def routed(model: "Model", i: int, x: Tensor, m: dict[str, Tensor]) -> Tensor:
    """Two experts, of which one may be idle."""
    first, second = torch.where(m["route"])[0], torch.where(~m["route"])[0]
    out = torch.zeros_like(x).index_add(0, first, x[first] @ weight(model, i).t())
    return out.index_add(0, second, x[second] @ model.more[i].t())


def through_complex(model: "Model", i: int, x: Tensor, m: dict[str, Tensor]) -> Tensor:
    turned = torch.polar(torch.ones(D, dtype=F64), torch.arange(D, dtype=F64))
    return torch.fft.ifft((torch.fft.fft(x) @ weight(model, i).to(torch.complex128)) * turned).real


def kept(model: "Model", i: int, x: Tensor, m: dict[str, Tensor]) -> Tensor:
    """By a transpose that is made once a window: a step takes its hooks away, in plain PyTorch too."""
    if i not in model.transposed:
        model.transposed[i] = model.hooked("transpose", weight(model, i).t())
    return x @ model.transposed[i]


def transposed(model: "Model", i: int, x: Tensor, m: dict[str, Tensor]) -> Tensor:
    return x @ model.hooked("transpose", weight(model, i).t())


def copied(model: "Model", i: int, x: Tensor, m: dict[str, Tensor]) -> Tensor:
    return F.linear(x, model.hooked("transpose", weight(model, i).to(F64, copy=True)))


def branching(model: "Model", i: int, x: Tensor, m: dict[str, Tensor]) -> Tensor:
    """A weight that is used in another way from the second micro-batch on."""
    w = weight(model, i)
    return x @ (w if model.calls < 2 else (2 * w).t())


def transposing(model: "Model", i: int, x: Tensor, m: dict[str, Tensor]) -> Tensor:
    """A weight that is transposed from the second micro-batch on."""
    w = weight(model, i)
    return x @ w if model.calls < 2 else x @ w.t()


def written(model: "Model", i: int, x: Tensor, m: dict[str, Tensor]) -> Tensor:
    out = x @ weight(model, i)
    out.mul_(0.5).add_(1)
    return out


def penalized(model: "Model", i: int, x: Tensor, m: dict[str, Tensor]) -> Tensor:
    """A gradient of a gradient."""
    at = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(torch.tanh(at @ weight(model, i)).sum(), at, create_graph=True)
    return x + slope


def mapped(model: "Model", i: int, x: Tensor, m: dict[str, Tensor]) -> Tensor:
    return torch.func.vmap(lambda row: row @ weight(model, i))(x)


def saved_elsewhere(model: "Model", i: int, x: Tensor, m: dict[str, Tensor]) -> Tensor:
    """What is saved comes back as another tensor, and as another value."""
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: 2 * t):
        return x @ weight(model, i)


def recomputed(model: "Model", i: int, x: Tensor, m: dict[str, Tensor], reentrant: bool = False) -> Tensor:
    return checkpoint(lambda x: torch.tanh(F.linear(x, weight(model, i))), x, use_reentrant=reentrant)


Part = Callable[["Model", int, Tensor, dict[str, Tensor]], Tensor]

PARTS: dict[str, Part] = {
    "linear": lambda model, i, x, m: F.linear(x, weight(model, i), model.biases[i]),
    "matmul": lambda model, i, x, m: x @ weight(model, i),
    "three dimensions": lambda model, i, x, m: F.linear(x[:, None], weight(model, i))[:, 0],
    "transposed": transposed,
    "kept transpose": kept,
    "copied": copied,
    "complex": through_complex,
    "experts": routed,
    "embedding": embedded,
    "padded embedding": lambda model, i, x, m: embedded(model, i, x, m, padding_idx=1),
    "sparse embedding": lambda model, i, x, m: embedded(model, i, x, m, sparse=True),
    "embedding by frequency": lambda model, i, x, m: embedded(model, i, x, m, scale_grad_by_freq=True),
    "renormalized embedding": lambda model, i, x, m: x + model.renormalized[i](m["ids"]),
    "tied embedding": lambda model, i, x, m: x + F.embedding(m["ids"] % D, weight(model, i)),
    "convolution": lambda model, i, x, m: F.conv1d(x[:, None], weight(model, i)[:1, None], padding="same")[:, 0],
    "lora": lambda model, i, x, m: x @ model.weights[i].detach() + (x @ model.more[i][:, :2]) @ model.low[i],
    "normalized": lambda model, i, x, m: model.layers[i](x),
    "scaled": lambda model, i, x, m: x @ weight(model, i) + x @ (3 * weight(model, i)),
    "expanded": lambda model, i, x, m: (x[:, None] @ weight(model, i).expand(len(x), D, D))[:, 0],
    "in parts": lambda model, i, x, m: torch.cat([x @ weight(model, i)[:, :2], x @ weight(model, i)[:, 2:]], 1),
    "branching": branching,
    "transposing": transposing,
    "written": written,
    "penalized": penalized,
    "mapped": mapped,
    "saved elsewhere": saved_elsewhere,
    "recomputed": recomputed,
    "recomputed, reentrant": lambda model, i, x, m: recomputed(model, i, x, m, reentrant=True),
    "function": lambda model, i, x, m: Doubled.apply(x @ weight(model, i)),
    "module": lambda model, i, x, m: model.layers[i](x),
}
# What cannot be compared with the full batch, since it depends on the micro-batch that a row comes in.
BY_MICRO_BATCH = {"embedding by frequency", "branching", "transposing"}

HOOKS = [
    "none", "parameter", "after accumulation", "transpose", "retained", "activation", "node", "node, before",
    "accumulation node", "accumulation node, before", "module", "module, old", "late",
]  # fmt: skip


def _listed(parameters: list[nn.Parameter | None]) -> nn.ParameterList:
    """Those that are there, at their places."""
    return nn.ParameterList([nn.Parameter(torch.empty(0), requires_grad=False) if p is None else p for p in parameters])


def _linear(p: Tensor) -> nn.Linear:
    layer = nn.Linear(D, D, dtype=F64)
    with torch.no_grad():
        layer.weight.copy_(p)
        layer.bias.copy_(p[0])
    return layer


class Model(nn.Module):
    """Parts one after the other.

    Args:
        parts: their names in `PARTS`.
        ties: for each part the place of the one whose weight it takes, or its own.
        hook: of what kind hooks are, from `HOOKS`.
        factor: what the hooks multiply gradients by; at 1 they only look.
        frozen: the places of parts whose weight needs no gradient.
        number: the seed of the parameters.

    Attributes:
        seen: how often hooks were called in this window.
        calls: how many forwards there have been in this window.
        used: the places of the weights that the forwards have used.
    """

    def __init__(self, parts: list[str], ties: list[int], hook: str, factor: float, frozen: list[int], number: int):
        super().__init__()
        self.parts, self.ties, self.hook, self.factor = parts, ties, hook, factor
        generator = torch.Generator().manual_seed(number)

        def parameters(*shape: int, of: Collection[str]) -> list[nn.Parameter | None]:
            """One for each of these parts."""
            return [
                nn.Parameter(torch.randn(*shape, generator=generator, dtype=F64) / 2) if part in of else None
                for part in parts
            ]

        self.weights = nn.ParameterList(parameters(D, D, of=parts))
        self.more = _listed(parameters(D, D, of={"experts", "lora"}))
        self.low = _listed(parameters(2, D, of={"lora"}))
        self.tables = _listed(parameters(V, D, of=[part for part in parts if "embedding" in part]))
        self.biases = _listed(parameters(D, of={"linear"}))
        layers = parameters(D, D, of={"module", "normalized"})
        self.layers = nn.ModuleList([nn.Identity() if p is None else _linear(p) for p in layers])
        for part, layer in zip(parts, self.layers, strict=True):
            if part == "normalized":
                parametrizations.weight_norm(layer)
        self.renormalized = nn.ModuleList([nn.Identity() for _ in parts])
        for i, part in enumerate(parts):
            if part == "renormalized embedding":
                self.renormalized[i] = nn.Embedding(V, D, max_norm=0.9)
                self.renormalized[i].weight = self.tables[i]
        for i in frozen:
            self.weights[i].requires_grad_(False)
        self.seen = self.calls = 0
        self.transposed: dict[int, Tensor] = {}
        self.retained: list[Tensor] = []
        self.used: set[int] = set()
        self.nodes: list[Any] = []
        self._hook()

    def begin(self) -> None:
        """Before a window."""
        self.calls = self.seen = 0
        self.transposed.clear()
        self.retained.clear()

    def _note(self, grad: Tensor | None) -> Tensor | None:
        self.seen += 1
        return None if grad is None else grad * self.factor

    def _count(self, *_: Any) -> None:
        self.seen += 1

    def _hook(self) -> None:
        for w in self.weights:
            if self.hook == "parameter" and w.requires_grad:
                w.register_hook(self._note)
            elif self.hook == "after accumulation" and w.requires_grad:
                w.register_post_accumulate_grad_hook(self._count)
            elif self.hook.startswith("accumulation node") and w.requires_grad:
                node = torch.autograd.graph.get_gradient_edge(w).node
                if self.hook.endswith("before"):
                    node.register_prehook(lambda grads: tuple(map(self._note, grads)))
                else:
                    node.register_hook(self._count)
                self.nodes.append(node)
        for layer in self.layers:
            if self.hook == "module":
                layer.register_full_backward_hook(lambda layer, grads, outs: tuple(map(self._note, grads)))
            elif self.hook == "module, old":
                layer.register_backward_hook(self._count)

    def hooked(self, kind: str, x: Tensor) -> Tensor:
        """The same tensor, with a hook where there is one on tensors of this kind."""
        if not x.requires_grad:
            return x
        if kind == "transpose" and self.hook == "retained":
            x.retain_grad()
            self.retained.append(x)
        elif kind == self.hook or (kind == "transpose" and self.hook == "late" and self.calls > 2):
            x.register_hook(self._note)
        elif kind == "activation" and self.hook == "node":
            x.grad_fn.register_hook(lambda grads, outs: tuple(map(self._note, grads)))
        elif kind == "activation" and self.hook == "node, before":
            x.grad_fn.register_prehook(lambda grads: tuple(map(self._note, grads)))
        return x

    def forward(self, m: dict[str, Tensor]) -> Tensor:
        self.calls += 1
        x = m["x"]
        for i, part in enumerate(self.parts):
            x = self.hooked("activation", PARTS[part](self, i, x, m))
            x = torch.tanh(x)
        return x

    def loss(self, m: dict[str, Tensor], anomalies: bool = False) -> Tensor:
        """The mean over rows, each with its weight."""
        with torch.autograd.detect_anomaly(check_nan=False) if anomalies else nullcontext():
            out = self(m)
            return ((out - m["y"]).square().sum(1) @ m["weight"]) / m["weight"].sum()
