"""The quick start's tab for the backend runs as printed, and its updates are the full batch's."""

from pathlib import Path

import numpy as np

from documentation import run_blocks

PAGE = Path(__file__).parents[2] / "docs/quickstart.md"
TABS = {"torch": "PyTorch", "jax": "JAX", "tensorflow": "TensorFlow"}


def in_torch(ran):
    """Two updates of AdamW on the same batch, the second with its gradient clipped."""
    import torch

    torch.manual_seed(0)
    model, loss_fn = torch.nn.Linear(64, 10), torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters())
    x, y = torch.randn(1024, 64), torch.randint(10, (1024,))
    for most in (float("inf"), 1.0):
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), most)
        optimizer.step()
    return [[p.detach().numpy() for p in net.parameters()] for net in (ran["model"], model)]


def in_jax(ran):
    """The split API's gradient, and one update of AdamW from zeros."""
    import jax
    import jax.numpy as jnp
    import optax

    params = {"w": jnp.zeros((64, 10)), "b": jnp.zeros(10)}
    grads = jax.grad(ran["loss_fn"])(params, {"x": ran["x"], "y": ran["y"]})
    tx = optax.adamw(1e-3)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert int(ran["state"].updates) == 1
    return [
        jax.tree.leaves(tree) for tree in ((ran["grads"], ran["params"]), (grads, optax.apply_updates(params, updates)))
    ]


def in_tensorflow(ran):
    """One update of AdamW from the weights that the seed gives."""
    import tensorflow as tf

    tf.keras.utils.set_random_seed(0)
    x, y = tf.random.normal((1024, 64)), tf.range(1024) % 10
    layer = tf.keras.layers.Dense(10)
    layer.build((None, 64))
    optimizer = tf.keras.optimizers.AdamW()
    with tf.GradientTape() as tape:
        loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)(y, layer(x))
    variables = layer.trainable_variables
    optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
    return [[v.numpy() for v in one.trainable_variables] for one in (ran["layer"], layer)]


def in_keras(ran):
    """The same model, trained by plain `fit`."""
    import keras

    np.random.seed(0)
    keras.utils.set_random_seed(0)
    x, y = np.random.rand(1024, 64).astype("float32"), np.random.randint(10, size=1024)
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10)])
    model.compile(keras.optimizers.AdamW(), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(x, y, batch_size=1024, verbose=0)
    return [one.get_weights() for one in (ran["model"], model)]


def seeded(backend):
    if backend == "torch":
        import torch

        torch.manual_seed(0)
    elif backend != "jax":
        import keras

        keras.utils.set_random_seed(0)
    return {"__name__": "__main__"}


def test_the_tab_makes_the_full_batchs_updates(request):
    backend = request.config.getoption("backend")
    ran = seeded(backend)
    assert run_blocks(PAGE, ran, TABS.get(backend, "Keras")) == 1
    check = {"torch": in_torch, "jax": in_jax, "tensorflow": in_tensorflow}.get(backend, in_keras)
    for got, target in zip(*check(ran), strict=True):
        np.testing.assert_allclose(got, target, rtol=1e-4, atol=2e-6)
