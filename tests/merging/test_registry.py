"""The tables hold every method of the tools, told what the tools tell theirs."""

from __future__ import annotations

from typing import get_args, get_type_hints

import pytest
from mergekit.merge_methods.base import MISSING, ParameterScope
from peft.tuners.lora import LoraModel

from tests.merging.in_torch import registry
from unmerge.merging.registry import MERGEKIT, MERGEKIT_TO_0_1_4, PEFT


def test_every_method_of_mergekit_is_here() -> None:
    assert set(MERGEKIT) == {method.spec.name for method in registry.registered_methods()}
    assert all(method.name == name for name, method in MERGEKIT.items())


@pytest.mark.parametrize("name", sorted(MERGEKIT))
def test_parameters_and_the_bases_part_are_those_of_mergekit(name: str) -> None:
    spec, ours = registry.get(name).spec, MERGEKIT[name]
    theirs = {
        parameter.name: (
            "shared" if parameter.scope == ParameterScope.SHARED else "model",
            None if parameter.default is MISSING else parameter.default,
            parameter.default is not MISSING and parameter.default is None,
        )
        for parameter in spec.parameters
    }
    # Alternative names of one parameter, and those of which no number depends, are mergekit's own business.
    assert {p.name: (p.scope, p.default, p.optional) for p in ours.parameters}.items() <= theirs.items()
    required = {parameter.name for parameter in spec.parameters if parameter.required}
    assert required <= {parameter.name for parameter in ours.parameters}
    assert ours.base == spec.contract.base.value


def test_an_older_version_differs_in_linear() -> None:
    assert {name for name in MERGEKIT if MERGEKIT[name] is not MERGEKIT_TO_0_1_4[name]} == {"linear"}
    assert set(MERGEKIT_TO_0_1_4) == set(MERGEKIT)


def test_every_combination_of_peft_is_here() -> None:
    assert set(PEFT) == set(get_args(get_type_hints(LoraModel.add_weighted_adapter)["combination_type"]))
