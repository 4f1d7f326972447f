"""A recovered recipe in the terminal."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from unmerge.recipe.proof import Range, Recovery, summary

_VERDICTS = {
    "proven": ("Proven: this recipe makes the target.", "green"),
    "decoded": ("Decoded: masks that were read off the target make it; their seed was not found.", "green"),
    "partial": ("Partial: what is known does not make the target; something unknown is in it.", "yellow"),
    "nothing known": ("No known fine-tune is in the target, so there is no recipe.", "yellow"),
}
_FAILS = 10.0


def render(result: Recovery) -> RenderableType:
    """Lay out what was recovered."""
    parts: list[RenderableType] = [Text(f"{result.target} on {result.base}", style="bold")]
    if result.members:
        parts.append(_members(result))
    if result.recipe is not None:
        parts.append(Syntax(result.recipe, "yaml", background_color="default"))
    return Group(*parts, *_sentences(result))


def _members(result: Recovery) -> Table:
    table = Table()
    for heading in ("model", "parameters", "coefficient by attribution"):
        table.add_column(heading, justify="right" if heading.startswith("coefficient") else "left", overflow="fold")
    for member in result.members:
        told = ", ".join(f"{name} {value}" for name, value in member.parameters.items())
        coefficient = "" if member.coefficient is None else f"{member.coefficient:.3f}"
        table.add_row(Text(member.name), Text(told), coefficient)
    return table


def _sentences(result: Recovery) -> list[Text]:
    text, style = _VERDICTS[result.status]
    lines = [Text(text, style=style)]
    if result.proof is not None:
        lines.append(Text(f"Made again: {summary(result.proof)}."))
        lines.extend(Text(f"It does not go with the recipe: {item}.", style="yellow") for item in result.proof.unlikely)
    if result.seed is not None:
        threads = "1 thread" if result.threads == 1 else f"{result.threads} threads"
        lines.append(Text(f"Masks: mergekit-yaml --random-seed {result.seed}, torch with {threads}."))
    if result.decoded is not None:
        lines.append(_decoded(result.decoded.error, result.decoded.decoy_error))
    if result.ranges:
        lines.append(Text(f"The same bits: {', '.join(_interval(item) for item in result.ranges)}."))
    lines.extend(Text(sentence) for sentence in result.free)
    if result.alike:
        lines.append(Text(f"{len(result.alike)} other recipes make nearly the same bits (see --json):"))
        lines.extend(Text(f"  {_headline(item.recipe)} ({100.0 * item.share:.3f} %)") for item in result.alike)
    lines.extend(Text(f"Note: {notice}", style="yellow") for notice in result.notices)
    return lines


def _interval(item: Range) -> str:
    name = item.parameter if item.model is None else f"{item.parameter} of {item.model}"
    low, high = (None if end is None else f"{end:.10g}" for end in (item.low, item.high))
    if low is None and high is None:
        return f"{name} any"
    if low is None or high is None:
        return f"{name} up to {high}" if low is None else f"{name} from {low}"
    return f"{name} {low} to {high}" if low != high else f"{name} {low} only"


def _decoded(error: float, decoy_error: float) -> Text:
    own, decoys = f"{100.0 * error:.3f} %", f"{100.0 * decoy_error:.0f} %"
    text = f"Decoded masks leave {own} of the change unexplained; with decoys it is {decoys}"
    trusted = decoy_error > _FAILS * error
    return Text(f"{text}." if trusted else f"{text}, so they prove nothing.", style="" if trusted else "yellow")


def _headline(recipe: str) -> str:
    """Return the lines of a recipe that tell it apart, in one."""
    kept = [line.strip() for line in recipe.splitlines() if line.startswith(("merge_method", "dtype", "base_model"))]
    return ", ".join(kept)


def print_recovery(result: Recovery, console: Console) -> None:
    """Print what was recovered."""
    console.print(render(result))
