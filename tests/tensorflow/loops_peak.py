"""Prints the predicted and the measured memory of a loss with a loop in it, in bytes.

python tests/tensorflow/loops_peak.py lstm|gru|while_loop|scan|map_fn|cond
"""

import sys
from pathlib import Path

import tensorflow as tf

from bigbatch.engines.tensorflow_estimate import peak

sys.path.append(str(Path(__file__).parents[1]))  # appended: folders there have the frameworks' names
from process_memory import growth

EXAMPLES, STEPS, INPUTS, WIDTH = 256, 60, 64, 128


def losses(name):
    """A loss of x (examples, STEPS, INPUTS), and the variables that it trains."""
    w = tf.Variable(tf.random.stateless_normal([INPUTS, WIDTH], [1, 3]) / 20)
    u = tf.Variable(tf.random.stateless_normal([WIDTH, WIDTH], [1, 4]) / 20)

    def cell(h, x):
        return tf.tanh(x @ w + h @ u)

    def while_loop(x):
        start = tf.zeros([x.shape[0], WIDTH])
        _, h = tf.while_loop(lambda i, h: i < STEPS, lambda i, h: (i + 1, cell(h, x[:, i])), (0, start))
        return tf.reduce_mean(h**2)

    def scan(x):
        states = tf.scan(cell, tf.transpose(x, [1, 0, 2]), initializer=tf.zeros([x.shape[0], WIDTH]))
        return tf.reduce_mean(states**2)

    def map_fn(x):
        return tf.reduce_mean(tf.map_fn(lambda one: tf.reduce_mean(tf.tanh(tf.tanh(one @ w) @ u)), x))

    def cond(x):
        h = x[:, 0] @ w
        wide = tf.cond(
            tf.reduce_sum(h) > 1e9,
            lambda: tf.tanh(tf.tile(h, [1, 20])),
            lambda: tf.sin(tf.tanh(tf.tile(tf.tanh(h @ u), [1, 20]))),
        )
        return tf.reduce_mean(wide)

    if name in ("lstm", "gru"):
        layer = {"lstm": tf.keras.layers.LSTM, "gru": tf.keras.layers.GRU}[name](WIDTH, return_sequences=True)
        layer.build([EXAMPLES, STEPS, INPUTS])
        return lambda x: tf.reduce_mean(layer(x) ** 2), layer.trainable_variables
    return {"while_loop": while_loop, "scan": scan, "map_fn": map_fn, "cond": cond}[name], [w, u]


def main(name):
    # What is predicted is the order in which the operations were made; side by side they hold more.
    tf.config.threading.set_inter_op_parallelism_threads(1)
    loss, variables = losses(name)

    @tf.function
    def gradient(x):
        with tf.GradientTape() as tape:
            value = loss(x)
        return [value, *tape.gradient(value, variables)]

    x = tf.random.stateless_normal([EXAMPLES, STEPS, INPUTS], [1, 2])
    predicted = peak(gradient.get_concrete_function(x).graph)
    gradient(x[:2])  # what TensorFlow keeps for itself is there
    print(predicted, growth(lambda: gradient(x)))


if __name__ == "__main__":
    main(sys.argv[1])
