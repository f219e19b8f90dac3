"""What only JAX's split door has: its signature, its outputs, its transformations, its compiler."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bigbatch.jax as bb
from conformance.adapters.jax import Counts

rng = np.random.default_rng(0)
PARAMS = {"a": jnp.asarray(rng.normal(size=(6, 5))), "b": jnp.asarray(rng.normal(size=5))}
X, Y = jnp.asarray(rng.normal(size=(11, 6))), jnp.asarray(rng.normal(size=11))
AXES = (None, 0, 0)


def loss_fn(params, x, y):
    return ((jnp.tanh(x @ params["a"]) @ params["b"] - y) ** 2).mean()


def close(got, wanted, tolerance=1e-13):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 5, 10, 11, 64, np.int64(3)])
def test_any_micro_batch_is_the_full_batch(micro_batch):
    ours = jax.jit(bb.value_and_grad(loss_fn, micro_batch=micro_batch, in_axes=AXES))(PARAMS, X, Y)
    close(ours, jax.value_and_grad(loss_fn)(PARAMS, X, Y))


def test_a_batch_that_fits_is_jaxs_own_program():
    ours = jax.make_jaxpr(bb.value_and_grad(loss_fn, micro_batch=11, in_axes=AXES))(PARAMS, X, Y)
    assert str(ours) == str(jax.make_jaxpr(jax.value_and_grad(loss_fn))(PARAMS, X, Y))
    got = jax.jit(bb.value_and_grad(loss_fn, micro_batch=11, in_axes=AXES))(PARAMS, X, Y)
    wanted = jax.jit(jax.value_and_grad(loss_fn))(PARAMS, X, Y)
    assert all(map(np.array_equal, jax.tree.leaves(got), jax.tree.leaves(wanted)))


def test_argnums_of_several_arguments():
    def f(a, batch, b, *, scale):
        return scale * ((jnp.tanh(batch["x"] @ a) @ b - batch["y"]) ** 2).mean()

    args = PARAMS["a"], {"x": X, "y": Y, "none": None}, PARAMS["b"]
    for argnums in (0, 2, (0, 2), (2, 0)):
        ours = bb.value_and_grad(f, argnums, micro_batch=4, in_axes=(None, 0, None))(*args, scale=3.0)
        close(ours, jax.value_and_grad(f, argnums)(*args, scale=3.0))


def test_axes_are_said_leaf_by_leaf():
    def f(params, batch):
        return loss_fn(params, batch["x"].T + batch["shift"], batch["y"])

    batch = {"x": X.T, "y": Y, "shift": jnp.ones(6)}
    for axis in (1, -1):
        axes = (None, {"x": axis, "y": 0, "shift": None})
        close(bb.value_and_grad(f, micro_batch=3, in_axes=axes)(PARAMS, batch), jax.value_and_grad(f)(PARAMS, batch))


def test_examples_are_dealt_in_turn_and_the_tail_is_last():
    def f(p, seen, x):
        return p * x.sum(), jax.lax.dynamic_update_slice(jnp.roll(seen, -2), x, (2 * 3 - 2,))[: len(seen)]

    door = bb.value_and_grad(f, has_aux=True, micro_batch=2, in_axes=(None, None, 0), aux=bb.carry(1))
    (_, seen), _ = door(1.0, jnp.zeros(6), jnp.arange(6.0))
    assert seen.tolist() == [0, 3, 1, 4, 2, 5]
    first = bb.value_and_grad(lambda p, x: (p * x.sum(), x[0]), has_aux=True, micro_batch=3, aux="sum")
    (_, total), _ = first(1.0, jnp.asarray([1.0, 10, 100, 1e3, 1e4, 1e5, 1e6]))
    assert total == 1 + 10 + 1e6


@pytest.mark.parametrize("length", [8, 11])
def test_outputs(length):
    def f(params, x, y):
        predicted = jnp.tanh(x @ params["a"]) @ params["b"]
        outputs = {
            "each": (predicted, {"y": y}),
            "mean": jnp.abs(predicted - y).mean(),
            "count": (predicted > y).sum(),
            "any": jnp.ones((3, len(x)), jnp.bfloat16).sum(1),
        }
        return ((predicted - y) ** 2).mean(), outputs

    aux = {"each": "concatenate", "mean": "mean", "count": "sum", "any": "sum"}
    door = jax.jit(bb.value_and_grad(f, has_aux=True, micro_batch=4, in_axes=AXES, aux=aux))
    (loss, outputs), grads = door(PARAMS, X[:length], Y[:length])
    (wanted, expected), wanted_grads = jax.value_and_grad(f, has_aux=True)(PARAMS, X[:length], Y[:length])
    close((loss, outputs, grads), (wanted, expected, wanted_grads))
    assert outputs["count"].dtype == expected["count"].dtype
    assert outputs["any"].dtype == jnp.bfloat16


def test_a_mean_weighs_by_items():
    def f(w, x, mask):
        mean = (w * x * mask).sum() / mask.sum()
        return (mean, mask.sum()), mean

    mask = jnp.asarray([1, 1, 1, 0, 1, 0, 1, 1, 0, 1, 1])
    door = bb.value_and_grad(f, has_aux=True, has_items=True, micro_batch=4, in_axes=AXES, aux="mean")
    (loss, mean), _ = door(2.0, Y, mask)
    assert float(loss) == pytest.approx(float(2 * (Y * mask).sum() / 8), rel=1e-14)
    assert float(mean) == pytest.approx(float(loss), rel=1e-14)


def test_state_is_carried_from_micro_batch_to_micro_batch():
    def f(w, state, x):
        state = {"n": state["n"] + 1, "last": x.sum()}
        return (w * x).mean(), (state, x)

    door = bb.value_and_grad(f, has_aux=True, micro_batch=2, in_axes=(None, None, 0), aux=(bb.carry(1), "concatenate"))
    (_, (state, x)), _ = jax.jit(door)(1.0, {"n": 5, "last": 0.0}, jnp.arange(7.0))
    assert state == {"n": 9, "last": 6.0}
    assert x.tolist() == list(range(7))


@pytest.mark.parametrize("shape", [(), (3,)])
def test_each_micro_batch_draws_its_own(shape):
    def f(w, x, keys):
        draws = jax.vmap(jax.random.uniform)(keys.reshape(-1)).sum()
        return (w * x).mean(), draws

    key = jax.random.key(0)
    keys = jax.random.split(key, shape) if shape else key
    door = bb.value_and_grad(f, has_aux=True, micro_batch=2, in_axes=(None, 0, None), aux="sum")
    (_, total), _ = door(1.0, jnp.ones(5), keys)
    folded = [jax.vmap(jax.random.fold_in, (0, None))(keys.reshape(-1), i) for i in range(3)]
    assert total == sum(jax.vmap(jax.random.uniform)(k).sum() for k in folded)


def test_a_key_an_example_is_cut_like_other_leaves():
    def f(w, batch):
        x, keys = batch
        return (w * x * jax.vmap(jax.random.uniform)(keys)).mean()

    batch = jnp.arange(6.0), jax.random.split(jax.random.key(0), 6)
    close(bb.value_and_grad(f, micro_batch=4)(1.0, batch), jax.value_and_grad(f)(1.0, batch))


class TestTerms:
    """Tokens for the language loss, micro-batches for the router's."""

    mask = jnp.asarray([1, 1, 1, 0, 1, 0, 1, 1])

    def terms(self, params, x, mask):
        losses = (jnp.tanh(x @ params["a"]) @ params["b"]) ** 2
        router = (x @ params["a"]).std()
        return {"language": ((losses * mask).sum() / mask.sum(), mask.sum()), "router": (router, 1)}

    def expected(self, params):
        """By the law, term by term, on micro-batches dealt by hand."""
        parts = [self.terms(params, X[:8][i::2], self.mask[i::2]) for i in range(2)]
        language = sum(n * loss for loss, n in (p["language"] for p in parts)) / self.mask.sum()
        return {"language": language, "router": sum(p["router"][0] for p in parts) / 2}

    @pytest.mark.parametrize("jit", [True, False])
    def test_each_has_its_own_denominator(self, jit):
        door = bb.value_and_grad(self.terms, micro_batch=4, in_axes=AXES)
        means, grads = (jax.jit(door) if jit else door)(PARAMS, X[:8], self.mask)
        close(means, self.expected(PARAMS))
        close(grads, jax.grad(lambda p: sum(self.expected(p).values()))(PARAMS))

    def test_one_micro_batch(self):
        means, grads = bb.value_and_grad(self.terms, micro_batch=8, in_axes=AXES)(PARAMS, X[:8], self.mask)
        whole = {name: loss for name, (loss, _) in self.terms(PARAMS, X[:8], self.mask).items()}
        close(means, whole)
        close(grads, jax.grad(lambda p: sum(v for v, _ in self.terms(p, X[:8], self.mask).values()))(PARAMS))

    def test_counting_the_items_leaves_the_model_out(self):
        """The pass for the denominators is compiled to no matrix product and no tanh."""

        def dots(f):
            return len(re.findall(r" (?:dot|tanh)\(", jax.jit(f).lower(PARAMS, X[:8], self.mask).compile().as_text()))

        pair = lambda *args: self.terms(*args)["language"]  # noqa: E731
        one = bb.value_and_grad(pair, has_items=True, micro_batch=4, in_axes=AXES)
        both = bb.value_and_grad(lambda *args: {"language": self.terms(*args)["language"]}, micro_batch=4, in_axes=AXES)
        assert dots(both) == dots(one) > 0

    def test_a_term_without_items_in_the_window_counts_for_nothing(self):
        def f(w, x, mask):
            masked = (w * x * mask).sum() / jnp.maximum(mask.sum(), 1)
            return {"masked": (masked, mask.sum()), "all": ((w * x).mean(), len(x))}

        _, grad = bb.value_and_grad(f, micro_batch=2, in_axes=AXES)(1.0, jnp.arange(4.0), jnp.zeros(4))
        assert grad == 1.5


class TestTransformations:
    door = staticmethod(bb.value_and_grad(loss_fn, micro_batch=4, in_axes=AXES))

    def test_grad_of_it(self):
        """A gradient penalty: the derivative of the gradient's norm."""

        def penalty(of, params):
            return sum((g**2).sum() for g in jax.tree.leaves(of(params, X, Y)[1]))

        ours = jax.grad(functools.partial(penalty, self.door))(PARAMS)
        close(ours, jax.grad(functools.partial(penalty, jax.value_and_grad(loss_fn)))(PARAMS))

    def test_vmap_of_it(self):
        several = jax.tree.map(lambda p: jnp.stack([p, 2 * p, -p]), PARAMS)
        ours = jax.vmap(self.door, (0, None, None))(several, X, Y)
        close(ours, jax.vmap(jax.value_and_grad(loss_fn), (0, None, None))(several, X, Y))

    def test_checkpoint_in_it_and_around_it(self):
        inside = bb.value_and_grad(jax.checkpoint(loss_fn), micro_batch=4, in_axes=AXES)
        wanted = jax.value_and_grad(loss_fn)(PARAMS, X, Y)
        close(jax.jit(inside)(PARAMS, X, Y), wanted)
        close(jax.jit(jax.checkpoint(self.door))(PARAMS, X, Y), wanted)

    def test_the_scan_is_one_and_its_carry_is_not_copied(self):
        def step(params, x, y):
            return jax.tree.map(jnp.subtract, params, self.door(params, x, y)[1])

        big = {"a": jnp.ones((64, 256)), "b": jnp.ones(256)}
        args = big, jnp.ones((32, 64)), jnp.ones(32)
        compiled = jax.jit(step, donate_argnums=0).lower(*args).compile()
        memory = compiled.memory_analysis()
        size = big["a"].nbytes
        assert memory.alias_size_in_bytes >= size  # the parameters' memory was given up, and used
        assert memory.temp_size_in_bytes < 2.3 * size  # the sum and one micro-batch's gradient: no second sum
        assert str(jax.make_jaxpr(self.door)(*args)).count("scan[") == 1

    def test_a_second_window_compiles_nothing(self):
        door = jax.jit(bb.value_and_grad(masked_loss, has_items=True, micro_batch=4, in_axes=AXES))
        lengths = [11, 12, 5, 1]
        x = np.pad(X, ((0, 1), (0, 0)))
        windows = [(x, (np.arange(12) < n).astype(float)) for n in lengths]
        jax.block_until_ready(door(PARAMS, *windows[0]))
        with Counts() as counts:
            results = [door(PARAMS, *window) for window in windows]
        assert (counts.compiled, counts.waits) == (0, 0)
        for n, result in zip(lengths, results, strict=True):
            close(result, jax.value_and_grad(lambda *a: masked_loss(*a)[0])(PARAMS, x[:n], jnp.ones(n)))


def masked_loss(params, x, mask):
    losses = (jnp.tanh(x @ params["a"]) @ params["b"]) ** 2
    return (losses * mask).sum() / mask.sum(), mask.sum()  # 0 / 0 in a micro-batch of padding


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_the_full_batchs_own_error(dtype):
    """At N = 256; adding up in the parameters' own dtype would be off by percents."""
    n, d = 256, 64
    x = jnp.asarray(1 + np.random.default_rng(0).normal(size=(n, d)), dtype)
    w = jnp.zeros(d, dtype)
    exact = np.asarray(x, np.float64).mean(0)

    def error(micro_batch, **options):
        door = bb.value_and_grad(lambda w, x: (x @ w).astype(jnp.float32).mean(), micro_batch=micro_batch, **options)
        _, grads = door(w, x)
        assert grads.dtype == dtype
        return np.linalg.norm(np.asarray(grads, np.float64) - exact) / np.linalg.norm(exact)

    full = error(n)
    assert error(1) <= 1.05 * full
    assert error(1, dtype=None) > 5 * full
    assert error(4, dtype=jnp.float64) <= 1.05 * full


def test_a_loss_in_half_precision_is_reported_in_float32():
    loss, _ = bb.value_and_grad(lambda w, x: (w * x).mean(), micro_batch=1)(
        jnp.ones((), jnp.bfloat16), jnp.ones(512, jnp.bfloat16)
    )
    assert loss.dtype == jnp.float32
    assert loss == 1.0


def test_no_items_at_all_is_not_a_number():
    loss, grads = bb.value_and_grad(masked_loss, has_items=True, micro_batch=4, in_axes=AXES)(PARAMS, X, jnp.zeros(11))
    assert np.isnan(loss)
    assert np.isnan(grads["b"]).all()


def mistake(match, kind=ValueError, args=(PARAMS, X, Y), f=loss_fn, **options):
    """At trace time: nothing runs."""
    with pytest.raises(kind, match=match):
        jax.eval_shape(bb.value_and_grad(f, **{"micro_batch": 4, "in_axes": AXES, **options}), *args)


class TestMistakes:
    def test_lengths_by_the_arguments_names(self):
        mistake(r"Received: x of length 11, y of length 7\.", args=(PARAMS, X, Y[:7]))
        mistake(r"batch\['y'\]\[1\] of length 7", f=lambda p, batch: 0.0, in_axes=(None, 0),
                args=(PARAMS, {"x": X, "y": (Y, Y[:7])}))  # fmt: skip
        mistake(r"args\[1\] of length 11, args\[2\] of length 7", f=lambda *args: 0.0, args=(PARAMS, X, Y[:7]))

    def test_a_scalar_leaf(self):
        mistake(r"leading dimension\. Received: y=shape \(\), dtype float64", TypeError, args=(PARAMS, X, Y[0]))
        with pytest.raises(TypeError, match=r"leading dimension\. Received: y=3\.0 \(float\)"):
            bb.value_and_grad(loss_fn, micro_batch=4, in_axes=AXES)(PARAMS, X, 3.0)

    def test_arguments_that_are_not_there(self):
        mistake(r"one entry for each positional argument.*in_axes=\(None, 0, 0, 0\) for 3", in_axes=(*AXES, 0))
        mistake(r"one entry for each positional argument.*in_axes=\(None, 0\) for 3", in_axes=(None, 0))
        mistake(r"Received: argnums=3 for 3 positional arguments\.", argnums=3)
        mistake(r"carry=7 for 3", f=lambda *a: (loss_fn(*a), 0), has_aux=True, aux=bb.carry(7))

    def test_axes_that_are_not_there(self):
        mistake(r"in_axes must name an axis.*y=shape \(11,\).*Its axis is 1", in_axes=(None, 0, 1))
        mistake("integer or None", TypeError, in_axes=(None, 0, "0"))
        mistake("nested as the arguments are", in_axes=(None, [0, 0], 0))
        mistake("argnums goes whole to every micro-batch", argnums=1)

    def test_losses(self):
        for f in (lambda p, x, y: y.astype(int).sum(), lambda p, x, y: y, lambda p, x, y: 3.0):
            mistake("The loss must be a scalar of a floating type", f=f)
        mistake(r"dtype int64 .*Return the mean", f=lambda p, x, y: y.astype(int).sum())
        mistake(r"A loss term must be \(loss, items\)", f=lambda p, x, y: {"a": loss_fn(p, x, y)})
        mistake(r"must return \(loss, aux\)", TypeError, has_aux=True, aux="mean")

    def test_items(self):
        mistake("items must be positive. Received: items=0", f=lambda *a: (loss_fn(*a), 0), has_items=True)
        for items in ("8", jnp.ones(2), jnp.ones((), bool)):
            mistake("items must be a number", TypeError, f=lambda *a, n=items: (loss_fn(*a), n), has_items=True)

    def test_a_concatenated_output_without_examples(self):
        mistake("one entry an example", f=lambda *a: (loss_fn(*a), a[1][0]), has_aux=True, aux="concatenate")

    def test_options(self):
        mistake("holomorphic", holomorphic=True)
        mistake("aux says what becomes", has_aux=True)
        mistake("aux says what becomes", aux="mean")
        mistake("aux must be one of 'mean', 'sum', 'concatenate'", has_aux=True, aux={"a": "average"})
        mistake("aux must be nested", f=lambda *a: (loss_fn(*a), 0), has_aux=True, aux={"a": "mean"})

    def test_a_raw_key(self):
        mistake(
            "raw PRNG key", TypeError, in_axes=(None, 0, None), args=(PARAMS, X, {"dropout": jax.random.PRNGKey(0)})
        )
