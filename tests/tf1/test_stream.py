"""What only sessions have: fetching together, feeding, restoring, several graphs; and what a graph can refuse."""

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import bigbatch.tf1 as bb

v1 = tf.compat.v1
REFUSED = tf.errors.InvalidArgumentError


@pytest.fixture(autouse=True)
def graph():
    with tf.Graph().as_default() as graph:
        yield graph
    assert tf.executing_eagerly()  # TensorFlow 2 behavior is on, as before


class Line:
    """loss = w · mean(x), so the gradient is the mean of what is fed, and w after an update of rate 1 is −gradient."""

    def __init__(self, optimizer=None, every=4, dtype=tf.float64, items=None, dtype_of_sums=tf.float32, **options):
        self.x = v1.placeholder(dtype, [None, 2], "x")
        self.w = v1.get_variable("w", initializer=tf.zeros(2, dtype))
        self.step = v1.train.get_or_create_global_step()
        self.loss = tf.reduce_mean(tf.linalg.matvec(self.x, self.w))
        optimizer = optimizer or v1.train.GradientDescentOptimizer(1.0)
        self.acc = bb.Accumulator(optimizer, every, dtype=dtype_of_sums, **options)
        self.op = self.acc.minimize(self.loss, self.step, items=tf.shape(self.x)[0] if items is None else items)
        self.session = v1.Session()
        self.session.run(v1.global_variables_initializer())

    def run(self, fetches, rows=None):
        return self.session.run(fetches, None if rows is None else {self.x: np.asarray(rows, float).reshape(-1, 2)})

    @property
    def state(self):
        return [*self.run([self.w, self.step, self.acc.pending, self.acc.pending_items])]


def same(state, w, step, pending, items):
    assert state[0].tolist() == list(w)
    assert state[1:] == [step, pending, items]


def test_the_op_is_fetched_with_whatever_else():
    line = Line()
    summary = v1.summary.scalar("loss", line.loss)
    for i in range(8):
        updates, before = divmod(i, 4)
        w = line.run(line.w)
        _, loss, pending, held, made, last, written = line.run(
            [line.op, line.loss, line.acc.pending, line.acc.pending_items, line.acc.updates, line.acc.last, summary],
            [[i, 1]] * 2,
        )
        assert loss == w @ [i, 1]
        assert (pending, held, made) == (before, 2 * before, updates)  # as the run found them
        assert last.micro_batches == 4 * bool(updates)
        assert v1.Summary.FromString(written).value[0].simple_value == pytest.approx(loss)
    same(line.state, [-1.5 - 5.5, -2], 2, 0, 0)
    assert line.run(line.acc.last) == (1, 4, 8.0, pytest.approx(-1.5 * 5.5 - 1), pytest.approx(np.hypot(5.5, 1)), None)


def test_the_parts_by_name():
    line = Line(every=2)
    for i in range(3):
        line.run(line.acc.accumulate, [[i, 0]] * (i + 1))
    same(line.state, [0, 0], 0, 3, 6)  # accumulate never makes an update, not even past `every`
    line.run(line.acc.apply)
    same(line.state, [-8 / 6, 0], 1, 0, 0)
    line.run(line.acc.apply)  # nothing is pending
    same(line.state, [-8 / 6, 0], 1, 0, 0)
    line.run(line.acc.accumulate, [[5, 5]])
    line.run(line.acc.zero)
    same(line.state, [-8 / 6, 0], 1, 0, 0)
    line.run(line.acc.accumulate, [[1, 1]])
    line.run(line.op, [[3, 3]])  # the second closes the window
    same(line.state, [-8 / 6 - 2, -2], 2, 0, 0)


def test_what_the_caller_waits_for_is_no_part_of_apply():
    x, other = v1.placeholder(tf.float64, []), v1.placeholder(tf.float64, [])
    w = v1.get_variable("w", initializer=tf.constant(0.0, tf.float64))
    acc, loss = bb.Accumulator(v1.train.AdamOptimizer(1.0), every=4), w * x
    with tf.control_dependencies([tf.identity(other)]):  # as UPDATE_OPS would be
        op = acc.minimize(loss, items=1)
    assert v1.get_collection(v1.GraphKeys.TRAIN_OP) == [op]
    with v1.Session() as session:
        session.run(v1.global_variables_initializer())
        with pytest.raises(REFUSED, match="You must feed a value for placeholder"):
            session.run(op, {x: 1})
        session.run(op, {x: 1, other: 0})
        session.run([acc.flush])
        assert session.run([w, acc.updates]) == [pytest.approx(-1), 1]


def test_gradients_from_elsewhere_are_fed_and_not_kept():
    w = v1.get_variable("w", initializer=tf.zeros([2]))
    holder, items = v1.placeholder(tf.float32, [2]), v1.placeholder(tf.float32, [])
    acc = bb.Accumulator(v1.train.GradientDescentOptimizer(1.0), every=3)
    op = acc.apply_gradients([(holder, w)], items=items)
    with v1.Session() as session:
        session.run(v1.global_variables_initializer())
        # 64-byte aligned, so that the session takes it without a copy; then the caller writes over it.
        buffer = np.zeros(64, np.float32)
        offset = (-buffer.ctypes.data % 64) // 4
        array = buffer[offset : offset + 2]
        for i in (1, 2, 3):
            array[:] = [i, 10 * i]
            session.run(op, {holder: array, items: i})
            array[:] = np.nan
        np.testing.assert_allclose(session.run(w), [-14 / 6, -140 / 6], rtol=1e-6)
        assert np.isnan(session.run(acc.last).loss)


def test_a_sum_where_losses_are_sums():
    line = Line(every=3, reduction="sum")
    for i in range(3):
        line.run(line.op, [[i, 1]] * (i + 1))
    same(line.state, [-3, -3], 1, 0, 0)


def test_windows_by_items_and_by_a_callable(graph):
    line = Line(every=bb.items(5))
    for rows in (2, 2, 2):
        line.run(line.op, [[1, rows]] * rows)
    same(line.state, [-1, -2], 1, 0, 0)
    with tf.Graph().as_default():
        line = Line(every=lambda update: tf.where(update < 1, 1, 3))
        seen = []
        for _ in range(7):
            line.run(line.op, [[1, 1]])
            seen.append(int(line.run(line.acc.updates)))
        assert seen == [1, 1, 1, 2, 2, 2, 3]
    with tf.Graph().as_default():
        line = Line(every=lambda update: tf.constant(0))
        with pytest.raises(REFUSED, match=r"every must be at least 1\. Received: every=0 \(int32\)\. Pass the number"):
            line.run(line.op, [[1, 1]])
    with (
        tf.Graph().as_default(),
        pytest.raises(ValueError, match=r"every must be at least 1\. Received: every=0 \(int\)"),
    ):
        Line(every=lambda update: 0)


@pytest.mark.parametrize(
    ("items", "dtype", "words"),
    [
        (0, tf.int32, "items must be positive. Received: items=0 (int32). "),
        (-1, tf.int64, "items must be positive. Received: items=-1 (int64). "),
        (-1.5, tf.float32, "items must be positive. Received: items=-1.5 (float32). "),
        (float("nan"), tf.float32, "items must be finite. Received: items=nan (float32). "),
        (float("inf"), tf.float64, "items must be finite. Received: items=inf (float64). "),
    ],
)
def test_bad_items_in_the_graph(items, dtype, words):
    count = v1.placeholder(dtype, [])
    line = Line(every=2, items=count)
    line.session.run(line.op, {line.x: [[1, 2]], count: 1})
    for op in (line.op, line.acc.accumulate):
        with pytest.raises(REFUSED) as refused:
            line.session.run(op, {line.x: [[3, 4]], count: items})
        assert words + "Pass the number of examples or tokens the loss is the mean of." in str(refused.value)
        same(line.state, [0, 0], 0, 1, 1)
    line.session.run(line.op, {line.x: [[3, 4]], count: 3})
    same(line.state, [-2.5, -3.5], 1, 0, 0)


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (
            lambda: bb.Accumulator("sgd", 2),
            TypeError,
            "optimizer must be a tf.compat.v1.train.Optimizer. Received: opt",
        ),
        (lambda: Line(clip_norm=0), ValueError, "clip_norm must be positive and finite. Received: clip_norm=0 (int)."),
        (lambda: Line(partial="keep"), ValueError, "partial must be one of 'apply', 'carry', 'drop'."),
        (lambda: Line(reduction="max"), ValueError, "reduction must be one of 'mean', 'sum'."),
        (
            lambda: Line(items=tf.constant([1, 2])),
            TypeError,
            "items must be a number. Received: items=shape (2,), dtype",
        ),
        (lambda: Line(items=tf.constant(True)), TypeError, "items must be a number. Received: items=shape (), dtype"),
    ],
)
def test_what_the_door_refuses(make, kind, words):
    with pytest.raises(kind) as refused:
        make()
    assert words in str(refused.value)


def test_losses_and_gradients_that_cannot_be(graph):
    line = Line()
    acc = bb.Accumulator(v1.train.GradientDescentOptimizer(1.0), 2)
    operations = len(graph.get_operations())
    with pytest.raises(ValueError, match="The loss must be a scalar of a floating type"):
        acc.minimize(line.w, items=1)
    with pytest.raises(ValueError, match=r"No gradients provided for any variable: .*w:0"):
        acc.apply_gradients([(None, line.w)], items=1)
    assert len(graph.get_operations()) == operations
    with pytest.raises(ValueError, match="has its op already"):
        line.acc.minimize(line.loss, items=1)


def test_reference_variables_beside_control_flow_v2():
    w = v1.get_variable("old", initializer=tf.zeros([2]), use_resource=False)
    assert w.op.type == "VariableV2"
    acc = bb.Accumulator(v1.train.MomentumOptimizer(1.0, 0.9), every=2)
    op = acc.apply_gradients([(tf.ones([2]), w)], items=1)
    with v1.Session() as session:
        session.run(v1.global_variables_initializer())
        for _ in range(3):
            session.run(op)
        assert session.run(w).tolist() == [-1, -1]
        session.run(acc.flush)
        np.testing.assert_allclose(session.run(w), -2.9, rtol=1e-6)


def test_an_uninitialized_accumulator_says_which_initializer_to_run():
    x = v1.placeholder(tf.float32, [None, 2])
    w = v1.get_variable("w", initializer=tf.zeros([2]))
    early = v1.global_variables_initializer()
    acc = bb.Accumulator(v1.train.GradientDescentOptimizer(1.0), every=2)
    op = acc.minimize(tf.reduce_mean(tf.linalg.matvec(x, w)), items=1)
    with v1.Session() as session:
        session.run(early)
        for fetch in (op, acc.flush, acc.pending):
            with pytest.raises(REFUSED, match=r"The accumulator is not initialized.*global_variables_initializer"):
                session.run(fetch, {x: [[1, 2]]})


def test_the_end_of_the_data_leaves_the_window_to_flush():
    data = v1.data.make_one_shot_iterator(tf.data.Dataset.from_tensor_slices(np.arange(10.0)).batch(3)).get_next()
    w = v1.get_variable("w", initializer=tf.constant(0.0, tf.float64))
    for name in ("loss", "gradients alone"):
        acc = bb.Accumulator(v1.train.GradientDescentOptimizer(1.0), every=64, name=f"Accumulator_{len(name)}")
        loss = w * tf.reduce_mean(data)
        if name == "loss":
            op = acc.minimize(loss, items=tf.size(data))
        else:
            op = acc.apply_gradients(acc.compute_gradients(loss), items=64)
        with v1.Session() as session:
            session.run(v1.global_variables_initializer())
            for _ in range(4):
                session.run(op)
            with pytest.raises(tf.errors.OutOfRangeError):
                session.run(op)
            assert session.run(acc.pending) == 4
            session.run(acc.flush)
            assert session.run(w) == -(4.5 if name == "loss" else (1 + 4 + 7 + 9) / 4)


def test_after_an_error_in_the_backward_the_next_window_is_clean():
    fails = v1.placeholder_with_default(False, [])

    @tf.custom_gradient
    def fragile(x):
        def backward(dy):
            with tf.control_dependencies([tf.raw_ops.Assert(condition=tf.logical_not(fails), data=["broken"])]):
                return tf.identity(dy)

        return tf.identity(x), backward

    x = v1.placeholder(tf.float64, [])
    a, b = (v1.get_variable(name, initializer=tf.constant(0.0, tf.float64)) for name in "ab")
    loss = x * a + fragile(b) * x
    acc = bb.Accumulator(v1.train.GradientDescentOptimizer(1.0), every=2)
    op = acc.minimize(loss, items=1)
    with v1.Session() as session:
        session.run(v1.global_variables_initializer())
        session.run(op, {x: 100})
        with pytest.raises(REFUSED, match="broken"):
            session.run(op, {x: 1000, fails: True})
        session.run(acc.zero)
        for value in (1, 3):
            session.run(op, {x: value})
        assert session.run([a, b]) == [-2, -2]


def test_threads_share_a_window():
    line = Line(every=8, optimizer=v1.train.GradientDescentOptimizer(1.0))

    def work(thread):
        for i in range(16):
            line.run(line.op, [[2.0**thread, i]] * (1 + i % 2))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made, pending = line.run([line.acc.updates, line.acc.pending])
    assert (made, pending) == (8, 0)  # 64 micro-batches, none lost and none doubled


def test_nonfinite_windows():
    for nonfinite in ("skip", "raise", "apply"):
        with tf.Graph().as_default():
            line = Line(every=2, nonfinite=nonfinite)
            line.run(line.op, [[np.inf, 1]])
            if nonfinite == "raise":
                with pytest.raises(
                    REFUSED, match=r"the window is not finite: loss nan, gradient norm inf\. The variables"
                ):
                    line.run(line.op, [[1, 1]])
            else:
                line.run(line.op, [[1, 1]])
            if nonfinite == "apply":
                assert line.run(line.acc.last).skipped is None
                assert line.run(line.step) == 1
                continue
            if nonfinite == "skip":
                assert line.run(line.acc.last).skipped == "the window is not finite: loss nan, gradient norm inf"
            same(line.state, [0, 0], 0, 0, 0)
            line.run(line.op, [[1, 1]])
            line.run(line.op, [[3, 1]])
            same(line.state, [-2, -1], 1, 0, 0)


def test_a_dynamic_loss_scale_sees_the_overflow_and_unscales_once():
    scale = v1.train.experimental.DynamicLossScale(initial_loss_scale=8.0, increment_period=100)
    inner = v1.train.experimental.MixedPrecisionLossScaleOptimizer(v1.train.GradientDescentOptimizer(1.0), scale)
    line = Line(inner, every=2, dtype=tf.float32)
    for rows in ([[1, 1]], [[np.inf, 1]], [[1, 2]], [[3, 4]]):
        line.run(line.op, rows)
        line.run(line.acc.last)
    same(line.state, [-2, -3], 1, 0, 0)
    assert 4.0 in [float(v) for v in line.run([v for v in inner.variables() if v.shape.rank == 0])]


def test_wide_sums_for_narrow_variables():
    for narrow, dtype, wide in (
        (tf.float16, tf.float32, tf.float32),
        (tf.bfloat16, tf.float32, tf.float32),
        (tf.bfloat16, None, tf.bfloat16),
        (tf.float64, tf.float32, tf.float64),
    ):
        with tf.Graph().as_default():
            line = Line(every=2, dtype=narrow, **({} if dtype == tf.float32 else {"dtype_of_sums": dtype}))
            assert [v.dtype for v in line.acc.variables() if "sum" in v.name] == [wide]
            for value in (1, 3):
                line.run(line.op, [[value, 0]])
            assert line.run(line.w).astype(float).tolist() == [-2, 0]


def test_mixed_widths_are_clipped_together():
    a, b = v1.get_variable("a", initializer=tf.zeros([1])), v1.get_variable("b", initializer=tf.zeros([1], tf.float64))
    acc = bb.Accumulator(v1.train.GradientDescentOptimizer(1.0), 1, clip_norm=1.0)
    op = acc.apply_gradients([(tf.constant([3.0]), a), (tf.constant([4.0], tf.float64), b), (None, a)], items=1)
    with v1.Session() as session:
        session.run(v1.global_variables_initializer())
        session.run(op)
        np.testing.assert_allclose(session.run([a, b]), [[-0.6], [-0.8]], rtol=1e-6)
        assert session.run(acc.last).grad_norm == 5


class GetVariable(v1.train.Optimizer):
    """As BERT's AdamWeightDecayOptimizer: its own apply_gradients, which makes its slots with get_variable."""

    def __init__(self):
        super().__init__(use_locking=False, name="GetVariable")

    def apply_gradients(self, grads_and_vars, global_step=None, name=None):
        made = []
        for grad, var in grads_and_vars:
            m = v1.get_variable(f"{var.op.name}/m", var.shape, var.dtype, v1.zeros_initializer(), trainable=False)
            new = 0.5 * m + grad
            made += [m.assign(new), var.assign_sub(new)]
        return tf.group(*made, name=name)


def test_an_optimizer_that_makes_its_slots_itself():
    line = Line(GetVariable(), every=2)
    for value in (1, 3, 5):
        line.run(line.op, [[value, 0]])
    line.run(line.acc.flush)
    assert line.run(line.w).tolist() == [-2 - (0.5 * 2 + 5), 0]


def test_several_accumulators_graphs_and_sessions():
    one = Line(every=2)
    other_loss = tf.reduce_mean(one.x) * v1.get_variable("v", initializer=tf.constant(0.0, tf.float64))
    two = bb.Accumulator(v1.train.MomentumOptimizer(1.0, 0.5), every=3)
    two_op = two.minimize(other_loss, var_list=v1.get_collection(v1.GraphKeys.TRAINABLE_VARIABLES)[1:], items=1)
    with tf.Graph().as_default():
        elsewhere = Line(every=2)
    first, second = v1.Session(), v1.Session()
    for session in (first, second):
        session.run(v1.global_variables_initializer())
    first.run([one.op, two_op], {one.x: [[1, 3]]})  # of two accumulators, any ops together
    elsewhere.run(elsewhere.op, [[7, 7]])
    assert first.run([one.acc.pending, two.pending]) == [1, 1]
    assert second.run([one.acc.pending, two.pending]) == [0, 0]
    first.run([one.op, two.flush], {one.x: [[3, 3]]})
    assert first.run(one.w).tolist() == [-2, -3]
    assert elsewhere.run(elsewhere.acc.pending) == 1
    assert two.get_slot_names() == ["momentum"]
    assert two.get_slot(v1.trainable_variables()[1], "momentum") is not None


def test_a_monitored_session_flushes_at_its_end_and_saves_the_update(tmp_path):
    data = v1.data.make_one_shot_iterator(tf.data.Dataset.from_tensor_slices(np.arange(6.0))).get_next()
    w = v1.get_variable("w", initializer=tf.constant(0.0, tf.float64))
    step = v1.train.get_or_create_global_step()
    acc = bb.Accumulator(v1.train.GradientDescentOptimizer(1.0), every=4)
    op = acc.minimize(w * data, step, items=1)
    with v1.train.MonitoredTrainingSession(
        checkpoint_dir=str(tmp_path), chief_only_hooks=[bb.FlushHook(acc)], log_step_count_steps=None
    ) as session:
        while not session.should_stop():
            session.run(op)
    saved = tf.train.load_checkpoint(str(tmp_path))
    assert saved.get_tensor("w") == -(1.5 + 4.5)
    assert saved.get_tensor("global_step") == 2
    assert saved.get_tensor("Accumulator/window")[1] == 0


def test_a_meta_graph_goes_on_inside_a_window(tmp_path):
    line = Line(every=3)
    line.run(line.op, [[1, 2]])
    path = v1.train.Saver().save(line.session, str(tmp_path / "model"))
    with tf.Graph().as_default() as graph, v1.Session() as session:
        v1.train.import_meta_graph(path + ".meta").restore(session, path)
        op = graph.get_operation_by_name(line.op.name)
        for value in (3, 5):
            session.run(op, {"x:0": [[value, 2.0]]})
        assert session.run("w/Read/ReadVariableOp:0").tolist() == [-3, -2]


def test_old_behavior():
    """Reference variables and control flow v1, in a process of its own, since they cannot be turned back on."""
    script = Path(__file__).with_name("old_behavior.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "resource_variables_enabled False, control_flow_v2_enabled False"


def test_a_table_of_fifty_million_rows_stays_sparse():
    script = Path(__file__).with_name("big_table.py")
    done = subprocess.run([sys.executable, str(script), "bigbatch"], capture_output=True, text=True, check=True)
    printed = done.stdout.splitlines()[-1]
    table, peak = (int(part.split(" MiB")[0].split()[-1]) for part in printed.split(","))
    assert table == 191
    assert peak < table / 4, printed  # a dense gradient or a dense sum would be another 191
