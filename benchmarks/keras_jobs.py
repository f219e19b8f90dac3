"""The three jobs of the TensorFlow and Keras benchmarks: the same as `torch_jobs`, in Keras's words."""

from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np
from keras import layers, ops

WORDS, WIDTH, DEPTH, LENGTH, HEADS = 32_000, 256, 2, 64, 4


@dataclass(frozen=True)
class Job:
    """One window: `micro_batches` micro-batches of `size` examples."""

    title: str
    model: Callable[[], keras.Model]
    example: Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]
    size: int
    micro_batches: int

    def batch(self, windows: int = 1) -> tuple[np.ndarray, np.ndarray]:
        return self.example(np.random.default_rng(0), windows * self.size * self.micro_batches)

    def make(self) -> keras.Model:
        keras.utils.set_random_seed(0)
        return self.model()


def loss() -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def mlp(width: int = 1024) -> keras.Model:
    widths = [(width, "relu"), (width, "relu"), (10, None)]
    return keras.Sequential([keras.Input((784,)), *(layers.Dense(*width) for width in widths)])


class Words(layers.Embedding):
    """A table of words that is used at both ends, as GPT-2's is."""

    def scores(self, x):
        return ops.matmul(x, ops.transpose(self.embeddings))


class Transformer(keras.Model):
    """A small pre-norm language model with causal attention."""

    def __init__(self):
        super().__init__()
        self.words, self.places = Words(WORDS, WIDTH), layers.Embedding(LENGTH, WIDTH)
        self.blocks = [
            (
                layers.LayerNormalization(epsilon=1e-5),
                layers.MultiHeadAttention(HEADS, WIDTH // HEADS),
                layers.LayerNormalization(epsilon=1e-5),
                layers.Dense(4 * WIDTH, "gelu"),
                layers.Dense(WIDTH),
            )
            for _ in range(DEPTH)
        ]
        self.norm = layers.LayerNormalization(epsilon=1e-5)

    def call(self, tokens, training=None):
        x = self.words(tokens) + self.places(ops.arange(tokens.shape[1]))
        for norm1, attention, norm2, up, down in self.blocks:
            y = norm1(x)
            x = x + attention(y, y, use_causal_mask=True)
            x = x + down(up(norm2(x)))
        return self.words.scores(self.norm(x))


def transformer() -> keras.Model:
    model = Transformer()
    model(np.zeros((1, LENGTH), "int32"))
    return model


def convolutional() -> keras.Model:
    several = [keras.Input((32, 32, 3))]
    for channels in (32, 64, 128):
        several += [layers.Conv2D(channels, 3, padding="same"), layers.GroupNormalization(8)]
        several += [layers.ReLU(), layers.MaxPooling2D(2)]
    return keras.Sequential([*several, layers.Flatten(), layers.Dense(10)])


def digits(draw: np.random.Generator, n: int):
    return draw.normal(size=(n, 784)).astype("float32"), draw.integers(10, size=n).astype("int32")


def sentences(draw: np.random.Generator, n: int):
    tokens = draw.integers(WORDS, size=(n, LENGTH + 1)).astype("int32")
    return tokens[:, :-1].copy(), tokens[:, 1:].copy()


def pictures(draw: np.random.Generator, n: int):
    return draw.normal(size=(n, 32, 32, 3)).astype("float32"), draw.integers(10, size=n).astype("int32")


LANGUAGE = f"a transformer language model, {WORDS:,} words, width {WIDTH}, {DEPTH} blocks, {LENGTH} tokens a sentence"
JOBS = {
    "mlp-1": Job("MLP 784-1024-1024-10, micro-batch 1", mlp, digits, 1, 16),
    "mlp-16": Job("MLP 784-1024-1024-10, micro-batch 16", mlp, digits, 16, 16),
    "mlp-128": Job("MLP 784-1024-1024-10, micro-batch 128", mlp, digits, 128, 16),
    "transformer": Job(f"{LANGUAGE}, micro-batch 1", transformer, sentences, 1, 16),
    "convolutional": Job("3 convolutions on 32 × 32 pictures, micro-batch 8", convolutional, pictures, 8, 16),
}
