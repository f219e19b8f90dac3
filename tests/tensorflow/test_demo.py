"""The demo's promises, in TensorFlow."""

import pytest

from bigbatch.demo import WAYS, Job
from bigbatch.demo.tensorflow import train


@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 1e-5), ("float64", 1e-12)])
def test_accumulated_weights_are_the_true_batchs(dtype, allowed):
    job = Job(dtype=dtype, epochs=10)
    results = {way: train(way, job, lambda n: None) for way in WAYS if way != "micro"}
    for way in ("stream", "split"):
        assert results[way].updates == results["full"].updates == 20
        assert results[way].distance(results["full"]) <= allowed
        assert results[way].losses[-1][1] == pytest.approx(results["full"].losses[-1][1], rel=1e-4)
    assert results["full"].accuracy > 0.9
