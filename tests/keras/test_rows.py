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
    """Which word comes after three, told by the table of words itself where it is tied."""

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


DOORS = {"split": ({"micro_batch": MICRO}, 30), "stream": ({"every": 10}, 3)}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("door", DOORS)
def test_the_update_is_the_batchs(tied, door):
    options, batch_size = DOORS[door]
    ours, plain = bb.accumulate(model(tied), **options), model(tied)
    for _ in range(2):  # two windows an epoch, and their graph is run again
        ours.fit(TOKENS, NEXT, batch_size=batch_size, shuffle=False, verbose=0)
        plain.fit(TOKENS, NEXT, batch_size=30, shuffle=False, verbose=0)
    close(ours, plain)


if BACKEND == "tensorflow":
    from bigbatch.keras import tensorflow_window

    @pytest.mark.parametrize(("tied", "terms"), [(False, 1), (True, 2)])
    @pytest.mark.parametrize("door", DOORS)
    def test_the_tables_gradient_is_taken_apart(monkeypatch, tied, terms, door):
        found = []
        look = tensorflow_window.apart

        def noting(gradient, shape):
            taken = look(gradient, shape)
            found.extend([] if taken is None else [len(taken.terms)])
            return taken

        monkeypatch.setattr(tensorflow_window, "apart", noting)
        options, batch_size = DOORS[door]
        bb.accumulate(model(tied), **options).fit(TOKENS[:30], NEXT[:30], batch_size=batch_size, verbose=0)
        assert found
        assert set(found) == {terms}

    def test_noise_is_measured_of_what_was_taken_apart():
        scales = []
        for large in (4, 1000):  # the second leaves the table whole
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("bigbatch.engines.tensorflow_rows.LARGE", large)
                one = bb.accumulate(model(tied=True), micro_batch=MICRO, noise=True)
                one.fit(TOKENS, NEXT, batch_size=30, shuffle=False, verbose=0)
                scales.append(bb.noise_scale(one))
        assert scales[0].trace == pytest.approx(scales[1].trace, rel=1e-9)
        assert scales[0].squared_norm == pytest.approx(scales[1].squared_norm, rel=1e-9)
