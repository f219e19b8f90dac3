"""What a window may cost: memory on JAX, micro-batches in flight on TensorFlow, host waits and Python on PyTorch."""

import keras
import numpy as np
import pytest

import bigbatch.keras as bb
from conformance.keras_parity import BACKEND

N, MICRO, WIDTH = 8, 4, 256
X = np.random.default_rng(0).normal(size=(N * MICRO, WIDTH)).astype("float32")
Y = np.random.default_rng(1).integers(0, 10, len(X))


@pytest.fixture(autouse=True)
def _float32():
    keras.config.set_floatx("float32")


def mlp():
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(WIDTH, activation="relu") for _ in range(3)]
    model = keras.Sequential([keras.Input((WIDTH,)), *layers, keras.layers.Dense(10)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.train_on_batch(X[:MICRO], Y[:MICRO])
    return model


if BACKEND == "jax":
    import jax
    from jax import numpy as jnp

    def mebibytes(step, *args):
        memory = jax.jit(step, donate_argnums=0).lower(*args).compile().memory_analysis()
        size = memory.argument_size_in_bytes + memory.output_size_in_bytes
        return (size - memory.alias_size_in_bytes + memory.temp_size_in_bytes) / 2**20

    def hand_written(model):
        def step(state, x, y):
            trainable, non_trainable, optimizer = state

            def loss_fn(trainable, x, y):
                return model.loss(y, model.stateless_call(trainable, non_trainable, x, training=True)[0])

            def body(sums, part):
                return jax.tree.map(jnp.add, sums, jax.value_and_grad(loss_fn)(trainable, *part)), None

            start = jnp.zeros(()), jax.tree.map(jnp.zeros_like, trainable)
            (loss, sums), _ = jax.lax.scan(body, start, (x.reshape(N, MICRO, -1), y.reshape(N, MICRO)))
            trainable, optimizer = model.optimizer.stateless_apply(optimizer, [g / N for g in sums], trainable)
            return loss / N, (trainable, non_trainable, optimizer)

        variables = model.trainable_variables, model.non_trainable_variables, model.optimizer.variables
        return mebibytes(step, tuple([v.value for v in several] for several in variables), X, Y)

    @pytest.mark.parametrize("api", ["split", "stream"])
    def test_a_window_needs_no_more_memory_than_a_hand_written_scan(api):
        model = mlp()
        hand = hand_written(model)
        data = (X, Y) if api == "split" else [(X.reshape(N, MICRO, -1), Y.reshape(N, MICRO))]
        bb.accumulate(model, **({"micro_batch": MICRO} if api == "split" else {"every": N}))
        parts = ("trainable_variables", "non_trainable_variables", "optimizer_variables", "metrics_variables")
        state = model._get_jax_state(**dict.fromkeys(parts, True))
        # A few scalars more: the metrics and the items. An array of a layer's weights would be a fortieth.
        assert mebibytes(model.train_step, state, data) <= 1.005 * hand


if BACKEND == "tensorflow":
    import tensorflow as tf

    @pytest.mark.parametrize("api", ["split", "stream"])
    def test_one_micro_batch_is_in_flight_at_a_time(api):
        model = mlp()
        stacked = X.reshape(N, MICRO, -1), Y.reshape(N, MICRO)
        window = (X, Y) if api == "split" else [(stacked, None)]
        bb.accumulate(model, **({"micro_batch": MICRO} if api == "split" else {"every": N}))
        graph = tf.function(model.train_step, autograph=False).get_concrete_function(window).graph.as_graph_def()
        nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
        loops = [node for node in nodes if node.op in ("While", "StatelessWhile")]
        assert [node.attr["parallel_iterations"].i for node in loops] == [1, 1], "groups, and micro-batches in a group"


if BACKEND == "torch":
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Passes(TorchDispatchMode):
        """Counts the operations that write as much as a layer's weights."""

        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.count += isinstance(out, torch.Tensor) and out.numel() >= WIDTH * WIDTH
            return out

    def passes(run, micro_batches):
        with Passes() as counting:
            run(X[: micro_batches * MICRO], Y[: micro_batches * MICRO])
        return counting.count

    def test_a_micro_batch_passes_over_the_weights_as_often_as_in_a_hand_written_loop():
        model = mlp()

        def hand_written(x, y):
            for x_part, y_part in zip(*[torch.tensor(v).split(MICRO) for v in (x, y)], strict=True):
                model.loss(y_part, model(x_part, training=True)).backward()
            model.zero_grad()

        hand = passes(hand_written, 6) - passes(hand_written, 2)
        bb.accumulate(model, micro_batch=MICRO)
        assert passes(model.train_on_batch, 6) - passes(model.train_on_batch, 2) == hand > 0
