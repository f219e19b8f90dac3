"""Coupled losses: the full batch, ours in pieces, GradCache, a checkpoint a piece, sentence-transformers' cached loss.

    python benchmarks/coupled.py [pairs sentences head memory] [--repetitions 20] [--write]

One thread, whose CPU time is measured, so that a busy machine counts for less.
"""

import argparse
import logging
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from interleaved import circumstances, compared, figure, is_kept, measure, page, rounds, section, table
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch_jobs import Block, peak

import bigbatch.torch as bb

PAGE = page(__file__, False)
HEAD = """# Coupled losses

Every contender once a round, in an order drawn anew; a ratio is the median over rounds of both times in one round.
Times are the CPU time of the one thread that does all. *Peak* is the most that tensors held at once in a step, beyond
the parameters and the batch.

*Full* is the whole batch at once. A loop that runs each piece twice and differentiates it once takes 1.33 times as
long, where a backward takes twice as long as a forward, and nothing is lost to smaller pieces. *GradCache* is that
loop, hand-written: outputs without a graph, the loss's gradient of them, each piece again from its random state.
*Checkpoint* is `torch.utils.checkpoint` on each piece.
"""
PAIRS, PIECE, LENGTH, WORDS, WIDTH, LAYERS = 256, 16, 16, 1000, 128, 3
AS_IT_STANDS = "" if is_kept() else ", as glibc stands"


class Encoder(nn.Module):
    """Three blocks of a transformer, and the mean over the tokens."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.blocks = nn.Embedding(WORDS, WIDTH), nn.Sequential(*[Block(WIDTH, 4) for _ in range(LAYERS)])

    def forward(self, tokens: Tensor) -> Tensor:
        return self.blocks(self.words(tokens)).mean(1)


def info_nce(a: Tensor, b: Tensor) -> Tensor:
    logits = 20 * F.normalize(a) @ F.normalize(b).T
    return F.cross_entropy(logits, torch.arange(len(a)))


def grad_cache(model: nn.Module, batches: list[Tensor]) -> None:
    pieces, states, outputs = [piece for x in batches for piece in x.split(PIECE)], [], []
    with torch.no_grad():
        for piece in pieces:
            states.append(torch.get_rng_state())
            outputs.append(model(piece))
    leaves = [y.requires_grad_() for y in outputs]
    half = len(leaves) // 2
    info_nce(torch.cat(leaves[:half]), torch.cat(leaves[half:])).backward()
    for piece, state, leaf in zip(pieces, states, leaves, strict=True):
        with torch.random.fork_rng([]):
            torch.set_rng_state(state)
            (model(piece) * leaf.grad).sum().backward()


def pairs() -> dict[str, Callable[[], None]]:
    x, y = torch.randint(WORDS, (2, PAIRS, LENGTH))
    model = Encoder()

    def checkpointed(tokens: Tensor) -> Tensor:
        return torch.cat([checkpoint(model, piece, use_reentrant=False) for piece in tokens.split(PIECE)])

    def step(encode: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        return lambda: info_nce(encode(x), encode(y)).backward()

    runs = {
        "full": step(model),
        "GradCache": lambda: grad_cache(model, [x, y]),
        "checkpoint": step(checkpointed),
        "ours": step(bb.chunked(model, micro_batch=PIECE)),
        "ours, half kept": step(bb.chunked(model, micro_batch=PIECE, keep=PAIRS // PIECE // 2)),
    }
    return {name: without_gradients(model, run) for name, run in runs.items()}


def sentences() -> dict[str, Callable[[], None]]:
    import sentence_transformers
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
        MultipleNegativesRankingLoss,
    )

    class Words(nn.Module):
        """The encoder, as a module of sentence-transformers."""

        def __init__(self):
            super().__init__()
            self.encoder = Encoder()

        def forward(self, features):
            return {**features, "sentence_embedding": self.encoder(features["input_ids"])}

    model = sentence_transformers.SentenceTransformer(modules=[Words()], device="cpu")
    tokens = torch.randint(WORDS, (2, PAIRS, LENGTH))
    forward = model.forward

    def step(loss: nn.Module, changed: Callable[..., object]) -> Callable[[], None]:
        def run() -> None:
            model.forward = changed
            loss([{"input_ids": x} for x in tokens], None).backward()

        return run

    plain = MultipleNegativesRankingLoss(model)
    runs = {
        "full": step(plain, forward),
        "their cached loss": step(CachedMultipleNegativesRankingLoss(model, mini_batch_size=PIECE), forward),
        "ours": step(plain, bb.chunked(forward, micro_batch=PIECE)),
    }
    return {name: without_gradients(model, run) for name, run in runs.items()}


def head(tokens: int = 4096, width: int = 256, words: int = 32_000, piece: int = 256) -> dict[str, Callable[[], None]]:
    torch.manual_seed(0)
    model = nn.Linear(width, words, bias=False)
    x, y = torch.randn(tokens, width, requires_grad=True), torch.randint(words, (tokens,))

    def row_loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y, reduction="none")

    rows = bb.chunked(row_loss, micro_batch=piece)
    runs = {"full": lambda: row_loss(x, y).mean().backward(), "ours": lambda: rows(x, y).mean().backward()}

    def without(run: Callable[[], None]) -> Callable[[], None]:
        def cleared() -> None:
            x.grad = None
            run()

        return cleared

    return {name: without_gradients(model, without(run)) for name, run in runs.items()}


def without_gradients(model: nn.Module, run: Callable[[], None]) -> Callable[[], float]:
    """A step from no gradients, which returns the CPU time of this thread."""

    def timed() -> float:
        model.zero_grad()
        started = time.thread_time()
        run()
        return time.thread_time() - started

    return timed


TITLES = {
    "pairs": f"{PAIRS} pairs in pieces of {PIECE}: {LAYERS} blocks of width {WIDTH}, {LENGTH} tokens",
    "sentences": f"sentence-transformers: {PAIRS} pairs in pieces of {PIECE}, the same encoder",
    "head": "a head of 32,000 words, width 256, 4,096 tokens in pieces of 256",
}
JOBS = {"pairs": pairs, "sentences": sentences, "head": head}
TARGETS = {
    "pairs": [
        ("ours", "full", 1.40),
        ("ours", "GradCache", 1.00),
        ("ours, half kept", "full", 1.20),
        ("ours, half kept", "GradCache", 0.90),
    ],
    "sentences": [("ours", "full", None), ("ours", "their cached loss", 1.00)],
    "head": [("ours", "full", 1.10)],
}
N = 16_384


def memory_of_torch() -> tuple[float, float]:
    """Peak MiB at 16,384 pairs, of the full batch by a dry run on shapes, and of ours by a step."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def step(x: Tensor, y: Tensor, first: Tensor, second: Tensor, piece: int | None) -> None:
        def encode(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
            return F.gelu(x @ first) @ second

        def row_loss(a: Tensor, labels: Tensor, b: Tensor) -> Tensor:
            return F.cross_entropy(a @ b.T, labels, reduction="none")

        rows, encoder = row_loss, encode
        if piece:
            encoder = bb.chunked(encode, micro_batch=256, in_dims=(0, None, None))
            rows = bb.chunked(row_loss, micro_batch=piece, in_dims=(0, 0, None))
        rows(encoder(x, first, second), torch.arange(N), encoder(y, first, second)).mean().backward()

    def inputs() -> list[Tensor]:
        weights = [torch.randn(shape, requires_grad=True) for shape in ((16, 64), (64, 16))]
        return [torch.randn(N, 16), torch.randn(N, 16), *weights]

    with FakeTensorMode():
        given = inputs()
        full = peak(lambda: step(*given, None))
    given = inputs()
    return full / 2**20, peak(lambda: step(*given, 64)) / 2**20


def memory_of_jax() -> tuple[float, float]:
    """The same by the compiler's memory analysis."""
    import jax
    import jax.numpy as jnp

    import bigbatch.jax as bbj
    from bigbatch.engines.jax_estimate import needs_of

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((16, 64), (64, 16), (N, 16), (N, 16))]

    def needs(pieces: bool) -> float:
        def encode(first, second, x):
            return jax.nn.gelu(x @ first) @ second

        def row_loss(a, labels, b):
            return -jnp.take_along_axis(jax.nn.log_softmax(a @ b.T), labels[:, None], 1)[:, 0]

        f = bbj.chunked(encode, micro_batch=256, in_axes=(None, None, 0)) if pieces else encode
        rows = bbj.chunked(row_loss, micro_batch=64, in_axes=(0, 0, None)) if pieces else row_loss

        def loss(first, second, x, y):
            return rows(f(first, second, x), jnp.arange(N), f(first, second, y)).mean()

        return needs_of(jax.jit(jax.grad(loss, (0, 1))).trace(*shapes)) / 2**20

    return needs(False), needs(True)


def memory(write: bool) -> None:
    lines = ["| | full, MiB | ours, MiB | ours / full, % | target, at most |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, (full, ours) in {
        "PyTorch, of tensors": memory_of_torch(),
        "JAX, by the compiler": memory_of_jax(),
    }.items():
        lines.append(f"| {name} | {full:,.1f} | {ours:,.1f} | {100 * ours / full:.2f} | 2 |")
    shown = "\n".join(lines)
    print(shown, flush=True)
    if write:
        body = (
            "Two layers (16-64-16) for each side, in pieces of 256; the n × n matrix in pieces of 64 rows."
            f"\n\n{shown}"
            f"\n\n{circumstances('torch', 'jax')}.\n\n    python benchmarks/coupled.py memory --write\n"
        )
        section(PAGE, HEAD, "Peak memory at 16,384 pairs", body)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", help=f"some of {[*JOBS, 'memory']}; all of them without")
    parser.add_argument("--repetitions", type=int, default=0, help="rounds; without, what takes about a minute")
    parser.add_argument("--write", action="store_true", help="write the jobs' parts of benchmarks/coupled.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    for name in options.jobs or [*JOBS, "memory"]:
        if name == "memory":
            memory(options.write)
            continue
        runs = JOBS[name]()
        repetitions = options.repetitions or rounds(runs, 60)
        timings = measure(runs, repetitions, warm_up=1)
        peaks = {way: f"{peak(run) / 2**20:.1f}" for way, run in runs.items()}
        against = [way for way in runs if not way.startswith("ours")]
        shown = f"{table(timings, against, {'peak MiB': peaks})}\n\n{compared(timings, TARGETS[name])}"
        title = TITLES[name] + AS_IT_STANDS
        print(f"{title}, {repetitions} rounds\n{shown}", flush=True)
        if options.write:
            picture = f"{PAGE.stem}-{name}{AS_IT_STANDS.replace(', ', '-').replace(' ', '-')}.png"
            figure(timings, title, PAGE.with_name(picture))
            body = (
                f"{repetitions} rounds.\n\n{shown}\n\n![times]({picture})\n\n"
                f"{circumstances('torch', 'sentence-transformers')}.\n\n"
                f"    python benchmarks/coupled.py {name} --repetitions {repetitions} --write\n"
            )
            section(PAGE, HEAD, title, body)


if __name__ == "__main__":
    main()
