"""Plans and replays against the real mergekit: the same tensors, parameters, order and bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.recipe.worlds import World, models, quiet_mergekit
from unmerge.checkpoint.reader import open_checkpoint
from unmerge.checkpoint.tensor import values
from unmerge.errors import RecipeError
from unmerge.merging.arithmetic import Arithmetic
from unmerge.merging.draws import TorchDraws
from unmerge.merging.registry import MERGEKIT
from unmerge.recipe.document import Recipe, parse_recipe, read_recipe
from unmerge.recipe.making import load_inputs, make
from unmerge.recipe.outcomes import undecided
from unmerge.recipe.plan import Plan, plan
from unmerge.recipe.replay import TensorMatch, compare, replay
from unmerge.recipe.sources import Model, open_model
from unmerge.testing import encode, write_adapter

THREE = models("math", "code", "chat", weight=0.3, density=0.6)
BF16 = {"dtype": "bfloat16"}
MIXED = {"dtype": "float32", "out_dtype": "bfloat16"}
CASES: dict[str, dict[str, Any]] = {
    "linear": {"models": models("math", "code", weight=0.3), **MIXED},
    "linear with a base": {
        "merge_method": "linear", "base_model": "base", "models": models("math", "base", weight=0.4), **BF16
    },
    "task_arithmetic": {"base_model": "base", "models": THREE, "parameters": {"lambda": 0.7}, **BF16},
    "ties": {"base_model": "base", "models": THREE, **BF16},
    "dare_linear": {"base_model": "base", "models": THREE, "dtype": "float32"},
    "dare_ties": {"base_model": "base", "models": THREE, **BF16},
    "breadcrumbs": {"base_model": "base", "models": THREE, **BF16},
    "breadcrumbs_ties": {"base_model": "base", "models": THREE, "dtype": "float16"},
    "della": {"base_model": "base", "models": THREE, **BF16},
    "della_linear": {"base_model": "base", "models": THREE, **MIXED},
    "slerp": {"base_model": "base", "models": models("math"), "parameters": {"t": [0.1, 0.9, 0.3]}, **BF16},
    "nuslerp": {"models": models("math", "code", weight=0.3), **BF16},
    "multislerp": {"models": models("math", "code", "chat", weight=0.3), **BF16},
    "karcher": {"models": models("math", "code"), **BF16},
    "model_stock": {"base_model": "base", "models": models("math", "code"), **BF16},
    "nearswap": {"base_model": "base", "models": models("math"), "parameters": {"t": 0.001}, **BF16},
    "arcee_fusion": {"base_model": "base", "models": models("math"), **BF16},
    "ram": {"base_model": "base", "models": models("math", "code"), **BF16},
    "ramplus_tl": {"base_model": "base", "models": models("math", "code"), **BF16},
    "sce": {"base_model": "base", "models": models("math", "code", "chat"), "parameters": {"select_topk": 0.4}, **BF16},
    "passthrough": {
        "slices": [
            {"sources": [{"model": "math", "layer_range": [1, 3], "parameters": {"scale": 1.5}}]},
            {"sources": [{"model": "code", "layer_range": [0, 1]}]},
        ],
        **BF16,
    },
    "no dtype": {"merge_method": "linear", "models": models("math", "single", weight=1.0)},
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = World(tmp_path_factory.mktemp("world"))
    made.write("single", made.base, "F32")
    return made


def opened(recipe: Recipe, folder: Path) -> dict[Any, Model]:
    return {reference: open_model(reference, folder) for reference in recipe.references}


def planned(recipe: Recipe, folder: Path) -> tuple[Plan, dict[Any, Model]]:
    found = opened(recipe, folder)
    names = {reference: model.tensors.keys() for reference, model in found.items()}
    return plan(recipe, MERGEKIT[recipe.merge_method], names), found


@pytest.mark.parametrize("name", CASES)
def test_every_bit_is_mergekit_s(world: World, name: str) -> None:
    document = {"merge_method": name, **CASES[name]}
    folder = world.merge(f"merge-{name}", document, seed=5)
    recipe = read_recipe(folder)
    made, found = planned(recipe, folder)
    target = open_checkpoint(folder).tensors
    matches = list(replay(recipe, made, found, target, TorchDraws(5) if made.method.draws else None))
    assert {match.name for match in matches} == set(target)
    assert sum(match.active for match in matches) > 10_000
    # arcee_fusion's scores are small differences of large terms: some elements near the threshold are left open.
    allowed = 20 if name == "arcee_fusion" else 0
    assert sum(match.elements - match.equal for match in matches) <= allowed
    assert sum(match.unequal for match in matches) == 0


def schedule(world: World, document: dict[str, Any]) -> list[Any]:
    """Return mergekit's own tasks for the tensors of a merge, in the order in which it runs them."""
    with quiet_mergekit():
        from mergekit.architecture import get_architecture_info
        from mergekit.config import MergeConfiguration
        from mergekit.graph import Executor
        from mergekit.io.tasks import LoaderCache
        from mergekit.options import MergeOptions
        from mergekit.plan import MergePlanner

        config = MergeConfiguration.model_validate(world.recipe(document))
        options = MergeOptions()
        LoaderCache().setup(options)
        architecture = get_architecture_info(config, options)
        planner = MergePlanner(config, architecture, options, config.referenced_models()[0].config())
        tasks = Executor(planner.plan_to_disk("nowhere")).schedule.tasks
    return [item.task() for item in tasks if type(item.task()).__name__ == "SaveTensor"]


PLANS: list[dict[str, Any]] = [
    {
        "merge_method": "ties",
        "base_model": "base",
        "models": [
            {"model": "math", "parameters": {"weight": [0.1, 0.9], "density": [{"filter": "mlp", "value": [0.2, 1]}]}},
            {"model": "code", "parameters": {"weight": [{"filter": "q_proj", "value": 1}, {"value": [0.5, 0.7, 0.1]}]}},
        ],
        "parameters": {"density": 0.4, "normalize": [True, False], "lambda": [{"filter": "norm", "value": 0.5}]},
    },
    {
        "merge_method": "linear",
        "slices": [
            {
                "sources": [
                    {"model": "base", "layer_range": [0, 2], "parameters": {"weight": [0.0, 1.0]}},
                    {"model": "math", "layer_range": [1, 3], "parameters": {"weight": {"filter": "s.2", "value": 7}}},
                ],
                "parameters": {"weight": [3.0, 4.0]},
            },
            {
                "sources": [{"model": "code", "layer_range": [0, 3]}, {"model": "chat", "layer_range": [0, 3]}],
                "parameters": {"normalize": False},
            },
            {"sources": [{"model": "chat", "layer_range": [2, 3]}, {"model": "math", "layer_range": [2, 3]}]},
        ],
        "parameters": {"weight": [{"filter": "mlp", "value": [1, 2]}, {"value": 5}]},
    },
    {
        "merge_method": "slerp",
        "slices": [
            {
                "base_model": "math",
                "sources": [{"model": "math", "layer_range": [0, 3]}, {"model": "code", "layer_range": [0, 3]}],
                "parameters": {"t": [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"value": 0.5}]},
            }
        ],
    },
]  # fmt: skip


@pytest.mark.parametrize("document", PLANS, ids=lambda document: document["merge_method"])
def test_tensors_parameters_and_order_are_mergekit_s(world: World, document: dict[str, Any]) -> None:
    recipe = parse_recipe(yaml.safe_dump(world.recipe(document)))
    made, _ = planned(recipe, world.folder)
    ours = {tensor.name: tensor for tensor in made.tensors}
    theirs = schedule(world, document)
    assert {task.tensor_name for task in theirs} == set(ours)
    for task in theirs:
        tensor, merge = ours[task.tensor_name], task.tensor_task
        assert dict(merge.parameters.items()) == dict(tensor.shared)
        inputs = {model: merge.gather_tensors.weight_info[model].name for model in merge.model_order}
        assert {str(item.model): item.name for item in tensor.inputs} == {str(m): name for m, name in inputs.items()}
        of_models = [
            dict(merge.input_parameters[model].items()) for model in merge.model_order if model != merge.base_model
        ]
        assert of_models == [
            {name: of[index] for name, of in tensor.of_models.items()} for index in range(len(tensor.models))
        ]
    labels = [ours[task.tensor_name].label for task in theirs]
    assert labels == [tensor.label for tensor in made.tensors]
    if made.ordered:
        assert [task.tensor_name for task in theirs] == [tensor.name for tensor in made.tensors]


def test_after_the_layers_is_where_mergekit_s_architectures_say(world: World) -> None:
    import json
    from importlib.resources import files

    from unmerge.recipe.plan import _AFTER_LAYERS

    decoders = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi", "gpt-neox", "gpt2", "falcon", "mamba")
    seen = 0
    for path in (files("mergekit") / "_data" / "architectures").iterdir():
        if path.name.removesuffix(".json") in decoders:
            definition = json.loads(path.read_text())
            seen += 1
            assert not [w["name"] for w in definition["pre_weights"] if _AFTER_LAYERS.search(w["name"])]
            assert not [w["name"] for w in definition["post_weights"] if not _AFTER_LAYERS.search(w["name"])]
    assert seen >= 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_method": "ties"}, "merge method ties needs a base_model"),
        ({"models": [*THREE, THREE[0]]}, "names .*math twice"),
        ({"models": models("math", "code")}, "parameter weight is missing for lm_head.weight"),
        (
            {
                "models": None, "parameters": {"weight": 1},
                "slices": [{"sources": [{"model": "math", "layer_range": [2, 9]}]}],
            },
            "takes layers 2 to 8 of .*math, which has 3",
        ),
        (
            {
                "merge_method": "slerp", "models": None, "base_model": "base", "parameters": {"t": 0.5},
                "slices": [{"sources": [{"model": name, "layer_range": [0, 3]} for name in ("math", "code")]}],
            },
            "base_model .*base is not among the sources of a slice",
        ),
    ],
)  # fmt: skip
def test_what_mergekit_refuses_is_refused(world: World, change: dict[str, Any], message: str) -> None:
    document = {"merge_method": "linear", "models": THREE, "parameters": {"t": 0.5}, **change}
    recipe = parse_recipe(yaml.safe_dump({key: value for key, value in world.recipe(document).items() if value}))
    with pytest.raises(RecipeError, match=message):
        planned(recipe, world.folder)


def test_a_model_and_its_adapter_are_merged_as_mergekit_does(world: World, tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    write_adapter(world.folder / "adapter", rng, world.base, size=0.05, config={"task_type": "CAUSAL_LM"})
    reference = f"{world.path('base')}+{world.path('adapter')}"
    with quiet_mergekit():
        from mergekit.common import ModelReference

        merged = ModelReference.parse(reference).merged(cache_dir=str(tmp_path))
    theirs = open_checkpoint(Path(merged.model.path)).tensors
    recipe = parse_recipe(f"merge_method: passthrough\nmodels: [{{model: {reference}}}]\n")
    ours = open_model(recipe.references[0], tmp_path).tensors
    assert set(ours) == set(theirs)
    unequal = sum(int((values(ours[name]) != values(theirs[name])).sum()) for name in theirs)
    changed = sum(int((values(theirs[name]).ravel() != world.base[name].ravel()).sum()) for name in theirs)
    assert changed > 1000
    assert unequal <= changed / 1000


def matches_of(world: World, name: str, document: dict[str, Any]) -> Iterator[TensorMatch]:
    """Compare a merge with itself where elements at a threshold were kept or dropped the other way round."""
    folder = world.merge(name, document)
    recipe = read_recipe(folder)
    made, found = planned(recipe, folder)
    target = open_checkpoint(folder).tensors
    for tensor in made.tensors:
        inputs = load_inputs(tensor, found, recipe.dtype)
        ours, kind = make(made.method, inputs, recipe.out_dtype)
        open_ = undecided(made.method.name, inputs)
        if open_ is None:
            continue
        other = Arithmetic(kind).round(ours).reshape(-1)
        other[open_.places] = Arithmetic(kind).round(open_.outcomes[0])
        stored = replace(target[tensor.name], offset=0)  # type: ignore[type-var]
        file = world.folder / f"{name}.bin"
        file.write_bytes(encode(other.astype(np.float64), kind).tobytes())
        yield compare(made.method.name, inputs, ours, kind, replace(stored, origin=file))  # type: ignore[type-var]


@pytest.mark.parametrize("name", ["ties", "breadcrumbs", "sce"])
def test_ties_at_a_threshold_may_be_kept_or_dropped(world: World, name: str) -> None:
    matches = list(matches_of(world, f"open-{name}", {"merge_method": name, **CASES[name]}))
    differing = [match for match in matches if match.equal < match.elements]
    assert differing
    for match in matches:
        assert match.unequal == 0
        assert match.free_explained == match.free
        assert match.free >= match.elements - match.equal


def test_a_difference_elsewhere_is_not_explained_by_ties(world: World) -> None:
    folder = world.merge("open", {"merge_method": "ties", **CASES["ties"]})
    recipe = read_recipe(folder)
    made, found = planned(recipe, folder)
    target = open_checkpoint(folder).tensors
    wrong = replace(
        recipe, models=tuple(replace(item, parameters={"weight": 0.3, "density": 0.95}) for item in recipe.models)
    )
    other, _ = planned(wrong, folder)
    matches = list(replay(wrong, other, found, target))
    assert sum(match.unequal for match in matches) > 0.02 * sum(match.active for match in matches)
    assert made.ordered
