"""On TensorFlow for XLA, convolutions' gradients are written as those that are fast in a loop: the same numbers."""

import re

import keras
import numpy as np
import pytest
from keras import layers

import bigbatch.keras as bb
from conformance.keras_parity import BACKEND, close, float64

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(7, 9, 8, 2)), RNG.normal(size=(7, 2))


@pytest.fixture(autouse=True)
def _float64():
    float64()


def network(**options):
    keras.utils.set_random_seed(0)
    convolutions = [
        layers.Conv2D(4, 3, padding="same", activation="tanh"),
        layers.Conv2D(4, 3, strides=2, activation="tanh"),
        layers.Conv2DTranspose(3, 2, strides=2, padding="same", activation="tanh"),
    ]
    model = keras.Sequential([keras.Input((9, 8, 2)), *convolutions, layers.Flatten(), layers.Dense(2)])
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", **options)
    return model


@pytest.mark.parametrize("options", [{}, {"jit_compile": True}][: 2 if BACKEND == "tensorflow" else 1])
@pytest.mark.parametrize("micro_batch", [2, 3])
def test_a_window_is_the_big_batch(options, micro_batch):
    model, plain = bb.accumulate(network(**options), micro_batch=micro_batch), network(**options)
    for trained in (model, plain):
        trained.train_on_batch(X, Y)
    close(model, plain, 1e-12)


if BACKEND == "tensorflow":
    import tensorflow as tf

    from bigbatch.fused.keras_tensorflow import with_fast_convolutions
    from bigbatch.keras.backends.tensorflow.window import build, micro_step

    @pytest.mark.parametrize("rewrite", [None, with_fast_convolutions])
    def test_the_loop_is_over_fast_ones(rewrite):
        model = network()
        build(model, (X, Y))
        step = micro_step(model, (X, Y), [], rewrite)

        @tf.function(jit_compile=True, autograph=False)
        def gradients(x, y):
            def body(i, sums):
                (more,) = step([x, y], tf.zeros([0], tf.float64)).gradients
                return i + 1, [a + b for a, b in zip(sums, more, strict=True)]

            sums = [tf.zeros(v.shape, tf.float64) for v in model.trainable_variables]
            return tf.while_loop(lambda i, _: i < 3, body, (0, sums))[1]

        program = gradients.experimental_get_compiler_ir(X, Y)(stage="optimized_hlo")
        layouts = set(re.findall(r"dim_labels=(\S+?)[,}\s]", program))
        assert ({"b01f_01io->b01f"} == layouts) == (rewrite is not None)

    def test_a_window_of_one_is_bit_for_bit_the_plain_step():
        model, plain = (network(jit_compile=True) for _ in range(2))
        bb.accumulate(model, micro_batch=7)
        for trained in (model, plain):
            trained.train_on_batch(X, Y)
        close(model, plain, 0)
