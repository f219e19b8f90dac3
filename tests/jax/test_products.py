"""Factors of large weights' gradients, kept by the loop, whose product is the sum: which, when, and correctly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import bigbatch.jax as bb
from bigbatch.fused import jax_deferred

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(8, 3, 40)))
W, V = (jnp.asarray(RNG.normal(size=shape)) / 6 for shape in [(40, 48), (48, 40)])


@jax.custom_jvp
def tanh(x):
    return jnp.tanh(x)


tanh.defjvps(lambda g, y, x: g * (1 - y**2))


def last(params, x):
    return (tanh(x[:, -1] @ params["w"]) @ params["v"]).sum(-1).mean()


def biased(params, x):
    return (tanh(x[:, -1] @ params["w"] + params["b"]) ** 2).mean()


def sequences(params, x):
    return (tanh(x[:, :1] @ params["w"]) ** 2).mean()


def heads(params, x):
    split = jnp.einsum("bd,dhk->bhk", x[:, 0], params["w"].reshape(40, 6, 8))
    return (tanh(split) ** 3).mean()


def turned(params, x):
    return (tanh(x[:, 0] @ params["v"].T) ** 3).mean()


def twice(params, x):
    return (tanh(x[:, 0] @ params["w"]) * (x[:, 1] @ params["w"])).mean()


def tied(params, x):
    return (tanh(x[:, 0] @ params["w"]) @ params["w"].T).sum(-1).mean()


def regularised(params, x):
    return last(params, x) + 0.1 * (params["w"] ** 2).sum()


def inside_jit(params, x):
    return jax.jit(lambda w, x: (tanh(x @ w) ** 2).mean())(params["w"], x[:, 0])


def looked_up(params, x):
    rows = jnp.take(params["v"], (x[:, 0, 0] > 0).astype(int), axis=0)
    return (tanh(rows @ params["w"]) ** 2).mean()


PARAMS = {"w": W, "v": V, "b": jnp.ones(48)}
# Each with how many products there are in its gradient, for micro-batches of one example.
LOSSES = {last: 2, biased: 1, sequences: 1, heads: 1, turned: 1, twice: 2, tied: 2, regularised: 2, inside_jit: 1,
          looked_up: 1}  # fmt: skip


def scans(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from scans(inner)


def both(function, *args):
    """How many factors the loop yields, beside the losses and their items, for the product after it.

    And of how many micro-batches in a row they are kept until they are added to the sums; 1 where that is done of none.
    """
    loop, *inner = scans(jax.make_jaxpr(function)(*args).jaxpr)
    each = loop.params["jaxpr"].jaxpr.outvars  # of one iteration: what is stacked has another shape
    stacked = sum(v.aval.shape != one.aval.shape for v, one in zip(loop.outvars, each, strict=True))
    return stacked - 2, inner[0].params["length"] if inner else 1


def kept(function, *args):
    """The factors that one loop yields, in which is no other."""
    factors, few = both(function, *args)
    assert few == 1
    return factors


def in_a_row(function, *args):
    """The micro-batches of a loop that yields none."""
    factors, few = both(function, *args)
    assert factors == 0
    return few


@pytest.fixture
def in_pieces(monkeypatch):
    """No product is kept until the end, and none is too small to be added in pieces."""
    monkeypatch.setattr(jax_deferred, "SMALLER", 1e9)
    monkeypatch.setattr(jax_deferred, "LARGE", 0)


@pytest.fixture(params=["until the end", "in pieces"])
def factors_kept(request):
    """How many of each product are kept until the end."""
    if request.param == "in pieces":
        request.getfixturevalue("in_pieces")
    return 2 if request.param == "until the end" else 0


def door(loss_fn, micro_batch=1, **options):
    return bb.value_and_grad(loss_fn, micro_batch=micro_batch, **options)


def close(got, wanted, tolerance=1e-13):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("loss_fn", LOSSES, ids=lambda f: f.__name__)
def test_the_gradient_is_the_full_batchs(loss_fn):
    assert kept(door(loss_fn), PARAMS, X) == 2 * LOSSES[loss_fn]
    close(jax.jit(door(loss_fn))(PARAMS, X), jax.value_and_grad(loss_fn)(PARAMS, X))


def test_a_shorter_micro_batch_at_the_end(factors_kept):
    x = jnp.concatenate([X, 2 * X])[:13]
    found = door(last, micro_batch=2)
    assert both(found, PARAMS, x) == (factors_kept, 1 if factors_kept else 3)
    close(jax.jit(found)(PARAMS, x), jax.value_and_grad(last)(PARAMS, x))


# The product of heads is reshaped, which nothing cuts, and beside the gradient of a penalty there is no room.
@pytest.mark.parametrize("loss_fn", LOSSES, ids=lambda f: f.__name__)
def test_in_pieces_the_gradient_is_the_full_batchs(loss_fn, in_pieces):
    assert in_a_row(door(loss_fn), PARAMS, X) == (1 if loss_fn in (heads, regularised) else 8)
    close(jax.jit(door(loss_fn))(PARAMS, X), jax.value_and_grad(loss_fn)(PARAMS, X))


@pytest.mark.parametrize(("examples", "few"), [(16, 4), (18, 3), (21, 2), (22, 1), (240, 4)])
def test_as_many_in_a_row_as_there_is_room_for(examples, few, in_pieces):
    x = jnp.asarray(RNG.normal(size=(examples, 3, 40)))
    found = door(last, micro_batch=2)
    assert in_a_row(found, PARAMS, x) == few
    close(jax.jit(found)(PARAMS, x), jax.value_and_grad(last)(PARAMS, x))


def test_a_huge_product_is_added_in_pieces_whatever_its_factors_take(monkeypatch):
    monkeypatch.setattr(jax_deferred, "HUGE", W.nbytes)
    x = jnp.asarray(RNG.normal(size=(8 * 16, 3, 40)))  # of sixteen examples the factors take nearly as much
    found = door(last, micro_batch=16)
    pieces = [loop.params["length"] for loop in scans(jax.make_jaxpr(found)(PARAMS, x).jaxpr)]
    assert pieces == [8, 4, 4]  # micro-batches, and in each the pieces of two products
    close(jax.jit(found)(PARAMS, x), jax.value_and_grad(last)(PARAMS, x))


def test_whole_numbers_are_exact(factors_kept):
    """Sums of whole numbers do not depend on their order."""
    x = jnp.asarray(RNG.integers(-8, 8, (16, 64)), jnp.float32)
    w = jnp.asarray(RNG.integers(-8, 8, (64, 64)), jnp.float32)

    def loss_fn(w, x):
        return ((x @ w) ** 2).sum(-1).mean()

    assert both(door(loss_fn), w, x) == (factors_kept, 1 if factors_kept else 16)
    assert (door(loss_fn)(w, x)[1] == 2 * x.T @ (x @ w) / 16).all()


def test_micro_batches_weigh_by_their_items_and_padding_alone_is_nothing(factors_kept):
    mask = jnp.asarray([1, 1, 1, 0, 0, 1, 0, 1, 1, 1, 0, 1, 0, 0, 1, 1])  # dealt by eights: two of them are empty

    x = jnp.concatenate([X, 2 * X])

    def masked(params, x, mask):
        losses = (tanh(x[:, 0] @ params["w"] / mask.sum()) ** 2).sum(-1)
        return (losses * mask).sum() / mask.sum(), mask.sum()

    def expected(params):
        parts = [masked(params, x[i::8], mask[i::8]) for i in range(8)]
        return sum(n * loss for loss, n in parts if n) / mask.sum()

    mask = mask.at[3].set(0).at[11].set(0)
    assert any(mask[i::8].sum() == 0 for i in range(8))
    found = door(masked, has_items=True, micro_batch=2, in_axes=(None, 0, 0))
    assert both(found, PARAMS, x, mask) == (factors_kept, 1 if factors_kept else 8)
    close(jax.jit(found)(PARAMS, x, mask), jax.value_and_grad(expected)(PARAMS))


def test_of_another_dtype_than_the_sums_none_is_kept():
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    assert kept(door(last), half, X.astype(jnp.bfloat16)) == 0
    assert kept(door(last, dtype=None), half, X.astype(jnp.bfloat16)) == 4


def test_none_is_kept_where_it_does_not_pay(monkeypatch):
    assert kept(door(last), PARAMS, X[:3]) == 0  # of few micro-batches
    assert kept(door(last), PARAMS, jnp.concatenate([X] * 2)) == 2  # what 16 keep fills the room with one
    assert kept(door(last), PARAMS, jnp.concatenate([X] * 4)) == 0  # what 32 keep would be more than the sum
    assert kept(door(last, micro_batch=4), PARAMS, jnp.concatenate([X] * 2)) == 0  # factors that are not small
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert kept(door(last), PARAMS, X) == 0  # on several devices


def test_a_gradient_that_is_read_as_well_is_made():
    def loss_fn(w, x):
        return (tanh(x @ w) ** 2).mean()

    def micro(count, x):
        _, grad = jax.value_and_grad(loss_fn)(W, x)
        return (grad, None), count + (grad**2).sum(), None

    x = X[:, :1]
    sums, squares, _ = jax_deferred.scan(micro, jnp.zeros_like(W), 0.0, x)
    each = [jax.grad(loss_fn)(W, one) for one in x]
    close((sums, squares), (sum(each), sum((g**2).sum() for g in each)))


def test_grad_and_vmap_of_it(factors_kept):
    def penalty(of, params):
        return sum((g**2).sum() for g in jax.tree.leaves(of(params, X)[1]))

    assert both(door(last), PARAMS, X) == (2 * factors_kept, 1 if factors_kept else 8)
    close(
        jax.grad(lambda p: penalty(door(last), p))(PARAMS),
        jax.grad(lambda p: penalty(jax.value_and_grad(last), p))(PARAMS),
    )
    several = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), PARAMS)
    axes = (0, None)
    close(jax.vmap(door(last), axes)(several, X), jax.vmap(jax.value_and_grad(last), axes)(several, X))


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 6])
def test_memory_is_no_more_than_the_scan_by_hands(depth, clipped, monkeypatch):
    monkeypatch.setattr(jax_deferred, "LARGE", 1 << 20)
    params = [jnp.ones((512, 512), jnp.float32) / 512] * depth

    def loss_fn(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return (x**2).mean()

    def by_hand(params, x):
        def body(sums, part):
            return jax.tree.map(jnp.add, sums, jax.grad(loss_fn)(params, part)), None

        sums, _ = jax.lax.scan(body, jax.tree.map(jnp.zeros_like, params), x.reshape(-1, 8, 512))
        return jax.tree.map(lambda s: s / (len(x) // 8), sums)

    def ours(params, x):
        return door(loss_fn, micro_batch=8)(params, x)[1]

    def needs(gradient, n):
        def step(params, x):
            grads = gradient(params, x)
            norm = sum((g**2).sum() for g in grads) if clipped else 1e3
            return jax.tree.map(lambda p, g: p - g / norm, params, grads)

        x = jnp.ones((8 * n, 512), jnp.float32)
        memory = jax.jit(step, donate_argnums=0).lower(params, x).compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.argument_size_in_bytes - x.nbytes

    assert kept(door(loss_fn, micro_batch=8), params, jnp.ones((64, 512), jnp.float32)) == 2 * depth
    assert (
        kept(door(loss_fn, micro_batch=8), params, jnp.ones((192, 512), jnp.float32)) == 2 * {1: 1, 2: 1, 6: 4}[depth]
    )
    for n in (2, 8, 16, 24, 1024):
        assert needs(ours, n) <= 1.02 * needs(by_hand, n), n
    assert needs(ours, 1024) <= 1.02 * needs(ours, 2)


def test_few_rows_of_a_table_are_added_where_the_sum_stands():
    """By their items, and with NaN where there are none."""
    words = jnp.asarray(RNG.integers(12, size=(8, 5)))  # some of them several times
    mask = jnp.asarray([[1, 1, 0, 1, 0], [0] * 5, *[[1] * 5] * 6])
    table = jnp.asarray(RNG.normal(size=(50, 6)))

    def loss_fn(table, words, mask):
        scores = tanh(table[words] @ table.T).sum(-1)
        return (scores * mask).sum() / mask.sum(), mask.sum()

    found = door(loss_fn, has_items=True, in_axes=(None, 0, 0))
    (loop,) = scans(jax.make_jaxpr(found)(table, words, mask).jaxpr)
    made = {v: equation.primitive.name for equation in loop.params["jaxpr"].jaxpr.eqns for v in equation.outvars}
    into = [
        made.get(equation.invars[0])
        for equation in loop.params["jaxpr"].jaxpr.eqns
        if equation.primitive.name == "scatter-add"
    ]
    assert into == ["broadcast_in_dim", "add"]  # the first, into zeros, is read by nobody
    close(jax.jit(found)(table, words, mask), jax.value_and_grad(lambda t: loss_fn(t, words, mask)[0])(table))
