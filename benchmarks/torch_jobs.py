"""The three jobs of PyTorch's benchmarks: a model, a batch, what a micro-batch is, and how a window is measured."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigbatch.engines.torch_memory import PeakMemory

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
ON = f"a GPU ({torch.cuda.get_device_name()}), timed by its events" if ON_GPU else "a CPU"


class Stopwatch:
    """Seconds from `start` to `stop`: by the device's own events on a GPU, by the host's clock on a CPU."""

    def start(self) -> None:
        if ON_GPU:
            self.started, self.stopped = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.started.record()
        else:
            self.began = time.perf_counter()

    def stop(self) -> float:
        if ON_GPU:
            self.stopped.record()
            self.stopped.synchronize()
            return self.started.elapsed_time(self.stopped) / 1e3
        return time.perf_counter() - self.began


def timed(run: Callable[[], None]) -> Callable[[], float]:
    """A window that keeps its own time."""
    watch = Stopwatch()

    def whole() -> float:
        watch.start()
        run()
        return watch.stop()

    return whole


def peak(run: Callable[[], object]) -> int:
    """The most bytes that tensors held at once in `run`, beyond those that stood before."""
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with PeakMemory() as memory:
        run()
    return memory.peak


@dataclass(frozen=True)
class Job:
    """One window: `micro_batches` micro-batches of `size` examples."""

    title: str
    model: Callable[[], nn.Module]
    example: Callable[[int], tuple[Tensor, Tensor]]
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    size: int
    micro_batches: int

    def batch(self, micro_batches: int | None = None) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        x, y = self.example(self.size * (micro_batches or self.micro_batches))
        return x.to(DEVICE), y.to(DEVICE)

    def make(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        with DEVICE:
            model = self.model()
        return model, torch.optim.Adam(model.parameters())


def mlp(width: int = 1024) -> nn.Module:
    return nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


class Block(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A small language model whose table of words is used at both ends, as GPT-2's is."""

    def __init__(self, words: int = 32_000, width: int = 256, depth: int = 2, length: int = 64):
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*[Block(width, max(4, width // 64)) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.norm(self.blocks(x)))


def gpt() -> nn.Module:
    return Transformer(50_257, 2048, 4, 256)


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(4096, 16384), nn.ReLU(), nn.Linear(16384, 8192), nn.ReLU(), nn.Linear(8192, 10))


def convolutional() -> nn.Module:
    layers: list[nn.Module] = []
    for wide, narrow in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(wide, narrow, 3, padding=1), nn.GroupNorm(8, narrow), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4 * 4, 10))


def digits(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 784), torch.randint(10, (n,))


def sentences(n: int, words: int = 32_000, length: int = 64) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(words, (n, length + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def long_sentences(n: int) -> tuple[Tensor, Tensor]:
    return sentences(n, 50_257, 256)


def vectors(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 4096), torch.randint(10, (n,))


def pictures(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, 32, 32), torch.randint(10, (n,))


def classify(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def language(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def language_in_bfloat16(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast(DEVICE.type, torch.bfloat16):
        logits = model(x)
    return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())


WORDS = "a transformer language model, 32,000 words, width 256, 2 blocks, 64 tokens a sentence"
JOBS = {
    "mlp-1": Job("MLP 784-1024-1024-10, micro-batch 1", mlp, digits, classify, 1, 16),
    "mlp-16": Job("MLP 784-1024-1024-10, micro-batch 16", mlp, digits, classify, 16, 16),
    "mlp-128": Job("MLP 784-1024-1024-10, micro-batch 128", mlp, digits, classify, 128, 16),
    "transformer": Job(f"{WORDS}, micro-batch 1", Transformer, sentences, language, 1, 16),
    "convolutional": Job("3 convolutions on 32 × 32 pictures, micro-batch 8", convolutional, pictures, classify, 8, 16),
}
if ON_GPU:  # which has little to do in the jobs above
    GPT = "a transformer, 50,257 words, width 2,048, 4 blocks, 256 tokens a sentence, bfloat16 by autocast"
    JOBS |= {
        "mlp-wide": Job("MLP 4096-16384-8192-10, micro-batch 16", wide, vectors, classify, 16, 16),
        "gpt-1": Job(f"{GPT}, micro-batch 1", gpt, long_sentences, language_in_bfloat16, 1, 16),
        "gpt-8": Job(f"{GPT}, micro-batch 8", gpt, long_sentences, language_in_bfloat16, 8, 8),
    }
