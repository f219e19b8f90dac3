"""`chunked`: the values and gradients of the function itself, for losses that compare all examples of a batch."""

import importlib
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec as P

import bigbatch.jax as bb
from bigbatch.engines.jax_estimate import needs_of
from bigbatch.host import Memory

file = importlib.import_module("bigbatch.jax.chunked")  # the package has its function under this name
N = 11


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def towers():
    """Two encoders' parameters, and a batch of pairs."""
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def params():
        return {
            "w": jax.random.normal(next(keys), (5, 7)),
            "v": jax.random.normal(next(keys), (7, 3)),
            "scale": jnp.array(0.3),
        }

    return params(), params(), jax.random.normal(next(keys), (N, 5)), jax.random.normal(next(keys), (N, 5))


def encode(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def normalized(x):
    return x / jnp.linalg.norm(x, axis=1, keepdims=True)


def info_nce(a, b, scale):
    logits = jnp.exp(scale) * normalized(a) @ normalized(b).T
    return -(jnp.diag(jax.nn.log_softmax(logits)) + jnp.diag(jax.nn.log_softmax(logits, axis=0))).mean() / 2


def siglip(a, b, scale):
    signs = 2 * jnp.eye(len(a)) - 1
    return -jax.nn.log_sigmoid(signs * (jnp.exp(scale) * normalized(a) @ normalized(b).T - 1)).mean()


def supervised(a, b, scale):
    labels = jnp.arange(len(a)) % 3
    same = (labels[:, None] == labels[None]) & ~jnp.eye(len(a), dtype=bool)
    logits = jnp.where(jnp.eye(len(a), dtype=bool), -1e9, jnp.exp(scale) * normalized(a) @ normalized(a).T)
    return -(jnp.where(same, jax.nn.log_softmax(logits), 0).sum(1) / same.sum(1)).mean() + (b**2).mean()


def triplet(a, b, scale):
    distances = ((a[:, None] - b[None]) ** 2).sum(-1)
    positive = jnp.diag(distances)
    hardest = jnp.where(jnp.eye(len(a), dtype=bool), jnp.inf, distances).min(1)
    return jax.nn.softplus(positive - hardest + scale).mean()


def barlow(a, b, scale):
    a, b = ((x - x.mean(0)) / x.std(0) for x in (a, b))
    return ((jnp.exp(scale) * a.T @ b / len(a) - jnp.eye(a.shape[1])) ** 2).sum()


def vicreg(a, b, scale):
    covariance = jnp.cov(a.T)
    spread = (
        jax.nn.relu(1 - a.std(0)).mean() + jnp.exp(scale) * (covariance - jnp.diag(jnp.diag(covariance))).sum() ** 2
    )
    return ((a - b) ** 2).mean() + spread


def ranking(a, b, scale):
    scores = (a * b).sum(1)
    return jax.nn.softplus(
        -(scores[:, None] - scores[None]) * jnp.sign(jnp.arange(len(a))[:, None] - jnp.arange(len(a)))
    ).mean()


LOSSES = [info_nce, siglip, supervised, triplet, barlow, vicreg, ranking]


def of(loss, f, tied=False):
    def loss_fn(p, q, x, y):
        return loss(f(p, x), f(p if tied else q, y), p["scale"])

    return jax.value_and_grad(loss_fn, argnums=(0, 1, 2, 3))


def agree(got, right, relative=1e-12):
    for g, r in zip(jax.tree.leaves(got), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(
            np.asarray(g, float), np.asarray(r, float), rtol=0, atol=relative * max(1e-3, float(jnp.abs(r).max()))
        )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_it_is_the_full_batchs_gradient(loss, tied, towers):
    right = of(loss, encode, tied)(*towers)
    agree(jax.jit(of(loss, bb.chunked(encode, micro_batch=4), tied))(*towers), right)


@pytest.mark.parametrize(
    ("micro_batch", "keep"),
    [(1, 0), (1, 2), (1, "auto"), (3, 0), (3, 1), (3, 9), (10, 0), (10, 1), (10, "auto"), (11, 0), (50, 2)],
)
def test_any_cut_and_any_number_of_kept_pieces(micro_batch, keep, towers):
    right = of(info_nce, encode)(*towers)
    agree(of(info_nce, bb.chunked(encode, micro_batch=micro_batch, keep=keep))(*towers), right)


def test_what_is_kept_does_not_run_again(towers):
    """A kept piece's tanh is in the program once, and one that runs again twice: counted in loops of known length."""

    def tanhs(keep):
        program = jax.jit(of(info_nce, bb.chunked(encode, micro_batch=4, keep=keep), True)).trace(*towers).jaxpr
        return _count(program.jaxpr, "tanh")

    assert tanhs(0) == 2 * 2 * 3, "two towers, twice, of two full pieces and one of three examples"
    assert tanhs(1) == 2 * (2 * 2 + 1)
    assert tanhs(2) == 2 * (2 + 1 + 1)
    assert tanhs(3) == tanhs("auto") == 2 * 3


def _count(jaxpr, name):
    total = 0
    for equation in jaxpr.eqns:
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        inner = sum(_count(one, name) for one in jaxprs_in_params(equation.params))
        total += times * inner + (equation.primitive.name == name)
    return total


def test_rows_of_a_matrix_in_pieces(towers):
    _, _, q, k = towers

    def row_loss(q, labels, keys):
        return -jnp.take_along_axis(jax.nn.log_softmax(q @ keys.T), labels[:, None], 1)[:, 0]

    labels = jnp.arange(N)

    def loss(rows):
        return lambda q, k: rows(q, labels, k).mean()

    rows = bb.chunked(row_loss, micro_batch=3, in_axes=(0, 0, None))
    agree(jax.value_and_grad(loss(rows), (0, 1))(q, k), jax.value_and_grad(loss(row_loss), (0, 1))(q, k))


def test_dropout_is_that_of_the_same_pieces_without_recomputation():
    def noisy(x, key):
        return x * jax.random.bernoulli(key, 0.5, x.shape)

    x, weights = jax.random.normal(jax.random.key(0), (2, N, 64))

    def run(keep):
        f = bb.chunked(noisy, micro_batch=2, in_axes=(0, None), keep=keep)
        return jax.jit(jax.value_and_grad(lambda x: (f(x, jax.random.key(3)) * weights).max()))(x), f(
            x, jax.random.key(3)
        )

    again, kept = run(0), run(9)
    jax.tree.map(np.testing.assert_array_equal, again, kept)
    assert len(np.unique(np.asarray(again[1] == 0), axis=0)) == N, "each piece draws its own"
    gradient = jax.grad(
        lambda x: (bb.chunked(noisy, micro_batch=2, in_axes=(0, None))(x, jax.random.key(3)) * weights).sum()
    )(x)
    np.testing.assert_array_equal(gradient, jnp.where(again[1] == 0, 0, weights))


def test_nested_outputs_in_the_batchs_order_along_other_axes(towers):
    def f(x, y):
        return {"sum": (x + y[:, None]).sum(1), "both": (x, y)}

    x, y = jnp.arange(33.0).reshape(3, N), jnp.arange(float(N))
    got = bb.chunked(lambda x, y: f(x.T, y), micro_batch=4, in_axes=(1, 0))(x, y)
    jax.tree.map(np.testing.assert_array_equal, got, f(x.T, y))


@pytest.mark.parametrize("transform", ["hessian", "vmap", "jacfwd", "twice in one graph", "nested"])
def test_transformations(transform, towers):
    p, q, x, y = towers
    ours = bb.chunked(encode, micro_batch=4)

    def loss(f):
        return lambda p: info_nce(f(p, x), f(q, y), p["scale"])

    if transform in ("hessian", "jacfwd"):
        change = getattr(jax, transform)
        agree(change(loss(ours))(p), change(loss(encode))(p), 1e-11)
    elif transform == "vmap":
        several = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), p)
        agree(jax.vmap(jax.grad(loss(ours)))(several), jax.vmap(jax.grad(loss(encode)))(several))
    elif transform == "nested":
        agree(jax.grad(loss(bb.chunked(ours, micro_batch=7)))(p), jax.grad(loss(encode))(p))
    else:

        def twice(f):
            return lambda p: info_nce(f(p, x), f(p, jnp.sin(jnp.pad(f(p, x), ((0, 0), (0, 2))))), p["scale"])

        agree(jax.grad(twice(ours))(p), jax.grad(twice(encode))(p))


def test_gradients_of_16_bit_parameters_add_up_in_float32():
    w = jnp.ones((1, 1), jnp.bfloat16)
    x = jnp.full((4096, 1), 2.0**-6, jnp.bfloat16)

    def grad(**options):
        return jax.grad(
            lambda w: bb.chunked(lambda w, x: x @ w, micro_batch=1, **options)(w, x).astype(jnp.float32).sum()
        )(w)

    assert grad() == 64
    assert grad().dtype == jnp.bfloat16
    assert grad(dtype=None) < 16, "sums in bfloat16 stop growing"


def test_it_needs_two_percent_of_the_full_batchs_memory():
    n, width = 16_384, 64
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((16, width), (width, 16), (n, 16), (n, 16))]

    def program(pieces):
        def encode(w, v, x):
            return jax.nn.gelu(x @ w) @ v

        def row_loss(a, labels, b):
            return -jnp.take_along_axis(jax.nn.log_softmax(a @ b.T), labels[:, None], 1)[:, 0]

        f = bb.chunked(encode, micro_batch=256, in_axes=(None, None, 0)) if pieces else encode
        rows = bb.chunked(row_loss, micro_batch=64, in_axes=(0, 0, None)) if pieces else row_loss

        def loss(w, v, x, y):
            return rows(f(w, v, x), jnp.arange(n), f(w, v, y)).mean()

        return jax.jit(jax.grad(loss, (0, 1))).trace(*shapes)

    assert needs_of(program(True)) <= 0.02 * needs_of(program(False))


def test_auto_takes_the_largest_that_fits_and_says_so(towers, monkeypatch, caplog):
    p, q, x, y = towers
    x, y = (jnp.tile(v, (100, 1)) for v in (x, y))
    monkeypatch.setattr(file, "device_memory", lambda: Memory(0, 200_000, "the test"))
    ours = bb.chunked(encode, micro_batch="auto")
    with caplog.at_level(logging.WARNING, "bigbatch.jax"):
        got = of(info_nce, ours)(p, q, x, y)
        of(info_nce, ours)(p, q, x, y)
    assert len(caplog.messages) == 1
    assert "of a batch of 1,100" in caplog.text
    assert "micro_batch 1,100" not in caplog.text
    agree(got, of(info_nce, encode)(p, q, x, y), 1e-11)
    monkeypatch.setattr(file, "device_memory", lambda: Memory(0, 1, "the test"))
    with pytest.raises(MemoryError, match="No micro-batch fits"):
        bb.chunked(encode, micro_batch="auto")(p, x)


def test_on_a_mesh_and_inside_shard_map(towers):
    p, q, x, y = towers
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(p, q, x, y):
        f = bb.chunked(encode, micro_batch=4)
        a, b = (jax.lax.all_gather(f(params, v), "data", tiled=True) for params, v in ((p, x), (q, y)))
        return jax.lax.pmean(info_nce(a, b, p["scale"]), "data")

    spread = jax.shard_map(local, mesh=mesh, in_specs=(P(), P(), P("data"), P("data")), out_specs=P())
    agree(jax.value_and_grad(spread, (0, 1, 2, 3))(p, q, x, y), of(info_nce, encode)(p, q, x, y))


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: bb.chunked(3, micro_batch=2), TypeError, "function must be a function. Received: function=3 (int)."),
        (lambda: bb.chunked(encode, micro_batch=0), ValueError, "micro_batch must be at least 1."),
        (lambda: bb.chunked(encode, micro_batch=2, keep=-1), ValueError, "keep must be a number of pieces"),
        (lambda: bb.chunked(encode, micro_batch=2, in_axes=0), TypeError, "in_axes must be a tuple"),
        (lambda: bb.chunked(lambda p, x: x.sum(), micro_batch=2)({}, jnp.ones((5, 2))), ValueError,
         "An output must have one entry an example along its leading dimension. Received: output=shape ()"),
        (lambda: bb.chunked(lambda x, y: x, micro_batch=2, in_axes=(0, 0))(jnp.ones(5), jnp.ones(4)), ValueError,
         "The leaves of a batch must have the same length. Received: x of length 5, y of length 4."),
    ],
)  # fmt: skip
def test_bad_input(make, error, text):
    with pytest.raises(error) as raised:
        make()
    assert text in str(raised.value)
