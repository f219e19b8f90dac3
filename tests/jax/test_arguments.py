"""What the split API takes: keys fold in whatever goes whole, and what cannot be right is refused when called."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bigbatch.jax as bb

rng = np.random.default_rng(4)
W, X = jnp.asarray(rng.normal(size=3)), jnp.asarray(rng.normal(size=(12, 3)))


def loss_fn(w, x):
    return jnp.tanh(x @ w).mean()


class TestKeys:
    """Micro-batch i draws with `fold_in(key, i)`, wherever the key stands, and the one micro-batch with the key."""

    def masks(self, micro_batch, *args, jit=False, **kwargs):
        def drawn(w, x, *rest, **named):
            keys = jax.tree.leaves((rest, named))
            assert len(keys) == 1
            mask = jax.random.bernoulli(keys[0].reshape(-1)[0], 0.5, x.shape)
            return (x * mask @ w).mean(), mask

        axes = (None, 0, *[None] * len(args))
        function = bb.value_and_grad(drawn, has_aux=True, aux="concatenate", micro_batch=micro_batch, in_axes=axes)
        (_, masks), grads = (jax.jit(function) if jit else function)(W, X, *args, **kwargs)
        np.testing.assert_allclose(grads, (X * masks).mean(0), rtol=1e-12)
        return masks

    def folded(self, key, size, count):
        parts = [jax.random.bernoulli(jax.random.fold_in(key, i), 0.5, (size, 3)) for i in range(count)]
        return np.stack(parts, 1).reshape(-1, 3)

    @pytest.mark.parametrize("jit", [False, True])
    def test_by_keyword(self, jit):
        key = jax.random.key(7)
        expected = self.folded(key, 4, 3)
        assert np.array_equal(self.masks(4, rng=key, jit=jit), expected)
        assert np.array_equal(self.masks(4, rngs={"dropout": key}, jit=jit), expected)
        assert np.array_equal(self.masks(4, {"dropout": key}, jit=jit), expected)
        assert len({np.asarray(part).tobytes() for part in expected.reshape(4, 3, 3).swapaxes(0, 1)}) == 3

    def test_the_shorter_micro_batch_draws_its_own(self):
        key = jax.random.key(7)
        masks = self.masks(5, rng=key)
        assert np.array_equal(masks[10:], jax.random.bernoulli(jax.random.fold_in(key, 2), 0.5, (2, 3)))

    def test_one_micro_batch_gets_the_key_as_it_is(self):
        key = jax.random.key(7)
        assert np.array_equal(self.masks(12, rng=key), jax.random.bernoulli(key, 0.5, (12, 3)))

    @pytest.mark.parametrize("jit", [False, True])
    @pytest.mark.parametrize("key", [jax.random.PRNGKey(0), jax.random.split(jax.random.PRNGKey(0), 4),
                                     np.asarray(jax.random.PRNGKey(0))])  # fmt: skip
    def test_a_raw_key_is_refused(self, key, jit):
        for where, given in (("rng", {"rng": key}), (r"rngs\['dropout'\]", {"rngs": {"dropout": key}})):
            with pytest.raises(TypeError, match=rf"A raw PRNG key.*Received: {where}=shape .*jax\.random\.key"):
                self.masks(4, jit=jit, **given)
        with pytest.raises(TypeError, match="A raw PRNG key"):
            self.masks(4, key, jit=jit)

    def test_other_keyword_arguments_go_whole(self):
        def scaled(w, x, *, scale, names, none):
            assert names == ["a", "b"]
            assert none is None
            return scale * loss_fn(w, x)

        found = bb.value_and_grad(scaled, micro_batch=4)(W, X, scale=jnp.asarray(3.0), names=["a", "b"], none=None)
        right = jax.value_and_grad(lambda w: 3 * loss_fn(w, X))(W)
        for a, b in zip(found, right, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-13)


@pytest.mark.parametrize("text", [["a"] * 12, tuple("abcdefghijkl"), [b"a"] * 12, np.asarray(["a"] * 12)])
def test_text_is_refused_with_the_way(text):
    """A loss function is traced once for all micro-batches: there is no text in a compiled loop."""
    with pytest.raises(TypeError, match=r"Text cannot be cut.*Received: batch\['caption'\].*Encode it before the call"):
        bb.value_and_grad(lambda w, batch: loss_fn(w, batch["x"]), micro_batch=4)(W, {"x": X, "caption": text})


def test_text_that_goes_whole_is_the_callers():
    def with_names(w, x, names):
        assert names == ["a"] * 12
        return loss_fn(w, x)

    loss, _ = bb.value_and_grad(with_names, micro_batch=4, in_axes=(None, 0, None))(W, X, ["a"] * 12)
    assert float(loss) == pytest.approx(float(loss_fn(W, X)), rel=1e-13)


SIZE = 'micro_batch must be an integer or "auto". Received: micro_batch='
OPTIONS = [
    ({"micro_batch": "Auto"}, TypeError, SIZE + "'Auto' (str)."),
    ({"micro_batch": None}, TypeError, SIZE + "None (NoneType)."),
    ({"in_axes": 0}, TypeError, "in_axes must be a tuple with one entry for each positional argument"),
    ({"in_axes": None}, TypeError, "Received: in_axes=None (NoneType)."),
    ({"in_axes": "00"}, TypeError, "Received: in_axes='00' (str)."),
    ({"argnums": ()}, ValueError, "argnums must name at least one argument, and each once. Received: argnums=()"),
    ({"argnums": (0, 0)}, ValueError, "argnums must name at least one argument, and each once."),
    ({"argnums": "w"}, TypeError, "argnums must be an integer, or a tuple of them. Received: argnums='w' (str)."),
    ({"argnums": True}, TypeError, "argnums must be an integer"),
    ({"dtype": "float32"}, TypeError, "dtype must be a floating dtype such as jnp.float32, or None."),
    ({"dtype": jnp.int32}, TypeError, "dtype must be a floating dtype"),
    ({"dtype": 32}, TypeError, "dtype must be a floating dtype"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "kind", "words"), OPTIONS)
def test_options_are_refused_where_they_are_given(options, kind, words):
    """At the call that takes them, before there is a batch."""
    with pytest.raises(kind, match=re.escape(words)):
        bb.value_and_grad(loss_fn, **{"micro_batch": 4, **options})
    if "micro_batch" not in options:
        with pytest.raises(kind, match=re.escape(words)):
            bb.value_and_grad(loss_fn, micro_batch="auto", **options)
        with pytest.raises(kind, match=re.escape(words)):
            bb.plan(loss_fn, **options)
    if "dtype" in options:
        import optax

        with pytest.raises(kind, match=re.escape(words)):
            bb.accumulate(optax.sgd(0.1), every=2, **options)


class Layer(eqx.Module):
    weight: jax.Array
    activation: object = jnp.tanh
    size: int = 3


@pytest.mark.parametrize("call", [bb.plan, lambda f: bb.value_and_grad(f, micro_batch=4),
                                  lambda f: bb.value_and_grad(f, micro_batch="auto")])  # fmt: skip
def test_a_module_is_partitioned_first(call):
    words = r"Parameters must be arrays of a floating type\. Received: model\.activation=.*Partition a module first"
    with pytest.raises(TypeError, match=words):
        call(lambda model, x: loss_fn(model.weight, x))(Layer(W), X)
    model = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"of a floating type\. Received: model\..*nnx\.split\(model, nnx\.Param"):
        call(lambda model, x: model(x).mean())(model, X)
    with pytest.raises(TypeError, match=r"of a floating type\. Received: w=shape \(3,\), dtype int"):
        call(lambda w, x: loss_fn(w, x))(jnp.arange(3), X)


def test_a_partitioned_module():
    params, static = eqx.partition(Layer(W), eqx.is_inexact_array)
    found = bb.value_and_grad(lambda p, x: loss_fn(eqx.combine(p, static).weight, x), micro_batch=4)(params, X)
    np.testing.assert_allclose(found[1].weight, jax.grad(loss_fn)(W, X), rtol=1e-13)
