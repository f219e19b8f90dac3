"""Tables that are looked up, and multiplied with as well: their gradients' few rows, on every backend."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import bigbatch.keras as bb
from conformance.keras_parity import BACKEND, close, float64

WORDS, WIDTH, MICRO = 60, 6, 4
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(WORDS // 3, size=(60, 3))  # of which most come several times
NEXT = RNG.integers(WORDS, size=(60,))


@pytest.fixture(autouse=True)
def _float64():
    float64()


class Words(keras.Model):
    """Predicts the word after three, with the table of words itself as the last layer where it is tied."""

    def __init__(self, tied):
        super().__init__()
        self.words, self.mix = layers.Embedding(WORDS, WIDTH), layers.Dense(WIDTH, "tanh")
        self.scores = None if tied else layers.Dense(WORDS)

    def call(self, tokens):
        x = self.mix(ops.sum(self.words(tokens), 1))
        return self.scores(x) if self.scores else ops.matmul(x, ops.transpose(self.words.embeddings))


def model(tied):
    keras.utils.set_random_seed(0)
    made = Words(tied)
    made.compile(keras.optimizers.SGD(0.5, momentum=0.9), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    made(TOKENS[:1])
    return made


APIS = {"split": ({"micro_batch": MICRO}, 30), "stream": ({"every": 10}, 3)}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("api", APIS)
def test_the_update_is_the_batchs(tied, api):
    options, batch_size = APIS[api]
    ours, plain = bb.accumulate(model(tied), **options), model(tied)
    for _ in range(2):  # two windows an epoch, and their graph is run again
        ours.fit(TOKENS, NEXT, batch_size=batch_size, shuffle=False, verbose=0)
        plain.fit(TOKENS, NEXT, batch_size=30, shuffle=False, verbose=0)
    close(ours, plain)


def updated(micro_batch=None):
    """A table before and after one update of Adam that looks three of its rows up six times."""
    ids, y = np.array([[1], [1], [2], [3], [1], [3]]), np.random.default_rng(0).normal(size=(6, 2))
    keras.utils.set_random_seed(0)
    one = keras.Sequential([keras.Input((1,)), layers.Embedding(5, 2), layers.Flatten()])
    one.compile(keras.optimizers.Adam(0.1, epsilon=1e-3), "mse")
    start = one.get_weights()[0]
    if micro_batch:
        bb.accumulate(one, micro_batch=micro_batch)
    one.fit(ids, y, batch_size=6, shuffle=False, verbose=0)
    gradient = np.zeros((5, 2))
    np.add.at(gradient, ids[:, 0], (start[ids[:, 0]] - y) / 6)
    right = start - 0.1 * gradient / (np.abs(gradient) + 1e-3 / np.sqrt(1 - 0.999))
    return np.linalg.norm(one.get_weights()[0] - right) / np.linalg.norm(right - start)


@pytest.mark.parametrize("micro_batch", [2, 4, 6])
def test_repeated_rows_are_one_gradient_to_adam(micro_batch):
    assert updated(micro_batch) < 1e-5  # the optimizer's own constants are float32


def test_where_plain_keras_is_wrong_the_page_says_so():
    assert (updated() > 0.2) == (BACKEND == "tensorflow")


if BACKEND == "tensorflow":
    from bigbatch.fused import keras_tensorflow

    @pytest.mark.parametrize(("tied", "terms"), [(False, 1), (True, 2)])
    @pytest.mark.parametrize("api", APIS)
    def test_the_tables_gradient_is_split(monkeypatch, tied, terms, api):
        found = []
        look = keras_tensorflow.split_gradient

        def noting(gradient, shape):
            taken = look(gradient, shape)
            found.extend([] if taken is None else [len(taken.terms)])
            return taken

        monkeypatch.setattr(keras_tensorflow, "split_gradient", noting)
        options, batch_size = APIS[api]
        bb.accumulate(model(tied), **options).fit(TOKENS[:30], NEXT[:30], batch_size=batch_size, verbose=0)
        assert found
        assert set(found) == {terms}

    def test_noise_is_measured_of_split_gradients():
        scales = []
        for large in (4, 1000):  # the second leaves the table whole
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("bigbatch.fused.tensorflow_lookups.LARGE", large)
                one = bb.accumulate(model(tied=True), micro_batch=MICRO, noise=True)
                one.fit(TOKENS, NEXT, batch_size=30, shuffle=False, verbose=0)
                scales.append(bb.noise_scale(one))
        assert scales[0].trace == pytest.approx(scales[1].trace, rel=1e-9)
        assert scales[0].squared_norm == pytest.approx(scales[1].squared_norm, rel=1e-9)
