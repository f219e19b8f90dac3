"""What `accumulate`, `fit` and `train_on_batch` refuse before anything moves, and what they warn of."""

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import keras

from bigbatch.keras import batch, noise
from bigbatch.keras.backends import select

_IN_A_TRAIN_STEP = {
    "tensorflow": "bigbatch.tensorflow.value_and_grad, in the place of tf.GradientTape,",
    "jax": "bigbatch.jax.value_and_grad, in the place of jax.value_and_grad,",
    "torch": "bigbatch.torch.backward, in the place of loss.backward(),",
}


def check_model(model: Any) -> None:
    """Refuses a model that trains in a way that bigbatch would replace or double."""
    name = type(model).__name__
    for method in ("train_step", "compute_loss_and_updates"):  # the second is JAX's alone
        if getattr(type(model), method, None) is not getattr(keras.Model, method, None):
            raise ValueError(
                f"{name} has a {method} of its own, which bigbatch would replace. "
                "For a loss or metrics of your own override compute_loss and compute_metrics; both are kept. "
                "For two optimizers, as a GAN has, leave bigbatch.keras out and call "
                f"{_IN_A_TRAIN_STEP[keras.backend.backend()]} once for each optimizer in your train_step "
                "(examples/keras_gan.py)."
            )
    if keras.backend.backend() == "jax" and keras.config.is_nnx_enabled():
        raise ValueError("With NNX enabled, Keras would pass bigbatch's train_step over. Disable KERAS_NNX_ENABLED.")
    optimizer = getattr(model, "optimizer", None)
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # of loss scaling
    for one in (optimizer, *getattr(optimizer, "optimizers", ())):  # a MultiOptimizer's
        steps = getattr(one, "gradient_accumulation_steps", None)
        if steps:
            raise ValueError(
                f"The optimizer accumulates too. Received: gradient_accumulation_steps={steps}. "
                "Leave it out: with bigbatch as well it would accumulate twice."
            )


def check_cut(model: Any) -> None:
    """Refuses a model whose batches cannot be cut into micro-batches."""
    names = [layer.name for layer in model._flatten_layers() if getattr(layer, "stateful", False)]
    if names:
        raise ValueError(
            f"A batch cannot be cut for a stateful layer. Received: {', '.join(names)}, with stateful=True. "
            "Its batch size is built in, and its state goes from one batch to the next. Pass every=n instead of "
            "micro_batch, with data in batches of the built-in size, or build the layer with stateful=False."
        )


def check_calls(model: Any, cuts: bool) -> None:
    """Lets `fit` and `train_on_batch` see what is wrong before anything moves, and warn of what cannot be exact.

    Args:
        model: gets the two methods anew.
        cuts: whether bigbatch cuts the batches that it is given.
    """
    warned = False

    def checked(method: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(method)

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal warned
            given = signature.bind(*args, **kwargs).arguments
            if model.compiled:  # else Keras says so
                check_model(model)
                if cuts:
                    check_cut(model)
                _check_arrays(given)
                if noise.meter_of(model) is not None:
                    noise.check_devices(model)
                if not warned:
                    warned = _warn_of_batch_norm(model)
            kept = select.backend().keep(model) if keras.backend.backend() == "jax" and model.compiled else None
            try:
                return method(*args, **kwargs)
            except BaseException as error:
                if kept is not None:
                    select.backend().give_back(kept)
                if isinstance(error, Exception):
                    # TensorFlow may keep what an error cut short while it was traced, and run it at the next call.
                    model.train_function = None
                raise

        return call

    model.fit, model.train_on_batch = checked(model.fit), checked(model.train_on_batch)


def _check_arrays(given: dict[str, Any]) -> None:
    data = tuple(given.get(name) for name in ("x", "y", "sample_weight"))
    leaves = batch.leaves(data)
    if leaves and all(hasattr(leaf, "shape") for leaf in leaves):
        batch.check(data)


def _warn_of_batch_norm(model: Any) -> bool:
    names = [
        layer.name
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
    ]
    if names:
        warnings.warn(
            f"BatchNormalization normalizes over each micro-batch, not over the batch: {', '.join(names)}. "
            "The update is then not exactly the big batch's. GroupNormalization and LayerNormalization are exact.",
            stacklevel=3,
        )
    return bool(names)
