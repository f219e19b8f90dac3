"""What others do to an open window: the full batch's update, or a refusal after which the next window is exact."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bigbatch.tf1 as bb
from bigbatch.tf1 import fingerprint

v1 = tf.compat.v1
REFUSED = tf.errors.InvalidArgumentError
RATE, ROWS = 0.25, 4
KINDS = ("dense", "table", "old")


class Net:
    """Two variables under SGD: tanh(x·w + table[ids]·x), of any dtype's bytes, and everything others may run."""

    def __init__(self, every, kind="dense", optimizer=None, **options):
        self.kind = kind
        with tf.Graph().as_default():
            self.x, self.ids = v1.placeholder(tf.float64, [None, 3]), v1.placeholder(tf.int64, [None])
            start = np.random.default_rng(5)
            resource = kind != "old"
            self.w = v1.get_variable("w", initializer=tf.constant(start.normal(size=3)), use_resource=resource)
            self.table = v1.get_variable(
                "table", initializer=tf.constant(start.normal(size=(ROWS, 3))), use_resource=resource
            )
            row = self.w if kind == "dense" else self.w + tf.gather(self.table, self.ids)
            self.loss = tf.reduce_mean(tf.tanh(tf.reduce_sum(row * self.x, 1)) ** 2)
            self.trained = [self.w] if kind == "dense" else [self.w, self.table]
            self.step = v1.train.get_or_create_global_step()
            self.optimizer = optimizer() if optimizer else v1.train.GradientDescentOptimizer(RATE)
            self.acc = bb.Accumulator(self.optimizer, every, **options)
            items = tf.shape(self.x)[0]
            self.op = self.acc.minimize(self.loss, self.step, self.trained, items=items)
            self.plain = self.optimizer.minimize(self.loss, var_list=self.trained)
            second = bb.Accumulator(v1.train.GradientDescentOptimizer(RATE), 1)
            self.second = second.minimize(self.loss, var_list=self.trained, items=items)
            self.value = v1.placeholder(tf.float64, [3])
            self.assign = self.w.assign(self.value)
            self.row = self.table[1].assign(self.value) if resource else v1.scatter_update(self.table, 1, self.value)
            self.saver, self.of_model = v1.train.Saver(), v1.train.Saver(self.trained)
            self.init, self.init_model = v1.global_variables_initializer(), v1.variables_initializer(self.trained)
            self.session = v1.Session()
        self.session.run(self.init)

    def feed(self, part):
        return {self.x: part[0], self.ids: part[1]}

    def run(self, *parts, fetch=None):
        for part in parts:
            self.session.run(self.op if fetch is None else fetch, self.feed(part))

    def values(self):
        return [a.copy() for a in self.session.run([self.w, self.table])]

    def save(self, saver, directory):
        with self.session.graph.as_default():
            return saver.save(self.session, str(directory / "model"), write_meta_graph=False)

    def restore(self, saver, path):
        with self.session.graph.as_default():
            saver.restore(self.session, path)

    def pending(self):
        return int(self.session.run(self.acc.pending))

    def after(self, values, parts):
        """The values after one update by SGD from the whole batch, in float64."""
        w, table = (v.copy() for v in values)
        x, ids = (np.concatenate(each) for each in zip(*parts, strict=True))
        t = np.tanh(((w if self.kind == "dense" else w + table[ids]) * x).sum(1))
        each = (2 * t * (1 - t**2) / len(x))[:, None] * x
        gradient = np.zeros_like(table)
        np.add.at(gradient, ids, each)
        return [w - RATE * each.sum(0), table if self.kind == "dense" else table - RATE * gradient]


NETS = {}


def started(every, kind="dense", partial="apply"):
    """One graph for all tests of the same, and everything initialized."""
    if (every, kind, partial) not in NETS:
        NETS[every, kind, partial] = Net(every, kind, partial=partial)
    net = NETS[every, kind, partial]
    net.session.run(net.init)
    return net


def parts(seed, *sizes):
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(n, 3)), rng.integers(0, ROWS, n)) for n in sizes]


def close(got, expected):
    for g, e in zip(got, expected, strict=True):
        np.testing.assert_allclose(g, e, rtol=1e-12, atol=1e-14)


ACTS = {
    "minimize": lambda net, other: net.run(*other, fetch=net.plain),
    "Accumulator": lambda net, other: net.run(*other, fetch=net.second),
    "assign": lambda net, other: net.session.run(net.assign, {net.value: other[0][0][0]}),
    "initializer": lambda net, other: net.session.run(net.init_model),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("closed", ["full", "apply", "flush"])
def test_variables_that_change_inside_a_window_are_refused(kind, act, closed):
    net = started(4 if closed == "full" else 64, kind)
    other = parts(9, 3)
    net.run(*parts(8, 2, 2), fetch=net.plain)  # away from the initial values
    first = parts(1, 3, 1, 2, 2)
    net.run(*first[:2])
    ACTS[act](net, other)
    left, step = net.values(), net.session.run(net.step)
    net.run(*first[2:-1])
    with pytest.raises(REFUSED, match=act):
        net.run(first[-1], fetch=net.op if closed == "full" else [net.acc.accumulate, getattr(net.acc, closed)])
    close(net.values(), left)
    assert (net.pending(), net.session.run(net.step)) == (0, step)
    again = parts(2, 2, 1, 4, 1)
    net.run(*again)
    net.session.run(net.acc.flush)
    close(net.values(), net.after(left, again))


@pytest.mark.parametrize("kind", KINDS)
def test_what_changes_between_windows_or_is_put_back_is_nobodys_business(kind):
    net = started(2, kind)
    for seed in range(3):
        ACTS["minimize"](net, parts(9, 3))
        before = net.values()
        first = parts(seed, 2, 3)
        net.run(first[0])
        net.session.run(net.assign, {net.value: np.ones(3)})  # as an average of the weights, for evaluation
        net.session.run(net.assign, {net.value: before[0]})
        net.run(first[1])
        close(net.values(), net.after(before, first))


def test_one_micro_batch_that_is_applied_later_is_compared_too():
    net = started(64)
    net.run(*parts(1, 3))
    net.session.run(net.assign, {net.value: np.ones(3)})
    with pytest.raises(REFUSED, match="changed inside the open window"):
        net.session.run(net.acc.apply)
    assert net.values()[0].tolist() == [1, 1, 1]


@pytest.mark.parametrize("kind", ["table", "old"])
def test_a_row_of_a_table(kind):
    net = started(2, kind)
    net.run(*parts(1, 3))
    net.session.run(net.row, {net.value: np.ones(3)})
    left = net.values()
    with pytest.raises(REFUSED, match="changed inside the open window"):
        net.run(*parts(2, 3))
    close(net.values(), left)


def test_two_variables_that_swap_their_values():
    with tf.Graph().as_default(), v1.Session() as session:
        a, b = (v1.get_variable(name, initializer=tf.constant([value])) for name, value in (("a", 1.0), ("b", 2.0)))
        acc = bb.Accumulator(v1.train.GradientDescentOptimizer(1.0), 2)
        op, swap = acc.minimize(tf.reduce_sum(a * b), items=1), [a.assign([2.0]), b.assign([1.0])]
        session.run(v1.global_variables_initializer())
        session.run(op)
        session.run(swap)
        with pytest.raises(REFUSED, match="changed inside the open window"):
            session.run(op)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_large_variable_is_compared_at_numbers_of_every_row(sparse, monkeypatch):
    """Of as many rows as are sampled numbers; the page says what is not seen."""
    rows, width = 4000, 96
    assert rows * width > fingerprint.LARGE
    with tf.Graph().as_default(), v1.Session() as session:
        w = v1.get_variable("w", [rows, width], use_resource=True)
        ids, row = v1.placeholder(tf.int64, [None]), v1.placeholder(tf.int64, [])
        loss = tf.reduce_sum(tf.gather(w, ids)) if sparse else tf.reduce_sum(w**2)
        acc = bb.Accumulator(v1.train.GradientDescentOptimizer(1.0), 2)
        op = acc.minimize(loss, items=1)
        change = w.scatter_add(tf.IndexedSlices(tf.ones([1, width]), row[None]))
        session.run(v1.global_variables_initializer())
        for each in (0, 1, rows // 2 + 1, rows - 2):
            session.run(op, {ids: [7]})
            session.run(change, {row: each})
            with pytest.raises(REFUSED, match="changed inside the open window"):
                session.run(op, {ids: [7]})
        session.run([op], {ids: [7]})
        session.run([op], {ids: [7]})
        assert session.run(acc.updates) == 1


def test_all_initialized_again_starts_over():
    net = started(3)
    fresh = net.values()
    net.run(*parts(1, 2, 2))
    net.session.run(net.init)
    assert net.pending() == 0
    again = parts(2, 1, 2, 3)
    net.run(*again)
    close(net.values(), net.after(fresh, again))


def test_a_checkpoint_restored_inside_a_window_goes_on_from_its_own_window(tmp_path):
    net = started(3)
    fresh, saved = net.values(), parts(1, 2, 1)
    net.run(*saved)
    path = net.save(net.saver, tmp_path)
    net.run(*parts(2, 2, 2))  # makes an update, and opens a window
    net.restore(net.saver, path)
    rest = parts(3, 4)
    net.run(*rest)
    close(net.values(), net.after(fresh, saved + rest))


def test_the_models_variables_alone_restored_inside_a_window_are_refused(tmp_path):
    net = started(2)
    path = net.save(net.of_model, tmp_path)
    net.run(*parts(1, 2, 2, 2))
    net.restore(net.of_model, path)
    left = net.values()
    with pytest.raises(REFUSED, match="restore"):
        net.run(*parts(2, 2))
    close(net.values(), left)


def test_the_apply_op_twice_is_one_update():
    net = started(64)
    before, first = net.values(), parts(1, 2, 3)
    net.run(*first)
    net.session.run([net.acc.apply, net.acc.apply])
    net.session.run(net.acc.apply)
    close(net.values(), net.after(before, first))


def test_two_accumulators_with_windows_open_on_one_variable():
    """The first to close makes its update; the other's window has then seen two values of the variable."""
    net = started(2)
    with net.session.graph.as_default():
        slow = bb.Accumulator(v1.train.GradientDescentOptimizer(RATE), 3)
        op = slow.minimize(net.loss, var_list=net.trained, items=tf.shape(net.x)[0])
        net.session.run(v1.variables_initializer(slow.variables()))
    before, first = net.values(), parts(1, 2, 3)
    for part in first:
        net.session.run([net.op], net.feed(part))
        net.session.run([op], net.feed(part))
    close(net.values(), net.after(before, first))
    with pytest.raises(REFUSED, match="another Accumulator"):
        net.session.run(op, net.feed(first[0]))
    close(net.values(), net.after(before, first))


PARTIAL = {"dense": "carry", "table": "apply", "old": "drop"}


def example(data):
    """One random run of windows and acts; every window is the full batch's update, or is refused and forgotten."""
    kind, every = data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from([1, 3]))
    net = started(every, kind, PARTIAL[kind])
    seed = data.draw(st.integers(0, 999))
    window, opened, expected = [], None, net.values()
    for k in range(data.draw(st.integers(4, 14))):
        name = data.draw(st.sampled_from(["op"] * 8 + ["accumulate", "apply", "flush", "zero", *ACTS]))
        part = parts(seed + k, data.draw(st.integers(1, 3)))
        if name in ACTS:
            ACTS[name](net, part)
            expected = net.values()
            continue
        if name in ("op", "accumulate"):
            opened = opened if window else expected
            window += part
        drops = name == "zero" or (name == "flush" and PARTIAL[kind] == "drop")
        closes = (name == "op" and len(window) >= every) or name == "apply"
        closes |= name == "flush" and PARTIAL[kind] == "apply"
        changed = bool(window) and any(not np.array_equal(o, e) for o, e in zip(opened, expected, strict=True))
        refused = None
        try:
            net.run(*part, fetch=net.op if name == "op" else getattr(net.acc, name))
        except REFUSED as error:
            refused = error
        assert (refused is not None) == (closes and changed), f"{name}, {changed=}: {refused}"
        if closes and window and not refused:
            expected = net.after(expected, window)
        window = [] if closes or drops else window
        close(net.values(), expected)
        assert net.pending() == len(window)
        expected = net.values()


@settings(max_examples=300, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_no_third_outcome_in_random_windows_under_random_acts(data):
    example(data)
