"""What this package uses of TensorFlow that is not public: each name is there, and does what the package relies on."""

import tensorflow as tf
from tensorflow.python.eager import context

from bigbatch.engines import tensorflow_rng
from bigbatch.engines.tensorflow_loops import branches_of
from bigbatch.engines.tensorflow_writes import written
from bigbatch.engines.tensorflow_xla import under_xla


def test_a_graph_knows_that_it_is_for_xla():
    """`control_flow_util.GraphOrParentsInXlaContext`, as XLA knows no strings and no shapes that depend on values."""
    seen = []

    def look(x):
        seen.append(under_xla())
        return tf.cond(x > 0, lambda: inner(x), lambda: x)

    def inner(x):
        seen.append(under_xla())
        return x

    tf.function(look)(tf.constant(1.0))
    tf.function(look, jit_compile=True)(tf.constant(1.0))
    tf.function(tf.function(look), jit_compile=True)(tf.constant(1.0))
    assert seen == [False, False, True, True, True, True]
    assert not under_xla()


def test_which_variables_a_graph_writes_to():
    """`get_read_only_resource_input_indices_graph`, to refuse a loss that writes to the variables."""
    read, statistics, w = tf.Variable(1.0), tf.Variable(1.0), tf.Variable(tf.ones(3, tf.float64))

    @tf.function
    def inner(x):
        statistics.assign(x * read)

    @tf.function
    def graph(x):
        inner(x)
        tf.cond(x > 0, lambda: w.assign_add(tf.ones(3, tf.float64)), lambda: w)
        return read * x

    handles = {id(handle) for handle in written(graph.get_concrete_function(tf.TensorSpec(())).graph)}
    assert handles == {id(statistics.handle), id(w.handle)}


def test_the_random_generator_is_in_the_context():
    """`context()._seed` and `._rng`, which an audit restores."""
    tf.random.set_seed(3)
    float(tf.random.normal(()))
    assert isinstance(context.context()._seed, int)
    assert callable(context.context()._rng.getstate)
    with tensorflow_rng.kept():
        drawn = float(tf.random.normal(()))
        tf.random.set_seed(4)
    assert float(tf.random.normal(())) == drawn


def test_a_graph_has_the_functions_that_it_calls():
    """`graph._get_function`, to read what a nested tf.function and a loop's body need."""
    inner = tf.function(lambda x: x + 1)
    graph = tf.function(lambda x: inner(x)).get_concrete_function(tf.TensorSpec(())).graph
    calls = [found for operation in graph.get_operations() if (found := branches_of(operation))]
    assert ["AddV2" in {op.type for op in graphs[0].get_operations()} for _, graphs in calls] == [True]


def test_an_operation_reads_another_tensor_from_then_on():
    """`Operation._update_input`, to compute a product the faster way."""
    with tf.Graph().as_default() as graph:
        a, b = tf.constant(1.0), tf.constant(2.0)
        total = a + a
        total.op._update_input(1, b)
        with tf.compat.v1.Session(graph=graph) as session:
            assert session.run(total) == 3.0
    assert list(b.consumers()) == [total.op]
