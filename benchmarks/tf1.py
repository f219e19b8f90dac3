"""TensorFlow 1: one window in a session, ours against the three ops that people paste, and the floor.

    python benchmarks/tf1.py [mlp-16 transformer … table] [--repetitions 100] [--write]
    python benchmarks/tf1.py mlp-16 --peaks         the memory alone, as asked for in a process of its own

The floor is N forwards and backwards, each gradient read once and thrown away, and one update.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import resident
import tensorflow as tf
from interleaved import circumstances, compared, figure, measure, page, rounds, section, table
from tf1_jobs import JOBS

import bigbatch.tf1 as bb

v1 = tf.compat.v1
ROOT = Path(__file__).parent.parent
TABLE = "A table of 50 million rows"
ON_GPU = bool(tf.config.list_physical_devices("GPU"))
ON = "a GPU" if ON_GPU else "a CPU"
PAGE = page(__file__, ON_GPU)
HEAD = f"""# TensorFlow 1 sessions{" on a GPU" * ON_GPU}

Every contender once a round in one process, in an order drawn anew; medians, quartiles, and the medians of each round's
ratios. `session.run` returns when the device is done, on a GPU too.

*Three ops* is the recipe that people paste: one run to zero the sums, one a micro-batch to add, one to apply. *Guarded*
is the same with a finite check on the norm of the mean, which ours has too. *Floor* is the forwards and backwards, each
gradient read once and thrown away, and one update. Weight gradients of many micro-batches are multiplied out at once in
ours, so it can be under that floor.

*Peak* is the most that a window holds beyond the parameters, the optimizer's state and the data. TensorFlow keeps no
account on a CPU, so it is what a process of its own holds more (`benchmarks/resident.py`), to half a MiB, and the sums.
"""


def graph(job):
    """A model and its optimizer, in the graph that is open."""
    x, y, loss = job.loss()
    return x, y, loss, job.optimizer()


def started():
    session = v1.Session()
    session.run(v1.global_variables_initializer())
    return session


def held(session, variables):
    """The bytes of variables that stand between windows."""
    sizes = [tf.size(v.read_value()) * v.dtype.size for v in variables]
    return lambda: int(sum(session.run(sizes)))


def ours(job):
    parts = job.parts()
    x, y, loss, optimizer = graph(job)
    acc = bb.Accumulator(optimizer, every=job.micro_batches)
    op = acc.minimize(loss, items=tf.shape(x)[0])
    others = {v.ref() for v in [*v1.trainable_variables(), *optimizer.variables()]}
    session = started()

    def run():
        for a, b in parts:
            session.run(op, {x: a, y: b})

    run.correction = held(session, [v for v in acc.variables() if v.ref() not in others])
    return run


def three_ops(job, guarded=False):
    parts = job.parts()
    x, y, loss, optimizer = graph(job)
    gradients, variables = dense(optimizer.compute_gradients(loss))
    sums = [v1.Variable(tf.zeros(v.shape), trainable=False, use_resource=True) for v in variables]
    zero = tf.group(*[s.assign(tf.zeros_like(s)) for s in sums])
    add = tf.group(*[s.assign_add(g) for s, g in zip(sums, gradients, strict=True)])
    means = [s / job.micro_batches for s in sums]
    pairs = list(zip(means, variables, strict=True))
    if guarded:  # with what our update also does: the gradient's norm, and no update where it is not finite
        finite = tf.math.is_finite(tf.linalg.global_norm(means))
        apply = tf.cond(finite, lambda: optimizer.apply_gradients(pairs), tf.no_op)
    else:
        apply = optimizer.apply_gradients(pairs)
    session = started()

    def run():
        session.run(zero)
        for a, b in parts:
            session.run(add, {x: a, y: b})
        session.run(apply)

    run.correction = held(session, sums)
    return run


def dense(pairs):
    """Gradients and variables; an embedding's is rows, which the recipe adds up as a table."""
    gradients, variables = zip(*pairs, strict=True)
    return [tf.convert_to_tensor(g) for g in gradients], variables


def floor(job):
    parts = job.parts()
    x, y, loss, optimizer = graph(job)
    gradients, variables = dense(optimizer.compute_gradients(loss))
    read = tf.add_n([tf.reduce_max(g) for g in gradients])
    fixed = [v1.Variable(tf.ones(v.shape), trainable=False, use_resource=True) for v in variables]
    apply = optimizer.apply_gradients(zip([f.read_value() for f in fixed], variables, strict=True))
    session = started()

    def run():
        for a, b in parts:
            session.run(read.op, {x: a, y: b})
        session.run(apply)

    return run


# Ratios, and what is wanted at most.
PAIRS = [("ours", "three ops", 1.0), ("ours", "three ops, guarded", None), ("ours", "floor", None)]
WAYS = {
    "ours": ours,
    "three ops": three_ops,
    "three ops, guarded": lambda job: three_ops(job, guarded=True),
    "floor": floor,
}


def contenders(job, ways=WAYS):
    made = {}
    for name in ways:
        with tf.Graph().as_default():
            made[name] = WAYS[name](job)
    return made


def big_table() -> str:
    lines = ["Eight micro-batches of 100 rows and an update by SGD, each way in a process of its own.\n"]
    for way in ("bare", "bigbatch", "recipe"):
        script = str(ROOT / "tests/tf1/big_table.py")
        done = subprocess.run([sys.executable, script, way], capture_output=True, text=True, check=True)
        lines.append(f"- {done.stdout.splitlines()[-1]}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", help=f"some of {[*JOBS, 'table']}; all of them without")
    parser.add_argument("--repetitions", type=int, default=0, help="rounds; without, what takes about 10 seconds")
    parser.add_argument("--peaks", action="store_true", help="only measure what each contender holds in a window")
    parser.add_argument("--write", action="store_true", help="write the jobs' parts of benchmarks/tf1.md")
    options = parser.parse_args()
    for name in options.jobs or [*JOBS, "table"]:
        if name == "table":
            title, body, more = TABLE, big_table(), ""
        else:
            job = JOBS[name]
            runs = contenders(job)
            if options.peaks:
                resident.told(runs)
                continue
            repetitions = options.repetitions or rounds(runs, 10)
            timings = measure(runs, repetitions)
            peaks = {way: f"{size / 2**20:.1f}" for way, size in resident.asked_of(__file__, name).items()}
            shown = table(timings, ["three ops", "three ops, guarded", "floor"], {"peak MiB": peaks})
            title, more = job.title, f" --repetitions {repetitions}"
            body = f"{job.micro_batches} micro-batches a window, float32, on {ON}; {repetitions} rounds.\n\n{shown}"
            body += f"\n\n{compared(timings, PAIRS)}"
            if options.write:
                figure(timings, f"{title}, {job.micro_batches} of them", PAGE.with_name(f"{PAGE.stem}-{name}.png"))
                body += f"\n\n![times]({PAGE.stem}-{name}.png)"
        print(title, body, sep="\n", flush=True)
        if options.write:
            command = f"python benchmarks/tf1.py {name}{more} --write"
            section(PAGE, HEAD, title, f"{body}\n\n{circumstances('tensorflow-cpu')}.\n\n    {command}\n")


if __name__ == "__main__":
    main()
