"""Checkpoints: interchangeable with the plain optimizer's, refused where they are damaged, whole after any kill."""

import itertools
import shutil

import numpy as np
import pytest
import tensorflow as tf

import bigbatch.tf1 as bb

v1 = tf.compat.v1
REFUSED = tf.errors.InvalidArgumentError
X = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)


@pytest.fixture(autouse=True)
def graph():
    with tf.Graph().as_default() as graph:
        yield graph


def scaled(optimizer):
    scale = v1.train.experimental.DynamicLossScale(initial_loss_scale=8.0, increment_period=3)
    return v1.train.experimental.MixedPrecisionLossScaleOptimizer(optimizer, scale)


OPTIMIZERS = {
    "GradientDescent": lambda step: v1.train.GradientDescentOptimizer(0.1),
    "Momentum": lambda step: v1.train.MomentumOptimizer(0.1, 0.9),
    "Adam": lambda step: v1.train.AdamOptimizer(0.1),
    "AdamInItsScope": lambda step: v1.train.AdamOptimizer(0.1, use_own_namescope_for_non_slot_vars=True),
    "Adagrad": lambda step: v1.train.AdagradOptimizer(0.1),
    "AdagradDA": lambda step: v1.train.AdagradDAOptimizer(0.1, step),
    "Adadelta": lambda step: v1.train.AdadeltaOptimizer(0.1),
    "RMSProp": lambda step: v1.train.RMSPropOptimizer(0.1, momentum=0.5, centered=True),
    "Ftrl": lambda step: v1.train.FtrlOptimizer(0.1),
    "ProximalGradientDescent": lambda step: v1.train.ProximalGradientDescentOptimizer(0.1),
    "ProximalAdagrad": lambda step: v1.train.ProximalAdagradOptimizer(0.1),
    "MixedPrecisionLossScale": lambda step: scaled(v1.train.AdamOptimizer(0.1)),
}


class Model:
    """Two variables in a scope, trained by the optimizer alone (`every=None`), or through as many micro-batches."""

    def __init__(self, optimizer="Adam", every=None, scope="model", twice=False, size=3, **options):
        self.graph = tf.Graph()
        with self.graph.as_default(), v1.variable_scope(scope):
            v1.set_random_seed(1)
            self.x = v1.placeholder(tf.float32, [None, size])
            self.step = v1.train.get_or_create_global_step()
            w, b = v1.get_variable("w", [size]), v1.get_variable("b", [])
            self.loss = tf.reduce_mean((tf.tanh(tf.linalg.matvec(self.x, w) + b) - 1) ** 2)
            ops = [self.train_op(OPTIMIZERS[optimizer](self.step), every, options) for _ in range(1 + twice)]
            self.op = ops[0]
            self.names = [v.op.name for v in v1.global_variables() if v not in self.ours]
            self.theirs = v1.train.Saver([v for v in v1.global_variables() if v not in self.ours])
            self.saver, self.all = v1.train.Saver(max_to_keep=2), v1.global_variables()
            self.session = v1.Session()
            self.session.run(v1.global_variables_initializer())

    ours = ()

    def train_op(self, optimizer, every, options):
        if every is None:
            return optimizer.minimize(self.loss, self.step)
        self.acc = bb.Accumulator(optimizer, every, **options)
        op = self.acc.minimize(self.loss, self.step, items=tf.shape(self.x)[0])
        self.ours = (*self.ours, *self.acc.variables())
        return op

    def run(self, *stops, fetch=None):
        for start, stop in itertools.pairwise(stops):
            self.session.run(self.op if fetch is None else fetch, {self.x: X[start:stop]})

    def save(self, path, saver=None, **options):
        with self.graph.as_default():
            return (saver or self.saver).save(self.session, str(path), **options)

    def restore(self, path, saver=None):
        with self.graph.as_default():
            (saver or self.saver).restore(self.session, path)

    def values(self, names=None):
        return [
            a for v, a in zip(self.all, self.session.run(self.all), strict=True) if v.op.name in (names or self.names)
        ]

    def state(self):
        """All of it, the window too."""
        return self.session.run(self.all)


def same(got, expected):
    for g, e in zip(got, expected, strict=True):
        np.testing.assert_array_equal(g, e)


def close(got, expected):
    for g, e in zip(got, expected, strict=True):
        np.testing.assert_allclose(g, e, rtol=2e-5, atol=1e-6)


def test_every_optimizer_of_v1_is_here():
    classes = {n.removesuffix("Optimizer") for n in dir(v1.train) if n.endswith("Optimizer")} - {"", "SyncReplicas"}
    assert classes <= set(OPTIMIZERS)


@pytest.mark.parametrize("scope", ["", "model"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_optimizers_variables_have_the_names_of_the_plain_ones(optimizer, scope):
    for twice in (False, True) if "Scale" not in optimizer and "Scope" not in optimizer else (False,):
        plain, ours = (Model(optimizer, every, scope, twice) for every in (None, 2))
        assert ours.names == plain.names
        assert not set(ours.names) & {v.op.name for v in ours.ours}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_plain_run_goes_on_with_bigbatch_and_the_other_way_round(optimizer, tmp_path):
    plain, ours = Model(optimizer), Model(optimizer, every=2)
    plain.run(0, 8, 16, 24)
    ours.restore(plain.save(tmp_path / "plain"), ours.theirs)
    same(ours.values(), plain.values())
    ours.run(24, 29, 32)
    plain.run(24, 32)
    close(ours.values(), plain.values())

    back = Model(optimizer)
    back.restore(ours.save(tmp_path / "ours"))  # the plain graph asks for its own variables
    same(back.values(), ours.values())
    ours.run(32, 33, 40)
    back.run(32, 40)
    close(back.values(), ours.values())


def test_a_checkpoint_of_an_older_bigbatch_needs_its_names(tmp_path):
    """Its Adam's powers had the Accumulator's scope, and its window fewer numbers."""
    ours = Model(every=2, scope="")
    old = {("Accumulator/" if "power" in v.op.name else "") + v.op.name: v for v in ours.all if v not in ours.ours}
    with ours.graph.as_default():
        saver = v1.train.Saver(old)
    ours.run(0, 3, 8)
    path, state = ours.save(tmp_path / "old", saver), ours.values()
    again = Model(every=2, scope="")
    with pytest.raises(tf.errors.NotFoundError, match="not found in checkpoint"):
        again.restore(path)
    with again.graph.as_default():
        renamed = v1.train.Saver({
            ("Accumulator/" if v.op.name in ("beta1_power", "beta2_power") else "") + v.op.name: v
            for v in again.all if v not in again.ours
        })  # fmt: skip
    again.restore(path, renamed)
    same(again.values(), state)


DAMAGE = {
    "negative": ((0, -3.0),),
    "negative items": ((1, -5.0),),
    "no items": ((1, 0.0),),
    "not a number": ((0, np.nan),),
    "infinite items": ((1, np.inf),),
    "nan items": ((1, np.nan),),
    "half a micro-batch": ((0, 1.5),),
    "nan unit": ((2, np.nan),),
    "negative unit": ((2, -1.0),),
    "all": tuple((k, np.nan) for k in range(5)),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("close_by", ["op", "apply"])
def test_a_damaged_window_is_refused_and_the_next_one_is_exact(damage, close_by):
    ours, plain = Model("GradientDescent", every=3), Model("GradientDescent")
    ours.run(0, 2, 4)
    window = next(v for v in ours.ours if v.op.name.endswith("/window"))
    counts = ours.session.run(window)
    for k, value in DAMAGE[damage]:
        counts[k] = value
    window.load(counts, ours.session)
    with pytest.raises(REFUSED, match=r"do not hold a window of this Accumulator\. Received: micro_batches="):
        ours.run(*range(4, 12), fetch=None if close_by == "op" else [ours.acc.accumulate, ours.acc.apply])
    same(ours.values(), plain.values())
    assert ours.session.run(ours.acc.pending) == 0
    ours.run(0, 3, 5, 8)
    plain.run(0, 8)
    close(ours.values(), plain.values())


def test_a_damaged_window_can_be_forgotten():
    ours = Model(every=3)
    window = next(v for v in ours.ours if v.op.name.endswith("/window"))
    for value in (np.nan, -2.0):
        window.load([value] * 5, ours.session)
        ours.session.run(ours.acc.zero)
        ours.run(0, 3, 5, 8)
    assert ours.session.run(ours.step) == 2


@pytest.mark.parametrize("updates", [np.nan, -1.0, np.inf])
def test_a_damaged_count_of_updates_is_refused(updates):
    ours = Model(every=lambda update: 2)
    last = next(v for v in ours.ours if v.op.name.endswith("/last"))
    report = ours.session.run(last)
    last.load([updates, *report[1:]], ours.session)
    with pytest.raises(REFUSED, match=r"updates="):
        ours.run(0, 2)


@pytest.mark.parametrize("reductions", [("mean", "sum"), ("sum", "mean")])
def test_a_window_of_another_reduction_is_refused(reductions, tmp_path):
    before, after = (Model("GradientDescent", every=2, reduction=reduction) for reduction in reductions)
    before.run(0, 3)
    after.restore(before.save(tmp_path / "model"))
    start = after.values()
    with pytest.raises(REFUSED, match="another `reduction`"):
        after.run(3, 6)
    same(after.values(), start)


def test_sums_that_are_not_finite_skip_their_window():
    ours = Model("GradientDescent", every=2)
    start = ours.values()
    ours.run(0, 3)
    total = next(v for v in ours.ours if v.op.name.endswith("w/sum"))
    total.load([np.nan] * 3, ours.session)
    ours.run(3, 6)
    assert "not finite" in ours.session.run(ours.acc.last).skipped
    same(ours.values(), start)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("sparse", [False, True])
def test_sums_of_other_shapes_are_refused_and_the_next_window_is_exact(size, sparse, tmp_path):
    """A Saver restores them without a word, as it does any resource variable."""

    class Broadcasting(v1.train.GradientDescentOptimizer):
        def _resource_apply_dense(self, grad, var):
            return var.assign_sub(self._learning_rate * grad, read_value=False)

    def made(width):
        with tf.Graph().as_default():
            x = v1.placeholder(tf.float32, [])
            w = v1.get_variable("w", initializer=tf.ones([2, width]))
            acc = bb.Accumulator(Broadcasting(1.0), 2)
            op = acc.minimize(x * tf.reduce_sum(tf.gather(w, [0, 0]) if sparse else w), items=1)
            session, saver = v1.Session(), v1.train.Saver(acc.variables())
            session.run(v1.global_variables_initializer())
            return x, w, acc, op, session, saver

    x, _, _, op, session, saver = made(size)
    session.run(op, {x: 1.0})
    with session.graph.as_default():
        path = saver.save(session, str(tmp_path / "model"))
    x, w, acc, op, session, saver = made(3)
    for rest in ("apply", "op"):
        with session.graph.as_default():
            saver.restore(session, path)
        with pytest.raises((REFUSED, tf.errors.FailedPreconditionError)):
            session.run(acc.apply if rest == "apply" else op, {x: 1.0})
        assert (session.run(w) == 1).all()
    for _ in range(2):
        session.run(op, {x: 2.0})
    assert session.run(w).tolist() == ([[-3] * 3, [1] * 3] if sparse else [[-1] * 3] * 2)


@pytest.mark.parametrize("numbered", [True, False])
def test_whatever_a_kill_leaves_resumes_bit_for_bit_or_is_an_error(numbered, tmp_path):
    """Each file of the second checkpoint missing, cut short or whole, in every combination: more than a kill can do."""
    ours = Model(every=4)
    ours.run(0, 3, 5)
    older = ours.state()
    ours.save(tmp_path / "a/model", global_step=0 if numbered else None)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    ours.run(5, 6, 8, 9)
    newer = ours.state()
    with ours.graph.as_default():
        ours.saver.set_last_checkpoints_with_time([(str(tmp_path / "a/model-0"), 0.0)] if numbered else [])
    ours.save(tmp_path / "a/model", global_step=1 if numbered else None)
    ours.run(9, 20, 21)  # what is restored over

    after, before = ({p.name: p.read_bytes() for p in (tmp_path / d).iterdir()} for d in "ab")
    written = [name for name, content in after.items() if content != before.get(name)]
    assert len(written) == (4 if numbered else 2)
    outcomes = set()
    for states in itertools.product(("old", "cut", "new"), repeat=len(written)):
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        shutil.copytree(tmp_path / "b", tmp_path / "c")
        for name, state in zip(written, states, strict=True):
            content = after[name]
            if state != "old":
                (tmp_path / "c" / name).write_bytes(content if state == "new" else content[: len(content) // 2])
        outcomes.add(resumed(ours, tmp_path / "c", older, newer))
    assert outcomes == {"older", "newer", "error"}


def resumed(ours, directory, older, newer):
    """What TensorFlow's own way of going on comes to."""
    try:
        path = tf.train.latest_checkpoint(str(directory))
        # The state file holds whole paths.
        ours.restore(str(directory / path.rpartition("/")[2]))
    except Exception as error:
        return "error" if str(error) else "nothing said"
    got = ours.state()
    for name, state in (("older", older), ("newer", newer)):
        if all(np.array_equal(g, s) for g, s in zip(got, state, strict=True)):
            return name
    return "mixed"
