"""Prints the memory that eight micro-batches of 100 rows and their update take over what a table of 50 million holds.

python tests/tf1/big_table.py [bigbatch | bare | recipe]
"""

import sys
from pathlib import Path

import numpy as np
import tensorflow as tf

import bigbatch.tf1 as bb

v1 = tf.compat.v1
ROWS = 50_000_000
MiB = 2**20


def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def main(way):
    with tf.Graph().as_default():
        ids = v1.placeholder(tf.int64, [None])
        # Not zeros: TensorFlow may fold them into a constant, which shares the table's memory until the first update.
        table = v1.get_variable("table", [ROWS, 1], initializer=v1.random_uniform_initializer(0, 1e-9))
        loss, optimizer = tf.reduce_mean(tf.gather(table, ids)), v1.train.GradientDescentOptimizer(1.0)
        last = []
        if way == "bigbatch":
            op = bb.Accumulator(optimizer, every=8).minimize(loss, items=tf.size(ids))
        elif way == "bare":
            op = optimizer.minimize(loss)
        else:
            ((gradient, _),) = optimizer.compute_gradients(loss)
            total = v1.get_variable("sum", [ROWS, 1], initializer=v1.zeros_initializer(), trainable=False)
            op, last = total.assign_add(gradient).op, [optimizer.apply_gradients([(total, table)])]
        with v1.Session() as session:
            session.run(v1.global_variables_initializer())
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
            before = memory("VmRSS")
            rng, touched = np.random.default_rng(0), []
            for _ in range(8):
                touched.append(rng.integers(0, ROWS, 100))
                session.run(op, {ids: touched[-1]})
            for op in last:
                session.run(op)
            moved = session.run(tf.gather(table, np.concatenate(touched)))
            assert (moved < 0).all()
            print(f"{way}: table {4 * ROWS / MiB:.0f} MiB, peak over it {(memory('VmHWM') - before) / MiB:.0f} MiB")


if __name__ == "__main__":
    main(*sys.argv[1:] or ["bigbatch"])
