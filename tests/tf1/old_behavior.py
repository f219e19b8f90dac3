"""What `import tensorflow.compat.v1 as tf; tf.disable_v2_behavior()` gives: run by test_stream.py, or by hand."""

import sys
from pathlib import Path

import tensorflow as tf

v1 = tf.compat.v1
v1.disable_v2_behavior()
v1.logging.set_verbosity(v1.logging.ERROR)
sys.path.insert(0, str(Path(__file__).parent))

import optimizers  # noqa: E402

import bigbatch.tf1 as bb  # noqa: E402

for name in ("Momentum", "Adam"):
    optimizers.check(name)

for partial in ("apply", "carry", "drop"):
    with tf.Graph().as_default():
        x = v1.placeholder(tf.float32, [None])
        w = v1.get_variable("w", initializer=0.0)
        assert w.op.type == "VariableV2"
        acc = bb.Accumulator(v1.train.AdamOptimizer(0.5), every=2, clip_norm=1.0, partial=partial)
        op = acc.minimize(w * tf.reduce_mean(x), items=tf.size(x))
        with v1.Session() as session:
            session.run(v1.global_variables_initializer())
            for values in ([4.0], [1.0, 2.0], [5.0]):
                session.run([op, acc.pending], {x: values})
            before = session.run(w)
            session.run(acc.flush)
            last, pending, after = session.run([acc.last, acc.pending, w])
            assert (pending, after != before) == {"apply": (0, True), "carry": (1, False), "drop": (0, False)}[partial]
            said = {"apply": None, "carry": "carried: 1 micro-batch stay in the open window",
                    "drop": "dropped: 1 micro-batch"}[partial]  # fmt: skip
            assert last.skipped == said
            session.run([acc.zero, op], {x: [1.0]})
            assert session.run(acc.pending) == 0

print(
    f"resource_variables_enabled {v1.resource_variables_enabled()}, "
    f"control_flow_v2_enabled {v1.control_flow_v2_enabled()}"
)
