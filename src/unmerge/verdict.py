"""The answer in plain words."""

from __future__ import annotations

from collections.abc import Sequence

from unmerge.result import Component, Unexplained

NEAR_FLOOR = 0.02
"""Unexplained share beyond rounding that is not worth a second sentence."""
LISTED = 8
"""Names that a sentence holds."""


def verdict(components: Sequence[Component], unexplained: Unexplained) -> str:
    """Say in a few sentences what was found."""
    if components and not any(_tested(component) for component in components):
        return f"Presence was not tested. {_left(unexplained)}"
    return f"{_found(components)} {_left(unexplained)}"


def _tested(component: Component) -> bool:
    return component.present is not None or component.evidence.p_value is not None or component.evidence.one_of_group


def _found(components: Sequence[Component]) -> str:
    present = [component for component in components if component.present]
    certain = {component.name for component in present}
    groups = sorted(
        {
            _group(component)
            for component in components
            if component.evidence.one_of_group and not certain & {component.name, *component.evidence.group}
        }
    )
    unclear = [
        component for component in components if component.present is None and not component.evidence.one_of_group
    ]
    rest = "".join(f" One of {group} is present; it cannot be told which." for group in groups)
    rest += f" For {_count(unclear)} it cannot be told." if unclear else ""
    if not present and groups:
        return rest.strip()
    if not present:
        if unclear:
            return f"No component is certain to be present.{rest}"
        return "No known component is present: do not read the coefficients."
    return f"{_count(present)} present: {_names(present)}.{rest}"


def _group(component: Component) -> str:
    return ", ".join(sorted((component.name, *component.evidence.group)))


def _count(components: Sequence[Component]) -> str:
    return f"{len(components)} component{'' if len(components) == 1 else 's'}"


def _names(components: Sequence[Component]) -> str:
    names = [component.name for component in components[:LISTED]]
    more = f" and {len(components) - LISTED} more" if len(components) > LISTED else ""
    return ", ".join(names) + more


def _left(unexplained: Unexplained) -> str:
    share, floor = unexplained.share, unexplained.rounding_floor
    said = f"{_percent(share)} of the change is unexplained"
    beyond = share - floor
    if beyond <= NEAR_FLOOR:
        enough = "all" if beyond <= 0.005 else "most"
        return f"{said}; rounding accounts for {enough} of it."
    said = f"{said}, {_percent(floor)} by rounding."
    if unexplained.kind == "low rank":
        rest = f"The rest is of rank {unexplained.rank} or so"
        return f"{said} {rest}: one or a few fine-tunes that are not in the dictionary."
    if unexplained.kind == "full rank":
        return f"{said} The rest is of full rank: a sparsified merge (TIES, DARE), or training of all weights."
    return said


def _percent(share: float) -> str:
    return f"{100.0 * share:.{1 if share >= 0.001 else 2}f} %"
