"""`bigbatch demo`: one network, one seed, four ways to train it, on real data.

What every framework's demo shares is here: the job (data, initial weights, hyperparameters, the order of the examples)
and what a training has to show for itself. `demo/torch.py` and its siblings train; `demo/report.py` shows.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

Way = Literal["micro", "full", "stream", "split"]
WAYS: dict[Way, str] = {
    "micro": "micro-batches of 16",
    "full": "true batch of 1,024",
    "stream": "64 × 16 by stream",
    "split": "1,024 by split",
}


@dataclass(frozen=True)
class Job:
    """What to train: a tanh network, 64-256-256-10, on scikit-learn's handwritten digits.

    The same for every framework: AdamW (β 0.9 and 0.999, ε 1e-8, weight decay 1e-2 of every
    parameter), the mean gradient clipped to norm
    1, and the learning rate of update k out of n falling from 3e-3 to 0 along a cosine. `layers` are (kernel, bias)
    pairs, with y = x @ kernel + bias. The last batch of an epoch is ragged.
    """

    dtype: str = "float32"
    epochs: int = 30
    batch: int = 1024
    micro_batch: int = 16
    rate: float = 3e-3
    weight_decay: float = 1e-2
    clip_norm: float = 1.0
    seed: int = 0

    @cached_property
    def data(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The digits: x (1437, 64) and y (1437,) to train on, then x (360, 64) and y (360,) held out."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        pixels, labels = map(np.asarray, load_digits(return_X_y=True))
        rows, held_out = map(
            np.asarray, train_test_split(np.arange(len(labels)), test_size=0.2, random_state=self.seed, stratify=labels)
        )
        x = (pixels / 16).astype(self.dtype)
        return x[rows], labels[rows], x[held_out], labels[held_out]

    @cached_property
    def layers(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """The initial weights."""
        rng = np.random.default_rng(self.seed)
        widths = (64, 256, 256, 10)
        return [
            (rng.normal(scale=n**-0.5, size=(n, m)).astype(self.dtype), np.zeros(m, self.dtype))
            for n, m in itertools.pairwise(widths)
        ]

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """The rows of each batch of `size`, epoch after epoch; the same order of examples whatever the size."""
        rng = np.random.default_rng(self.seed)
        for _ in range(self.epochs):
            rows = rng.permutation(len(self.data[0]))
            # The true batches first, so that a window of micro-batches never reaches over the end of one.
            for start in range(0, len(rows), self.batch):
                held = rows[start : start + self.batch]
                yield from (held[i : i + size] for i in range(0, len(held), size))

    def updates(self, size: int) -> int:
        """How many batches of `size` the whole training has."""
        return sum(1 for _ in self.batches(size))

    def rate_at(self, update: int, updates: int) -> float:
        """The learning rate of one update."""
        return self.rate * 0.5 * (1 + float(np.cos(np.pi * update / updates)))


@dataclass(frozen=True)
class Result:
    """What one way of training came to.

    Attributes:
        losses: (examples seen, mean loss of the batch that the update was made from), an update each.
        accuracy: on the held-out examples, from 0 to 1.
        layers: the final weights, as `Job.layers`.
        peak_bytes: the most memory held at once over what stood before, during one full update, the third; None
            where the framework cannot tell.
        seconds: of training, without the measurement of memory.
        advice: whether the batch was worth it, in words, where the training measured that.
    """

    losses: list[tuple[int, float]]
    accuracy: float
    layers: list[tuple[np.ndarray, np.ndarray]]
    peak_bytes: int | None
    seconds: float
    advice: str | None = None

    @property
    def updates(self) -> int:
        """How many updates were made."""
        return len(self.losses)

    def distance(self, other: "Result") -> float:
        """The largest difference between any two weights."""
        pairs = zip(self.layers, other.layers, strict=True)
        return max(float(np.abs(a - b).max()) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))


Train = Callable[[Way, Job, Callable[[int], None]], Result]
"""A framework's `train(way, job, advance)`; it calls `advance(examples)` as it goes."""
