"""Draws rows of plain numbers: tables for the terminal with rich, figures with matplotlib.

Plans, audits and the noise scale make the rows. Both libraries are imported where they are used;
`pip install 'bigbatch[demo]'` brings them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bigbatch.host import format_bytes

Row = Mapping[str, Any]


def plan_table(rows: Sequence[Row]) -> Any:
    """What each size of micro-batch needs, whether it fits, and how fast it is where that was timed.

    Args:
        rows: `Plan.rows()`.
    """
    from rich import box
    from rich.table import Table

    timed = any(row["seconds_per_example"] is not None for row in rows)
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ["micro-batch", "passes", "needs", "of the budget"] + ["an example"] * timed:
        shown.add_column(column, justify="right", no_wrap=True)
    shown.add_column("")
    for row in rows:
        needs = "—" if row["needs"] is None else format_bytes(row["needs"])
        share = "—" if row["share"] is None else f"{row['share']:.0%}"
        seconds = row["seconds_per_example"]
        time = ["—" if seconds is None else f"{seconds * 1e3:.3g} ms"] * timed
        style = "bold" if row["chosen"] else None if row["fits"] else "dim"
        cells = f"{row['micro_batch']:,}", f"{row['passes']:,}", needs, share
        shown.add_row(*cells, *time, row["verdict"], style=style)
    return shown


def print_table(above: str, table: Any, *below: str) -> None:
    """Prints a table between lines of text, which may use rich's markup."""
    from rich.console import Console

    console = Console(highlight=False)
    console.print(above)
    console.print(table)
    for line in below:
        console.print(line)


def plan_figure(rows: Sequence[Row], budget: int, title: str, path: str | Path) -> None:
    """Saves memory against the micro-batch with the budget's line, and the time an example below where it was taken.

    Args:
        rows: `Plan.rows()`.
        budget: bytes that a micro-batch may take.
        title: above the figure.
        path: of the figure; its ending says which kind.
    """
    from matplotlib.ticker import FuncFormatter

    timed = [row for row in rows if row["seconds_per_example"] is not None]
    figure, (above, *below) = _axes(6.6 if timed else 4.4, 2 if timed else 1)
    run = [row for row in rows if row["needs"] is not None]
    above.plot([row["micro_batch"] for row in run], [max(row["needs"], 1) for row in run], color="0.7")
    for fits, color, label in ((True, "tab:blue", "fits"), (False, "tab:red", "too large")):
        points = [row for row in run if row["fits"] is fits]
        if points:
            needs = [max(row["needs"], 1) for row in points]
            above.scatter([row["micro_batch"] for row in points], needs, c=color, label=label, zorder=3)
    above.axhline(budget, color="black", linewidth=1, linestyle="--", label=f"budget: {format_bytes(budget)}")
    chosen = next(row["micro_batch"] for row in rows if row["chosen"])
    above.axvline(chosen, color="tab:blue", linewidth=6, alpha=0.2, label=f"chosen: {chosen:,}")
    # Logarithmic, so that the sizes can be told apart under a budget that is far away.
    above.set_xscale("log", base=2)
    above.set_yscale("log", base=2)
    above.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:,.0f}"))
    above.yaxis.set_major_formatter(FuncFormatter(lambda size, _: format_bytes(size)))
    above.set_ylabel("memory a micro-batch needs")
    above.set_title(title, fontsize=10)
    above.legend(frameon=False)
    for axes in below:
        axes.plot([r["micro_batch"] for r in timed], [r["seconds_per_example"] * 1e3 for r in timed], "o-")
        axes.set(ylabel="ms an example", ylim=(0, None))
    (below[-1] if below else above).set_xlabel("micro-batch")
    figure.savefig(path, dpi=150)


def audit_table(rows: Sequence[Row], title: str, more: int) -> Any:
    """Parameters whose gradients differ.

    Args:
        rows: the parameters to show, of `Audit.rows()`.
        title: above the table.
        more: how many parameters are left out.
    """
    from rich import box
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    shown.add_column("parameter", overflow="fold")  # several may begin alike
    for column in ("full batch", "accumulated", "ratio", "relative error", "angle"):
        shown.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        numbers = f"{row['full']:.3g}", f"{row['accumulated']:.3g}", f"{row['ratio']:.4g}"
        shown.add_row(row["name"], *numbers, f"{row['error']:.1e}", f"{row['angle']:.1f}°")
    if more > 0:
        shown.add_row(f"… and {more} more")
    return shown


def audit_figure(rows: Sequence[Row], tolerance: float, title: str, path: str | Path) -> None:
    """Saves parameters' relative errors against the line up to which a difference is rounding.

    Args:
        rows: the parameters to show, of `Audit.rows()`.
        tolerance: the relative error that is rounding.
        title: above the figure.
        path: of the figure; its ending says which kind.
    """
    figure, (axes,) = _axes(height=1.8 + 0.32 * len(rows))
    top = 1e3  # NaN and inf stand at the right edge
    errors = [min(row["error"], top) if row["error"] == row["error"] else top for row in rows]
    floor = min([e for e in errors if e > 0] + [tolerance]) / 10  # where an error of zero stands
    shown = [max(e, floor) for e in errors]
    colors = ["tab:red" if row["differs"] else "tab:blue" for row in rows]
    places = range(len(rows))
    axes.hlines(places, floor, shown, color=colors, linewidth=1, alpha=0.5)
    axes.scatter(shown, places, c=colors, zorder=3)
    for place, error, row in zip(places, shown, rows, strict=True):
        angle = f", {row['angle']:.1f}°" if row["angle"] == row["angle"] else ""
        text = f"{row['error']:.1e}{angle}"
        axes.annotate(text, (error, place), (6, 0), textcoords="offset points", va="center", fontsize=8)
    axes.axvline(tolerance, color="black", linewidth=1, linestyle="--")
    axes.annotate(f"rounding, up to {tolerance:.0e}", (tolerance, -0.6), (4, 0), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", xlim=(floor / 2, max([*shown, tolerance]) * 300), ylim=(-0.7, len(rows) - 0.3))
    axes.set_yticks(places, [row["name"] for row in rows])
    axes.set_xlabel("relative error of the accumulated gradient, and the angle to the full batch's")
    axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=150)


def noise_figure(rows: Sequence[Row], path: str | Path, title: str = "Gradient noise scale") -> None:
    """Saves the noise scale over a training with its 95 % interval, beside the batch that was used.

    Args:
        rows: from `bb.noise_curve(updates)`.
        path: of the figure; its ending says which kind.
        title: above the figure.
    """
    figure, (axes,) = _axes(height=4.2)
    updates = [row["update"] for row in rows]
    finite = [row["noise_scale"] for row in rows if 0 < row["noise_scale"] < float("inf")]
    items = [row["items"] for row in rows]
    # The first intervals reach from zero to infinity; drawn whole, they would flatten the curve.
    bottom, top = min([*finite, *items], default=1.0) / 5, 5 * max([*finite, *items], default=1.0)
    low = [min(max(row["noise_scale_low"], bottom), top) for row in rows]
    high = [max(min(row["noise_scale_high"], top), bottom) for row in rows]
    axes.fill_between(updates, low, high, alpha=0.2, linewidth=0)
    axes.plot(updates, [row["noise_scale"] for row in rows], label="noise scale, with 95 % interval")
    axes.plot(updates, items, color="black", linewidth=1, linestyle="--", label="batch")
    axes.set(xlabel="update", ylabel="items", yscale="log", ylim=(bottom, top))
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def _axes(height: float, count: int = 1) -> tuple[Any, Any]:
    # Not pyplot: a figure of one's own needs no screen, and nobody has to close it.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), layout="constrained")
    every = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
    for axes in every:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, every
