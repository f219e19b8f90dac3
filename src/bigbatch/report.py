"""What plan, audit and the noise scale say: tables for the terminal with rich, figures for the eye with matplotlib.

Both are imported where they are used; `pip install 'bigbatch[demo]'` brings them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigbatch.host import written
from bigbatch.plan import NEVER, Plan

if TYPE_CHECKING:
    from bigbatch.audit import Audit


def plan_table(plan: Plan) -> Any:
    """The sizes that were looked at: what each needs, whether it fits, and how fast it is where that was timed."""
    from rich import box
    from rich.table import Table

    timed = any(c.seconds is not None for c in plan.candidates)
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ["micro-batch", "passes", "needs", "of the room"] + ["an example"] * timed:
        shown.add_column(column, justify="right", no_wrap=True)
    shown.add_column("")
    for c in plan.candidates:
        share = f"{c.needs / plan.budget.room:.0%}" if plan.budget.room else "—"
        time = ["—" if c.seconds is None else f"{c.seconds_per_example * 1e3:.3g} ms"] * timed
        words = ["largest"] if c.micro_batch == plan.largest else []
        words += ["fastest"] * (timed and c.micro_batch == plan.micro_batch)
        words = words if plan.fits(c) else ["does not run" if c.needs == NEVER else "too large"]
        style = "bold" if c.micro_batch == plan.micro_batch else None if plan.fits(c) else "dim"
        needs, share = ("—", "—") if c.needs == NEVER else (written(c.needs), share)
        row = f"{c.micro_batch:,}", f"{-(-plan.batch // c.micro_batch):,}", needs, share
        shown.add_row(*row, *time, ", ".join(words), style=style)
    return shown


def plan_show(plan: Plan) -> None:
    """Prints the table, with the budget above it and the choice below."""
    from rich.console import Console

    console = Console(highlight=False)
    console.print(
        f"For a batch of {plan.batch:,} a micro-batch may take {written(plan.budget.room)} beside the "
        f"{written(plan.budget.held)} in use ({plan.budget.says})."
    )
    console.print(plan_table(plan))
    console.print(f"Needs: {plan.how}. {' '.join(plan.notes)}")
    console.print(f"[bold]micro_batch={plan.micro_batch}[/bold]")


def plan_figure(plan: Plan, path: str | Path) -> None:
    """Saves memory against the micro-batch with the budget's line, and the time an example below where it was taken.

    Args:
        plan: what `bb.plan` returned.
        path: of the figure; its ending says which kind.
    """
    # Not pyplot: a figure of one's own needs no screen, and nobody has to close it.
    from matplotlib.figure import Figure

    timed = [c for c in plan.candidates if c.seconds is not None]
    figure = Figure(figsize=(8, 6.6 if timed else 4.4), layout="constrained")
    above, *below = figure.subplots(2 if timed else 1, 1, sharex=True, squeeze=False)[:, 0]
    room, gib = plan.budget.room / 2**30, 2**30
    runs = [c for c in plan.candidates if c.needs != NEVER]
    above.plot([c.micro_batch for c in runs], [c.needs / gib for c in runs], color="0.7")
    for fits, color, label in ((True, "tab:blue", "fits"), (False, "tab:red", "too large")):
        points = [c for c in runs if plan.fits(c) is fits]
        above.scatter([c.micro_batch for c in points], [c.needs / gib for c in points], c=color, label=label, zorder=3)
    above.axhline(room, color="black", linewidth=1, linestyle="--", label=f"budget: {written(plan.budget.room)}")
    above.axvline(plan.micro_batch, color="tab:blue", linewidth=6, alpha=0.2, label=f"chosen: {plan.micro_batch:,}")
    above.set(ylabel="GiB a micro-batch needs", xscale="log", title=f"A batch of {plan.batch:,}, {plan.how}")
    above.title.set_size(10)
    # From zero to a little over the budget: what is far too large would flatten all that fits.
    above.set_ylim(0, max(2.5 * room, 1.1 * max(c.needs for c in runs if plan.fits(c)) / gib))
    above.legend(frameon=False)
    for axes in below:
        axes.plot([c.micro_batch for c in timed], [c.seconds_per_example * 1e3 for c in timed], "o-", color="tab:blue")
        axes.set(ylabel="ms an example", ylim=(0, None))
    axes = below[-1] if below else above
    axes.set_xlabel("micro-batch")
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def audit_table(audit: "Audit", most: int = 20) -> Any:
    """The parameters whose gradients differ, the worst first; of an exact audit, the largest.

    Args:
        audit: what `bb.audit` returned.
        most: rows at most.
    """
    from rich import box
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, title=audit.verdict, title_justify="left", pad_edge=False)
    shown.add_column("parameter", overflow="fold")  # several may begin alike
    for column in ("full batch", "accumulated", "ratio", "relative error", "angle"):
        shown.add_column(column, justify="right", no_wrap=True)
    chosen = audit.differing or sorted(audit.parameters, key=lambda p: -p.full)
    for p in chosen[:most]:
        cells = f"{p.full:.3g}", f"{p.accumulated:.3g}", f"{p.ratio:.4g}", f"{p.error:.1e}", f"{p.angle:.1f}°"
        shown.add_row(p.name, *cells)
    if len(chosen) > most:
        shown.add_row(f"… and {len(chosen) - most} more")
    return shown


def audit_figure(audit: "Audit", path: str | Path, most: int = 12) -> None:
    """Saves the worst parameters' relative errors as bars, each with the angle between the two gradients.

    Args:
        audit: what `bb.audit` returned.
        path: of the figure; its ending says which kind.
        most: bars at most.
    """
    worst = sorted(audit.parameters, key=lambda p: p.error)[-most:]
    figure, axes = _axes(height=1.6 + 0.32 * len(worst))
    wrong = {p.name for p in audit.differing}
    smallest = 1e-17  # of float64's rounding; a bar of zero has no length on a logarithmic axis
    bars = axes.barh(
        [p.name for p in worst],
        [max(min(p.error, 1e3), smallest) if p.error == p.error else 1e3 for p in worst],
        color=["tab:red" if p.name in wrong else "tab:green" for p in worst],
    )
    axes.bar_label(bars, [f"{p.error:.1e}, {p.angle:.1f}°" for p in worst], padding=4, fontsize=8)
    axes.set(xscale="log", xlim=(smallest, 1e5), xlabel="relative error of the accumulated gradient", title="")
    axes.set_title(f"{audit.verdict}\n{audit.length} examples in micro-batches of {audit.micro_batch}", fontsize=10)
    _save(figure, path)


def noise_figure(rows: Sequence[dict[str, float]], path: str | Path) -> None:
    """Saves the noise scale over a training with its 95 % interval, beside the batch that was used.

    Args:
        rows: from `bb.noise_curve(updates)`.
        path: of the figure; its ending says which kind.
    """
    figure, axes = _axes(height=4.2)
    updates = [row["update"] for row in rows]
    finite = [row["noise_scale"] for row in rows if row["noise_scale"] < float("inf")]
    top = 10 * max([*finite, *(row["items"] for row in rows)], default=1.0)
    low = [max(row["noise_scale_low"], 1e-3) for row in rows]
    axes.fill_between(updates, low, [min(row["noise_scale_high"], top) for row in rows], alpha=0.2, linewidth=0)
    axes.plot(updates, [row["noise_scale"] for row in rows], label="noise scale, with 95 %")
    axes.plot(updates, [row["items"] for row in rows], color="black", linewidth=1, linestyle="--", label="batch")
    axes.set(xlabel="update", ylabel="items", yscale="log", ylim=(None, top))
    axes.legend(frameon=False)
    _save(figure, path)


def _axes(height: float) -> tuple[Any, Any]:
    # Not pyplot: a figure of one's own needs no screen, and nobody has to close it.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: str | Path) -> None:
    figure.savefig(path, dpi=150)
