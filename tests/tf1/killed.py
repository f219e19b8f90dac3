"""Saves inside a window and is killed at each of the save's file operations: run by test_killed.py, or by hand.

LD_PRELOAD=kills.so python tests/tf1/killed.py DIRECTORY
"""

import ctypes
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf

import bigbatch.tf1 as bb

v1 = tf.compat.v1
EVERY, STEPS, SAVED_FROM, KILLED_IN = 4, 14, 4, 7  # micro-batches; 7 is inside the second window
X = np.random.default_rng(0).normal(size=(STEPS, 3, 8)).astype(np.float32)

with tf.Graph().as_default() as graph:
    x = v1.placeholder(tf.float32, [None, 8])
    w = v1.get_variable("w", initializer=tf.reshape(tf.linspace(-1.0, 1.0, 64), [8, 8]))
    acc = bb.Accumulator(v1.train.AdamOptimizer(0.1), EVERY)
    op = acc.minimize(tf.reduce_mean(tf.tanh(x @ w) ** 2), v1.train.get_or_create_global_step(), items=tf.shape(x)[0])
    initializer, everything = v1.global_variables_initializer(), v1.global_variables()
    saver = v1.train.Saver(max_to_keep=2)


def seen(session):
    updates, pending = session.run([acc.updates, acc.pending])
    return EVERY * int(updates) + int(pending)


def train(session, directory=None, kill_at=None):
    """To the end; with a directory, a checkpoint after each micro-batch, one of which is killed."""
    kills = ctypes.CDLL(None)
    for step in range(seen(session), STEPS):
        session.run(op, {x: X[step]})
        if directory is not None and step + 1 >= SAVED_FROM:
            if step + 1 == KILLED_IN:
                kills.kill_at(kill_at)
            saver.save(session, str(directory / "model"), global_step=step + 1, write_meta_graph=step + 1 == KILLED_IN)
            if step + 1 == KILLED_IN:
                print(f"survived {kills.operations()} operations", flush=True)
                os._exit(0)
    return session.run(everything)


def resumed(directory):
    """What is left goes on from the latest checkpoint; returns where that was, and the end."""
    with v1.Session() as session:
        saver.restore(session, tf.train.latest_checkpoint(str(directory)))
        return seen(session), train(session)


def main(top):
    places = []
    while True:
        directory = top / str(len(places))
        directory.mkdir()
        child = os.fork()  # before the first session, which starts threads
        if not child:
            try:
                session = v1.Session(graph=graph)
                session.run(initializer)
                train(session, directory, len(places))
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        places.append(directory)
        if not os.WIFSIGNALED(status):
            break
    if os.waitstatus_to_exitcode(status) != 0:
        raise RuntimeError(f"the run that nothing kills failed: {status}")
    with v1.Session() as session:
        session.run(initializer)
        undisturbed = train(session)
    for number, directory in enumerate(places):
        place, end = resumed(directory)
        exact = all(np.array_equal(a, b) for a, b in zip(end, undisturbed, strict=True))
        print(f"killed at {number}: went on after {place}, {'exact' if exact else 'wrong'}", flush=True)


if __name__ == "__main__":
    with graph.as_default():
        main(Path(sys.argv[1]))
