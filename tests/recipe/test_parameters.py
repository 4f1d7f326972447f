"""Parameters of random recipes, as mergekit's own resolver finds them."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.recipe.worlds import quiet_mergekit
from unmerge.errors import RecipeError
from unmerge.merging.method import Parameter
from unmerge.recipe.document import parse_recipe
from unmerge.recipe.parameters import Place, resolve

NAMES = ["model.layers.3.self_attn.q_proj.weight", "model.layers.12.mlp.up_proj.weight", "model.norm.weight"]
numbers = st.one_of(
    st.floats(-2.0, 2.0, allow_nan=False), st.integers(-3, 3), st.sampled_from(["1e-3", "0.25"]), st.booleans()
)
truths = st.one_of(st.booleans(), st.sampled_from([0, 1, 1.0, "true", "no"]))


@pytest.fixture(scope="module", autouse=True)
def _mergekit() -> None:
    with quiet_mergekit():
        import mergekit.parameter_resolver  # noqa: F401 - its first import warns


def setting_of(scalars: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    value = st.one_of(scalars, st.lists(scalars, max_size=4))
    filters = st.sampled_from(["mlp", "self_attn", "layers.1", "*", "nothing", "weight"])
    conditional = st.one_of(
        st.fixed_dictionaries({"value": value}), st.fixed_dictionaries({"filter": filters, "value": value})
    )
    return st.one_of(value, conditional, st.lists(conditional, min_size=1, max_size=4))


def scope_of(scalars: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    setting = setting_of(scalars)
    return st.one_of(st.just({}), st.fixed_dictionaries({"weight": setting}), st.fixed_dictionaries({"other": setting}))


def theirs(document: dict[str, Any], default: Any, kind: type, name: str, depth: float) -> Any:
    from mergekit.common import ModelReference
    from mergekit.config import ConfigReader, MergeConfiguration
    from mergekit.merge_methods.base import MISSING, ParameterScope, ParameterSpec
    from mergekit.parameter_resolver import resolve_parameter

    config = MergeConfiguration.model_validate(document)
    assert config.slices
    reader = ConfigReader(config=config, slice_out=config.slices[0], t=depth)
    spec = ParameterSpec("weight", kind, ParameterScope.INPUT, default=MISSING if default is None else default)
    scopes = reader.parameter_sources(ModelReference.parse("a/b"))
    return resolve_parameter(spec, scopes, tensor_name=name, t=depth)


def ours(document: dict[str, Any], default: Any, name: str, depth: float) -> Any:
    recipe = parse_recipe(yaml.safe_dump(document))
    part = recipe.slices[0]
    scopes = (part.sources[0].parameters, part.parameters, recipe.parameters)
    return resolve(Parameter("weight", "model", default=default), scopes, Place(name, depth))


@pytest.mark.parametrize(("kind", "scalars", "default"), [(float, numbers, None), (bool, truths, False)])
def test_a_parameter_is_what_mergekit_resolves(kind: type, scalars: st.SearchStrategy[Any], default: Any) -> None:
    scope = scope_of(scalars)

    @settings(max_examples=300, deadline=None)
    @given(scope, scope, scope, st.sampled_from(NAMES), st.fractions(0, 1, max_denominator=7))
    def check(inner: Any, middle: Any, outer: Any, name: str, depth: Any) -> None:
        document = {
            "merge_method": "linear",
            "slices": [
                {"sources": [{"model": "a/b", "layer_range": [0, 4], "parameters": inner}], "parameters": middle}
            ],
            "parameters": outer,
        }
        try:
            expected = theirs(document, default, kind, name, float(depth))
        except RuntimeError:
            with pytest.raises(RecipeError, match="weight is missing"):
                ours(document, default, name, float(depth))
            return
        found = ours(document, default, name, float(depth))
        assert found == expected
        assert type(found) is type(expected)

    check()


def test_an_optional_parameter_may_be_absent() -> None:
    parameter = Parameter("scale", "model", optional=True)
    assert resolve(parameter, [{}], Place(NAMES[0])) is None
    assert resolve(parameter, [{"scale": 2}], Place(NAMES[0])) == 2.0


@pytest.mark.parametrize(
    ("default", "value", "expected"), [(True, "maybe", "true or false"), (1.0, "half", "a number")]
)
def test_a_value_of_another_type_is_named(default: Any, value: str, expected: str) -> None:
    with pytest.raises(RecipeError, match=f"weight is '{value}'; expected {expected}"):
        resolve(Parameter("weight", "model", default=default), [{"weight": value}], Place(NAMES[0]))
