"""What plans say: tables for the terminal with rich, figures for the eye with matplotlib.

Both are imported where they are used; `pip install 'bigbatch[demo]'` brings them.
"""

from pathlib import Path
from typing import Any

from bigbatch.host import written
from bigbatch.plan import NEVER, Plan


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
