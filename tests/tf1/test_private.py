"""What this package uses of TensorFlow that is not public: the name is there, and does what the package relies on."""

import tensorflow as tf

v1 = tf.compat.v1


def test_a_graph_knows_its_old_conditionals_and_loops():
    """`Graph._get_control_flow_context`, which `checks.check_place` reads: None in the graph itself."""
    seen = []

    def look():
        seen.append(v1.get_default_graph()._get_control_flow_context() is not None)
        return tf.constant(1)

    with tf.Graph().as_default():
        look()
        with tf.Graph().as_default():
            v1.disable_control_flow_v2()
            try:
                v1.cond(v1.placeholder(tf.bool), look, look)
            finally:
                v1.enable_control_flow_v2()
    assert seen == [False, True, True]
