"""`accumulate` in Flax's TrainState and nnx.Optimizer, and around an Equinox module: the way that the page shows."""

import equinox as eqx
import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bigbatch.jax as bb

rng = np.random.default_rng(8)
X, Y = jnp.asarray(rng.normal(size=(12, 6))), jnp.asarray(rng.normal(size=(12, 2)))
CUTS = ((0, 5), (5, 8), (8, 12))


def close(got, right):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


class TestTrainState:
    params = {"w": jnp.asarray(rng.normal(size=(6, 2))), "b": jnp.zeros(2)}  # noqa: RUF012

    @staticmethod
    def loss_fn(params, x, y):
        return jnp.square(jnp.tanh(x @ params["w"]) + params["b"] - y).mean()

    def started(self, every):
        tx = bb.accumulate(optax.adam(0.1), every=every)
        return flax.training.train_state.TrainState.create(apply_fn=None, params=self.params, tx=tx)

    @staticmethod
    @jax.jit
    def step(state, x, y):
        grads = jax.grad(TestTrainState.loss_fn)(state.params, x, y)
        params, opt_state = bb.apply_gradients(state.tx, grads, state.opt_state, state.params, items=len(x))
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state)

    def right(self, count=12):
        tx = optax.adam(0.1)
        grads = jax.grad(self.loss_fn)(self.params, X[:count], Y[:count])
        return optax.apply_updates(self.params, tx.update(grads, tx.init(self.params))[0])

    def test_a_window(self):
        state = self.started(every=3)
        for a, b in CUTS:
            state = self.step(state, X[a:b], Y[a:b])
        assert bb.has_updated(state.opt_state)
        close(state.params, self.right())

    def test_a_flush(self):
        state = self.started(every=9)
        for a, b in CUTS[:2]:
            state = self.step(state, X[a:b], Y[a:b])
        updates, opt_state = jax.jit(lambda s: bb.flush(s.tx, s.opt_state, s.params))(state)
        state = state.replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state)
        close(state.params, self.right(8))

    def test_its_own_way_names_ours(self):
        state = self.started(every=3)
        with pytest.raises(TypeError, match=r"items must be a number.*tx\.update\(grads, opt_state, params, items=n\)"):
            state.apply_gradients(grads=self.params)


class TestOptimizer:
    @staticmethod
    def loss_fn(model, x, y):
        return jnp.square(model(x) - y).mean()

    def model(self):
        return nnx.Linear(6, 2, rngs=nnx.Rngs(0), param_dtype=jnp.float64)

    def right(self, count=12):
        model = self.model()
        optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
        optimizer.update(model, nnx.grad(self.loss_fn)(model, X[:count], Y[:count]))
        return nnx.state(model, nnx.Param)

    def trained(self, every, cuts):
        model = self.model()
        optimizer = nnx.Optimizer(model, bb.accumulate(optax.adam(0.1), every=every), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, x, y):
            loss, grads = nnx.value_and_grad(self.loss_fn)(model, x, y)
            optimizer.update(model, grads, items=len(x), value=loss)

        for a, b in cuts:
            step(model, optimizer, X[a:b], Y[a:b])
        return model, optimizer

    def test_a_window(self):
        model, optimizer = self.trained(3, CUTS)
        assert bb.has_updated(optimizer.opt_state)
        assert optimizer.opt_state.last.reason is None
        close(nnx.state(model, nnx.Param), self.right())

    @pytest.mark.parametrize("jit", [True, False])
    def test_a_flush(self, jit):
        model, optimizer = self.trained(9, CUTS[:2])

        def flush(model, optimizer):
            optimizer.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)), flush=True)

        (nnx.jit(flush) if jit else flush)(model, optimizer)
        assert bb.has_updated(optimizer.opt_state)
        close(nnx.state(model, nnx.Param), self.right(8))

    def test_its_state_in_our_functions_names_its_way(self):
        model, optimizer = self.trained(9, CUTS[:2])
        params = nnx.state(model, nnx.Param)
        for call in (
            lambda: bb.flush(optimizer.tx, optimizer.opt_state, params),
            lambda: bb.apply_gradients(optimizer.tx, params, optimizer.opt_state, params, items=2),
            lambda: optimizer.tx.update(params, optimizer.opt_state, params, items=2),
        ):
            with pytest.raises(TypeError, match=r"nnx variables.*optimizer\.update\(model, .*flush=True\)"):
                call()

    def test_parameters_that_move_inside_a_window_skip_it(self):
        model, optimizer = self.trained(3, CUTS[:2])
        model.bias[...] += 1.0
        before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
        optimizer.update(model, nnx.grad(self.loss_fn)(model, X, Y), items=12)
        assert optimizer.opt_state.last.reason.startswith("the params changed")
        close(nnx.state(model, nnx.Param), before)


class Layer(eqx.Module):
    weight: jax.Array
    activation: object = jnp.tanh

    def __call__(self, x):
        return self.activation(x @ self.weight)


def test_an_equinox_module_is_partitioned_first():
    model = Layer(jnp.asarray(rng.normal(size=(6, 2))))
    tx = bb.accumulate(optax.adam(0.1), every=3)
    with pytest.raises(
        TypeError, match=r"Parameters must be arrays\. Received: params\.activation=.*Partition a module"
    ):
        tx.init(model)
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss_fn(params, x, y):
        return jnp.square(eqx.combine(params, static)(x) - y).mean()

    state, right = tx.init(params), optax.adam(0.1)
    grads = jax.grad(loss_fn)(params, X, Y)
    expected = optax.apply_updates(params, right.update(grads, right.init(params))[0])
    for a, b in CUTS:
        params, state = bb.apply_gradients(tx, jax.grad(loss_fn)(params, X[a:b], Y[a:b]), state, params, items=b - a)
    close(params, expected)
