"""Looks for a third outcome: neither the full batch's update nor an error after which the next window is exact.

    python tests/adversary.py --examples 10000                          PyTorch
    python tests/adversary.py --backend jax --examples 1000 --seed 7    the same examples again, with the same seed

An example is one random model, window, option and foreign act, drawn by `tests/adversaries/<backend>.py`. Hypothesis
shrinks the first third outcome that it meets, and the run ends with exit status 1.
"""

import argparse
import importlib
import logging
import os
import random
import sys
import time
import traceback
from pathlib import Path

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

BACKENDS = ["torch", "jax", "tensorflow", "keras_tensorflow", "keras_jax", "keras_torch"]


def search(backend: str, examples: int, number: int) -> int:
    """Runs `examples` random examples and returns how many were tried; raises AssertionError at a third outcome."""
    family, _, keras_backend = backend.partition("_")
    if keras_backend:
        os.environ.setdefault("KERAS_BACKEND", keras_backend)
    example = importlib.import_module(f"adversaries.{family}").example
    tried = 0

    @seed(number)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def look(data: st.DataObject) -> None:
        nonlocal tried
        tried += 1
        if tried % 500 == 0 and sys.stderr.isatty():
            print(f"\r{tried} of {examples}", end="", file=sys.stderr, flush=True)
        example(data)

    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # each skipped window says why
    try:
        look()
    finally:
        logging.disable(level)
    return tried


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=BACKENDS, default="torch")
    parser.add_argument("--examples", type=int, default=1000, help="how many to try (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="repeats a run; drawn anew where it is left out")
    asked = parser.parse_args(arguments)
    number = random.SystemRandom().randrange(2**32) if asked.seed is None else asked.seed
    print(f"{asked.backend}, {asked.examples} examples, seed {number}", flush=True)
    started = time.perf_counter()
    try:
        tried = search(asked.backend, asked.examples, number)
    except Exception:
        traceback.print_exc()
        print(f"a third outcome; repeat it with --backend {asked.backend} --seed {number}")
        return 1
    print(f"{tried} tried in {time.perf_counter() - started:.0f} s, no third outcome")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main(sys.argv[1:]))
