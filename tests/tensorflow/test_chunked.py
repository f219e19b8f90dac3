"""`chunked`: the values and gradients of the function itself, for losses that compare all examples of a batch."""

import functools
import importlib
import logging

import keras
import numpy as np
import pytest
import tensorflow as tf

import bigbatch.tensorflow as bb
from bigbatch.engines.tensorflow_estimate import peak
from bigbatch.host import Memory

file = importlib.import_module("bigbatch.tensorflow.chunked")  # the package has its function under this name
N = 11
F64 = tf.float64


class Encoder(tf.Module):
    def __init__(self, seed):
        super().__init__()
        normal = functools.partial(tf.random.stateless_normal, dtype=F64)
        self.a = tf.Variable(normal([5, 7], [seed, 1]))
        self.b = tf.Variable(normal([7, 3], [seed, 2]))

    def __call__(self, x):
        return tf.tanh(x @ self.a) @ self.b


@pytest.fixture
def towers():
    """Two encoders, a learned temperature, and a batch of pairs."""
    x, y = tf.unstack(tf.random.stateless_normal([2, N, 5], [0, 1], dtype=F64))
    return Encoder(0), Encoder(1), tf.Variable(tf.constant(0.3, F64)), x, y


def normalized(x):
    return x / tf.norm(x, axis=1, keepdims=True)


def places(a):
    return tf.range(tf.shape(a)[0])


def info_nce(a, b, scale):
    logits = tf.exp(scale) * normalized(a) @ tf.transpose(normalized(b))
    both = [tf.nn.sparse_softmax_cross_entropy_with_logits(places(a), one) for one in (logits, tf.transpose(logits))]
    return tf.reduce_mean(both)


def siglip(a, b, scale):
    signs = 2 * tf.one_hot(places(a), tf.shape(a)[0], dtype=a.dtype) - 1
    logits = tf.exp(scale) * normalized(a) @ tf.transpose(normalized(b)) - 1
    return tf.reduce_mean(tf.nn.softplus(-signs * logits))


def supervised(a, b, scale):
    own = tf.one_hot(places(a), tf.shape(a)[0], dtype=a.dtype)
    labels = places(a) % 3
    same = tf.cast(labels[:, None] == labels, a.dtype) - own
    logits = tf.exp(scale) * normalized(a) @ tf.transpose(normalized(a)) - 1e9 * own
    rows = tf.reduce_sum(same * tf.nn.log_softmax(logits), 1) / tf.reduce_sum(same, 1)
    return tf.reduce_mean(b**2) - tf.reduce_mean(rows)


def triplet(a, b, scale):
    distances = tf.reduce_sum((a[:, None] - b) ** 2, -1)
    own = tf.one_hot(places(a), tf.shape(a)[0], dtype=a.dtype)
    hardest = tf.reduce_min(distances + 1e9 * own, 1)
    return tf.reduce_mean(tf.nn.softplus(tf.linalg.diag_part(distances) - hardest + scale))


def barlow(a, b, scale):
    a, b = ((x - tf.reduce_mean(x, 0)) / tf.math.reduce_std(x, 0) for x in (a, b))
    count = tf.cast(tf.shape(a)[0], a.dtype)
    return tf.reduce_sum((tf.exp(scale) * tf.transpose(a) @ b / count - tf.eye(3, dtype=a.dtype)) ** 2)


def vicreg(a, b, scale):
    centred = a - tf.reduce_mean(a, 0)
    covariance = tf.transpose(centred) @ centred / (tf.cast(tf.shape(a)[0], a.dtype) - 1)
    off_diagonal = tf.linalg.set_diag(covariance, tf.zeros(3, a.dtype))
    spread = tf.reduce_mean(tf.nn.relu(1 - tf.math.reduce_std(a, 0))) + tf.exp(scale) * tf.reduce_sum(off_diagonal**2)
    return tf.reduce_mean((a - b) ** 2) + spread


def ranking(a, b, scale):
    scores, order = tf.reduce_sum(a * b, 1), tf.cast(places(a), a.dtype)
    return tf.reduce_mean(tf.nn.softplus((scores - scores[:, None]) * tf.sign(order[:, None] - order) * scale))


LOSSES = [info_nce, siglip, supervised, triplet, barlow, vicreg, ranking]


def gradients(loss, towers, change, tied=False, graph=False, jit_compile=None):
    """The loss and all gradients, with each encoder as `change` makes it."""
    a, b, scale, x, y = towers
    f, g = change(a), change(a if tied else b)

    def run(x, y):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = loss(f(x), g(y), scale)
        sources = [a.a, a.b, scale, x] + ([] if tied else [b.a, b.b])
        return [value, *tape.gradient(value, sources)]

    return (tf.function(run, jit_compile=jit_compile) if graph else run)(x, y)


def agree(got, right, relative=1e-12):
    for g, r in zip(got, right, strict=True):
        g, r = (np.asarray(tf.convert_to_tensor(v)) for v in (g, r))
        np.testing.assert_allclose(g, r, rtol=0, atol=relative * max(1e-3, float(np.abs(r).max())))


# In a graph each loss with two encoders and info_nce tied too; outside of one, where the loss is no part of it, tied.
CASES = [*((loss, False, True) for loss in LOSSES), (info_nce, True, True), *((loss, True, False) for loss in LOSSES)]


@pytest.mark.parametrize(("loss", "tied", "graph"), CASES)
def test_it_is_the_full_batchs_gradient(loss, tied, graph, towers):
    right = gradients(loss, towers, lambda model: model, tied)
    agree(gradients(loss, towers, lambda model: bb.chunked(model, micro_batch=4), tied, graph), right)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize(("micro_batch", "keep"), [(1, 0), (3, 1), (3, 2), (4, 20), (10, 1), (11, 0), (50, 3)])
def test_any_cut_and_any_number_of_kept_pieces(micro_batch, keep, graph, towers):
    right = gradients(info_nce, towers, lambda model: model)
    ours = lambda model: bb.chunked(model, micro_batch=micro_batch, keep=keep)  # noqa: E731
    agree(gradients(info_nce, towers, ours, graph=graph), right)


@pytest.mark.parametrize("given", [False, True])
def test_the_graph_has_loops_in_the_place_of_the_function(given, towers):
    """AutoGraph unwraps what it is given."""
    ours = bb.chunked(towers[0], micro_batch=4)
    traced = tf.function(lambda f, x: f(x)) if given else tf.function(lambda _, x: ours(x))
    graph = traced.get_concrete_function(ours, tf.TensorSpec([N, 5], F64)).graph
    assert {"While", "StatelessWhile"} & {op.type for op in graph.get_operations()}


def keras_model(*layers, dtype="float64"):
    keras.utils.set_random_seed(0)
    dense = [keras.layers.Dense(8, activation="tanh", dtype=dtype), *layers, keras.layers.Dense(3, dtype=dtype)]
    return keras.Sequential([keras.Input((5,)), *dense])


def trained(model, change, x, where):
    """Outputs and gradients in training mode; `where` is where the tape and the function run."""
    f = change(model)

    def forward(x):
        return f(x, training=True)

    def run(x, forward=forward):
        with tf.GradientTape() as tape:
            tape.watch(x)
            out = forward(x)
            loss = tf.reduce_sum(out * tf.sin(out))
        return [out, *tape.gradient(loss, [x, *(v.value for v in model.trainable_variables)])]

    if where == "eager":
        return run(x)
    if where == "graph":
        return tf.function(run)(x)
    return run(x, tf.function(forward))  # a tape around a tf.function


def in_parts(model):
    return lambda x, **options: tf.concat([model(x[i : i + 4], **options) for i in range(0, N, 4)], 0)


@pytest.mark.parametrize("keep", [0, 2])
@pytest.mark.parametrize("where", ["eager", "graph", "function"])
def test_dropout_and_averages_are_those_of_the_same_pieces(where, keep, towers):
    """Random numbers are drawn again bit for bit, and what the function writes to changes once."""
    results = []
    for change in (in_parts, lambda model: bb.chunked(model, micro_batch=4, keep=keep)):
        layers = keras.layers.Dropout(0.5, seed=3, dtype="float64"), keras.layers.BatchNormalization(dtype="float64")
        model = keras_model(*layers)
        made = trained(model, change, towers[3], where)
        results.append((made, [v.numpy() for v in model.variables]))
    (right, state), (ours, state_of_ours) = results
    np.testing.assert_array_equal(ours[0], right[0])
    agree(ours, right)
    for a, b in zip(state_of_ours, state, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("keep", [0, 9])
def test_a_generators_state_moves_once(keep, towers):
    a, b = tf.random.Generator.from_seed(1), tf.random.Generator.from_seed(1)
    w = tf.Variable(tf.ones([5], F64))

    @tf.function
    def gradient(x, f):
        with tf.GradientTape() as tape:
            out = f(x)
        return out, tape.gradient(out, w)

    ours = bb.chunked(lambda x: x * w * a.normal(tf.shape(x), dtype=F64), micro_batch=4, keep=keep)
    plain = in_parts(lambda x: x * w * b.normal(tf.shape(x), dtype=F64))
    agree(gradient(towers[3], ours), gradient(towers[3], plain))
    np.testing.assert_array_equal(a.state, b.state)


@pytest.mark.parametrize("graph", [False, True])
def test_random_numbers_that_cannot_be_drawn_again_are_refused(graph, towers):
    ours = bb.chunked(lambda x: tf.nn.dropout(x, 0.5), micro_batch=4)
    with pytest.raises(ValueError, match="must draw the same random numbers when it runs again"):
        (tf.function(ours) if graph else ours)(towers[3])
    drawn = bb.chunked(lambda x: x + tf.random.stateless_normal(x.shape, [1, 2], dtype=F64), micro_batch=4)
    assert drawn(towers[3]).shape == (N, 5)


@pytest.mark.parametrize("length", [N, 8, 3])
def test_a_length_that_only_the_run_tells(length, towers):
    a, b, scale, x, y = towers
    f, g = (bb.chunked(model, micro_batch=4) for model in (a, b))

    @tf.function(input_signature=[tf.TensorSpec([None, 5], F64)] * 2)
    def run(x, y):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = info_nce(f(x), g(y), scale)
        return [value, *tape.gradient(value, [a.a, a.b, scale, x, b.a, b.b])]

    right = gradients(info_nce, (a, b, scale, x[:length], y[:length]), lambda model: model)
    agree(run(x[:length], y[:length]), right)


@pytest.mark.parametrize("keep", [0, 1])
def test_under_xla(keep, towers):
    right = gradients(info_nce, towers, lambda model: model)
    ours = lambda model: bb.chunked(model, micro_batch=4, keep=keep)  # noqa: E731
    agree(gradients(info_nce, towers, ours, graph=True, jit_compile=True), right)


def test_writing_under_xla_is_refused(towers):
    model = bb.chunked(keras_model(keras.layers.BatchNormalization(dtype="float64")), micro_batch=4)
    with pytest.raises(ValueError, match="cannot run again under XLA"):
        tf.function(lambda x: model(x, training=True), jit_compile=True)(towers[3])


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("keep", [0, 1])
def test_gradients_of_16_bit_variables_add_up_in_float32(graph, keep):
    def gradient(**options):
        w = tf.Variable(tf.ones([1, 1], tf.bfloat16))
        x = tf.fill([512, 1], tf.constant(2.0**-4, tf.bfloat16))

        def run():
            with tf.GradientTape() as tape:
                value = tf.reduce_sum(tf.cast(bb.chunked(lambda x: x @ w, micro_batch=1, **options)(x), tf.float32))
            return tape.gradient(value, w)

        return (tf.function(run) if graph else run)()

    assert float(gradient(keep=keep)[0, 0]) == 32
    assert gradient(keep=keep).dtype == tf.bfloat16
    assert float(gradient(keep=keep, dtype=None)[0, 0]) <= 16, "sums in bfloat16 stop growing"


@pytest.mark.parametrize("graph", [False, True])
def test_rows_of_a_matrix_and_arguments_given_whole(graph, towers):
    q, keys = towers[3:]

    def row_loss(q, labels, keys):
        return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, q @ tf.transpose(keys))

    def run(f):
        with tf.GradientTape() as tape:
            tape.watch([q, keys])
            value = tf.reduce_mean(f(q, tf.range(N), keys))
        return tape.gradient(value, [q, keys])

    ours = bb.chunked(row_loss, micro_batch=3, in_axes=(0, 0, None))
    agree((tf.function(run) if graph else run)(ours), run(row_loss))


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("keep", [0, 2])
def test_what_it_closes_over_has_its_gradient(graph, keep, towers):
    a, _, scale, x, y = towers

    def run(chunk):
        with tf.GradientTape() as tape:
            tape.watch(y)
            factor, keys = tf.exp(scale), tf.transpose(a(y))
            made = chunk(lambda x: factor * a(x) @ keys)(x)
            value = tf.reduce_sum(made * tf.sin(made))
        return tape.gradient(value, [scale, a.a, a.b, y])

    ours = functools.partial(run, lambda f: bb.chunked(f, micro_batch=4, keep=keep))
    agree((tf.function(ours) if graph else ours)(), run(lambda f: f))


@pytest.mark.parametrize("graph", [False, True])
def test_nested_outputs_other_axes_keywords_and_text(graph, towers):
    def f(x, words, *, y, scale):
        ends = tf.strings.length(words)
        return {"sum": tf.reduce_sum(x * scale + y, 0), "both": (tf.transpose(x), (ends, tf.cast(y > 0, tf.int32)))}

    x, y, words = tf.transpose(towers[3]), towers[4][:, 0], ["a" * k for k in range(N)]

    def run(f):
        with tf.GradientTape() as tape:
            tape.watch([x, y])
            made = f(x, words, y=y, scale=2.0)
            value = tf.reduce_sum(made["sum"] ** 2) + tf.reduce_sum(tf.exp(made["both"][0]))
        return made, tape.gradient(value, [x, y])

    ours = functools.partial(run, bb.chunked(f, micro_batch=4, in_axes=(1, 0)))
    (made, grads), (right, right_grads) = (tf.function(ours) if graph else ours)(), run(f)
    tf.nest.assert_same_structure(made, right)
    agree(tf.nest.flatten(made), tf.nest.flatten(right))
    agree(grads, right_grads)


@pytest.mark.parametrize("graph", [False, True])
def test_twice_and_nested(graph, towers):
    a, _, scale, x, _ = towers
    ours = bb.chunked(a, micro_batch=4)

    def run(f):
        with tf.GradientTape() as tape:
            first = f(x)
            value = info_nce(first, f(tf.sin(tf.pad(first, [[0, 0], [0, 2]]))), scale)
        return tape.gradient(value, [a.a, a.b, scale])

    right = run(a)
    for f in (ours, bb.chunked(lambda v: ours(v), micro_batch=6)):
        agree((tf.function(functools.partial(run, f)) if graph else functools.partial(run, f))(), right)


@pytest.mark.parametrize("graph", [False, True])
def test_a_tables_few_rows_stay_few(graph):
    table = tf.Variable(tf.random.stateless_normal([50, 3], [0, 1], dtype=F64))
    ids = tf.constant([1, 2, 2, 7, 1, 9, 2], tf.int32)

    def run(f):
        with tf.GradientTape() as tape:
            value = tf.reduce_sum(f(ids) ** 3)
        return tape.gradient(value, table)

    look_up = lambda ids: tf.gather(table, ids)  # noqa: E731
    ours = functools.partial(run, bb.chunked(look_up, micro_batch=3))
    got = (tf.function(ours) if graph else ours)()
    assert isinstance(got, tf.IndexedSlices)
    agree([got], [run(look_up)])


@pytest.mark.parametrize("graph", [False, True])
def test_it_cannot_be_differentiated_twice(graph, towers):
    a, _, _, x, _ = towers

    def run():
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as tape:
                tape.watch(x)
                value = tf.reduce_sum(bb.chunked(a, micro_batch=4)(x) ** 2)
            first = tape.gradient(value, x)
        return outer.gradient(first, x)

    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        (tf.function(run) if graph else run)()


def test_a_tape_may_be_asked_twice(towers):
    a, _, _, x, _ = towers
    for keep in (0, 2):
        with tf.GradientTape(persistent=True) as tape:
            out = bb.chunked(a, micro_batch=4, keep=keep)(x)
            one, two = tf.reduce_sum(out**2), tf.reduce_sum(tf.sin(out))
        agree([tape.gradient(one, a.a), tape.gradient(two, a.a)], [*_both(a, x)])


def _both(a, x):
    for change in (tf.square, tf.sin):
        with tf.GradientTape() as tape:
            value = tf.reduce_sum(change(a(x)))
        yield tape.gradient(value, a.a)


@pytest.mark.parametrize("where", ["eager", "graph", "function"])
def test_what_was_written_to_since_the_forward_is_refused(where, towers):
    a, _, _, x, _ = towers
    f = bb.chunked(a, micro_batch=4)

    def run(f):
        with tf.GradientTape() as tape:
            value = tf.reduce_sum(f(x))
            a.a.assign_add(tf.ones_like(a.a))
        return tape.gradient(value, a.a)

    given = tf.function(f) if where == "function" else f
    error = RuntimeError if where == "eager" else tf.errors.InvalidArgumentError
    with pytest.raises(error, match="was written to between its forward and its backward"):
        (tf.function(run) if where == "graph" else run)(given)


def test_a_chunked_batch_is_one_micro_batch_of_a_window(towers):
    a, b, scale, x, y = towers
    variables = [a.a, a.b, b.a, b.b, scale]
    acc = bb.Accumulator(tf.keras.optimizers.SGD(0.5), every=2)
    f, g = (bb.chunked(model, micro_batch=4) for model in (a, b))

    @tf.function
    def gradient(f, g, k):
        with tf.GradientTape() as tape:
            value = info_nce(f(x + k), g(y), scale)
        return tape.gradient(value, variables)

    plain = [gradient(a, b, tf.constant(k, F64)) for k in (0, 1)]
    right = [v - 0.5 * (g + 3 * h) / 4 for v, g, h in zip(variables, *plain, strict=True)]
    for k, n in ((0, 1), (1, 3)):
        acc.apply_gradients(zip(gradient(f, g, tf.constant(k, F64)), variables, strict=True), items=n)
    agree(variables, right)


def test_memory_is_that_of_one_piece():
    """Of the traced step, by the package's estimate: two percent of the full batch's."""
    w, v = tf.Variable(tf.ones([16, 512])), tf.Variable(tf.ones([512, 16]))

    def encode(x):
        return tf.nn.gelu(x @ w) @ v

    def estimate(f):
        @tf.function
        def step(x):
            with tf.GradientTape() as tape:
                value = tf.reduce_mean(f(x) ** 2)
            return tape.gradient(value, [w, v])

        return peak(step.get_concrete_function(tf.TensorSpec([16_384, 16])).graph)

    assert estimate(bb.chunked(encode, micro_batch=64)) <= 0.05 * estimate(encode)


def test_auto_takes_the_largest_that_fits_and_says_so(towers, monkeypatch, caplog):
    a, x = towers[0], tf.tile(towers[3], [100, 1])
    monkeypatch.setattr(file, "device_memory", lambda given: Memory(0, 260_000, "the test"))
    ours = bb.chunked(a, micro_batch="auto")
    with caplog.at_level(logging.WARNING, "bigbatch.tensorflow"):
        agree([ours(x), ours(x)], [a(x), a(x)])
    assert len(caplog.messages) == 1
    assert "of a batch of 1,100" in caplog.text
    assert "micro_batch 1,100" not in caplog.text
    monkeypatch.setattr(file, "device_memory", lambda given: Memory(0, 1, "the test"))
    with pytest.raises(MemoryError, match="No micro-batch fits"):
        bb.chunked(a, micro_batch="auto")(x)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m, x: bb.chunked(3, micro_batch=2), TypeError, "function must be a model or a function."),
        (lambda m, x: bb.chunked(m, micro_batch=0), ValueError, "micro_batch must be at least 1."),
        (lambda m, x: bb.chunked(m, micro_batch=2, keep="auto"), ValueError, "keep must be a number of pieces"),
        (lambda m, x: bb.chunked(m, micro_batch=2, dtype="float32"), TypeError, "dtype"),
        (lambda m, x: bb.chunked(m, micro_batch=2, in_axes=None), ValueError, "in_axes must be an integer"),
        (lambda m, x: bb.chunked(m, micro_batch=2, in_axes=(0, 0))(x), ValueError, "There are 1 positional arguments."),
        (lambda m, x: bb.chunked(m, micro_batch=2, in_axes=7)(x), TypeError, "must be an array with a leading"),
        (lambda m, x: bb.chunked(tf.reduce_sum, micro_batch=2)(x), ValueError, "An output must have one entry"),
        (lambda m, x: bb.chunked(lambda x: x[1:], micro_batch=2)(x), ValueError, "The piece had 2 examples."),
        (lambda m, x: bb.chunked(lambda x, y: x, micro_batch=2)(x, x[:4]), ValueError, "of length 11, "),
        (lambda m, x: bb.chunked(lambda x: None, micro_batch=2)(x), TypeError, "must return real tensors"),
        (lambda m, x: bb.chunked(m, micro_batch=2)(tf.ragged.constant([[1], [2, 3]])), TypeError, "dense tensors"),
        (lambda m, x: bb.chunked(m, micro_batch=2)(3.0), ValueError, "The batch holds no arrays"),
    ],
)  # fmt: skip
def test_bad_input(call, error, text, towers):
    with pytest.raises(error) as raised:
        call(towers[0], towers[3])
    assert str(raised.value).startswith(text) or text in str(raised.value)


def test_the_audit_names_it(towers):
    a, b, scale, x, y = towers
    variables = [a.a, a.b, b.a, b.b]
    found = bb.audit(lambda batch: info_nce(a(batch[0]), b(batch[1]), scale), (x, y), variables, micro_batch=4)
    assert [cause.kind for cause in found.causes] == ["coupling"]
    assert "bb.chunked" in found.causes[0].remedy
