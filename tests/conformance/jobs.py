"""The four losses that every adapter trains on, and their data.

A micro-batch is a dict of arrays with one row an example, always with "x" (n, D) and "weight" (n,); its items are
the sum of the weights. A loss is Σₑ weightₑ·lossₑ / Σₑ weightₑ over its rows e, with

| job     | lossₑ                                                       | parameters                          |
|---------|-------------------------------------------------------------|-------------------------------------|
| mean    | <w, xₑ>, whose gradient is the data: exact in any framework | w (D,)                              |
| net     | (tanh(xₑ·a + b)·c − yₑ)² / 2, smooth everywhere             | a (D, H), b (H,), c (H,)            |
| missing | <w + table[idₑ] + hasₑ·extra, xₑ>; `never` has no part      | w, extra, never (D,), table (V, D)  |
| dropout | <w, dropout(xₑ)>, half of the entries dropped               | w (D,)                              |
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

MicroBatch = Mapping[str, np.ndarray]
Params = dict[str, np.ndarray]

D, H, V = 6, 5, 7


@dataclass(frozen=True)
class Spec:
    """What a law asks an adapter to train.

    `every` is the number of micro-batches in a window; at the split door the laws pass micro-batches of one size
    with a shorter last one, and the adapter joins them. `rates` are the learning rates of the updates, in order; the
    last one stays. "half" is the framework's own 16-bit type for parameters and data. `ema` is the decay of an
    exponential moving average of the parameters, taken after each update; `shrink` a factor that they are multiplied
    by after each update, as a constraint would be; `decay` AdamW's weight decay.
    """

    job: Literal["mean", "net", "missing", "dropout"] = "mean"
    params: Params = field(default_factory=dict)
    optimizer: Literal["sgd", "momentum", "adamw", "overwriting"] = "sgd"
    rates: tuple[float, ...] = (0.5,)
    every: int = 4
    clip_norm: float | None = None
    decay: float = 0.0
    ema: float | None = None
    shrink: float | None = None
    dtype: Literal["float64", "float32", "half"] = "float64"
    partial: Literal["apply", "carry", "drop"] = "apply"
    seed: int = 0


def params(job: str, seed: int = 0) -> Params:
    """Initial parameters."""
    rng = np.random.default_rng(seed)
    if job == "net":
        shapes = {"a": (D, H), "b": (H,), "c": (H,)}
    elif job == "missing":
        shapes = {"w": (D,), "table": (V, D), "extra": (D,), "never": (D,)}
    else:
        shapes = {"w": (D,)}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def window(job: str, sizes: Sequence[int], seed: int, weights: Sequence[float] | None = None) -> list[MicroBatch]:
    """Micro-batches of random data. `weights` gives each one's item an example; else every example has its own."""
    rng = np.random.default_rng(seed)
    made = []
    for i, n in enumerate(sizes):
        weight = rng.integers(1, 9, size=n).astype(float) if weights is None else np.full(n, float(weights[i]))
        made.append({"x": rng.normal(size=(n, D)), "weight": weight, **_extras(job, n, i, rng)})
    return made


def dyadic(sizes: Sequence[int], items: Sequence[int], seed: int) -> list[MicroBatch]:
    """Micro-batches for "mean" whose every sum and quotient is exact in float32: eighths, and powers of two."""
    rng = np.random.default_rng(seed)
    return [
        {"x": rng.integers(-64, 65, size=(n, D)) / 8, "weight": np.full(n, count / n)}
        for n, count in zip(sizes, items, strict=True)
    ]


def _extras(job: str, n: int, i: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    if job == "net":
        return {"y": rng.normal(size=n)}
    if job == "missing":
        # The first and third micro-batches see `extra`, the last does not; every one names a row twice.
        ids = rng.integers(0, V - 1, size=n)
        ids[-1] = ids[0]
        return {"ids": ids, "has": np.full(n, float(i in (0, 2)))}
    return {}


def items(micro_batch: MicroBatch) -> float:
    """What a micro-batch counts for."""
    return float(micro_batch["weight"].sum())


def join(micro_batches: Sequence[MicroBatch]) -> MicroBatch:
    """The big batch."""
    return {name: np.concatenate([m[name] for m in micro_batches]) for name in micro_batches[0]}


def loss_and_gradient(job: str, p: Params, m: MicroBatch) -> tuple[float, dict[str, np.ndarray | None]]:
    """The mean loss and its gradient in closed form; None where a parameter has no part in the loss."""
    x, share = m["x"], m["weight"] / m["weight"].sum()
    if job == "mean":
        return float(share @ (x @ p["w"])), {"w": share @ x}
    if job == "net":
        h = np.tanh(x @ p["a"] + p["b"])
        r = h @ p["c"] - m["y"]
        back = (share * r)[:, None] * p["c"] * (1 - h**2)
        return float(share @ r**2 / 2), {"a": x.T @ back, "b": back.sum(0), "c": (share * r) @ h}
    if job == "missing":
        has = m["has"]
        table = np.zeros_like(p["table"])
        np.add.at(table, m["ids"], share[:, None] * x)
        loss = share @ ((p["w"] + p["table"][m["ids"]] + has[:, None] * p["extra"]) * x).sum(1)
        extra = (share * has) @ x if has.any() else None
        return float(loss), {"w": share @ x, "table": table, "extra": extra, "never": None}
    raise ValueError(job)


def envelope(p: Params, m: MicroBatch) -> Params:
    """For "net": the gradient with every term in absolute value, which bounds how far rounding can be amplified.

    A sum computed with m roundings is off by at most γₘ = m·u / (1 − m·u) times the sum of its terms' absolute values
    (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1). tanh and 1 − tanh² have slopes of
    at most 1 and are bounded by |x|·|a| + |b| and by 1.
    """
    x, share = np.abs(m["x"]), m["weight"] / m["weight"].sum()
    z = x @ np.abs(p["a"]) + np.abs(p["b"])
    r = z @ np.abs(p["c"]) + np.abs(m["y"])
    back = (share * r)[:, None] * np.abs(p["c"]) * (1 + 2 * z)
    return {"a": x.T @ back, "b": back.sum(0), "c": (share * r) @ z}
