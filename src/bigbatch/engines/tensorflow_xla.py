"""Whether a graph is for XLA."""

import tensorflow as tf

# Nothing public says that a graph is traced for jit_compile=True: tests/tensorflow/test_private.py.
from tensorflow.python.ops import control_flow_util


def under_xla() -> bool:
    """Whether the graph being traced is for XLA, which knows no strings and no shapes that depend on values."""
    return control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())
