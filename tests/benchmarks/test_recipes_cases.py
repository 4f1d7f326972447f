from __future__ import annotations

import warnings
from collections import Counter
from copy import deepcopy
from dataclasses import fields

import pytest
from benchmarks.recipes.cases import DICTIONARY, SIBLINGS, UNKNOWN, Case, cases, names_of, plain_name
from benchmarks.recipes.lies import COUNT, LIES, STEP, claims, draw
from benchmarks.recipes.making import dumped
from benchmarks.recipes.rows import Recovered, Store, Verified
from benchmarks.recipes.scoring import Likeness, effective, errors, in_cells
from benchmarks.recipes.verifying import names_lie

from unmerge.merging.registry import MERGEKIT
from unmerge.recipe.document import Recipe, parse_recipe
from unmerge.recipe.plan import plan

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of packages that mergekit imports
    from mergekit.config import MergeConfiguration

CASES = cases()
CLAIMS = claims()
STORED = tuple(
    f"model.layers.{layer}.self_attn.{module}.weight" for layer in range(4) for module in ("q_proj", "o_proj")
)


def test_every_method_is_recovered_with_all_members_known() -> None:
    assert {case.method for case in CASES if case.group == "method"} == set(MERGEKIT)
    assert len({case.name for case in CASES}) == len(CASES)
    assert {len(case.members) for case in CASES if case.method in ("linear", "ties")} >= {2, 3, 5}


@pytest.mark.parametrize("document", [*(case.document for case in CASES), *(one.claimed for one in CLAIMS)])
def test_mergekit_accepts_every_recipe(document: dict[str, object]) -> None:
    found = MergeConfiguration.model_validate(document)
    assert parse_recipe(dumped(document)).merge_method == found.merge_method


def test_the_dictionary_has_what_a_group_says() -> None:
    for case in CASES:
        assert len(case.dictionary) == 8
        lacking = case.members - set(case.dictionary)
        assert lacking == {"unknown member": {UNKNOWN}, "strangers": case.members}.get(case.group, set())
    assert not set(SIBLINGS) & set(DICTIONARY)


def test_lies_are_as_many_of_each_kind_and_differ_from_the_truth_in_one_thing() -> None:
    assert Counter(one.kind for one in CLAIMS)["true"] == COUNT == sum(one.kind in LIES for one in CLAIMS)
    assert draw(7) == draw(7)
    for one in CLAIMS:
        restored = deepcopy(one.claimed)
        for entry, true in zip(restored["models"], one.made["models"], strict=True):
            if entry["model"] == one.subject or (one.kind, one.method) == ("weight", "slerp"):
                entry.update(deepcopy(true))
        if (one.kind, one.method) == ("weight", "slerp"):
            restored["parameters"] = one.made["parameters"]
        assert restored == one.made
        assert (one.claimed == one.made) == (one.kind == "true")
        if one.kind == "weight":
            assert abs(float(one.says) - float(one.truth)) == pytest.approx(STEP)
        if one.kind == "member":
            assert one.truth in DICTIONARY
            assert one.subject not in names_of(one.made)
            assert one.subject.rpartition("-")[0] == one.truth.rpartition("-")[0]


def test_a_reason_is_right_only_if_it_names_the_lie_and_the_truth() -> None:
    lie = next(one for one in CLAIMS if one.kind == "weight" and one.method == "linear")
    model = lie.subject.rpartition("-")[0]
    assert names_lie(lie, f"weight of {model}: the recipe says {lie.says}, the weights say {lie.truth}")
    assert not names_lie(lie, f"weight of {model}: the recipe says {lie.says}, the weights say {lie.says}")
    assert not names_lie(lie, f"weight of another: the recipe says {lie.says}, the weights say {lie.truth}")
    swap = next(one for one in CLAIMS if one.kind == "member")
    member = swap.subject.rpartition("-")[0]
    assert names_lie(swap, f"member {member}: the weights hold {swap.truth} in its place")
    assert not names_lie(swap, f"member {member}: the weights hold {swap.subject} in its place")


def _effective(case: Case) -> list[dict[str, float]]:
    recipe = parse_recipe(dumped(case.document))
    names = dict.fromkeys(recipe.references, STORED)
    made = plan(recipe, MERGEKIT[recipe.merge_method], names).tensors
    return [effective(tensor, recipe.merge_method, lambda model: plain_name(str(model))) for tensor in made]


def _case(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def test_weights_are_compared_as_they_act() -> None:
    assert _effective(_case("nuslerp"))[0] == pytest.approx({"gsm8k_math-0": 7 / 11, "xsum-0": 4 / 11})
    assert _effective(_case("task-arithmetic-lambda"))[0] == pytest.approx({"gsm8k_math-0": 0.56, "xsum-0": 0.32})
    assert _effective(_case("slerp"))[0] == pytest.approx({"xsum-0": 0.65, "gsm8k_math-0": 0.35})
    by_layer = {round(one["gsm8k_math-0"], 9) for one in _effective(_case("task-arithmetic-gradient"))}
    assert by_layer == {0.2, 0.4, 0.6, 0.8}
    assert _effective(_case("karcher-3")) == [{}] * len(STORED)


def test_errors_are_those_of_the_farthest_tensor() -> None:
    true = parse_recipe(dumped(_case("ties-3").document))
    wrong = parse_recipe(dumped(_case("ties-3").document).replace("weight: 0.2", "weight: 0.21"))
    found = errors(true, wrong, STORED, STORED, str)
    assert found.other == 0.0
    assert found.weight_cells == pytest.approx((0.21 / 1.01 - 0.2) * 2**10)
    assert errors(true, true, STORED, STORED, str).weight_cells == 0.0
    fewer = Recipe("linear", None, true.models[:2])
    assert errors(true, fewer, STORED, STORED, str).weight_cells is None


def test_a_cell_is_the_spacing_of_bfloat16() -> None:
    assert in_cells(1.0, 1.0 + 2.0**-7) == 1.0
    assert in_cells(0.3, 0.3 + 2.0**-9) == pytest.approx(1.0)
    assert Likeness(200, 1, 0.0).equal == 0.995


def test_rows_are_read_as_they_were_written(tmp_path) -> None:  # type: ignore[no-untyped-def]
    row = Verified("one", "true", "ties", False, "", "pass", "every", ("weight",), True, 1.5)
    store = Store(tmp_path / "rows.jsonl", Verified)
    assert store.read() == {}
    store.append(row)
    with store.path.open("ab") as file:
        file.write(b'{"name": "cut sh')
    store.append(row)
    assert store.read() == {"one": row}
    assert len(store.path.read_bytes().splitlines()) == 2
    assert {field.name for field in fields(Recovered)} >= {"equal", "paper_error", "decoy_error"}
