"""A loss over the whole batch on the JAX backend: two scans over its micro-batches, one update, in one program."""

from typing import Any

import jax
import jax.numpy as jnp
import keras
from jax import lax

from bigbatch.keras import batch, whole_batch
from bigbatch.keras.backends.jax.window import State, Step, Sums, add_runs, condition, cut, optimizer_scope
from bigbatch.keras.guard import guarded


def split_step(model: Any, micro_batch: int) -> Step:
    """`train_step` for a whole batch."""

    def train_step(state: Any, data: Any) -> tuple[dict[str, Any], Any]:
        return _Step(model, State(*state), data, cut(data, micro_batch)).run()

    return train_step


class _Step:
    """One update."""

    def __init__(self, model: Any, state: State, data: Any, runs: list[list[Any]]):
        self.model, self.state, self.data, self.runs = model, state, data, runs
        self.length = len(batch.leaves(data)[0])
        # The generator of unseeded draws is no variable of the model's; plain fit leaves its state in the trace, too.
        self.variables = model.non_trainable_variables

    def run(self) -> tuple[dict[str, Any], Any]:
        """Both scans, the loss between them, and the update."""
        with guarded(self.model, adds_up=len(self.runs) > 1 or len(self.runs[0][0]) > 1):
            y_pred, added, now = self._first_runs()
            (loss, metrics), of_outputs, of_added, direct = self._loss(y_pred, added, now)
            gradients = self._second_runs(of_outputs, of_added)
        gradients = [g + d.astype(g.dtype) for g, d in zip(gradients, direct, strict=True)]
        return self._updated(gradients, loss, y_pred, now, metrics)

    def _values(self, trainable: Any, written: list[Any]) -> list[tuple[Any, Any]]:
        values = list(self.state.non_trainable)
        for k, value in zip(self.written, written, strict=True):
            values[k] = value
        return [*zip(self.model.trainable_variables, trainable, strict=True), *zip(self.variables, values, strict=True)]

    def _forward(self, trainable: Any, written: list[Any], leaves: list[Any]) -> whole_batch.Forward:
        x, _, _ = batch.unpack(batch.nest(self.data, leaves))
        return whole_batch.forward(self.model, x, self._values(trainable, written), self.variables)

    def _first_runs(self) -> tuple[Any, list[Any], list[Any]]:
        """The whole batch's outputs, the means of the losses that are added, and the non-trainable variables."""
        self.written: list[int] = []
        like: Any = None

        def examined(leaves: list[Any]) -> tuple[list[Any], list[Any]]:
            nonlocal like
            like = self._forward(self.state.trainable, [], leaves)
            return like.arrays, like.added

        _, shapes = jax.eval_shape(examined, [leaf[0] for leaf in self.runs[0]])
        self.written = like.written

        def body(carry: Any, leaves: list[Any]) -> Any:
            written, added = carry
            made = self._forward(self.state.trainable, written, leaves)
            n = len(leaves[0]) / self.length
            added = [a + b * n for a, b in zip(added, made.added, strict=True)]
            return ([made.state[k] for k in self.written], added), (made.arrays, written)

        carry = [self.state.non_trainable[k] for k in self.written], [jnp.zeros(x.shape, x.dtype) for x in shapes]
        parts, self.starts = [], []
        for run in self.runs:
            carry, (arrays, starts) = lax.scan(body, carry, run)
            parts.append([x.reshape(-1, *x.shape[2:]) for x in arrays])
            self.starts.append(starts)
        now = list(self.state.non_trainable)
        for k, value in zip(self.written, carry[0], strict=True):
            now[k] = value
        arrays = [jnp.concatenate(of_one) for of_one in zip(*parts, strict=True)]
        return whole_batch.joined(like, arrays), carry[1], now

    def _loss(self, y_pred: Any, added: list[Any], now: list[Any]) -> Any:
        """The loss and the metrics' variables; its gradients of outputs, added losses and the variables it reads."""
        model, outputs = self.model, keras.tree.flatten(y_pred)
        floating = [k for k, y in enumerate(outputs) if whole_batch.is_floating(y)]
        kinds = model.trainable_variables, model.non_trainable_variables, model.metrics_variables

        def loss_of(trainable: Any, given: list[Any], added: list[Any]) -> Any:
            for k, y in zip(floating, given, strict=True):
                outputs[k] = whole_batch.with_mask_of(outputs[k], y)
            values = trainable, now, self.state.metrics
            mapping = [pair for pairs in zip(kinds, values, strict=True) for pair in zip(*pairs, strict=True)]
            with keras.StatelessScope(mapping) as scope:
                loss = whole_batch.loss_of(model, self.data, keras.tree.pack_sequence_as(y_pred, outputs), added)
            metrics = [scope.get_current_value(v) for v in model.metrics_variables]
            with optimizer_scope(model, self.state):
                return model.optimizer.scale_loss(loss), (loss, metrics)

        given = list(self.state.trainable), [outputs[k] for k in floating], added
        (_, aux), (direct, found, of_added) = jax.value_and_grad(loss_of, argnums=(0, 1, 2), has_aux=True)(*given)
        of_outputs = dict(zip(floating, found, strict=True))
        return aux, of_outputs, of_added, direct

    def _second_runs(self, of_outputs: dict[int, Any], of_added: list[Any]) -> list[Any]:
        """The gradients' sums over the micro-batches, each of which runs again as it ran before."""
        runs, at = [], 0
        for run, starts in zip(self.runs, self.starts, strict=True):
            count, size = run[0].shape[:2]
            cuts = [g[at : at + count * size].reshape(count, size, *g.shape[1:]) for g in of_outputs.values()]
            runs.append([run, cuts, starts])
            at += count * size

        def micro_step(sums: Any, given: Any) -> Any:
            leaves, cuts, written = given
            n = len(leaves[0]) / self.length

            def outputs(trainable: Any) -> Any:
                made = self._forward(trainable, written, leaves)
                return [keras.tree.flatten(made.y_pred)[k] for k in of_outputs], made.added

            _, back = jax.vjp(outputs, self.state.trainable)
            gradients = back((cuts, [g * n for g in of_added]))[0]
            wide = [g.astype(jnp.promote_types(g.dtype, jnp.float32)) for g in gradients]
            return (Sums([wide], [], [], [], None),)

        first = jax.tree.map(lambda x: x[0], runs[0])
        shapes = jax.eval_shape(lambda given: micro_step(None, given)[0], first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (sums,) = add_runs(micro_step, (zeros,), runs)
        return sums.gradients[0]

    def _updated(self, gradients: list[Any], loss: Any, y_pred: Any, now: list[Any], metrics: list[Any]) -> Any:
        model, state = self.model, self.state
        with keras.StatelessScope(list(zip(model.metrics_variables, metrics, strict=True))) as scope:
            logs = whole_batch.logs_of(model, self.data, y_pred, loss, self.length)
        metrics = [scope.get_current_value(v) for v in model.metrics_variables]

        def apply() -> Any:
            narrowed = [g.astype(v.dtype) for g, v in zip(gradients, state.trainable, strict=True)]
            return tuple(map(list, model.optimizer.stateless_apply(state.optimizer, narrowed, state.trainable)))

        goes_on = condition(model, Sums([gradients], [], [], [], None), loss, [])
        made = (
            apply()
            if goes_on is None
            else lax.cond(goes_on, apply, lambda: (list(state.trainable), list(state.optimizer)))
        )
        return logs, (made[0], now, made[1], metrics)
