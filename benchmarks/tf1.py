"""TensorFlow 1: one window in a session, ours against the three ops that people paste, and the floor.

    python benchmarks/tf1.py [--repetitions 100]

The floor is N forwards and backwards, each gradient read once and thrown away, and one update.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from interleaved import circumstances, measure, ratio, table

import bigbatch.tf1 as bb

v1 = tf.compat.v1
N, SIZE = 16, 16
MLP, TINY = (784, 1024, 1024, 10), (784, 8, 8, 10)
ADAM, SGD = lambda: v1.train.AdamOptimizer(1e-3), lambda: v1.train.GradientDescentOptimizer(1e-2)
JOBS = {
    "MLP 784-1024-1024-10, Adam": (MLP, ADAM),
    "MLP 784-1024-1024-10, SGD": (MLP, SGD),
    "MLP 784-8-8-10, Adam": (TINY, ADAM),
}


def model(widths, optimizer):
    x, y = v1.placeholder(tf.float32, [None, 784]), v1.placeholder(tf.int64, [None])
    h = x
    for i in range(len(widths) - 1):
        h = tf.nn.relu(h) if i else h
        bias = v1.get_variable(f"b{i}", [widths[i + 1]], initializer=v1.zeros_initializer())
        h = h @ v1.get_variable(f"w{i}", widths[i : i + 2]) + bias
    loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=h))
    return x, y, loss, optimizer()


def started():
    session = v1.Session()
    session.run(v1.global_variables_initializer())
    return session


def contenders(*job):
    rng = np.random.default_rng(0)
    parts = [(rng.normal(size=(SIZE, 784)).astype(np.float32), rng.integers(0, 10, SIZE)) for _ in range(N)]

    def ours():
        x, y, loss, optimizer = model(*job)
        op = bb.Accumulator(optimizer, every=N).minimize(loss, items=tf.shape(x)[0])
        session = started()

        def run():
            for a, b in parts:
                session.run(op, {x: a, y: b})

        return run

    def three_ops(guarded):
        x, y, loss, optimizer = model(*job)
        gradients, variables = zip(*optimizer.compute_gradients(loss), strict=True)
        sums = [v1.Variable(tf.zeros(v.shape), trainable=False) for v in variables]
        zero = tf.group(*[s.assign(tf.zeros_like(s)) for s in sums])
        add = tf.group(*[s.assign_add(g) for s, g in zip(sums, gradients, strict=True)])
        means = [s / N for s in sums]
        if guarded:  # with what our update also does: the gradient's norm, and no update where it is not finite
            finite = tf.math.is_finite(tf.linalg.global_norm(means))
            pairs = list(zip(means, variables, strict=True))
            apply = tf.cond(finite, lambda: optimizer.apply_gradients(pairs), tf.no_op)
        else:
            apply = optimizer.apply_gradients(zip(means, variables, strict=True))
        session = started()

        def run():
            session.run(zero)
            for a, b in parts:
                session.run(add, {x: a, y: b})
            session.run(apply)

        return run

    def floor():
        x, y, loss, optimizer = model(*job)
        gradients, variables = zip(*optimizer.compute_gradients(loss), strict=True)
        read = tf.add_n([tf.reduce_max(g) for g in gradients])
        fixed = [v1.Variable(tf.ones(v.shape), trainable=False) for v in variables]
        apply = optimizer.apply_gradients(zip([f.read_value() for f in fixed], variables, strict=True))
        session = started()

        def run():
            for a, b in parts:
                session.run(read.op, {x: a, y: b})
            session.run(apply)

        return run

    made = {}
    for name, make in {
        "bigbatch": ours,
        "three ops": lambda: three_ops(guarded=False),
        "three ops, guarded": lambda: three_ops(guarded=True),
        "floor": floor,
    }.items():
        with tf.Graph().as_default():
            made[name] = make()
    return made


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--repetitions", type=int, default=100)
    parser.add_argument("--write", action="store_true", help="write benchmarks/tf1.md")
    options = parser.parse_args()
    root = Path(__file__).parent.parent
    lines = [
        "# TensorFlow 1 sessions",
        "",
        circumstances("tensorflow-cpu"),
        "",
        f"`python benchmarks/tf1.py --repetitions {options.repetitions}`",
        "",
        f"One window of {N} micro-batches of {SIZE}. Ratios are medians over rounds of the ratio in",
        "one round. Guarded is the three-op recipe with a finite check on the norm of the mean, which ours has too.",
    ]
    for name, job in JOBS.items():
        timings = measure(contenders(*job), options.repetitions)
        lines += ["", f"## {name}", "", table(timings, ["three ops", "three ops, guarded", "floor"])]
        print(
            f"{name}: bigbatch / three ops = {ratio(timings, 'bigbatch', 'three ops'):.3f} (to be at most 1)",
            flush=True,
        )
    lines += ["", "## A table of 50 million rows", "", "Eight micro-batches of 100 rows and an update by SGD.", ""]
    for way in ("bare", "bigbatch", "recipe"):
        script = str(root / "tests/tf1/big_table.py")
        done = subprocess.run([sys.executable, script, way], capture_output=True, text=True, check=True)
        lines.append(f"- {done.stdout.splitlines()[-1]}")
    page = "\n".join(lines) + "\n"
    if options.write:
        Path(__file__).with_suffix(".md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
