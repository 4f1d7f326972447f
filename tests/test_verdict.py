"""The sentences for every case."""

from __future__ import annotations

from typing import Any

import pytest

from unmerge.result import Component, Evidence, ModelReference, Unexplained
from unmerge.verdict import LISTED, verdict

SOURCE = ModelReference(reference="r", commit=None, digest="d", kind="adapter")


def component(
    name: str, present: bool | None, *, p_value: float | None = 0.5, one_of: tuple[str, ...] = ()
) -> Component:
    return Component(
        name=name,
        coefficient=0.1,
        weight=None,
        interval=None,
        present=present,
        evidence=Evidence(
            reason="r", p_value=p_value, detectable=None, group=one_of, one_of_group=bool(one_of), energy_share=0.1
        ),
        profile=None,
        by_layer=(),
        source=SOURCE,
        relative_norm=1.0,
    )


def left(share: float = 0.0, floor: float = 0.0, kind: Any = None, rank: int = 0) -> Unexplained:
    return Unexplained(
        share=share,
        rounding_floor=floor,
        rounding=None,
        relative_norm=0.0,
        kind=kind,
        rank=rank,
        untouched_share=0.0,
        untouched_error=0.0,
    )


def components(present: int, unclear: int = 0, absent: int = 0) -> list[Component]:
    kinds = [True] * present + [None] * unclear + [False] * absent
    return [component(f"a{place}", kind) for place, kind in enumerate(kinds)]


HALF = "50.0 % of the change is unexplained, 10.0 % by rounding."
NOTHING_LEFT = "0.00 % of the change is unexplained; rounding accounts for all of it."


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (components(1), "1 component present: a0."),
        (components(2, absent=3), "2 components present: a0, a1."),
        (components(2, 1), "2 components present: a0, a1. For 1 component it cannot be told."),
        (components(0, 2, 1), "No component is certain to be present. For 2 components it cannot be told."),
        (components(0, 0, 3), "No known component is present: do not read the coefficients."),
    ],
)
def test_says_what_was_found(found: list[Component], said: str) -> None:
    assert verdict(found, left()) == f"{said} {NOTHING_LEFT}"


def test_lists_some_names_and_counts_the_rest() -> None:
    said = verdict(components(LISTED + 3), left())
    assert said.startswith(f"{LISTED + 3} components present: a0, ")
    assert f"a{LISTED - 1} and 3 more. " in said
    assert f"a{LISTED}" not in said
    assert "more" not in verdict(components(LISTED), left())


def test_says_which_are_versions_of_one() -> None:
    pair = [component("x", None, one_of=("b",)), component("b", None, one_of=("x",))]
    said = "One of b, x is present; it cannot be told which."
    assert verdict(pair, left()) == f"{said} {NOTHING_LEFT}"
    assert verdict([*components(1), *pair], left()) == f"1 component present: a0. {said} {NOTHING_LEFT}"
    assert verdict([*pair, *components(0, 1)], left()) == f"{said} For 1 component it cannot be told. {NOTHING_LEFT}"
    other = [component("u", None, one_of=("v",)), component("v", None, one_of=("u",))]
    assert verdict([*other, *pair], left()) == f"{said} One of u, v is present; it cannot be told which. {NOTHING_LEFT}"


def test_of_versions_one_of_which_is_certain_the_rest_is_not_mentioned() -> None:
    sure = component("x", True).model_copy(
        update={"evidence": component("x", True, one_of=("b",)).evidence.model_copy(update={"one_of_group": False})}
    )
    assert "One of" not in verdict([sure, component("b", None, one_of=("x",))], left())


def test_copies_alone_were_tested() -> None:
    pair = [component("x", None, p_value=None, one_of=("b",)), component("b", None, p_value=None, one_of=("x",))]
    assert verdict(pair, left()) == f"One of b, x is present; it cannot be told which. {NOTHING_LEFT}"


def test_says_if_nothing_was_tested() -> None:
    untested = [component("a", None, p_value=None), component("b", None, p_value=None)]
    assert verdict(untested, left()) == f"Presence was not tested. {NOTHING_LEFT}"
    assert not verdict([*untested, component("c", False, p_value=None)], left()).startswith("Presence was not")


@pytest.mark.parametrize(
    ("rest", "said"),
    [
        (left(0.0004, 0.0001), "0.04 % of the change is unexplained; rounding accounts for all of it."),
        (left(0.006, 0.005), "0.6 % of the change is unexplained; rounding accounts for all of it."),
        (left(0.02, 0.03), "2.0 % of the change is unexplained; rounding accounts for all of it."),
        (left(0.315, 0.3), "31.5 % of the change is unexplained; rounding accounts for most of it."),
        (left(0.315, 0.3, "full rank"), "31.5 % of the change is unexplained; rounding accounts for most of it."),
        (left(0.5, 0.1), HALF),
        (
            left(0.5, 0.1, "low rank", 16),
            f"{HALF} The rest is of rank 16 or so: one or a few fine-tunes that are not in the dictionary.",
        ),
        (
            left(0.5, 0.1, "full rank"),
            f"{HALF} The rest is of full rank: a sparsified merge (TIES, DARE), or training of all weights.",
        ),
        (left(1.0, 0.0, "nothing"), "100.0 % of the change is unexplained, 0.00 % by rounding."),
    ],
)
def test_says_what_is_left(rest: Unexplained, said: str) -> None:
    assert verdict(components(1), rest) == f"1 component present: a0. {said}"
