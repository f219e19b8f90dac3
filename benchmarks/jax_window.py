"""JAX: one window of three jobs, ours against optax's ways, the loops by hand, and the floor.

    python benchmarks/jax_window.py [mlp-16 transformer …] [--repetitions 60] [--write]

The floor is N forwards and backwards and one update; it adds nothing up. Memory is what XLA plans for the compiled
step: arguments + outputs − aliased + temporary.
"""

import argparse

import jax
import jax.numpy as jnp
import optax
from interleaved import against_goals, circumstances, figure, measure, page, ratio, rounds, section, table
from jax_jobs import JOBS, ON, ON_GPU, Job

import bigbatch.jax as bb
from bigbatch.fused.jax_conv_layout import with_fast_convolutions

PAGE = page(__file__, ON_GPU)
ADAM = optax.adam(1e-3)
HEAD = f"""# JAX{" on a GPU" * ON_GPU}

Every contender once a round, in an order drawn anew; a ratio is the median over rounds of both times in one round. The
streams are compiled steps that are called once a micro-batch, the others are called once a window; parameters and state
are donated to all. *Floor* is the forwards and backwards and one update; it adds nothing up. *Live* is the memory that
XLA plans for the compiled step: arguments + outputs − aliased + temporary.

*Scan by hand* is what an expert writes: one scan over reshaped arrays, the sum in its carry. *Stream by hand* is one
compiled function that adds to the sums, donated, and another that applies them.

Each window ends in `jax.block_until_ready`, on a GPU too.
"""


class Contender:
    """A compiled step, run once or N times a window, and the memory that it needs."""

    def __init__(self, job, tx, value_and_grad, *, streamed=False, extra=None):
        def step(params, opt_state, x, y):
            loss, grads = value_and_grad(params, x, y)
            more = {} if extra is None else extra(loss)
            if isinstance(opt_state, bb.AccumulateState):
                return *bb.apply_gradients(tx, grads, opt_state, params, **more), loss
            updates, opt_state = tx.update(grads, opt_state, params, **more)
            return optax.apply_updates(params, updates), opt_state, loss

        params = job.parameters()
        self.state = params, tx.init(params)
        self.parts = parts(job) if streamed else [job.example(job.size * job.micro_batches)]
        self.step = jax.jit(step, donate_argnums=(0, 1)).lower(*self.state, *self.parts[0]).compile()
        self.mebibytes = live(self.step)

    def __call__(self):
        for part in self.parts:
            *self.state, _ = self.step(*self.state, *part)
        jax.block_until_ready(self.state)


class StreamByHand:
    """Two compiled functions: one adds a micro-batch's gradient to the sums, one applies their mean."""

    def __init__(self, job):
        def add(params, sums, x, y):
            loss, grads = jax.value_and_grad(job.loss_fn)(params, x, y)
            return jax.tree.map(jnp.add, sums, (loss, grads))

        def apply(params, opt_state, sums):
            _, grads = jax.tree.map(lambda s: s / job.micro_batches, sums)
            updates, opt_state = ADAM.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, jax.tree.map(jnp.zeros_like, sums)

        params = job.parameters()
        self.state = params, ADAM.init(params), (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        self.parts = parts(job)
        self.add = jax.jit(add, donate_argnums=1).lower(params, self.state[2], *self.parts[0]).compile()
        self.apply = jax.jit(apply, donate_argnums=(0, 1, 2)).lower(*self.state).compile()
        self.mebibytes = max(live(self.add) + live_state(self.state[1]), live(self.apply))

    def __call__(self):
        params, opt_state, sums = self.state
        for part in self.parts:
            sums = self.add(params, sums, *part)
        self.state = self.apply(params, opt_state, sums)
        jax.block_until_ready(self.state)


def parts(job):
    x, y = job.example(job.size * job.micro_batches)
    return [(x[i : i + job.size], y[i : i + job.size]) for i in range(0, len(x), job.size)]


def live(compiled) -> float:
    memory = compiled.memory_analysis()
    size = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return (size - memory.alias_size_in_bytes + memory.temp_size_in_bytes) / 2**20


def live_state(tree) -> float:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / 2**20


def contenders(job: Job):
    n, size, loss_fn = job.micro_batches, job.size, job.loss_fn

    def by_hand(params, x, y):
        def body(carry, part):
            return jax.tree.map(jnp.add, carry, jax.value_and_grad(loss_fn)(params, *part)), None

        start = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        cut = [a.reshape(n, size, *a.shape[1:]) for a in (x, y)]
        sums, _ = jax.lax.scan(body, start, cut)
        return jax.tree.map(lambda s: s / n, sums)

    def floor(params, x, y):
        @with_fast_convolutions  # without, the floor would be ten times over our heads
        def body(_, part):
            return jax.value_and_grad(loss_fn)(params, *part), None

        start = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(body, start, [a.reshape(n, size, *a.shape[1:]) for a in (x, y)])[0]

    plain = jax.value_and_grad(loss_fn)
    microbatched = optax.microbatching.microbatch(
        plain, argnums=(1, 2), microbatch_size=size, accumulator=optax.microbatching.AccumulationType.MEAN
    )
    accumulated = bb.accumulate(ADAM, every=n)
    ours = bb.value_and_grad(loss_fn, micro_batch=size, in_axes=(None, 0, 0))
    return {
        "full batch": Contender(job, ADAM, plain),
        "floor": Contender(job, ADAM, floor),
        "scan by hand": Contender(job, ADAM, by_hand),
        "optax.microbatch": Contender(job, ADAM, microbatched),
        "ours, split": Contender(job, ADAM, ours),
        "optax.MultiSteps": Contender(job, optax.MultiSteps(ADAM, n), plain, streamed=True),
        "stream by hand": StreamByHand(job),
        "ours, stream": Contender(
            job, accumulated, plain, streamed=True, extra=lambda loss: {"items": size, "value": loss}
        ),
    }


def goals(timings, live, of_all: bool) -> list[tuple[str, str, float | None]]:
    """Ratios, and what is wanted at most: two of every job, the others of the MLP's 8 × 32 alone."""

    def time(ours, to):
        return ratio(timings, ours, to)

    wanted = [
        ("split / floor, time", time("ours, split", "floor"), 1.05),
        ("split / scan by hand, time", time("ours, split", "scan by hand"), 1.00),
        ("split / optax.microbatch, time", time("ours, split", "optax.microbatch"), 1.00),
        ("split / MultiSteps, time", time("ours, split", "optax.MultiSteps"), 0.50),
        ("stream / stream by hand, time", time("ours, stream", "stream by hand"), 1.00),
        ("stream / MultiSteps, time", time("ours, stream", "optax.MultiSteps"), 0.70),
        ("split / MultiSteps, memory", live["ours, split"] / live["optax.MultiSteps"], 0.68),
        ("split / scan by hand, memory", live["ours, split"] / live["scan by hand"], 1.00),
        ("stream / MultiSteps, memory", live["ours, stream"] / live["optax.MultiSteps"], 1.00),
    ]
    every = ("split / floor, time", "stream / stream by hand, time")
    return [(name, f"{got:.3f}", goal if of_all or name in every else None) for name, got, goal in wanted]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", help=f"some of {list(JOBS)}; all of them without")
    parser.add_argument("--repetitions", type=int, default=0, help="rounds; without, what takes about 15 seconds")
    parser.add_argument("--write", action="store_true", help="write the jobs' parts of benchmarks/jax_window.md")
    options = parser.parse_args()
    for name in options.jobs or JOBS:
        job = JOBS[name]
        measured = contenders(job)
        repetitions = options.repetitions or rounds(measured, 15)
        timings = measure(measured, repetitions)
        live = {name: c.mebibytes for name, c in measured.items()}
        against = ["optax.MultiSteps", "scan by hand", "stream by hand", "floor"]
        shown = table(timings, against, {"live MiB": {name: f"{mib:.1f}" for name, mib in live.items()}})
        wanted = against_goals(goals(timings, live, name == "mlp-32"))
        print(f"{job.title}, {job.micro_batches} micro-batches, {repetitions} rounds\n{shown}\n{wanted}")
        if options.write:
            figure(timings, f"{job.title}, {job.micro_batches} of them", PAGE.with_name(f"{PAGE.stem}-{name}.png"))
            body = (
                f"{job.micro_batches} micro-batches a window, Adam, float32, on {ON}; "
                f"{repetitions} rounds.\n\n{shown}\n\n{wanted}\n\n![times]({PAGE.stem}-{name}.png)\n\n"
                f"{circumstances('jax', 'optax')}.\n\n"
                f"    python benchmarks/jax_window.py {name} --repetitions {repetitions} --write\n"
            )
            section(PAGE, HEAD, job.title, body)


if __name__ == "__main__":
    main()
