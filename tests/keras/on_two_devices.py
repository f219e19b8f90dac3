"""Plain `fit` on one device beside both APIs on two: MirroredStrategy on TensorFlow, DataParallel on JAX.

Run by test_devices.py in a process of its own, since devices are made before anything runs on them.
"""

import contextlib
import os
import sys

if os.environ["KERAS_BACKEND"] == "tensorflow":
    import tensorflow as tf

    [cpu] = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
else:
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import keras
from keras import optimizers

import bigbatch.keras as bb
from conformance.keras_parity import close, data, float64, mlp

float64()
x, y = data(24)
FIT = {"x": x, "y": y, "shuffle": False, "verbose": 0}
# What clips: one optimizer, one behind loss scaling, two of several. An SGD shows a wrong scale, which Adam forgives.
OPTIMIZERS = {
    "momentum": lambda: optimizers.SGD(0.5, momentum=0.9),
    "global_clipnorm": lambda: optimizers.Adam(0.01, global_clipnorm=0.05),
    "loss scaling": lambda: optimizers.LossScaleOptimizer(optimizers.SGD(0.5, global_clipnorm=0.05)),
    "several": lambda: several(optimizers.SGD(0.5, clipnorm=0.05), optimizers.SGD(0.5, clipvalue=0.01)),
}


def several(kernels, biases):
    return optimizers.MultiOptimizer(lambda variable: kernels if "kernel" in variable.path else biases)


def fitted(make, api, size, scope):
    with scope():
        model = mlp(optimizer=make())
        model.optimizer.build(model.trainable_variables)
        if api:
            bb.accumulate(model, **api)
    model.fit(**FIT, batch_size=size)
    return model


plain = {name: fitted(make, None, 10, contextlib.nullcontext) for name, make in OPTIMIZERS.items()}
if os.environ["KERAS_BACKEND"] == "tensorflow":
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    if strategy.num_replicas_in_sync != 2:
        sys.exit("there are not two replicas")
    scope = strategy.scope
else:
    import jax

    if len(jax.devices()) != 2:
        sys.exit("there are not two devices")
    keras.distribution.set_distribution(keras.distribution.DataParallel())
    scope = contextlib.nullcontext
for name, make in OPTIMIZERS.items():
    # Both APIs make the update in the same place; one shows what it does with each optimizer.
    for api, size in (({"micro_batch": 4}, 10), ({"every": 5}, 2))[: 2 if name == "momentum" else 1]:
        close(fitted(make, api, size, scope), plain[name])
        print(f"{name} {api}: exact on two devices")

# What is of one device is refused with words. The model is as it was.
model = fitted(OPTIMIZERS["momentum"], None, 10, scope)
for refused in (
    lambda: bb.accumulate(model, micro_batch=4, noise=True),
    lambda: bb.audit(model, x, y, micro_batch=4),
):
    try:
        refused()
    except ValueError as error:
        print(error)
