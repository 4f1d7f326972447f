"""The figure: detection rate against weight, by size of the dictionary."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.evidence.mixes import HARD
from benchmarks.evidence.rows import Row
from benchmarks.evidence.scoring import BINS, CLEAR, accused_targets, detection, named, share, split
from unmerge.experiment.figures import BLUE, GREEN, INK, ORANGE, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LOOKS = ((BLUE, "o", 0.94), (ORANGE, "^", 1.0), (GREEN, "s", 1.06))


def write_figure(rows: Sequence[Row], path: Path) -> None:
    """Draw the detection rates of the hard mixes; the same rows always give the same bytes."""
    import matplotlib as mpl

    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context():
        mpl.rcdefaults()  # a reader's own matplotlibrc must not change what is drawn
        mpl.rcParams.update(STYLE)
        draw(rows).savefig(path, dpi=160, metadata={"Software": None})


def draw(rows: Sequence[Row]) -> Figure:
    """Draw one line per size of dictionary, with Wilson's 95 % intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for size, (colour, marker, shift) in zip(HARD, _LOOKS, strict=True):
        _draw_line(axes, [row for row in rows if row.size == size], f"{size} atoms", (colour, marker, shift))
    axes.axvline(CLEAR, color=INK, linestyle=(0, (4, 3)), linewidth=1.0)
    axes.set_xscale("log")
    ticks = [0.01, 0.02, 0.03, 0.05, 0.1, 0.3, 1.0]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_ylim(-0.03, 1.03)
    axes.grid(axis="y")
    axes.set_xlabel("Effective weight in the merge")
    axes.set_ylabel("Detection rate")
    axes.legend(loc="lower right", title="Dictionary")
    _headline(figure, rows)
    return figure


def _draw_line(axes: Axes, rows: Sequence[Row], label: str, look: tuple[str, str, float]) -> None:
    colour, marker, shift = look
    shares = [(place, one) for place, one in enumerate(detection(rows, named)) if one.total]
    # Each in the middle of its bin on the logarithmic axis, side by side.
    places = [sqrt(max(BINS[place][0], 0.01) * min(BINS[place][1], 1.0)) * shift for place, _ in shares]
    rates = [one.count / one.total for _, one in shares]
    bounds = [one.within() for _, one in shares]
    below = [max(0.0, rate - low) for rate, (low, _) in zip(rates, bounds, strict=True)]
    above = [max(0.0, high - rate) for rate, (_, high) in zip(rates, bounds, strict=True)]
    axes.errorbar(
        places,
        rates,
        yerr=[below, above],
        color=colour,
        marker=marker,
        markersize=5,
        capsize=2.5,
        linewidth=1.2,
        label=label,
    )


def _headline(figure: Figure, rows: Sequence[Row]) -> None:
    inside, _ = split(rows)
    found = share((answer for answer in inside if answer.truth >= CLEAR), named)
    title = f"{found.count} of {found.total} components with a weight of {CLEAR:g} or more are found"
    accused = accused_targets(rows)
    explanation = (
        "Found: named present, or as one of a group of versions of one fine-tune. "
        f"{len(rows)} hard mixes by four methods;\nan absent atom, twins aside, is accused in {accused.count} of them. "
        "Bars are 95 % intervals of the rate."
    )
    figure.suptitle(title + "\n \n ", x=0.01, ha="left", fontsize=11, fontweight="bold", linespacing=1.3)
    figure.text(0.01, 1.0 - 0.25 / figure.get_figheight(), explanation, ha="left", va="top", color="#444444")
