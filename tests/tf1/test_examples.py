"""The example and the page run, and the demo agrees with the true batch."""

import runpy
import time
from pathlib import Path

import pytest
import tensorflow as tf

from bigbatch.demo import Job
from bigbatch.demo import tf1 as demo
from conformance.adapters import tf1 as conformance
from documentation import run_blocks

v1 = tf.compat.v1
ROOT = Path(__file__).parent.parent.parent


def test_the_example(capsys):
    runpy.run_path(str(ROOT / "examples/tf1_stream.py"))
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split("loss ")[1]) for line in lines if "loss" in line]
    assert len(losses) == 40
    assert losses[-1] < 0.3 < 2 < losses[0]
    assert lines[-1] == "40 updates made, 0 micro-batches pending"


def test_the_demo_agrees_with_the_true_batch():
    job = Job(dtype="float64", epochs=2)
    seen = []
    results = {way: demo.train(way, job, seen.append) for way in ("micro", "full", "stream", "split")}
    assert {way: result.updates for way, result in results.items()} == {
        "micro": 180,
        "full": 4,
        "stream": 4,
        "split": 4,
    }
    for way in ("stream", "split"):
        assert results[way].distance(results["full"]) < 1e-12
        assert dict(results[way].losses) == pytest.approx(dict(results["full"].losses))
    assert results["micro"].distance(results["full"]) > 1e-2
    assert sum(seen) == 4 * 2 * 1437


@pytest.mark.parametrize("adamw", [demo.AdamW, conformance.AdamW])
def test_the_bare_optimizer_decays_after_the_forward_pass(adamw):
    # What ours is compared with. The gradient is 2w, and Adam's first moment a tenth of it; decay alone would make w 0.
    with tf.Graph().as_default(), v1.Session() as session:
        w = v1.get_variable("w", initializer=1.0, use_resource=True)
        with tf.control_dependencies([tf.numpy_function(lambda: time.sleep(0.1), [], [])]):
            loss = tf.square(w.read_value())
        optimizer = adamw(1.0, weight_decay=1.0)
        train_op = optimizer.minimize(loss)
        session.run(v1.global_variables_initializer())
        session.run(train_op)
        assert session.run(optimizer.get_slot(w, "m")) == pytest.approx(0.2)


def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_blocks(ROOT / "docs/tf1.md")
