"""A verification in a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from unmerge.recipe.verification import Verification

_STYLES = {"pass": "bold green", "fail": "bold red", "cannot tell": "bold yellow"}
_LISTED = 5


def render_verification(result: Verification) -> RenderableType:
    """Lay out a verification: the verdict and its reason first, then what was compared."""
    title = Text(f"{result.target} by {result.recipe} ({result.method})", style="bold")
    verdict = Text.assemble((result.verdict, _STYLES[result.verdict]), f": {result.reason}")
    parts: list[RenderableType] = [title, verdict, *_restored(result)]
    if result.differences:
        parts.append(_differences(result))
    if result.masks:
        parts.append(_masks(result))
    return Group(*parts, *_sentences(result))


def print_verification(result: Verification, console: Console) -> None:
    """Print a verification to a console."""
    console.print(render_verification(result))


def _restored(result: Verification) -> Iterator[Text]:
    if result.wrong_claims and result.wrong_claims[0].restored is not None:
        share = 100.0 * result.wrong_claims[0].restored
        yield Text(f"With that changed, the recipe makes {share:.2f} % of the elements.")


def _differences(result: Verification) -> Table:
    table = Table(title="tensors that differ, in the order of the merge", title_justify="left")
    table.add_column("tensor", overflow="fold")
    for heading in ("elements", "looked at", "wrong", "share", "largest (spacings)"):
        table.add_column(heading, justify="right")
    for item in result.differences:
        share = f"{100.0 * item.wrong / max(1, item.looked_at):.2f} %"
        largest = "" if item.largest is None else f"{item.largest:.3g}"
        table.add_row(Text(item.name), f"{item.elements:,}", f"{item.looked_at:,}", f"{item.wrong:,}", share, largest)
    return table


def _masks(result: Verification) -> Table:
    table = Table(title="random masks", title_justify="left")
    table.add_column("member", overflow="fold")
    for heading in ("kept", "claimed", "away", "size over claim"):
        table.add_column(heading, justify="right")
    for item in result.masks:
        size = f"{item.size:.4f} ± {item.size_error:.4f}"
        table.add_row(Text(item.model), f"{item.kept:.4f}", f"{item.claimed:.4f}", f"{item.surprise:+.1f} sd", size)
    return table


def _sentences(result: Verification) -> Iterator[Text]:
    counts = result.counts
    if counts is not None:
        looked_at = f"{counts.looked_at:,} elements looked at, {counts.wrong:,} not as the recipe makes them"
        yield Text(f"Compared {counts.tensors:,} tensors of {counts.elements:,} elements: {looked_at}.")
    for item in result.not_compared[:_LISTED]:
        yield Text(f"Not compared: {item.name}: {item.reason}", style="yellow")
    if len(result.not_compared) > _LISTED:
        yield Text(f"  … {len(result.not_compared) - _LISTED} more in --json", style="yellow")
    for notice in result.notices:
        yield Text(f"Note: {notice}", style="yellow")
