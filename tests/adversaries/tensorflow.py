"""TensorFlow 2: random models, windows and foreign acts. The models are few, so that their graphs are traced once."""

import contextlib
import functools
import tempfile
from types import SimpleNamespace
from typing import Any

import numpy as np
import tensorflow as tf
from hypothesis import strategies as st

import bigbatch.tensorflow as bb

D, H, V = 4, 3, 5
RATE, MOMENTUM = 0.125, 0.75  # Keras rounds both to float32
MODELS = ["linear", "tied", "transposed", "embedding", "tied embedding", "idle expert", "convolution", "low rank"]
# A graph serves windows of every length: their function reads a variable.
EVERY = [*((model, "planned") for model in MODELS), ("linear", 1), ("linear", 3), ("linear", "items")]
ACTS = ["none", "apply_gradients", "assign", "assign the same", "Accumulator", "bad items", "reset", "raise before",
        "raise after", "retrace", "tape", "non-finite", "stranger", "restore"]  # fmt: skip
SHAPES = {
    "linear": [(D, H), (H,)], "tied": [(D, D)], "transposed": [(H, D)], "embedding": [(V, D), (D, H)],
    "tied embedding": [(V, D)], "idle expert": [(D, H), (D, H)], "convolution": [(2, 1, H)],
    "low rank": [(D, 1), (1, H)],
}  # fmt: skip


def outputs(model: str, p: list[Any], x: tf.Tensor, ids: tf.Tensor) -> tf.Tensor:
    """One row an example."""
    if model == "linear":
        return x @ p[0] + p[1]
    if model == "tied":
        return tf.tanh(x @ p[0]) @ tf.transpose(p[0])
    if model == "transposed":
        return tf.linalg.matmul(x, p[0], transpose_b=True)
    if model == "embedding":
        return (x + tf.gather(p[0], ids)) @ p[1]
    if model == "tied embedding":
        return tf.gather(p[0], ids) @ tf.transpose(p[0]) + x[:, :1]
    if model == "idle expert":
        return tf.where(ids[:, None] < V - 1, x @ p[0], x @ p[1])
    if model == "convolution":
        return tf.reduce_mean(tf.nn.conv1d(x[:, :, None], p[0], 1, "SAME"), 1)
    return x @ p[0] @ p[1]


def loss_of(model: str, p: list[Any], x: tf.Tensor, ids: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
    rows = tf.reduce_mean(tf.tanh(outputs(model, p, x, ids)) ** 2, 1)
    return tf.reduce_sum(weight * rows) / tf.reduce_sum(weight)


@functools.cache
def trained(model: str, every: Any, graph: bool) -> SimpleNamespace:
    """A model with its optimizer, its Accumulator and its steps, used again for every example that draws it."""
    p = [tf.Variable(tf.zeros(shape, tf.float64), name=f"p{k}") for k, shape in enumerate(SHAPES[model])]
    optimizer = tf.keras.optimizers.SGD(RATE, momentum=MOMENTUM)
    optimizer.build(p)
    length = tf.Variable(2, trainable=False)
    planned = {"items": bb.items(12), "planned": lambda update: length + tf.cast(update % 2, tf.int32)}.get(
        every, every
    )
    acc = bb.Accumulator(optimizer, every=planned)
    acc.build(p if "embedding" not in model else p[1:], sparse=p[:1] if model == "embedding" else ())
    if model == "tied embedding":
        acc.build(p)
    signature = [tf.TensorSpec([None, D], tf.float64), tf.TensorSpec([None], tf.int32)]
    signature += [tf.TensorSpec([None], tf.float64), tf.TensorSpec([], tf.float64), tf.TensorSpec([], tf.int32)]

    def step(x: Any, ids: Any, weight: Any, items: Any, fault: Any) -> bb.Update:
        if graph:  # before, as a check of the data would, or after, as a check of the loss
            tf.debugging.Assert(fault != 1, ["fault before"])
        with tf.GradientTape() as tape:
            loss = loss_of(model, p, x, ids, weight)
        update = acc.apply_gradients(zip(tape.gradient(loss, p), p, strict=True), items=items, loss=loss)
        if graph:
            tf.debugging.Assert(fault != 2, ["fault after"])
        return update

    @tf.function(input_signature=signature[:3])
    def gradient(x: Any, ids: Any, weight: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = loss_of(model, p, x, ids, weight)
        return [tf.convert_to_tensor(g) for g in tape.gradient(loss, p, unconnected_gradients="zero")]

    make = functools.partial(tf.function, step, input_signature=signature) if graph else lambda: step
    other = tf.keras.optimizers.SGD(0.25)
    return SimpleNamespace(
        p=p, optimizer=optimizer, acc=acc, make=make, step=make(), gradient=gradient, other=bb.Accumulator(other, 1),
        stranger=tf.Variable(tf.zeros([2], tf.float64)), saved=tf.train.Checkpoint(p=p, optimizer=optimizer, acc=acc),
        tape=tf.function(lambda: tf.reduce_sum(p[0] ** 2)), graph=graph, again=0, strangers=0, length=length,
    )  # fmt: skip


def start(run: SimpleNamespace, rng: np.random.Generator) -> None:
    run.acc.reset()
    run.acc._index.assign(0)
    for v in run.p:
        v.assign(rng.normal(size=v.shape))
    for slot in run.optimizer.variables[2:]:
        slot.assign(tf.zeros_like(slot))


def expected(run: SimpleNamespace, window: list[Any]) -> list[np.ndarray]:
    """The parameters after the full batch's update, from where they and the momentum are now."""
    gradients = run.gradient(*(tf.concat(part, 0) for part in zip(*window, strict=True)))
    slots = run.optimizer.variables[2:]
    return [
        v.numpy() + MOMENTUM * m.numpy() - RATE * g.numpy() for v, m, g in zip(run.p, slots, gradients, strict=True)
    ]


def act_on(run: SimpleNamespace, act: str, micro_batch: Any, rng: np.random.Generator) -> None:
    """What somebody else does to the open window. It may raise."""
    some = [(tf.constant(rng.normal(size=v.shape)), v) for v in run.p]
    x, ids, weight = micro_batch
    if act == "apply_gradients":
        run.optimizer.apply_gradients(some)
    elif act == "assign":
        some[-1][1].assign_add(some[-1][0])
    elif act == "assign the same":
        run.p[0].assign(tf.identity(run.p[0]))
    elif act == "Accumulator":
        run.other.apply_gradients(some, items=2)
    elif act == "bad items":
        bad = tf.constant(rng.choice([0.0, -3.0, np.nan, np.inf]), tf.float64)
        run.step(x, ids, weight, bad, tf.constant(0))
    elif act == "reset":
        run.acc.reset()
    elif act in ("raise before", "raise after") and run.graph:
        run.step(x, ids, weight, tf.reduce_sum(weight), tf.constant(1 if act == "raise before" else 2))
    elif act == "retrace" and run.again < 2:
        run.step, run.again = run.make(), run.again + 1
    elif act == "tape":
        with tf.GradientTape() as tape:
            value = run.tape()
        tape.gradient(value, run.p[0])
    elif act == "non-finite":
        run.step(x, ids, weight, tf.reduce_sum(weight), tf.constant(0))
    elif act == "stranger" and run.strangers < 2:  # outside a tf.function it makes our graph be traced again
        run.strangers += 1
        run.acc.apply_gradients([(tf.ones([2], tf.float64), run.stranger)], items=1)
    elif act == "restore":
        with tempfile.TemporaryDirectory() as folder:  # as it is, weights and window alike
            run.saved.read(run.saved.write(f"{folder}/checkpoint"))


def example(data: st.DataObject) -> None:
    """One window with an act in it: the full batch's update, or an error or a skip after which a window is exact."""
    draw = data.draw
    run = trained(*draw(st.sampled_from(EVERY)), draw(st.booleans()))
    run.length.assign(draw(st.integers(1, 4)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    act, place = draw(st.sampled_from(ACTS)), draw(st.integers(0, 4))
    start(run, rng)
    try:
        one_window(run, micro_batches(rng), act, place, rng)
    except ERRORS:
        assert act != "none"
        # Whatever the error left open is whole, or dropped by the next call at the latest.
        run.acc.reset()
    one_window(run, micro_batches(rng), "none", 0, rng)


ERRORS = (tf.errors.OpError, ValueError, RuntimeError)


def micro_batches(rng: np.random.Generator) -> list[Any]:
    """Enough for two windows of any kind."""
    return [
        (tf.constant(rng.normal(size=(n, D))), tf.constant(rng.integers(0, V, size=n), tf.int32),
         tf.constant(rng.integers(1, 5, size=n).astype(float))) for n in rng.integers(1, 7, size=24)
    ]  # fmt: skip


def one_window(run: SimpleNamespace, parts: list[Any], act: str, place: int, rng: np.random.Generator) -> None:
    """Feeds a window; asserts that it ended in the full batch's update where the parameters are, or in a skip."""
    index, kept, fed = int(run.acc.index), [], iter(parts)
    for k in range(12):
        if k == place and act != "none":
            extra = next(fed)
            if act == "non-finite":
                extra = (extra[0] * np.inf, *extra[1:])
            right, were = expected(run, [*kept, extra]), [v.numpy() for v in run.p]
            with contextlib.suppress(
                *(ERRORS if act in ("bad items", "stranger", "raise before", "raise after") else ())
            ):
                act_on(run, act, extra, rng)
            held = int(run.acc.pending)
            if int(run.acc.index) != index:  # the act's own micro-batch filled the window
                return assert_update(run, right, f"{act} closed the window")
            if act == "non-finite" and kept and held == 0:
                return assert_update(run, were, "a window that is not finite")
            if held == len(kept) + 1:
                kept.append(extra)
            elif act == "reset":
                kept = []
            if act == "non-finite" and not held:
                return assert_update(run, were, "a window that is not finite")
        part = next(fed)
        kept.append(part)
        right, were = expected(run, kept), [v.numpy() for v in run.p]
        update = run.step(*part, tf.reduce_sum(part[2]), tf.constant(0))
        if bool(update.closed):
            what = f"{act} before micro-batch {place}"
            assert int(update.micro_batches) == len(kept), f"{what}: {int(update.micro_batches)} counted of {len(kept)}"
            finite = all(np.isfinite(r).all() for r in right)
            assert bool(update.made) == finite, f"{what}: {update.skipped}"
            return assert_update(run, right if bool(update.made) else were, what)
    raise AssertionError(f"{act} before micro-batch {place}: the window never closed")


def assert_update(run: SimpleNamespace, right: list[np.ndarray], what: str) -> None:
    for v, r in zip(run.p, right, strict=True):
        off = np.abs(v.numpy() - r).max() / max(np.abs(r).max(), 1e-3)
        assert off < 1e-12, f"{what}: {v.name} is off by {off:.1e}"
