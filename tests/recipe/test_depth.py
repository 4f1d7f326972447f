"""Parameters by depth and module: what is written is evaluated by mergekit, and must come back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.recipe.samples import changes, sample_of
from tests.recipe.worlds import quiet_mergekit
from unmerge.recipe.depth import FINE_LEVELS, LEVELS, Level, Part, Parts, columns, fit_parts, part_of, ratios, setting
from unmerge.recipe.document import Conditional, Setting
from unmerge.recipe.sample import Sample
from unmerge.recipe.structures import Parameters, fit_dense

DEPTH = 6
MODULES = ("self_attn.q_proj.weight", "self_attn.o_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight")
OUTSIDE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
NAMES = [f"model.layers.{layer}.{module}" for layer in range(DEPTH) for module in MODULES]
hundredths = st.integers(-100, 100).map(lambda number: number / 100)
plain = st.one_of(hundredths, st.lists(hundredths, min_size=2, max_size=4))


@pytest.fixture(scope="module", autouse=True)
def _mergekit() -> None:
    with quiet_mergekit():
        import mergekit.config  # noqa: F401 - its first import warns


def evaluated(value: Any, name: str) -> float:
    """What mergekit makes of a setting for a tensor; those outside of the layers are at the start or the end."""
    from mergekit.config import ConditionalParameter, evaluate_setting

    def theirs(item: Any) -> Any:
        if isinstance(item, Conditional):
            return ConditionalParameter(value=theirs(item.value), filter=item.filter)
        return [theirs(one) for one in item] if isinstance(item, tuple | list) else item

    layer = part_of(name, "layer").layer
    depth = layer / (DEPTH - 1) if layer >= 0 else 0.0
    return float(evaluate_setting(name, theirs(value), depth, validate=float))


def values_of(value: Any, level: Level, names: list[str]) -> dict[Part, float]:
    return {part_of(name, level): evaluated(value, name) for name in names}


@given(plain, st.sampled_from(["whole", "layer", "module", "both"]))
def test_one_setting_for_all_modules_comes_back_without_filters(value: Any, level: Level) -> None:
    if isinstance(value, list) and level in {"whole", "module"}:
        return  # nothing of that level varies with depth
    found = setting(values_of(value, level, NAMES), DEPTH, 0.004)
    assert not (isinstance(found, tuple) and isinstance(found[0], Conditional))
    assert [evaluated(found, name) for name in NAMES] == pytest.approx(
        [evaluated(value, name) for name in NAMES], abs=0.008
    )


@given(plain, plain, plain)
def test_settings_with_filters_come_back(attention: Any, mlp: Any, rest: Any) -> None:
    value = [Conditional(attention, "self_attn"), Conditional(mlp, "mlp"), Conditional(rest)]
    names = NAMES + list(OUTSIDE)
    found = setting(values_of(value, "both", names), DEPTH, 0.004)
    for name in names:
        assert evaluated(found, name) == pytest.approx(evaluated(value, name), abs=0.008 + 1e-9)


def test_a_gradient_of_everything_needs_no_filter_for_what_is_outside_of_the_layers() -> None:
    found = setting(values_of([0.2, 0.8], "both", NAMES + list(OUTSIDE)), DEPTH, 0.004)
    assert found == (0.2, 0.8)


def test_missing_layers_are_filled_in() -> None:
    names = [name for name in NAMES if ".layers.2." not in name]
    found = setting(values_of([0.2, 0.8], "layer", names), DEPTH, 0.004)
    assert found == (0.2, 0.8)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.self_attn.q_proj.weight", Part("self_attn", 3)),
        ("model.layers.12.input_layernorm.weight", Part("input_layernorm", 12)),
        ("lm_head.weight", Part("lm_head.weight", -1)),
    ],
)
def test_parts_are_modules_of_layers(name: str, expected: Part) -> None:
    assert part_of(name, "both") == expected
    assert part_of(name, "whole") == Part()
    assert part_of(name, "layer").layer == expected.layer
    assert part_of(name, "module") == Part(expected.module, -1)


def joined(value: Any, names: list[str], seed: int = 0) -> Sample:
    """A sample in which one change is multiplied by what a setting says of each tensor."""
    samples = []
    for number, name in enumerate(names):
        delta = changes(seed + number, 1, 200)
        one = sample_of(delta, evaluated(value, name) * delta[0])
        samples.append(Sample(**{**{key: getattr(one, key) for key in Sample.__slots__}, "names": (name,)}))
    return Sample.join(samples)


def dense(part: Sample) -> tuple[Parameters, float]:
    found = fit_dense(part)
    return found.parameters, found.error


@pytest.mark.parametrize(
    ("value", "level"),
    [
        (0.4, "whole"),
        ([0.2, 0.8], "layer"),
        ([Conditional(0.7, "mlp"), Conditional(0.3)], "module"),
        ([Conditional([0.1, 0.9], "mlp"), Conditional([0.7, 0.3])], "both"),
    ],
)
def test_the_last_level_is_the_coarsest_that_explains_all(value: Any, level: Level) -> None:
    levels = list(fit_parts(joined(value, NAMES), dense, DEPTH))
    assert levels[-1].level == level
    assert [LEVELS.index(one.level) for one in levels] == sorted(LEVELS.index(one.level) for one in levels)
    [weight] = columns(levels[-1], "weights", [0])
    found: Setting = setting(weight, DEPTH, 0.004)
    assert [evaluated(found, name) for name in NAMES] == pytest.approx([evaluated(value, name) for name in NAMES])
    for name in NAMES:
        assert levels[-1].of(name).weights[0] == pytest.approx(evaluated(value, name))


def test_filters_within_modules_are_found_where_they_are_looked_for() -> None:
    value = [Conditional([0.0, 0.5, 0.3, 0.7], "q_proj"), Conditional(1.0, "o_proj"), Conditional(0.4)]
    sample = joined(value, NAMES)
    [*_, last] = fit_parts(sample, dense, DEPTH, levels=FINE_LEVELS)
    assert (last.level, last.error < 1e-9) == ("each", True)
    [weight] = columns(last, "weights", [0])
    found: Setting = setting(weight, DEPTH, 0.001)
    assert [evaluated(found, name) for name in NAMES] == pytest.approx(
        [evaluated(value, name) for name in NAMES], abs=0.002
    )
    [*_, without] = fit_parts(sample, dense, DEPTH)
    assert without.error > 0.01


def test_the_whole_model_comes_first_where_fits_are_slow() -> None:
    fitted: list[int] = []

    def counted(part: Sample) -> tuple[Parameters, float]:
        fitted.append(len(part.change))
        return dense(part)

    found = fit_parts(joined([0.2, 0.8], NAMES), counted, DEPTH, whole_first=True)
    assert next(found).level == "whole"
    assert len(fitted) == 1
    assert [one.level for one in found] == ["layer"]


def test_errors_are_of_the_whole_energy() -> None:
    sample = joined([0.2, 0.8], NAMES)
    whole = Parts("whole", {}, fit_dense(sample).error, DEPTH)
    found = {one.level: one.error for one in fit_parts(joined([0.2, 0.8], NAMES), dense, DEPTH)}
    assert found["layer"] < 1e-9 < whole.error
    assert "whole" not in found


def test_a_part_that_was_not_seen_is_like_its_neighbour() -> None:
    names = [name for name in NAMES if ".layers.5." not in name]
    [*_, found] = fit_parts(joined([Conditional([0.0, 1.0], "mlp"), Conditional(0.3)], names), dense, DEPTH)
    assert found.of("model.layers.5.mlp.up_proj.weight").weights[0] == pytest.approx(0.8)
    assert found.of("model.layers.5.self_attn.q_proj.weight").weights[0] == pytest.approx(0.3)


def test_ratios_are_over_one_model() -> None:
    one = Parameters(np.array([0.2, 0.4]), np.ones(2), np.zeros(2))
    found = ratios(Parts("layer", {Part("", 0): one}, 0.0, 1), reference=1)
    assert found[Part("", 0)].tolist() == [0.5, 1.0]
