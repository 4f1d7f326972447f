"""Mixtures of experts: made by the real mergekit-moe, found, and made again from what was found."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from tests.recipe.passthrough import bits, random_model, write_model
from unmerge.checkpoint.reader import Checkpoint, open_checkpoint
from unmerge.checkpoint.tensor import FileTensor, values
from unmerge.errors import CheckpointError, RecipeError
from unmerge.recipe.adapted import AdaptedTensor
from unmerge.recipe.experts import dense_role, find_experts, gate_mode, split_experts
from unmerge.task_vector import Difference
from unmerge.testing import tiny_model, write_checkpoint

LAYERS, HIDDEN, VOCABULARY = 3, 32, 64
# mergekit-moe's name, what sources are, and whether it takes a shared expert.
LAYOUTS = {
    "mixtral": ("mistral", False),
    "deepseek": ("mistral", True),
    "qwen moe": ("mistral", True),
    "qwen moe of qwen2": ("qwen2", True),
    "qwen3": ("qwen3", False),
}


class Prompts:
    """A tokenizer whose tokens are letters."""

    bos_token = None

    def __call__(self, prompts, **_):
        width = max(len(prompt) for prompt in prompts)
        ids = [[ord(letter) % VOCABULARY for letter in prompt.ljust(width)] for prompt in prompts]
        return BatchEncoding({"input_ids": torch.tensor(ids), "attention_mask": torch.ones(len(ids), width, dtype=int)})


def moe(document, output):
    """Run mergekit-moe on a document, without a tokenizer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mergekit.moe.config import MoEMergeConfig, is_bad_config
        from mergekit.moe.router import get_gate_params
        from mergekit.options import MergeOptions
        from mergekit.scripts.moe import select_output_arch

        config = MoEMergeConfig.model_validate(document)
        assert not is_bad_config(config)
        options = MergeOptions(quiet=True)
        experts, shared = list(config.experts), list(config.shared_experts or [])
        gated = experts + [one for one in shared if one.positive_prompts or "random" in config.gate_mode]
        gates = get_gate_params(config.base_model, Prompts(), gated, mode=config.gate_mode, device="cpu")
        select_output_arch(config, options).write_model(
            str(output), config, options,
            router_weights=list(gates[:, : len(experts)]), shared_router_weights=list(gates[:, len(experts) :]),
        )  # fmt: skip
    return open_checkpoint(output)


def architecture(kind):
    named = {"mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind]
    return {"model_type": kind, "architectures": [f"{named}ForCausalLM"], "head_dim": HIDDEN // 4}


def dense(kind):
    if kind == "qwen2":
        return tiny_model(np.random.default_rng(0), layers=LAYERS)
    model = random_model(0, LAYERS)
    if kind == "qwen3":
        norms = (f"model.layers.{layer}.self_attn.{part}_norm.weight" for layer in range(LAYERS) for part in "qk")
        model |= {name: 1.0 + 0.05 * np.random.default_rng(len(name)).standard_normal(HIDDEN // 4) for name in norms}
    return model


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folders by kind of model and name: a base, two fine-tunes of all of it, and one of its attention."""
    folder = tmp_path_factory.mktemp("dense")
    found = {}
    for kind in ("mistral", "qwen2", "qwen3"):
        base = dense(kind)
        for seed, (name, part) in enumerate({"base": None, "a": "", "b": "", "attention": "self_attn"}.items()):
            rng = np.random.default_rng(seed)
            tuned = {
                key: value + 0.003 * rng.standard_normal(value.shape) * (part is not None and part in key)
                for key, value in base.items()
            }
            found.setdefault(kind, {})[name] = write_model(folder / kind / name, tuned, **architecture(kind))
    return found


def opened(paths):
    return {name: open_checkpoint(path) for name, path in paths.items()}


def document(paths, base, experts, shared=(), **more):
    def entries(items):
        return [{"source_model": str(paths[name]), **options} for name, options in items]

    found = {"base_model": str(paths[base]), "gate_mode": "random", "dtype": "bfloat16", "experts": entries(experts)}
    return found | ({"shared_experts": entries(shared)} if shared else {}) | more


def remade(mixture, paths, folder):
    return moe(mixture.to_recipe_document({name: str(path) for name, path in paths.items()}), folder)


def without_routers(checkpoint, mixture):
    return {name: held for name, held in bits(checkpoint).items() if name not in mixture.routers}


@pytest.mark.parametrize(("layout", "kind", "shares"), [(name, *rest) for name, rest in LAYOUTS.items()], ids=LAYOUTS)
def test_every_expert_is_found_and_made_again(tmp_path, world, layout, kind, shares):
    paths = world[kind]
    experts = [("a", {}), ("b", {"residual_scale": 0.3}), ("a", {}), ("attention", {})]
    shared = [("b", {"residual_scale": 0.1})] if shares else []
    name = layout.partition(" of ")[0]
    target = moe(document(paths, "attention", experts, shared, architecture=name), tmp_path / "target")
    mixture = find_experts(target, opened(paths))
    assert (mixture.architecture, mixture.base_model, mixture.base_alternatives) == (name, "attention", ())
    # The MLPs of the base and of its fine-tuned attention are the same: the mixture's own base is taken.
    assert [(expert.number, expert.model) for expert in mixture.experts] == [
        (0, "a"),
        (1, "b"),
        (2, "a"),
        (3, "attention"),
    ]
    assert [expert.alternatives for expert in mixture.experts] == [(), (), (), ("base",)]
    assert [expert.residual_scale for expert in mixture.experts] == [None, 0.3, None, None]
    assert [(expert.model, expert.residual_scale) for expert in mixture.shared_experts] == (
        [("b", 0.1)] if shares else []
    )
    for expert in (*mixture.experts, *mixture.shared_experts):
        assert expert.layers == tuple((expert.model, layer) for layer in range(LAYERS))
        assert (expert.exact, expert.distance, expert.noise_scale) == (True, 0.0, None)
    assert (mixture.exact, mixture.share, mixture.base_share, mixture.gate_mode) == (True, 1.0, 1.0, "random")
    again = remade(mixture, paths, tmp_path / "again")
    assert without_routers(again, mixture) == without_routers(target, mixture)
    routers = {name for name in target.tensors if name.endswith((".mlp.gate.weight", "shared_expert_gate.weight"))}
    assert set(mixture.routers) == routers
    assert all(bits(again)[name] != bits(target)[name] for name in routers)


def test_the_older_layout_of_mixtral(tmp_path, world):
    paths = world["mistral"]
    target = moe(document(paths, "base", [("a", {}), ("b", {})]), tmp_path / "fused")
    older = {}
    parts = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    for name, tensor in split_experts(target).tensors.items():
        old = name.replace(".mlp.", ".block_sparse_moe.")
        for new, number in parts.items():
            old = old.replace(f".{new}.", f".{number}.")
        older[old] = values(tensor).reshape(tensor.shape)
    folder = write_checkpoint(tmp_path / "older", older, config={"model_type": "mixtral", "num_experts_per_tok": 1})
    known, fused = find_experts(open_checkpoint(folder), opened(paths)), find_experts(target, opened(paths))
    assert (known.experts, known.architecture, known.share) == (fused.experts, "mixtral", 1.0)
    assert (known.experts_per_token, fused.experts_per_token) == (1, 2)
    assert known.routers == tuple(f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in range(LAYERS))


def test_experts_are_split_as_they_are_stored(tmp_path, world):
    paths = world["mistral"]
    target = moe(document(paths, "base", [("a", {}), ("b", {}), ("base", {})]), tmp_path / "target")
    split = split_experts(target).tensors
    for number, name in enumerate(("a", "b", "base")):
        for key, tensor in open_checkpoint(paths[name]).tensors.items():
            if ".mlp." in key:
                own = split[key.replace(".mlp.", f".mlp.experts.{number}.")]
                assert isinstance(own, FileTensor)
                assert own.shape == tensor.shape
                assert np.array_equal(own.read(1, 5), tensor.read(1, 5))
    assert split_experts(Checkpoint(target.path, split)).tensors == split


@pytest.mark.parametrize("scale", [None, 0.5])
def test_noise_is_measured(tmp_path, world, scale):
    paths = world["mistral"]
    noisy = [("a", {"noise_scale": 0.002}), ("b", {"noise_scale": 0.01, "residual_scale": scale})]
    mixture = find_experts(moe(document(paths, "base", noisy), tmp_path / "target"), opened(paths))
    assert [expert.model for expert in mixture.experts] == ["a", "b"]
    assert [expert.noise_scale for expert in mixture.experts] == pytest.approx([0.002, 0.01], rel=0.03)
    assert [expert.residual_scale for expert in mixture.experts] == [None, scale]
    assert not mixture.exact
    assert all(".experts." in name for name in mixture.unexplained)
    written = mixture.to_recipe_document()["experts"]
    assert [entry["noise_scale"] for entry in written] == [expert.noise_scale for expert in mixture.experts]


def test_training_is_not_taken_for_noise(tmp_path, world):
    paths = world["mistral"]
    mixture = find_experts(
        moe(document(paths, "base", [("a", {}), ("b", {})]), tmp_path / "target"),
        {name: open_checkpoint(paths[name]) for name in ("base", "b")},
    )
    first, second = mixture.experts
    assert (first.exact, second.exact, second.model) == (False, True, "b")
    assert 0.0 < first.distance < 0.2
    assert second.noise_scale is None


@pytest.mark.parametrize("mode", ["random", "uniform_random", "cheap_embed", "hidden"])
def test_routers_tell_how_they_were_made(tmp_path, world, mode):
    paths = world["mistral"]
    experts = [
        ("a", {"positive_prompts": ["count the apples"], "negative_prompts": ["sing"]}),
        ("b", {"positive_prompts": ["write a poem", "rhyme"]}),
    ]
    target = moe(document(paths, "base", experts, gate_mode=mode), tmp_path / "target")
    mixture = find_experts(target, opened(paths))
    assert mixture.gate_mode == mode
    assert ("prompts" in mixture.notices[0]) == ("random" not in mode)
    # Prompts are not known, so the recipe asks for random routers, and mergekit-moe takes it.
    again = remade(mixture, paths, tmp_path / "again")
    assert without_routers(again, mixture) == without_routers(target, mixture)


def test_trained_routers_are_of_no_mode():
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((3, 8, 256))
    assert gate_mode([*normal]) == "random"
    assert gate_mode([*(0.9 * normal)]) is None
    assert gate_mode([*(0.02 * normal)]) is None
    unit = normal / np.linalg.norm(normal, axis=2, keepdims=True)
    assert gate_mode([*unit]) == "hidden"
    assert gate_mode([*(unit * np.linspace(0.9, 1.1, 8)[:, np.newaxis])]) is None
    assert gate_mode([]) is None


def test_experts_of_other_layers_are_told_layer_by_layer(tmp_path, world):
    paths = world["mistral"]
    target = moe(document(paths, "base", [("a", {}), ("b", {})]), tmp_path / "target")
    tensors = {name: values(tensor).reshape(tensor.shape) for name, tensor in split_experts(target).tensors.items()}
    for part in ("gate_proj", "up_proj", "down_proj"):
        name = "model.layers.{}.mlp.experts.{}." + part + ".weight"
        tensors[name.format(0, 0)] = tensors[name.format(2, 1)]
    mixture = find_experts(open_checkpoint(write_checkpoint(tmp_path / "moved", tensors)), opened(paths))
    assert mixture.experts[0].model == "a"
    assert mixture.experts[0].layers == (("b", 2), ("a", 1), ("a", 2))
    assert mixture.experts[0].share == pytest.approx(2 / 3)
    assert {name for name in mixture.unexplained if "experts.0" in name} == set(mixture.unexplained)


def test_unknown_experts_are_said(tmp_path, world):
    paths = world["mistral"]
    strange = write_model(tmp_path / "strange", random_model(9, LAYERS))
    places = {**paths, "strange": strange}
    target = moe(document(places, "base", [("strange", {}), ("b", {})]), tmp_path / "target")
    mixture = find_experts(target, opened(paths))
    assert (mixture.experts[0].model, mixture.experts[0].share, mixture.experts[0].layers) == (
        None,
        0.0,
        (None,) * LAYERS,
    )
    with pytest.raises(RecipeError, match=r"no known model is near expert 0; give more models"):
        mixture.to_recipe_document()
    other = moe(document(places, "strange", [("a", {}), ("b", {})]), tmp_path / "other")
    with pytest.raises(RecipeError, match=r"no known model is near what is around the experts; give the base model"):
        find_experts(other, opened(paths)).to_recipe_document()


def test_a_dense_model_is_refused(world):
    models = opened(world["mistral"])
    with pytest.raises(RecipeError, match=r"no experts: expected tensors such as mlp\.experts\.0\.gate_proj\.weight"):
        find_experts(models["a"], models)


def test_roles_are_those_of_dense_models(world):
    base = open_checkpoint(world["mistral"]["base"])
    assert dense_role("model.layers.7.block_sparse_moe.experts.3.w2.weight") == (7, "mlp.down_proj.weight")
    assert dense_role("model.layers.7.mlp.shared_experts.up_proj.weight") == (7, "mlp.up_proj.weight")
    assert all(
        dense_role(name) == (dense_role(name).layer, name.split(".", 3)[-1]) for name in base.tensors if "mlp" in name
    )


def test_fused_experts_that_are_not_in_a_file_are_refused(tmp_path, world):
    paths = world["mistral"]
    target = moe(document(paths, "base", [("a", {}), ("b", {})]), tmp_path / "target")
    name, tensor = next((name, tensor) for name, tensor in target.tensors.items() if "experts" in name)
    changed = AdaptedTensor(tensor, Difference(tensor, tensor), rounds_change=False)
    with pytest.raises(CheckpointError, match=rf"tensor '{name}' holds fused experts and cannot be split"):
        split_experts(Checkpoint(target.path, {name: changed}))
