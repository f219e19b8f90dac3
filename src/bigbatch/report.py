"""What audit and the noise scale say: tables for the terminal with rich, figures for the eye with matplotlib.

Both are imported where they are used; `pip install 'bigbatch[demo]'` brings them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigbatch.audit import Audit


def audit_table(audit: "Audit", most: int = 20) -> Any:
    """The parameters whose gradients differ, the worst first; of an exact audit, the largest.

    Args:
        audit: what `bb.audit` returned.
        most: rows at most.
    """
    from rich import box
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, title=audit.verdict, title_justify="left", pad_edge=False)
    shown.add_column("parameter")
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
