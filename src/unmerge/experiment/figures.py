"""Figures of the experiment: error by method, coefficients, precision and recall, as SVG and PNG.

Drawn on figures of their own, without pyplot, so nothing global is touched. Colours are Okabe and Ito's, which
people with any colour vision can tell apart; shapes differ too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmerge.errors import MissingExtraError
from unmerge.experiment.aggregation import WAYS, Choice, Quantity, Way, choose, mean_and_std, paper_numbers, summarise
from unmerge.experiment.paper import facts
from unmerge.experiment.readings import ALGORITHMS, COORDINATES, GROUPS, METHODS, Run, read_results
from unmerge.metrics import ACTIVE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY, INK = "#0072B2", "#D55E00", "#009E73", "#8A8A8A", "#222222"
PAPER: dict[str, Any] = {
    "marker": "D",
    "s": 34,
    "facecolors": "white",
    "edgecolors": INK,
    "linewidths": 1.3,
    "zorder": 5,
}
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so it is the same everywhere
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "unmerge",  # otherwise the identifiers in an SVG are random
    "svg.fonttype": "path",
}
PAPERS_WAY = WAYS[0]


def write_figures(results: Path, output: Path) -> list[Path]:
    """Draw the experiment.

    Parameters
    ----------
    results : path
        Folder with ``results.parquet``, or the file.
    output : path
        Folder to write to: ``error``, ``coefficients`` and ``precision-recall``, each as SVG and PNG.

    Returns
    -------
    list of path
        The files. The same results and the same matplotlib always give the same bytes.

    Raises
    ------
    UnmergeError
        The results are missing, or not of this experiment.
    MissingExtraError
        matplotlib or pyarrow is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise MissingExtraError("matplotlib is needed to draw: pip install 'unmerge[experiment]'") from error
    runs = read_results(results)
    output.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    with mpl.rc_context():
        # A reader's own matplotlibrc must not change what is drawn.
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        for name, figure in _figures(runs, paper_numbers(facts())).items():
            written += _save(figure, output / name)
    return written


def _figures(runs: Sequence[Run], paper: Mapping[Quantity, tuple[float, float | None]]) -> dict[str, Figure]:
    return {
        "error": draw_errors(runs, paper),
        "coefficients": draw_coefficients(runs),
        "precision-recall": draw_precision_recall(runs, paper),
    }


def _save(figure: Figure, stem: Path) -> list[Path]:
    # Neither the date nor matplotlib's version: they are all that differs between two runs.
    figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
    figure.savefig(stem.with_suffix(".png"), dpi=160, metadata={"Software": None})
    return [stem.with_suffix(".svg"), stem.with_suffix(".png")]


def _new_figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _headline(figure: Figure, title: str, explanation: str) -> None:
    # An empty line in the title keeps the place of the explanation, which is set in another weight.
    figure.suptitle(
        title + "\n " * (1 + explanation.count("\n")),
        x=0.01,
        ha="left",
        fontsize=11,
        fontweight="bold",
        linespacing=1.3,
    )
    figure.text(0.01, 1.0 - 0.25 / figure.get_figheight(), explanation, ha="left", va="top", color="#444444")


def _legend(figure: Figure, panels: Sequence[Axes], columns: int) -> None:
    entries: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        entries |= {label: handle for label, handle in zip(labels, handles, strict=True) if label not in entries}
    figure.legend(list(entries.values()), list(entries), loc="outside lower left", ncols=columns)


# Error by method and category


def draw_errors(runs: Sequence[Run], paper: Mapping[Quantity, tuple[float, float | None]]) -> Figure:
    """Draw the reconstruction error of NNLS: one dot per merge, by category, merging method and coordinates.

    Parameters
    ----------
    runs : sequence of Run
        The results.
    paper : mapping
        What `unmerge.experiment.aggregation.paper_numbers` returns.
    """
    figure = _new_figure(9.2, 4.4)
    panels = list(figure.subplots(1, len(GROUPS), sharey=True))
    errors = {way.coordinates: _errors(choose(runs, way)) for way in (WAYS[0], WAYS[2])}
    for axes, (group, label) in zip(panels, GROUPS.items(), strict=True):
        _draw_error_panel(axes, group, errors, paper)
        axes.set_title(f"{label} merges")
    panels[0].set_ylabel("Reconstruction error of NNLS")
    panels[0].set_ylim(-0.03, 1.03)
    _legend(figure, panels, 5)
    _headline(figure, _error_title(errors["top_k"]), "One dot per merge and seed; bars are mean ± standard deviation.")
    return figure


def _errors(choices: Sequence[Choice]) -> dict[tuple[str, str], list[float]]:
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for choice in choices:
        if choice.case.algorithm == "nnls" and choice.best is not None:
            found[choice.case.group, choice.case.method].append(choice.best.numbers["error"])
    return found


def _error_title(errors: Mapping[tuple[str, str], Sequence[float]]) -> str:
    said = [
        f"{label if label.isupper() else label.lower()} {mean_and_std(errors['known', method])[0]:.2f}"
        for method, label in METHODS.items()
        if errors.get(("known", method))
    ]
    return f"Error on known merges, top-k: {', '.join(said)}" if said else "No known merge has a result"


def _draw_error_panel(
    axes: Axes,
    group: str,
    errors: Mapping[str, Mapping[tuple[str, str], Sequence[float]]],
    paper: Mapping[Quantity, tuple[float, float | None]],
) -> None:
    shapes = {"top_k": (BLUE, "o", -0.17), "all": (ORANGE, "^", 0.17)}
    for coordinates, (colour, marker, shift) in shapes.items():
        for place, method in enumerate(METHODS):
            values = sorted(errors[coordinates].get((group, method), ()))
            label = COORDINATES[coordinates] if place == 0 else None
            _draw_spread(axes, place + shift, values, colour, marker, label)
    _draw_papers_errors(axes, group, paper)
    axes.set_xticks(range(len(METHODS)), [label.replace(" ", "\n") for label in METHODS.values()])
    axes.set_xlim(-0.6, len(METHODS) - 0.4)
    axes.grid(axis="y")


def _draw_spread(
    axes: Axes, place: float, values: Sequence[float], colour: str, marker: str, label: str | None
) -> None:
    if not values:
        axes.text(place, 1.0, "no result", rotation=90, ha="center", va="top", color=GREY, fontsize=7)
        return
    # Spread sideways by rank, not by chance: the same results always give the same picture.
    sides = [((7 * rank) % 11 - 5) * 0.018 for rank in range(len(values))]
    axes.scatter(
        [place + side for side in sides],
        values,
        s=12,
        color=colour,
        marker=marker,
        alpha=0.45,
        linewidths=0,
        label=label,
    )
    mean, std = mean_and_std(values)
    axes.errorbar(place, mean, yerr=std, color=INK, marker="_", markersize=11, capsize=2.5, linewidth=1.1, zorder=4)


def _draw_papers_errors(axes: Axes, group: str, paper: Mapping[Quantity, tuple[float, float | None]]) -> None:
    by_method = [paper.get(Quantity("error", "nnls", group, method)) for method in METHODS]
    given = [(place, pair[0]) for place, pair in enumerate(by_method) if pair is not None]
    if given:
        axes.scatter(*zip(*given, strict=True), label="Paper, by method", **PAPER)
        return
    # For mixed and unknown merges the paper tells only the mean over all four methods.
    overall = paper[Quantity("error", "nnls", group)][0]
    axes.axhline(overall, color=INK, linestyle=(0, (4, 3)), linewidth=1.1, label="Paper, all methods")


# Coefficients


def draw_coefficients(runs: Sequence[Run]) -> Figure:
    """Draw the coefficients of NNLS, mean over seeds: compositions by atoms, the true ones outlined.

    Parameters
    ----------
    runs : sequence of Run
        The results.
    """
    figure = _new_figure(11.5, 6.6)
    panels = list(figure.subplots(1, len(METHODS), sharey=True))
    choices = [choice for choice in choose(runs, PAPERS_WAY) if choice.case.algorithm == "nnls"]
    rows = sorted({(list(GROUPS).index(one.case.group), one.case.composition) for one in choices})
    atoms = list(choices[0].case.truth) if choices else []
    shown = _mean_coefficients(choices)
    top = max((value for cells in shown.values() for value in cells.values()), default=1.0)
    for axes, (method, label) in zip(panels, METHODS.items(), strict=True):
        cells = [shown.get((method, composition), {}) for _, composition in rows]
        image = _draw_cells(axes, [[row.get(atom, float("nan")) for atom in atoms] for row in cells], top)
        _outline(axes, _truths(choices, method, [composition for _, composition in rows]), atoms)
        _label_heat_map(axes, atoms, rows)
        axes.set_title(label)
    if atoms:
        figure.colorbar(image, ax=panels, shrink=0.6, pad=0.01, label="Coefficient (mean over seeds)")
    _headline(figure, *_coefficient_title(choices))
    return figure


def _mean_coefficients(choices: Sequence[Choice]) -> dict[tuple[str, int], dict[str, float]]:
    found: dict[tuple[str, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for choice in choices:
        for atom, value in choice.best.coefficients.items() if choice.best else ():
            found[choice.case.method, choice.case.composition][atom].append(value)
    return {key: {atom: mean_and_std(values)[0] for atom, values in cells.items()} for key, cells in found.items()}


def _draw_cells(axes: Axes, values: Sequence[Sequence[float]], top: float) -> Any:
    import matplotlib as mpl
    import numpy as np

    colours = mpl.colormaps["Blues"].with_extremes(bad="#C9C9C9")
    grid = np.asarray(values, dtype=float)
    return axes.imshow(np.ma.masked_invalid(grid), cmap=colours, vmin=0.0, vmax=top, aspect="auto")


def _truths(choices: Sequence[Choice], method: str, compositions: Sequence[int]) -> list[set[str]]:
    found: dict[int, set[str]] = defaultdict(set)
    for choice in choices:
        if choice.case.method == method:
            found[choice.case.composition] |= {atom for atom, value in choice.case.truth.items() if value}
    return [found[composition] for composition in compositions]


def _outline(axes: Axes, truths: Sequence[set[str]], atoms: Sequence[str]) -> None:
    from matplotlib.patches import Rectangle

    for row, true in enumerate(truths):
        for column, atom in enumerate(atoms):
            if atom in true:
                # Within the cell, so that the outlines of neighbours do not run into one another.
                box = Rectangle((column - 0.43, row - 0.41), 0.86, 0.82, fill=False, edgecolor=ORANGE, linewidth=1.4)
                axes.add_patch(box)


def _label_heat_map(axes: Axes, atoms: Sequence[str], rows: Sequence[tuple[int, int]]) -> None:
    axes.set_xticks(range(len(atoms)), [atom.replace("_", " ") for atom in atoms], rotation=90, fontsize=8)
    groups = [list(GROUPS)[group] for group, _ in rows]
    counts: dict[str, int] = defaultdict(int)
    names = []
    for group in groups:
        counts[group] += 1
        names.append(f"{group} {counts[group]}")
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    for row in range(1, len(rows)):
        if groups[row] != groups[row - 1]:
            axes.axhline(row - 0.5, color=INK, linewidth=1.0)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _coefficient_title(choices: Sequence[Choice]) -> tuple[str, str]:
    true = found = false = 0
    for choice in choices:
        if choice.best is None:
            continue
        for atom, value in choice.best.coefficients.items():
            inside, active = bool(choice.case.truth[atom]), abs(value) > ACTIVE
            true, found, false = true + inside, found + (inside and active), false + (active and not inside)
    title = f"NNLS finds {found} of {true} components that are inside (outlined), and {false} that are not"
    counted = "Counted over all seeds, above 1e-6, on top-k coordinates."
    return title, f"{counted} Tasks outside the dictionary have no column. Grey: all seeds failed."


# Precision and recall


def draw_precision_recall(runs: Sequence[Run], paper: Mapping[Quantity, tuple[float, float | None]]) -> Figure:
    """Draw precision and recall by algorithm, for the paper's way of choosing settings and the held-out one.

    Parameters
    ----------
    runs : sequence of Run
        The results.
    paper : mapping
        What `unmerge.experiment.aggregation.paper_numbers` returns.
    """
    figure = _new_figure(9.2, 4.8)
    # In an unknown merge no component is known, so there is nothing to find.
    groups = [group for group in GROUPS if group != "unknown"]
    panels = list(figure.subplots(1, len(groups), sharey=True))
    choices = {way: choose(runs, way) for way in WAYS[:2]}
    for axes, group in zip(panels, groups, strict=True):
        _draw_precision_panel(axes, group, choices, paper)
        axes.set_title(f"{GROUPS[group]} merges")
    panels[0].set_yticks(range(len(ALGORITHMS)), list(ALGORITHMS.values()))
    _legend(figure, panels, 3)
    _headline(figure, *_precision_title(choices[PAPERS_WAY]))
    return figure


def _precision_title(choices: Sequence[Choice]) -> tuple[str, str]:
    found = {
        name: (
            summarise(choices, Quantity("precision", name, "known")),
            summarise(choices, Quantity("recall", name, "known")),
        )
        for name in ALGORITHMS
    }
    said = [
        f"{ALGORITHMS[name]} {precision.mean:.2f} / {recall.mean:.2f}"
        for name, (precision, recall) in found.items()
        if name in ("nnls", "ridge", "lasso") and precision.mean is not None and recall.mean is not None
    ]
    first = f"Known merges, precision / recall: {', '.join(said)}" if said else "No known merge has a result"
    return first, (
        "Top-k coordinates; means over merges and seeds, bars are ± one standard deviation of precision.\n"
        "For mixed merges the paper tells NNLS alone."
    )


def _draw_precision_panel(
    axes: Axes,
    group: str,
    choices: Mapping[Way, Sequence[Choice]],
    paper: Mapping[Quantity, tuple[float, float | None]],
) -> None:
    shown = {"error": (BLUE, -0.18, "setting by error"), "heldout_error": (ORANGE, 0.18, "setting held out")}
    for way, own in choices.items():
        colour, shift, label = shown[way.chosen_by]
        for place, name in enumerate(ALGORITHMS):
            precision, recall = (summarise(own, Quantity(measure, name, group)) for measure in ("precision", "recall"))
            named = label if place == 0 else None
            _draw_pair(axes, place + shift, (precision.mean, precision.std, recall.mean), colour, named)
    _draw_papers_precision(axes, group, paper)
    axes.set_xlim(-0.04, 1.06)
    axes.set_ylim(len(ALGORITHMS) - 0.5, -0.5)
    axes.set_xlabel("Precision, recall")
    axes.grid(axis="x")
    for place in range(1, len(ALGORITHMS)):
        axes.axhline(place - 0.5, color="#E4E4E4", linewidth=0.8)


def _draw_pair(
    axes: Axes,
    place: float,
    numbers: tuple[float | None, float | None, float | None],
    colour: str,
    label: str | None,
) -> None:
    precision, std, recall = numbers
    if precision is None or std is None or recall is None:
        axes.text(0.5, place, "no result", ha="center", va="center", color=GREY, fontsize=7)
        return
    left, right = max(0.0, precision - std), min(1.0, precision + std)
    axes.hlines(place, left, right, color=colour, linewidth=1.2, alpha=0.55)
    # The square is larger than the dot: both are seen where precision and recall are equal.
    named = {what: None if label is None else f"{what}, {label}" for what in ("Precision", "Recall")}
    axes.scatter(precision, place, s=26, color=colour, label=named["Precision"], zorder=4)
    axes.scatter(
        recall,
        place,
        s=72,
        marker="s",
        facecolors="none",
        edgecolors=colour,
        linewidths=1.2,
        label=named["Recall"],
        zorder=3,
    )


def _draw_papers_precision(axes: Axes, group: str, paper: Mapping[Quantity, tuple[float, float | None]]) -> None:
    # Between our two lines: a diamond for precision, a cross for recall.
    points = {measure: _papers_points(group, measure, paper) for measure in ("precision", "recall")}
    axes.scatter(*_columns(points["precision"]), label="Precision, paper", **PAPER)
    axes.scatter(
        *_columns(points["recall"]), marker="x", s=34, color=INK, linewidths=1.3, label="Recall, paper", zorder=5
    )


def _columns(points: Sequence[tuple[float, int]]) -> tuple[list[float], list[int]]:
    return [value for value, _ in points], [place for _, place in points]


def _papers_points(
    group: str, measure: str, paper: Mapping[Quantity, tuple[float, float | None]]
) -> list[tuple[float, int]]:
    points = []
    for place, name in enumerate(ALGORITHMS):
        by_method = [paper.get(Quantity(measure, name, group, method)) for method in METHODS]
        given = [pair[0] for pair in by_method if pair is not None]
        overall = paper.get(Quantity(measure, name, group))
        if given:
            # As many merges of each method: the mean of the four means is the mean over all.
            points.append((mean_and_std(given)[0], place))
        elif overall is not None:
            points.append((overall[0], place))
    return points
