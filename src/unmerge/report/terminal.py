"""The result as tables in a terminal."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from unmerge.dictionary import Dictionary
from unmerge.evidence.identifiability import coherence
from unmerge.result import Attribution, Component, Profile

_VERDICTS = {True: "yes", False: "no", None: "cannot tell"}
_LISTED = 5


def render(result: Attribution, *, layers: bool = False) -> RenderableType:
    """Lay out a result.

    Parameters
    ----------
    layers : bool
        Add the coefficients by layer and by module.
    """
    title = Text(f"{result.target.reference} on {result.base.reference}", style="bold")
    parts: list[RenderableType] = [title, _components(result), *_sentences(result)]
    if layers:
        parts.append(_profiles("layer", result.layers, result))
        parts.append(_profiles("module", result.modules, result))
    return Group(*parts)


def render_dictionary(dictionary: Dictionary) -> RenderableType:
    """Lay out a dictionary: its atoms, and the most similar other atom of each."""
    cosines = dictionary.cosines
    norms = np.sqrt(np.diag(dictionary.total_gram))
    table = Table()
    for heading in ("atom", "kind", "norm", "most alike", "cosine", "from"):
        table.add_column(heading, justify="right" if heading in {"norm", "cosine"} else "left", overflow="fold")
    for index, atom in enumerate(dictionary.atoms):
        nearest = int(np.argmax(np.abs(cosines[index])))
        alike = ("", "") if len(norms) < 2 else (dictionary.names[nearest], f"{cosines[index, nearest]:+.3f}")
        row = (
            Text(atom.name),
            atom.kind,
            f"{norms[index]:.4g}",
            Text(alike[0]),
            alike[1],
            Text(atom.source.reference),
        )
        table.add_row(*row)
    largest = coherence(dictionary.total_gram)
    return Group(table, Text(f"Coherence (largest |cosine| of two atoms): {largest:.3f}"))


def print_result(result: Attribution, console: Console, *, layers: bool = False) -> None:
    """Print a result to a console."""
    console.print(render(result, layers=layers))


def _components(result: Attribution) -> Table:
    table = Table()
    table.add_column("component", overflow="fold")
    table.add_column("coefficient", justify="right")
    table.add_column("95 % interval", justify="right")
    table.add_column(f"over {0.01}*", justify="center")
    table.add_column("energy", justify="right")
    for component in result.components:
        style = None if component.present else "dim"
        table.add_row(*_cells(component), style=style)
    return table


def _cells(component: Component) -> tuple[Text, str, str, str, str]:
    low_high = component.interval
    interval = f"{low_high[0]:+.4f} to {low_high[1]:+.4f}" if low_high else "unknown"
    share = f"{100 * component.evidence.energy_share:.1f} %"
    # Text, not markup: a name may hold square brackets.
    return (
        Text(component.name),
        f"{component.coefficient:+.4f}",
        interval,
        _VERDICTS[component.present],
        share,
    )


def _sentences(result: Attribution) -> Iterator[Text]:
    unexplained, method = result.unexplained, result.method
    yield Text(
        f"Unexplained: {100 * unexplained.share:.1f} % of the change's energy "
        f"(storage rounding alone accounts for about {100 * unexplained.rounding_floor:.1f} %)."
    )
    if unexplained.untouched_share > 0.0:
        error = f" ± {100 * unexplained.untouched_error:.2f}" if unexplained.untouched_error else ""
        yield Text(
            f"  {100 * unexplained.untouched_share:.2f}{error} % of it lies in tensors that no component changes."
        )
    read = 100 * method.parameters_read / method.parameters
    sampled = "" if method.parameters_read == method.parameters else f", {read:.1f} % of them read (--exact reads all)"
    yield Text(f"Compared {method.parameters:,} parameters{sampled} by {method.solver} on {method.coordinates}.")
    if method.message:
        groups = "; ".join(", ".join(group) for group in method.groups)
        yield Text(f"{method.message}{f' Here: {groups}.' if groups else ''}", style="yellow")
    yield from _omissions(result)
    yield Text(
        "* A plain cut on the coefficient, not a test: a fine-tune that is absent but similar to a present one "
        "can pass it, above all when much is unexplained.",
        style="dim",
    )


def _omissions(result: Attribution) -> Iterator[Text]:
    if result.not_compared:
        yield Text(f"Not compared: {len(result.not_compared)} tensors or parts of them:", style="yellow")
        for item in result.not_compared[:_LISTED]:
            yield Text(f"  {item.name} ({item.model}): {item.reason}", style="yellow")
        if len(result.not_compared) > _LISTED:
            yield Text(f"  … {len(result.not_compared) - _LISTED} more in --json", style="yellow")
    for notice in result.notices:
        yield Text(f"Note: {notice}", style="yellow")


def _profiles(kind: str, profiles: tuple[Profile, ...], result: Attribution) -> Table:
    names = [component.name for component in result.components]
    table = Table(title=f"by {kind}", title_justify="left")
    table.add_column(kind)
    for name in names:
        table.add_column(Text(name), justify="right", overflow="fold")
    table.add_column("energy", justify="right")
    table.add_column("unexplained", justify="right")
    for profile in profiles:
        if profile.unexplained is None and not any(profile.coefficients.values()):
            continue  # unchanged; in --json all the same
        cells = [f"{profile.coefficients[name]:+.4f}" if name in profile.coefficients else "" for name in names]
        left = "" if profile.unexplained is None else f"{100 * profile.unexplained:.1f} %"
        table.add_row(Text(profile.part), *cells, f"{100 * profile.energy_share:.1f} %", left)
    return table
