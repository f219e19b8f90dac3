"""optax's own accumulation under the same laws: the page says what it does differently, and this is the evidence."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import jax
import optax
import pytest

from conformance import laws
from conformance.adapters.jax import Adapter, JaxRun, loss_fn
from conformance.jobs import MicroBatch, Spec


class MultiSteps(JaxRun):
    """As a user of MultiSteps writes it."""

    def __init__(self, spec: Spec):
        super().__init__(spec)
        self.fed = 0
        self.steps = optax.MultiSteps(self.tx, spec.every)
        self.state["opt"] = self.steps.init(self.state["params"])
        self.update = jax.jit(self.steps.update)

    def feed(self, micro_batch: MicroBatch) -> Any:
        args = self.spec.job, self.state["params"], self.arrays(micro_batch), self.next_key()
        (loss, _), grads = jax.value_and_grad(loss_fn, 1, has_aux=True)(*args)
        updates, self.state["opt"] = self.update(grads, self.state["opt"], self.state["params"])
        self.apply(updates)
        self.fed += 1
        if self.fed % self.spec.every:
            return None
        finite = bool(jax.numpy.isfinite(loss))
        return SimpleNamespace(micro_batches=self.spec.every, items=0.0, loss=float(loss), skipped=not finite)

    def window(self, micro_batches: Sequence[MicroBatch]) -> Any:
        return [self.feed(m) for m in micro_batches][-1]

    def flush(self) -> None:
        """It has none."""

    @property
    def pending(self) -> int:
        return int(self.state["opt"].mini_step)


class Microbatch(JaxRun):
    """As a user of optax.microbatch writes it; the key goes whole to every micro-batch."""

    def window(self, micro_batches: Sequence[MicroBatch]) -> Any:
        x = jax.numpy.concatenate([m["x"] for m in micro_batches])
        weight = jax.numpy.concatenate([m["weight"] for m in micro_batches])

        def gradient(params: Any, m: Any, key: jax.Array) -> Any:
            return jax.grad(lambda p: loss_fn(self.spec.job, p, m, key)[0])(params)

        mean = optax.microbatching.AccumulationType.MEAN
        micro = optax.microbatching.microbatch(gradient, 1, len(micro_batches[0]["x"]), mean)
        grads = micro(self.state["params"], {"x": x, "weight": weight}, self.next_key())
        updates, self.state["opt"] = self.tx.update(grads, self.state["opt"], self.state["params"])
        self.apply(updates)


@pytest.mark.parametrize("law", ["mean", "order", "non_finite", "loss"])
def test_multi_steps(law):
    with pytest.raises(laws.LawBroken):
        laws.LAWS[law](Adapter("stream", "stream", MultiSteps))


def test_microbatch():
    adapter = Adapter("split", "split", Microbatch)
    with pytest.raises(laws.LawBroken, match="both micro-batches drew the same dropout"):
        laws.randomness(adapter)
    with pytest.raises(ValueError, match="must be divisible"):
        laws.mean(adapter)
