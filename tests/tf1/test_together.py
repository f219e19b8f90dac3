"""Any of an accumulator's ops in one session.run: the micro-batch once, then apply, then flush, then zero."""

import itertools
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import bigbatch.tf1 as bb

v1 = tf.compat.v1
PARTS = ("op", "accumulate", "apply", "flush", "zero")
TOGETHER = [parts for n in range(1, len(PARTS) + 1) for parts in itertools.combinations(PARTS, n)]
EVERY = 3


class Line:
    """loss = w · mean(x): the gradient is what is fed. `slow` puts work between the feed and the gradient."""

    def __init__(self, partial, every=EVERY, slow=0, **options):
        with tf.Graph().as_default():
            self.x = v1.placeholder(tf.float64, [None])
            self.w = v1.get_variable("w", initializer=tf.constant(0.0, tf.float64))
            self.step = v1.train.get_or_create_global_step()
            x, ones = self.x, tf.ones_like(self.x)
            for _ in range(slow):
                x, ones = tf.roll(x, 1, 0), tf.roll(ones, 1, 0)  # the same mean and sum, and not optimized away
            self.loss = tf.reduce_mean(x) * self.w
            items = tf.reduce_sum(ones)  # known as late as the loss
            optimizer = v1.train.GradientDescentOptimizer(1.0)
            self.acc = bb.Accumulator(optimizer, every, partial=partial, **options)
            self.op = self.acc.minimize(self.loss, self.step, items=items)
            self.summary = v1.summary.scalar("loss", self.loss)
            # A pool of its own: with one thread, all that runs has an order.
            config = v1.ConfigProto(use_per_session_threads=True, inter_op_parallelism_threads=4)
            self.session = v1.Session(config=config)
            self.session.run(v1.global_variables_initializer())
        self.ops = {"op": self.op, **{part: getattr(self.acc, part) for part in PARTS[1:]}}
        self.readings = [self.acc.pending, self.acc.pending_items, self.acc.updates]

    def state(self):
        return self.session.run([self.w, self.step, *self.readings])


class Told:
    """What the page says of the same ops, one after the other, in plain Python."""

    def __init__(self, partial, every=EVERY):
        self.partial, self.every = partial, every
        self.w, self.updates, self.window = 0.0, 0, []

    def update(self):
        if self.window:
            items = sum(n for _, n in self.window)
            self.w -= sum(g * n for g, n in self.window) / items
            self.updates += 1
            self.window = []

    def run(self, parts, gradient, items):
        if "op" in parts or "accumulate" in parts:
            self.window.append((gradient, items))
        if "op" in parts and len(self.window) >= self.every:
            self.update()
        if "apply" in parts or ("flush" in parts and self.partial == "apply"):
            self.update()
        if "zero" in parts or ("flush" in parts and self.partial == "drop"):
            self.window = []

    def state(self):
        return [self.w, self.updates, len(self.window), sum(n for _, n in self.window), self.updates]


@pytest.mark.parametrize("partial", ["apply", "carry", "drop"])
def test_every_combination_does_what_its_parts_would_one_after_the_other(partial):
    line, told, draw = Line(partial, slow=20), Told(partial), random.Random(0)
    for repetition in range(12):
        for parts in TOGETHER:
            for found in range(EVERY + 1):
                line.session.run(line.acc.zero)
                told.window = []
                for gradient in range(found):
                    line.session.run(line.acc.accumulate, {line.x: [gradient]})
                    told.run(["accumulate"], gradient, 1)
                before = told.state()
                fetches = [line.ops[part] for part in parts] + [line.loss, line.summary, *line.readings]
                order = list(range(len(fetches)))
                draw.shuffle(order)
                rows = [float(draw.randrange(-4, 5))] * draw.choice([1, 2, 4])
                got = line.session.run([fetches[i] for i in order], {line.x: rows})
                loss, summary, *readings = [got[order.index(i)] for i in range(len(parts), len(fetches))]
                assert readings == before[2:], (parts, found)  # as the run found them
                told.run(parts, rows[0], len(rows))
                case = f"{parts} on {found} micro-batches, repetition {repetition}"
                np.testing.assert_allclose(line.state(), told.state(), rtol=1e-12, atol=1e-12, err_msg=case)
                if "op" in parts or "accumulate" in parts:
                    # The loss of the micro-batch is the one before the update that it goes into.
                    assert loss == rows[0] * before[0], case
                    assert v1.Summary.FromString(summary).value[0].simple_value == pytest.approx(loss)
                told.w = line.session.run(line.w)


@pytest.mark.parametrize("parts", [p for p in TOGETHER if not {"op", "accumulate"} & set(p)], ids="+".join)
def test_what_takes_no_micro_batch_needs_no_feed(parts):
    line, told = Line("drop"), Told("drop")
    for gradient in (1.0, 3.0):
        line.session.run(line.op, {line.x: [gradient]})
        told.run(["op"], gradient, 1)
    line.session.run([line.ops[part] for part in parts])
    told.run(parts, None, None)
    assert line.state() == told.state()


def test_the_micro_batch_is_in_the_update_however_long_it_takes():
    line = Line("apply", every=64, slow=1000)
    for i in range(20):
        line.session.run([line.acc.apply, line.acc.accumulate], {line.x: [2.0]})
        assert line.state() == [-2.0 * (i + 1), i + 1, 0, 0, i + 1]


def test_one_that_fails_takes_no_other_with_it_into_the_next_window():
    line = Line("apply", every=64)
    for _ in range(20):
        line.session.run(line.op, {line.x: [1.0]})
        with pytest.raises(tf.errors.InvalidArgumentError, match="items must be positive"):
            line.session.run([line.acc.accumulate, line.acc.apply, line.acc.zero], {line.x: []})
        w, updates, pending, items, _ = line.state()
        assert (updates, pending, items) == (0, 1, 1), "who comes after a micro-batch waits for it, and it never came"
        line.session.run(line.acc.zero)
        assert w == 0


def test_two_accumulators_in_one_run_do_not_wait_for_each_other():
    with tf.Graph().as_default():
        x = v1.placeholder(tf.float64, [])
        variables = [v1.get_variable(name, initializer=tf.constant(0.0, tf.float64)) for name in "ab"]
        accs = [bb.Accumulator(v1.train.GradientDescentOptimizer(1.0), every=2) for _ in variables]
        ops = [acc.minimize(x * v, var_list=[v], items=1) for acc, v in zip(accs, variables, strict=True)]
        with v1.Session() as session:
            session.run(v1.global_variables_initializer())
            session.run([ops[0], accs[0].apply, accs[1].accumulate], {x: 3.0})
            assert session.run(variables) == [-3, 0]
            session.run([ops, accs[1].zero, accs[0].flush], {x: 5.0})
            assert session.run(variables) == [-8, -4]


@pytest.mark.parametrize("parts", [("accumulate", "apply"), ("op", "flush"), ("op", "accumulate", "apply")])
def test_threads_that_fetch_several_lose_nothing_and_double_nothing(parts):
    line = Line("apply", every=2, reduction="sum")

    def work(thread):
        for i in range(25):
            line.session.run([line.ops[part] for part in parts], {line.x: [float(thread * 25 + i)]})

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    w, _, pending, _, _ = line.state()
    assert (w, pending) == (-sum(range(100)), 0)


def test_a_graph_that_was_saved_and_imported_keeps_the_order(tmp_path):
    line = Line("apply", every=64)
    with line.x.graph.as_default():
        saver = v1.train.Saver()
        path = saver.save(line.session, str(tmp_path / "model"))
        names = {"x": line.x.name, "w": line.w.name, **{part: op.name for part, op in line.ops.items()}}
    with tf.Graph().as_default():
        saver = v1.train.import_meta_graph(path + ".meta")
        with v1.Session() as session:
            saver.restore(session, path)
            for i in range(20):
                session.run([names["apply"], names["accumulate"]], {names["x"]: [1.0]})
                assert session.run(v1.global_variables()[0]) == -i - 1


def test_workers_of_a_parameter_server_share_a_window_and_its_lock():
    script = Path(__file__).with_name("servers.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    # 80 micro-batches in windows of 4, each of which counts its own mean: none is lost and none is doubled.
    assert done.stdout.split() == [str(-2.0 * sum(range(40)) / 4), "20", "0"], done.stderr[-3000:]
