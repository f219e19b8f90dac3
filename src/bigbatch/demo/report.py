"""What the demo shows: a bar while it works, then a table for the terminal and a figure for the eye."""

from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib.pyplot as plt
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bigbatch.audit import Audit
from bigbatch.demo import WAYS, Job, Result, Train, Way


def run(
    train: Train,
    job: Job,
    framework: str,
    output: Path,
    console: Console,
    audit: Callable[[Job], Audit] | None = None,
) -> dict[Way, Result]:
    """Trains all four ways, prints the table and saves the figure to `output`; then audits a model, given how."""
    examples = job.epochs * len(job.data[0])
    console.print(
        f"[bold]bigbatch demo[/bold] in {framework}, {job.dtype}: {len(job.data[0]):,} handwritten digits, "
        f"{job.epochs} epochs, one seed, four ways"
    )
    results: dict[Way, Result] = {}
    columns = (TextColumn("{task.description:<20}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        for way, title in WAYS.items():
            task = progress.add_task(title, total=examples)
            results[way] = train(way, job, lambda n, task=task: progress.advance(task, n))
    console.print(table(results))
    console.print(words(results))
    if advice := next((result.advice for result in results.values() if result.advice), None):
        console.print(f"\n[bold]Was the batch worth it?[/bold] {advice}")
    if audit is not None:
        found = audit(job)
        console.print("\n[bold]Would it be exact with a BatchNorm?[/bold]")
        console.print(found.table(most=4))
        for cause in found.causes:
            console.print(f"{cause}\n")
    figure(results, framework, output)
    console.print(f"The curves are in [bold]{output}[/bold].")
    return results


def table(results: Mapping[Way, Result]) -> Table:
    """One row a way, in 80 columns. "off by" is the largest difference from the true batch's weights."""
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    shown.add_column("way", no_wrap=True)
    for column in ("updates", "loss", "accuracy", "off by", "peak", "time"):
        shown.add_column(column, justify="right", no_wrap=True)
    for way, result in results.items():
        accumulated = way in ("stream", "split")
        peak = "not known" if result.peak_bytes is None else f"{result.peak_bytes / 2**20:.1f} MiB"
        shown.add_row(
            WAYS[way],
            f"{result.updates:,}",
            f"{result.losses[-1][1]:.5f}",
            f"{result.accuracy:.1%}",
            "—" if way == "full" else f"{result.distance(results['full']):.1e}",
            peak,
            f"{result.seconds:.1f} s",
            style="bold" if accumulated else "",
        )
    return shown


def words(results: Mapping[Way, Result]) -> str:
    """Two sentences on what to notice."""
    micro, full, stream, split = (results[way] for way in WAYS)
    farthest = max(stream.distance(full), split.distance(full))
    memory = ""
    if full.peak_bytes and split.peak_bytes and stream.peak_bytes:
        memory = f", with {max(stream.peak_bytes, split.peak_bytes) / full.peak_bytes:.0%} of the memory"
    return (
        f"Notice: after {full.updates} updates no weight of the accumulated runs is further than {farthest:.0e} from "
        f"the true batch's{memory}. Micro-batches of 16 make {micro.updates:,} noisy updates of the same examples; on "
        "data this easy they learn faster so, and a batch should be large for a reason."
    )


def figure(results: Mapping[Way, Result], framework: str, output: Path) -> None:
    """Loss against examples seen: the noisy curve, and the accumulated ones on the big batch's."""
    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    styles = {
        "micro": {"color": "0.75", "linewidth": 0.8},
        "full": {"color": "tab:blue", "linewidth": 6, "alpha": 0.35},
        "stream": {"color": "tab:orange", "linewidth": 2},
        "split": {"color": "black", "linewidth": 1.2, "linestyle": (0, (2, 2))},
    }
    for way, result in results.items():
        axes.plot(*zip(*result.losses, strict=True), label=WAYS[way], **styles[way])
    axes.set(
        xlabel="examples seen",
        ylabel="training loss of the update's batch",
        yscale="log",
        title=f"64 micro-batches of 16 make the update of one batch of 1,024 ({framework})",
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(output, dpi=150)
    plt.close(figure)
