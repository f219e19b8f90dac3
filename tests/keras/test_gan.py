"""examples/keras_gan.py: two optimizers in a train_step of one's own, exact in micro-batches of any size."""

import runpy
from pathlib import Path

import keras
import numpy as np
import pytest

import bigbatch.keras as bb
from conformance.keras_driver import array

EXAMPLE = Path(__file__).parent.parent.parent / "examples/keras_gan.py"


@pytest.fixture(autouse=True)
def _float32():
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


def trained(kind, micro_batch, points, noise):
    keras.utils.set_random_seed(0)
    gan = kind(micro_batch)
    gan.compile(keras.optimizers.SGD(0.5, momentum=0.9), keras.optimizers.SGD(0.3))
    start = [array(v) for v in gan.trainable_variables]
    logs = gan.fit(points, noise, batch_size=len(points), epochs=3, shuffle=False, verbose=0).history
    return logs, start, [array(v) for v in gan.trainable_variables]


def test_both_networks_get_the_whole_batchs_update():
    kind = runpy.run_path(str(EXAMPLE))["Gan"]
    rng = np.random.default_rng(1)
    points, noise = rng.normal(size=(2, 22, 2)).astype("float32")
    logs, start, whole = trained(kind, 22, points, noise)
    assert set(logs) == {"generator", "discriminator"}
    ours = trained(kind, 4, points, noise)
    for name in logs:
        np.testing.assert_allclose(ours[0][name], logs[name], rtol=1e-5)
    for network in (slice(4), slice(4, 8)):
        a, b, s = (np.concatenate([v.ravel() for v in several[network]]) for several in (ours[2], whole, start))
        assert np.linalg.norm(b - s) > 1e-2
        assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b - s)


def test_the_refusal_names_the_api_that_goes_into_a_train_step():
    gan = runpy.run_path(str(EXAMPLE))["Gan"](4)
    call = {"tensorflow": "value_and_grad", "jax": "value_and_grad", "torch": "backward"}[keras.backend.backend()]
    text = f"Gan has a train_step of its own.*bigbatch.{keras.backend.backend()}.{call}.*keras_gan.py"
    with pytest.raises(ValueError, match=text):
        bb.accumulate(gan, every=4)
    assert "fit" not in vars(gan)


def test_it_learns(capsys):
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    means = [line.split("mean ")[1].split() for line in capsys.readouterr().out.splitlines()]
    away = [np.hypot(float(x) - 2, float(y) - 1) for x, y in means]
    assert len(away) == 4
    assert away[-1] < 1.5 < np.hypot(2, 1)
