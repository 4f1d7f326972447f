"""The result as tables in a terminal."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from unmerge.dictionary import Likeness
from unmerge.evidence.identifiability import ALIKE, alike_groups, coherence
from unmerge.result import Attribution, Component, Profile

_VERDICTS = {True: "yes", False: "no", None: "cannot tell"}
_LISTED = 5
_WORTH_SAYING = 0.02


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


def render_dictionary(likeness: Likeness) -> RenderableType:
    """Lay out atoms of a dictionary: the most similar other atom of each."""
    table = Table()
    for heading in ("atom", "kind", "norm", "most alike", "cosine", "from"):
        table.add_column(heading, justify="right" if heading in {"norm", "cosine"} else "left", overflow="fold")
    between = likeness.cosines.copy()
    between[np.arange(len(likeness.shown)), likeness.shown] = 0.0
    for cosines, place in zip(between, likeness.shown, strict=True):
        record, nearest = likeness.records[place], int(np.argmax(np.abs(cosines)))
        alike = ("", "") if len(cosines) < 2 else (likeness.records[nearest].name, f"{cosines[nearest]:+.3f}")
        row = (
            Text(record.name),
            record.kind,
            f"{likeness.norms[place]:.4g}",
            Text(alike[0]),
            alike[1],
            Text(record.source.reference),
        )
        table.add_row(*row)
    if len(likeness.shown) < len(likeness.records):
        return Group(table, Text(f"{len(likeness.records)} atoms in all."))
    lines = [Text(f"Coherence (largest |cosine| of two atoms): {coherence(likeness.cosines):.3f}")]
    for group in alike_groups(likeness.cosines):
        names = ", ".join(likeness.records[atom].name for atom in group)
        lines.append(Text(f"Versions of one fine-tune (|cosine| of {ALIKE} and more): {names}", style="yellow"))
    return Group(table, *lines)


def print_result(result: Attribution, console: Console, *, layers: bool = False) -> None:
    """Print a result to a console."""
    console.print(render(result, layers=layers))


def _components(result: Attribution) -> Table:
    table = Table()
    table.add_column("component", overflow="fold")
    table.add_column("present", justify="center")
    table.add_column("weight", justify="right")
    table.add_column("95 % interval", justify="right")
    table.add_column("why", overflow="fold")
    table.add_column("fit", justify="right")
    for component in result.components:
        style = {True: "bold", None: None, False: "dim"}[component.present]
        table.add_row(*_cells(component), style=style)
    return table


def _cells(component: Component) -> tuple[Text, str, str, str, Text, str]:
    low_high = component.interval
    interval = f"{low_high[0]:+.4f} to {low_high[1]:+.4f}" if low_high else "unknown"
    weight = "" if component.weight is None else f"{component.weight:+.4f}"
    # Text, not markup: a name may hold square brackets.
    return (
        Text(component.name),
        _VERDICTS[component.present],
        weight,
        interval,
        Text(_why(component)),
        f"{component.coefficient:+.4f}",
    )


def _why(component: Component) -> str:
    evidence = component.evidence
    if evidence.one_of_group:
        return f"this or {' or '.join(evidence.group)} is there"
    group = f" (alike: {', '.join(evidence.group)})" if evidence.group else ""
    if component.present and evidence.p_value is not None:
        chance = "p < 1e-12" if evidence.p_value < 1e-12 else f"p = {evidence.p_value:.1g}"
        return f"{chance}; {component.profile or 'layers not compared'}{group}"
    return f"{evidence.reason}{group}"


def _sentences(result: Attribution) -> Iterator[Text]:
    unexplained, method = result.unexplained, result.method
    yield Text(result.verdict, style="bold")
    if unexplained.relative_norm > 0.0 and unexplained.share - unexplained.rounding_floor > _WORTH_SAYING:
        yield Text(f"  What is beyond rounding is {100 * unexplained.relative_norm:.2g} % of the weights' norm.")
    if unexplained.untouched_share > 0.0:
        error = f" ± {100 * unexplained.untouched_error:.2f}" if unexplained.untouched_error else ""
        yield Text(
            f"  {100 * unexplained.untouched_share:.2f}{error} % of it lies in tensors that no component changes."
        )
    base = result.base_coefficient
    if base is not None and base.removed:
        yield Text(f"The base is in it {base.coefficient:.4f} ± {base.error:.1g} times; the rest was attributed.")
    if result.decoys is not None:
        yield Text(f"Decoys: {len(result.decoys.accused)} of {result.decoys.tested} accused.")
    read = 100 * method.parameters_read / method.parameters
    sampled = "" if method.parameters_read == method.parameters else f", {read:.1f} % of them read (--exact reads all)"
    yield Text(f"Compared {method.parameters:,} parameters{sampled} by {method.solver} on {method.coordinates}.")
    if method.message:
        groups = "; ".join(", ".join(group) for group in method.groups)
        yield Text(f"{method.message}{f' Here: {groups}.' if groups else ''}", style="yellow")
    yield from _omissions(result)
    yield Text(
        "weight: of the fine-tune itself. fit: the solver's coefficient, which what resembles it raises too.",
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
