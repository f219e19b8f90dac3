"""What `accumulate`, `plan`, `fit` and `train_on_batch` refuse before anything changes, and what they warn of."""

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras

from bigbatch import errors
from bigbatch.keras import batch, noise
from bigbatch.keras.backends import select

_IN_A_TRAIN_STEP = {
    "tensorflow": "bigbatch.tensorflow.value_and_grad, in the place of tf.GradientTape,",
    "jax": "bigbatch.jax.value_and_grad, in the place of jax.value_and_grad,",
    "torch": "bigbatch.torch.backward, in the place of loss.backward(),",
}

NOT_PLANNED = 'micro_batch="auto" is not planned across devices yet. Pass a number.'


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
    nnx = getattr(keras.config, "is_nnx_enabled", bool)  # Keras before 3.11 has no NNX
    if keras.backend.backend() == "jax" and nnx():
        raise ValueError("With NNX enabled, Keras would pass bigbatch's train_step over. Disable KERAS_NNX_ENABLED.")
    errors.check_accumulates_once(getattr(model, "optimizer", None))


def check_one_device(model: Any, refusal: str = NOT_PLANNED) -> None:
    """Refuses, in these words, a model that is spread over devices."""
    replicas = model.distribute_strategy.num_replicas_in_sync if keras.backend.backend() == "tensorflow" else 1
    if replicas > 1 or keras.distribution.distribution() is not None:
        raise ValueError(refusal)


def check_cut(model: Any) -> None:
    """Refuses a model whose batches cannot be cut into micro-batches."""
    # Not public. tests/keras/test_private.py fails when it moves.
    names = [layer.name for layer in model._flatten_layers() if getattr(layer, "stateful", False)]
    if names:
        raise ValueError(
            f"A batch cannot be cut for a stateful layer. Received: {', '.join(names)}, with stateful=True. "
            "Its batch size is built in, and its state goes from one batch to the next. Pass every=n instead of "
            "micro_batch, with data in batches of the built-in size, or build the layer with stateful=False."
        )


def check_calls(model: Any, cuts: bool) -> None:
    """Makes `fit` and `train_on_batch` check their arguments before anything changes, and recover from an error.

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
            if not model.compiled:
                return method(*args, **kwargs)  # Keras raises
            _check_call(model, signature.bind(*args, **kwargs).arguments, cuts)
            warned = warned or _warn_of_batch_norm(model)
            with _recovering(model):
                return method(*args, **kwargs)

        return call

    model.fit, model.train_on_batch = checked(model.fit), checked(model.train_on_batch)


def _check_call(model: Any, arguments: dict[str, Any], cuts: bool) -> None:
    check_model(model)
    if cuts:
        check_cut(model)
    _check_arrays(arguments)
    if noise.meter_of(model) is not None:
        noise.check_devices(model)


@contextlib.contextmanager
def _recovering(model: Any) -> Iterator[None]:
    """After an error the model can be trained on."""
    values = select.backend().variable_values(model) if keras.backend.backend() == "jax" else []
    try:
        yield
    except BaseException as error:
        if values:
            select.backend().restore_values(values)
        if isinstance(error, Exception):
            # TensorFlow may keep what an error cut short while it was traced, and run it at the next call.
            model.train_function = None
        raise


def _check_arrays(arguments: dict[str, Any]) -> None:
    data = tuple(arguments.get(name) for name in ("x", "y", "sample_weight"))
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
            "The update is then not exactly the full batch's. GroupNormalization and LayerNormalization are exact.",
            stacklevel=3,
        )
    return bool(names)
