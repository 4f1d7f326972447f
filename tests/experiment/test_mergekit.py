from __future__ import annotations

import warnings

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file

from unmerge.errors import MissingExtraError, UnmergeError
from unmerge.experiment.mergekit import METHODS, find_mergekit, run_mergekit, write_recipe

WEIGHTS = {"gsm8k_math": 0.75, "xsum": 0.25}


@pytest.fixture(scope="module")
def parse_recipe():
    """mergekit's own reading of a recipe."""
    with warnings.catch_warnings():
        # mergekit looks numpy's internals up under their old name when it is imported.
        warnings.filterwarnings("ignore", r"numpy\.core is deprecated", DeprecationWarning)
        from mergekit.config import MergeConfiguration
    return lambda path: MergeConfiguration.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))


@pytest.fixture
def recipe(tiny_world, tmp_path):
    def write(method, **options):
        weights = {tiny_world.checkpoint(task): weight for task, weight in WEIGHTS.items()}
        path = tmp_path / "recipes" / f"{method}.yml"
        return write_recipe(path, method=method, weights=weights, base=tiny_world.base, **options)

    return write


def weights_of(folder):
    return {name: tensor.float().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize("method", METHODS)
def test_mergekit_accepts_the_yaml(recipe, parse_recipe, tiny_world, method):
    path = recipe(method, density=None if method == "linear" else 0.5, normalize=True)
    config = parse_recipe(path)
    assert config.merge_method == method
    assert config.dtype == "bfloat16"
    assert config.parameters == {"normalize": True}
    assert [model.parameters["weight"] for model in config.models] == list(WEIGHTS.values())
    assert (config.base_model is None) == (method == "linear")
    for model, task in zip(config.models, WEIGHTS, strict=True):
        found = path.parent / model.model.model.path
        assert found.resolve() == tiny_world.checkpoint(task).resolve()


def test_each_model_may_have_its_own_density(recipe, tiny_world):
    densities = {tiny_world.checkpoint("gsm8k_math"): 0.5, tiny_world.checkpoint("xsum"): 0.2}
    document = yaml.safe_load(recipe("ties", density=densities, int8_mask=True).read_text(encoding="utf-8"))
    assert [model["parameters"]["density"] for model in document["models"]] == [0.5, 0.2]
    assert document["parameters"] == {"int8_mask": True}


def test_a_linear_merge_is_the_weighted_mean_of_its_models(recipe, tiny_world, tmp_path):
    merged = run_mergekit(recipe("linear"), tmp_path / "merged")
    first, second = (weights_of(tiny_world.checkpoint(task)) for task in WEIGHTS)
    for name, weight in weights_of(merged).items():
        mean = 0.75 * first[name] + 0.25 * second[name]
        assert np.all(np.abs(weight - mean) <= np.abs(mean) * 2**-8)
    assert (merged / "tokenizer.json").is_file()


def test_a_dare_merge_is_repeatable_with_a_seed(recipe, tmp_path):
    path = recipe("dare_linear", density=0.5)
    first, again = (run_mergekit(path, tmp_path / name, seed=1) for name in ("first", "again"))
    assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


def test_a_failed_merge_ends_in_mergekits_last_line(recipe, tmp_path):
    path = recipe("ties", density=0.5)
    path.write_text(path.read_text(encoding="utf-8").replace("ties", "tides"), encoding="utf-8")
    with pytest.raises(UnmergeError, match=r"mergekit failed on .*ties\.yml with exit code 1: .*tides"):
        run_mergekit(path, tmp_path / "merged")


def test_an_unknown_method_is_refused(tiny_world, tmp_path):
    with pytest.raises(UnmergeError, match="cannot write a 'slerp' merge of 1 models: give one of linear"):
        write_recipe(tmp_path / "slerp.yml", method="slerp", weights={tiny_world.base: 1.0}, base=tiny_world.base)


def test_a_missing_mergekit_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with pytest.raises(MissingExtraError, match=r"pip install 'unmerge\[experiment\]'"):
        find_mergekit()
