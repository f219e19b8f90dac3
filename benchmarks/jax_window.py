"""One window of 8 micro-batches of 32 on a CPU: ours, the scan by hand, optax's, and the full batch.

python benchmarks/jax_window.py [--repetitions 100] [--write]
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from interleaved import circumstances, measure, ratio, table

import bigbatch.jax as bb

N, SIZE = 8, 32
WIDTHS = (784, 1024, 1024, 10)
X = jax.random.normal(jax.random.key(1), (N * SIZE, WIDTHS[0]))
Y = jax.random.randint(jax.random.key(2), (N * SIZE,), 0, WIDTHS[-1])
PARTS = [(X[i : i + SIZE], Y[i : i + SIZE]) for i in range(0, N * SIZE, SIZE)]
ADAM = optax.adam(1e-3)


def parameters():
    keys = jax.random.split(jax.random.key(0), len(WIDTHS) - 1)
    shapes = zip(keys, WIDTHS[:-1], WIDTHS[1:], strict=True)
    return [(jax.random.normal(key, (n, m)) / n**0.5, jnp.zeros(m)) for key, n, m in shapes]


def loss_fn(params, x, y):
    for kernel, bias in params[:-1]:
        x = jax.nn.gelu(x @ kernel + bias)
    kernel, bias = params[-1]
    return optax.softmax_cross_entropy_with_integer_labels(x @ kernel + bias, y).mean()


def by_hand(params, x, y):
    """What an expert writes: one scan over reshaped arrays, the sum in its carry."""

    def body(carry, part):
        return jax.tree.map(jnp.add, carry, jax.value_and_grad(loss_fn)(params, *part)), None

    start = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
    sums, _ = jax.lax.scan(body, start, (x.reshape(N, SIZE, -1), y.reshape(N, SIZE)))
    return jax.tree.map(lambda s: s / N, sums)


def floor(params, x, y):
    """N times a forward and a backward, and one gradient of them: the least that a loop can do."""

    def body(_, part):
        return jax.value_and_grad(loss_fn)(params, *part), None

    start = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
    return jax.lax.scan(body, start, (x.reshape(N, SIZE, -1), y.reshape(N, SIZE)))[0]


class Contender:
    """A compiled step, run once or N times a window, and the memory that it needs."""

    def __init__(self, tx, value_and_grad, *, streamed=False, extra=None):
        def step(params, opt_state, x, y):
            loss, grads = value_and_grad(params, x, y)
            more = {} if extra is None else extra(loss)
            updates, opt_state = tx.update(grads, opt_state, params, **more)
            return optax.apply_updates(params, updates), opt_state, loss

        params = parameters()
        self.state = params, tx.init(params)
        self.parts = PARTS if streamed else [(X, Y)]
        self.step = jax.jit(step, donate_argnums=(0, 1)).lower(*self.state, *self.parts[0]).compile()
        memory = self.step.memory_analysis()
        size = memory.argument_size_in_bytes + memory.output_size_in_bytes
        self.mebibytes = (size - memory.alias_size_in_bytes + memory.temp_size_in_bytes) / 2**20

    def __call__(self):
        for part in self.parts:
            *self.state, _ = self.step(*self.state, *part)
        jax.block_until_ready(self.state)


def contenders():
    kinds = optax.microbatching.AccumulationType
    microbatched = optax.microbatching.microbatch(
        jax.value_and_grad(loss_fn), argnums=(1, 2), microbatch_size=SIZE, accumulator=kinds.MEAN
    )
    plain = jax.value_and_grad(loss_fn)
    accumulated = bb.accumulate(ADAM, every=N)
    return {
        "full batch": Contender(ADAM, plain),
        "floor": Contender(ADAM, floor),
        "scan by hand": Contender(ADAM, by_hand),
        "optax.microbatch": Contender(ADAM, microbatched),
        "ours, split": Contender(ADAM, bb.value_and_grad(loss_fn, micro_batch=SIZE, in_axes=(None, 0, 0))),
        "optax.MultiSteps": Contender(optax.MultiSteps(ADAM, N), plain, streamed=True),
        "ours, stream": Contender(accumulated, plain, streamed=True, extra=lambda loss: {"items": SIZE, "value": loss}),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=100)
    parser.add_argument("--write", action="store_true", help="write benchmarks/jax_window.md")
    options = parser.parse_args()
    measured = contenders()
    timings = measure(measured, options.repetitions)
    shown = table(timings, ["optax.MultiSteps", "scan by hand", "floor"])
    memory = "\n".join(
        ["| | live MiB |", "| --- | ---: |", *(f"| {name} | {c.mebibytes:.1f} |" for name, c in measured.items())]
    )
    live = {name: c.mebibytes for name, c in measured.items()}
    goals = [
        ("split / MultiSteps, time", ratio(timings, "ours, split", "optax.MultiSteps"), 0.50),
        ("split / optax.microbatch, time", ratio(timings, "ours, split", "optax.microbatch"), 1.00),
        ("stream / MultiSteps, time", ratio(timings, "ours, stream", "optax.MultiSteps"), 0.70),
        ("split / MultiSteps, memory", live["ours, split"] / live["optax.MultiSteps"], 0.68),
        ("split / scan by hand, memory", live["ours, split"] / live["scan by hand"], 1.00),
        ("stream / MultiSteps, memory", live["ours, stream"] / live["optax.MultiSteps"], 1.00),
    ]
    wanted = "\n".join(
        ["| | measured | wanted, at most |", "| --- | ---: | ---: |"]
        + [f"| {name} | {got:.3f} | {goal:.2f} |" for name, got, goal in goals]
    )
    print(shown, memory, wanted, sep="\n\n")
    if options.write:
        Path(__file__).with_suffix(".md").write_text(
            f"# JAX\n\nOne window of {N} micro-batches of {SIZE}: MLP 784-1024-1024-10, Adam, float32, on a CPU. Every "
            "contender once a round, in an order drawn anew; a ratio is the median over rounds of both times in one "
            f"round. {options.repetitions} rounds. The streams are one compiled step a micro-batch, the others one a "
            "window; parameters and state are donated to all. The floor adds nothing up.\n\n"
            f"{shown}\n\nMemory as XLA plans it for the compiled step: arguments + outputs − aliased + temporary.\n\n"
            f"{memory}\n\n{wanted}\n\n{circumstances('jax', 'optax')}.\n\n"
            f"    python benchmarks/jax_window.py --repetitions {options.repetitions} --write\n"
        )


if __name__ == "__main__":
    main()
