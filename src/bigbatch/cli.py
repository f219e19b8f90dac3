"""The `bigbatch` command."""

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path

import bigbatch

# For each demo what it imports and the extra that brings it, in the order in which one is looked for.
FRAMEWORKS = {
    "torch": ("torch", "torch"),
    "jax": ("optax", "jax"),
    "tensorflow": ("tensorflow", "tensorflow"),
    "keras": ("keras", "keras"),
    "tf1": ("tensorflow", "tensorflow"),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(prog="bigbatch", description=bigbatch.__doc__)
    parser.add_argument("--version", action="version", version=f"bigbatch {bigbatch.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    demo = commands.add_parser("demo", help="64 micro-batches make one big batch's update, on real data")
    demo.add_argument("--framework", choices=FRAMEWORKS, help="default: the first that is installed")
    demo.add_argument("--float64", action="store_true", help="train in float64, where the differences vanish")
    demo.add_argument("--epochs", type=_positive, default=30, help="passes over the data (default: %(default)s)")
    demo.add_argument("--output", type=Path, default=Path("bigbatch-demo.png"), help="default: %(default)s")
    demo.set_defaults(run=_demo)
    options = parser.parse_args(arguments)
    return options.run(options)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1. Received: {text}")
    return number


def _demo(options: argparse.Namespace) -> int:
    for needed in ("rich", "matplotlib", "sklearn", "numpy"):
        if not _installed(needed):
            return _fail(f"The demo needs {needed}. Run: pip install 'bigbatch[demo]'")
    framework = options.framework or next((name for name in FRAMEWORKS if _installed(FRAMEWORKS[name][0])), None)
    if framework is None:
        return _fail(f"The demo needs one of {', '.join(FRAMEWORKS)}. Run: pip install 'bigbatch[torch]'")
    package, extra = FRAMEWORKS[framework]
    if not _installed(package):
        return _fail(f"{package} is not installed. Run: pip install 'bigbatch[{extra}]'")
    if options.output.suffix.lower() not in (".png", ".pdf", ".svg") or not options.output.parent.is_dir():
        return _fail(f"--output must be a .png, .pdf or .svg in a folder that exists. Received: {options.output}")

    # matplotlib's own default looks for a screen.
    importlib.import_module("matplotlib").use("agg")
    from rich.console import Console

    from bigbatch.demo import Job, report

    demo = importlib.import_module(f"bigbatch.demo.{framework}")
    job = Job(dtype="float64" if options.float64 else "float32", epochs=options.epochs)
    report.run(demo.train, job, framework, options.output, Console(), getattr(demo, "audit", None))
    return 0


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _fail(message: str) -> int:
    print(f"bigbatch: {message}", file=sys.stderr)
    return 1
