"""The figure: time and memory against layers and atoms, in logarithms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from unmerge.experiment.figures import BLUE, GREY, ORANGE, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from benchmarks.scaling import Curve

_LOOKS = {"seconds": ("Seconds", 1.0, BLUE, "o"), "memory": ("Peak memory, GB", 1e-9, ORANGE, "^")}


def write_figure(curves: Sequence[Curve], path: Path) -> None:
    """Draw the curves; the same measurements always give the same bytes."""
    import matplotlib as mpl

    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context():
        mpl.rcdefaults()  # a reader's own matplotlibrc must not change what is drawn
        mpl.rcParams.update(STYLE)
        draw(curves).savefig(path, dpi=160, metadata={"Software": None})


def draw(curves: Sequence[Curve]) -> Figure:
    """Draw a panel for each cost and each thing that grows, with all measurements and a line through their medians."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    for row, cost in zip(figure.subplots(len(_LOOKS), len(curves)), _LOOKS, strict=True):
        for axes, curve in zip(row, curves, strict=True):
            _draw_panel(axes, curve, cost)
    figure.suptitle("Cost of an answer as the work grows", x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


def _draw_panel(axes: Axes, curve: Curve, cost: str) -> None:
    label, unit, colour, marker = _LOOKS[cost]
    sizes = [point.size for point in curve.points]
    values = [[unit * value for value in getattr(point, cost)] for point in curve.points]
    middle = [median(found) for found in values]
    for size, found in zip(sizes, values, strict=True):
        axes.plot([size] * len(found), found, color=colour, marker=marker, markersize=3, linestyle="", alpha=0.4)
    axes.plot(sizes, middle, color=colour, marker=marker, markersize=5, linewidth=1.2)
    # What a cost that grows as the work does would be, from the first point on.
    line = [middle[0] * size / sizes[0] for size in sizes]
    axes.plot(sizes, line, color=GREY, linestyle=(0, (4, 3)), linewidth=1.0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xticks([], minor=True)
    axes.set_ylim(0.5 * min(middle), 2.0 * max(middle))
    axes.grid(axis="y")
    axes.set_xlabel(curve.unit.capitalize())
    axes.set_ylabel(label)
    slope, error = curve.slope(cost)
    axes.set_title(f"slope {slope:.2f} ± {error:.2f}")
