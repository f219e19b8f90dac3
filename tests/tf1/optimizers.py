"""Every optimizer of tf.compat.v1.train through two windows, dense and sparse, against itself on the big batch."""

import numpy as np
import tensorflow as tf

import bigbatch.tf1 as bb

v1 = tf.compat.v1
OPTIMIZERS = {
    "GradientDescent": lambda: v1.train.GradientDescentOptimizer(0.1),
    "Momentum": lambda: v1.train.MomentumOptimizer(0.1, 0.9),
    "Nesterov": lambda: v1.train.MomentumOptimizer(0.1, 0.9, use_nesterov=True),
    "Adam": lambda: v1.train.AdamOptimizer(0.1),
    "Adagrad": lambda: v1.train.AdagradOptimizer(0.1),
    "Adadelta": lambda: v1.train.AdadeltaOptimizer(0.1),
    "RMSProp": lambda: v1.train.RMSPropOptimizer(0.1, centered=True),
    "Ftrl": lambda: v1.train.FtrlOptimizer(0.1),
    "ProximalGradientDescent": lambda: v1.train.ProximalGradientDescentOptimizer(0.1),
    "ProximalAdagrad": lambda: v1.train.ProximalAdagradOptimizer(0.1),
}
# TensorFlow's sparse kernels of these take their rates in float32 only.
NARROW = {"ProximalGradientDescent", "ProximalAdagrad"}
SIZES = ((3, 1, 2, 1), (2, 2, 2, 2))


def trained(make, ours, dtype):
    """The table and the dense variable after two windows."""
    rng = np.random.default_rng(0)
    with tf.Graph().as_default():
        ids, x = v1.placeholder(tf.int32, [None]), v1.placeholder(dtype, [None, 3])
        table = v1.get_variable("table", initializer=tf.constant(rng.normal(size=(5, 3)), dtype))
        w = v1.get_variable("w", initializer=tf.constant(rng.normal(size=3), dtype))
        loss = tf.reduce_mean(tf.tanh(tf.reduce_sum((tf.gather(table, ids) + w) * x, 1)))
        step = v1.train.get_or_create_global_step()
        optimizer = make()
        if ours:
            acc = bb.Accumulator(optimizer, every=4)
            op = acc.minimize(loss, step, items=tf.size(ids))
        else:
            op = optimizer.minimize(loss, step)
        with v1.Session() as session:
            session.run(v1.global_variables_initializer())
            for sizes in SIZES:
                parts = [(rng.integers(0, 4, n), rng.normal(size=(n, 3))) for n in sizes]
                for i, r in parts if ours else [tuple(map(np.concatenate, zip(*parts, strict=True)))]:
                    session.run(op, {ids: i, x: r})
            assert session.run(step) == 2
            return session.run([table, w])


def check(name):
    dtype, rtol = (tf.float32, 64 * 2.0**-24) if name in NARROW else (tf.float64, 1e-12)
    for ours, plain in zip(*(trained(OPTIMIZERS[name], ours, dtype) for ours in (True, False)), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=rtol, atol=1e-14, err_msg=name)
