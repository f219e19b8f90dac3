"""Variables of TensorFlow 1 for sums, of a fixed size or of any number of rows."""

from typing import Any

import tensorflow as tf

from bigbatch.engines.tensorflow_ordering import of_any_shape

v1 = tf.compat.v1


def assign_rows(variable: Any, value: tf.Tensor) -> tf.Operation:
    """Gives a growing variable these rows."""
    return variable.assign(of_any_shape(value), read_value=False)


def growing(row: Any, dtype: tf.DType, name: str) -> Any:
    """A variable of any number of rows, none at first."""
    return variable_of(lambda: tf.zeros([0, *row], dtype), name, tf.TensorShape([None, *row]))


def variable_of(initial: Any, name: str, shape: tf.TensorShape | None = None) -> Any:
    """A resource variable whatever the default is: saved and initialized with the others, and not trained."""
    begin = initial if shape is None else lambda: of_any_shape(initial())
    return v1.Variable(begin, trainable=False, use_resource=True, name=name, shape=shape, validate_shape=shape is None)
