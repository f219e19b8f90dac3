"""One window on each Keras backend, through `fit` and bare: ours, Keras's own accumulation, and the loop by hand.

KERAS_BACKEND=tensorflow python benchmarks/keras_fit.py [mlp-16 transformer …] [--repetitions 15] [--write]
KERAS_BACKEND=tensorflow python benchmarks/keras_fit.py mlp-16 --peaks     the memory alone, in a process of its own

And with jax, and torch: each writes its own parts of keras_fit.md, one a job.
"""

import argparse

import resident
from interleaved import OVER_THE_FLOOR, circumstances, compared, figure, measure, page, rounds, section, table
from keras_jobs import JOBS
from keras_ways import BACKEND, WAYS, Trial, on

ON_GPU = "GPU" in on()
PAGE = page(__file__, ON_GPU)
GOALS = {"tensorflow": 0.50, "jax": 0.36, "torch": 0.70}  # over Keras's own, of the MLP at micro-batch 16
OURS = ("ours, split", "ours, stream")
NAMES = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}
PACKAGES = {"tensorflow": "tensorflow-cpu", "jax": "jax", "torch": "torch"}
HEAD = f"""# Keras: one window{" on a GPU" * ON_GPU}

16 micro-batches and one update by Adam, float32. Times are of one window: medians and quartiles over the repetitions,
each contender once a round in one process, in an order drawn anew; ratios are medians over the rounds.

- *Keras* is `gradient_accumulation_steps=16`.
- *fit* is an epoch inside `fit`, on arrays, as a user has it. What `fit` does once a training is left out, for all.
- *bare* is the train function that `fit` calls, on batches that are there already.
- *by hand* is what an expert writes with the same model and optimizer: a `tf.while_loop`, a `lax.scan` or a Python loop
  over the micro-batches, then one update. It keeps no metrics, weighs no micro-batch, and takes inf as it comes.
- *floor* is the same with nothing added up: each gradient replaces the one before. In TensorFlow ten micro-batches may
  run at once there and by hand, as is its default: quicker where a thread would be idle, and more are in memory. Ours
  run *one at a time*, and so does the floor of that name.
- *peak MiB* is the most that a window holds beyond model, optimizer state and data: of tensors on PyTorch,
  by XLA's plan for the compiled step on JAX, and on TensorFlow, which keeps no account on a CPU, what a process of its
  own holds more (`resident.py`), to half a MiB. Keras's accumulators stand between windows too, and are counted.

Each window, on a GPU too, ends when the host has read a weight that the update made.
"""


NOTES = {
    "tensorflow": """\
The large weights' gradients are multiplied out once for many micro-batches, where by hand and at the floor each
multiplies its own, a few rows times a matrix turned over are computed the other way round, and the rows of a table that
was looked up are added to its sum where they belong. Left over that: a test for inf once a window, the metrics, and in
the stream the micro-batches' way from the data set one by one.
Keras leaves XLA off where there is no accelerator; *XLA* is `compile(jit_compile=True)`, for ours and for Keras's
own alike.""",
    "jax": """\
The large weights' gradients are multiplied out once a window where their factors are small, while by hand and at the
floor each micro-batch multiplies its own. Of the others XLA writes each gradient and adds it in a pass of its own. The
division is part of the update's own pass, and the test for inf reads the sums once a window.""",
    "torch": """\
The large weights' gradients are taken from autograd, and the rows of many micro-batches multiplied together; by hand
and at the floor each micro-batch makes its own. Left over that: a window has a pass to divide and one to test for
inf. Every contender pays for Keras's own Python in each layer and loss.""",
}


def contenders(trial) -> dict:
    """Everybody on one job; those that `fit` are as they are bare, with `fit` around them."""
    bare, loop, more = WAYS(trial)
    batch = trial.n * trial.size
    return {
        "Keras, fit": trial.fit(trial.builtin(), trial.size),
        "ours, split, fit": trial.fit(trial.split(), batch),
        "ours, stream, fit": trial.fit(trial.stream(), trial.size),
        "Keras, bare": bare(trial.builtin(), trial.size),
        "ours, split, bare": bare(trial.split(), batch),
        "ours, stream, bare": bare(trial.stream(), trial.size, pulled=trial.n),
        "by hand": loop(trial.model(), add=True),
        "floor": loop(trial.model(), add=False),
        "full batch, fit": trial.fit(trial.model(), batch),
        **more(),
    }


def told(job):
    """The memory of one window of each way that TensorFlow's page shows."""
    trial = Trial(job, 1)
    bare, loop, _ = WAYS(trial)
    streamed = bare(trial.stream(), trial.size, pulled=trial.n)
    streamed.correction = lambda: -(trial.x.nbytes + trial.y.nbytes)  # pulled inside, and joined
    resident.told(
        {
            "Keras, bare": bare(trial.builtin(), trial.size),
            "ours, split, bare": bare(trial.split(), trial.n * trial.size),
            "ours, stream, bare": streamed,
            "by hand": loop(trial.model(), add=True),
            "floor": loop(trial.model(), add=False),
            "by hand, one at a time": loop(trial.model(), add=True, at_once=1),
            "floor, one at a time": loop(trial.model(), add=False, at_once=1),
        }
    )


def peaks(name, runs) -> dict[str, int]:
    """Bytes of those that are not `fit`, by the backend's own way."""
    if BACKEND == "tensorflow":
        return resident.asked_of(__file__, name)
    if BACKEND == "jax":
        size = lambda run: run.bytes[1]  # noqa: E731
    else:
        from torch_jobs import peak as size
    bare = {way: run for way, run in runs.items() if not way.endswith("fit")}
    return {way: size(run) + getattr(run, "correction", lambda: 0)() for way, run in bare.items()}


def main() -> None:
    """Measures and prints the backend's part of the page, and with --write writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", help=f"some of {list(JOBS)}; all of them without")
    parser.add_argument("--repetitions", type=int, default=0, help="rounds; without, what takes about 15 seconds")
    parser.add_argument("--peaks", action="store_true", help="on TensorFlow: only measure what a window holds")
    parser.add_argument("--write", action="store_true", help="write this backend's parts of benchmarks/keras_fit.md")
    options = parser.parse_args()
    for name in options.jobs or JOBS:
        job = JOBS[name]
        if options.peaks:
            told(job)
            continue
        trial = Trial(job, {"mlp-1": 8, "mlp-16": 4}.get(name, 1))
        runs = contenders(trial)
        repetitions = options.repetitions or rounds(runs, 15)
        timings = measure(runs, repetitions)
        for timing in timings.values():
            timing.seconds[:] = [seconds / trial.windows for seconds in timing.seconds]
        held = peaks(name, runs)
        columns = {"peak MiB": {way: f"{held[way] / 2**20:.1f}" if way in held else "" for way in runs}}
        title = f"{NAMES[BACKEND]}: {job.title}"
        part = (
            f"{job.micro_batches} micro-batches a window, {trial.windows} windows at a time, on {on()}; "
            f"{repetitions} rounds.\n\n"
            f"{table(timings, ['Keras, fit', 'Keras, bare', 'by hand', 'floor'], columns)}\n\n"
            f"{compared(timings, pairs(name))}\n\n"
            + (f"{NOTES[BACKEND]}\n\n" if name == "mlp-16" else "")
            + f"![times]({PAGE.stem}-{BACKEND}-{name}.png)\n\n{circumstances('keras', PACKAGES[BACKEND])}.\n\n"
            f"    KERAS_BACKEND={BACKEND} python benchmarks/keras_fit.py {name} --repetitions {repetitions} --write\n"
        )
        print(title, part, sep="\n", flush=True)
        if options.write:
            figure(timings, title, PAGE.with_name(f"{PAGE.stem}-{BACKEND}-{name}.png"))
            section(PAGE, HEAD, title, part)


def pairs(name):
    """Ours over Keras's own and over the floor, with what is wanted where something is."""
    for way in ("fit", "bare", "bare, XLA"):
        for ours in OURS:
            yield f"{ours}, {way}", f"Keras, {way}", GOALS[BACKEND] if name == "mlp-16" else None
    for floor in ("floor", "floor, one at a time"):
        for ours in OURS:
            yield f"{ours}, bare", floor, OVER_THE_FLOOR.get(name) if "split" in ours else None


if __name__ == "__main__":
    main()
