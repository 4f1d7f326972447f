"""Stacks of layers: made by the real mergekit, found, and made again from what was found."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.recipe.passthrough import bits, merge, random_model, write_model
from unmerge.checkpoint.reader import Checkpoint, open_checkpoint
from unmerge.dictionary import open_atom, open_base
from unmerge.errors import RecipeError
from unmerge.recipe.adapted import merged_adapter
from unmerge.recipe.copies import Copy, Origin, Role, find_copies
from unmerge.recipe.layer_stack import find_layer_stack, layer_stack
from unmerge.testing import tiny_model, write_adapter, write_checkpoint

DEPTHS = {"short": 4, "long": 6, "single": 5}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Three unrelated models of different depth."""
    folder = tmp_path_factory.mktemp("shelf")
    return {
        name: write_model(folder / name, random_model(seed, depth), "F32" if name == "single" else "BF16")
        for seed, (name, depth) in enumerate(DEPTHS.items())
    }


def taken(paths, name, first, stop, **parameters):
    source = {"model": str(paths[name]), "layer_range": [first, stop]}
    return {"sources": [source | ({"parameters": parameters} if parameters else {})]}


def passthrough(slices, dtype="bfloat16", **more):
    return {"merge_method": "passthrough", "slices": slices, **({"dtype": dtype} if dtype else {}), **more}


def opened(paths):
    return {name: open_checkpoint(path) for name, path in paths.items()}


def remade(stack, paths, folder):
    """What mergekit makes of a stack."""
    return bits(merge(stack.to_recipe_document({name: str(path) for name, path in paths.items()}), folder))


def in_order(stack):
    """The model and the layer of every layer of a stack."""
    return [(part.model, layer) for part in stack.slices for layer in range(part.first, part.stop)]


@pytest.mark.parametrize("seed", range(6))
def test_any_stack_is_found_and_made_again(tmp_path, shelf, seed):
    rng = np.random.default_rng(seed)
    wanted = []
    for _ in range(rng.integers(1, 6)):
        name = str(rng.choice(["short", "long"]))
        first = int(rng.integers(0, DEPTHS[name]))
        wanted.append((name, first, int(rng.integers(first + 1, DEPTHS[name] + 1))))
    target = merge(passthrough([taken(shelf, *part) for part in wanted]), tmp_path / "target")
    stack = find_layer_stack(target, opened(shelf))
    assert in_order(stack) == [(name, layer) for name, first, stop in wanted for layer in range(first, stop)]
    assert (stack.embeddings.model, stack.output.model) == (wanted[0][0], wanted[-1][0])
    assert (stack.exact, stack.share, stack.unexplained, stack.dtype) == (True, 1.0, (), "bfloat16")
    assert all(part.exact and part.distance == 0.0 and not part.alternatives for part in stack.slices)
    assert [part.start for part in stack.slices] == list(
        itertools.accumulate([0, *(part.layers for part in stack.slices[:-1])])
    )
    assert remade(stack, shelf, tmp_path / "again") == bits(target)


SCALES = {
    "blocks that do nothing": [
        {"filter": "o_proj", "value": 0.0},
        {"filter": "down_proj", "value": 0.0},
        {"value": 1.0},
    ],
    "attention that is damped": [
        {"filter": "q_proj", "value": 0.7071067812},
        {"filter": "k_proj", "value": 0.7071067812},
    ],
    "everything": 0.3,
    "against the grain": [{"filter": "mlp", "value": -1.5}, {"filter": "layernorm", "value": 0.9}],
    "a gradient": [{"filter": "v_proj", "value": [0.2, 0.8]}],
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_scaled_layers_are_made_again(tmp_path, shelf, scale, dtype):
    slices = [
        taken(shelf, "long", 0, 2),
        taken(shelf, "long", 1, 4, scale=scale),
        taken(shelf, "short", 2, 4, scale=scale),
    ]
    target = merge(passthrough(slices, dtype), tmp_path / "target")
    stack = find_layer_stack(target, opened(shelf))
    assert in_order(stack) == [
        ("long", 0),
        ("long", 1),
        ("long", 1),
        ("long", 2),
        ("long", 3),
        ("short", 2),
        ("short", 3),
    ]
    assert stack.exact
    assert not stack.slices[0].factors
    assert all(part.factors for part in stack.slices[1:])
    assert remade(stack, shelf, tmp_path / "again") == bits(target)


def test_factors_are_named_by_module(tmp_path, shelf):
    slices = [taken(shelf, "long", 0, 3, scale=SCALES["blocks that do nothing"]), taken(shelf, "short", 0, 1)]
    stack = find_layer_stack(merge(passthrough(slices), tmp_path / "target"), opened(shelf))
    assert stack.slices[0].factors == {"self_attn.o_proj.weight": 0.0, "mlp.down_proj.weight": 0.0}
    assert len(stack.slices) == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_layers_that_were_cast_are_made_again(tmp_path, shelf, dtype):
    target = merge(passthrough([taken(shelf, "single", 1, 4), taken(shelf, "short", 0, 3)], dtype), tmp_path / "target")
    stack = find_layer_stack(target, opened(shelf))
    assert in_order(stack) == [("single", 1), ("single", 2), ("single", 3), ("short", 0), ("short", 1), ("short", 2)]
    assert (stack.exact, stack.dtype) == (True, dtype)
    assert remade(stack, shelf, tmp_path / "again") == bits(target)


def test_a_target_of_several_types_is_made_again(tmp_path, shelf):
    target = merge(passthrough([taken(shelf, "single", 0, 2), taken(shelf, "short", 0, 2)], None), tmp_path / "target")
    assert {tensor.dtype.name for tensor in target.tensors.values()} == {"BF16", "F32"}
    stack = find_layer_stack(target, opened(shelf))
    assert (stack.exact, stack.dtype, stack.notices) == (True, None, ())
    assert remade(stack, shelf, tmp_path / "again") == bits(target)


def test_casts_in_a_target_of_several_types_are_left_unexplained(tmp_path, shelf):
    target = merge(passthrough([taken(shelf, "single", 0, 2), taken(shelf, "short", 0, 2)], None), tmp_path / "target")
    models = {"short": open_checkpoint(shelf["short"])}
    models["single"] = merge(passthrough([taken(shelf, "single", 0, 5)]), tmp_path / "rounded")
    wide = merge(passthrough([taken({"rounded": tmp_path / "rounded"}, "rounded", 0, 2)], "float32"), tmp_path / "wide")
    mixed = {name: wide.tensors.get(name, tensor) for name, tensor in target.tensors.items()}
    stack = find_layer_stack(Checkpoint(tmp_path, mixed), models)
    assert in_order(stack) == [("single", 0), ("single", 1), ("short", 0), ("short", 1)]
    assert [part.share for part in stack.slices] == [0.0, 1.0]
    assert "tensors have several types (BF16, F32)" in stack.notices[0]


def test_ends_may_be_from_models_without_layers(tmp_path, shelf):
    slices = [taken(shelf, "long", 0, 0), taken(shelf, "short", 0, 3), taken(shelf, "single", 0, 0, scale=0.5)]
    target = merge(passthrough(slices), tmp_path / "target")
    stack = find_layer_stack(target, opened(shelf))
    assert (stack.embeddings.model, stack.output.model) == ("long", "single")
    assert stack.output.factors == {"model.norm.weight": 0.5, "lm_head.weight": 0.5}
    assert stack.models == ("long", "short", "single")
    assert remade(stack, shelf, tmp_path / "again") == bits(target)


@pytest.fixture(scope="module")
def siblings(tmp_path_factory):
    """A base and fine-tunes of it, each of some modules of some layers."""
    folder = tmp_path_factory.mktemp("siblings")
    base = random_model(7, 4)
    changed = {"base": (), "attention": ("self_attn",), "late": ("layers.2.", "layers.3.")}
    paths = {}
    for seed, (name, parts) in enumerate(changed.items()):
        rng = np.random.default_rng(seed)
        tuned = {
            key: value + 0.002 * rng.standard_normal(value.shape) * any(part in key for part in parts)
            for key, value in base.items()
        }
        paths[name] = write_model(folder / name, tuned)
    return paths


def test_layers_that_models_share_make_no_slices(tmp_path, siblings):
    # Of layers 0 and 1, base and late are the same; so are the embeddings of all three, and all outputs.
    slices = [taken(siblings, "base", 0, 2), taken(siblings, "late", 2, 4), taken(siblings, "attention", 1, 3)]
    target = merge(passthrough(slices), tmp_path / "target")
    stack = find_layer_stack(target, opened(siblings))
    assert [(part.model, part.first, part.stop) for part in stack.slices] == [("late", 0, 4), ("attention", 1, 3)]
    assert all(not part.alternatives for part in stack.slices)
    assert set(stack.output.alternatives) == {"base", "late"}
    assert remade(stack, siblings, tmp_path / "again") == bits(target)


def test_what_cannot_be_told_is_said(tmp_path, siblings):
    target = merge(passthrough([taken(siblings, "late", 0, 2), taken(siblings, "late", 0, 1)]), tmp_path / "target")
    stack = find_layer_stack(target, opened(siblings))
    found = [{part.model: part.first, **dict(part.alternatives)} for part in stack.slices]
    assert found == [{"base": 0, "late": 0}, {"base": 0, "late": 0}]


def test_halves_of_two_models_of_one_depth(tmp_path, siblings):
    slices = [taken(siblings, "attention", 0, 2), taken(siblings, "late", 2, 4)]
    target = merge(passthrough(slices), tmp_path / "target")
    stack = find_layer_stack(target, opened(siblings))
    assert in_order(stack) == [("attention", 0), ("attention", 1), ("late", 2), ("late", 3)]
    assert remade(stack, siblings, tmp_path / "again") == bits(target)


def test_a_stack_that_was_trained_further_keeps_its_outline(tmp_path, shelf):
    source = random_model(1, 6)
    rng = np.random.default_rng(0)
    order = [0, 1, 2, 1, 2, 3]
    trained = {name: value for name, value in source.items() if ".layers." not in name}
    for place, layer in enumerate(order):
        for name, value in source.items():
            if f".layers.{layer}." in name:
                size = 0.1 * value.std()
                trained[name.replace(f".{layer}.", f".{place}.", 1)] = value + size * rng.standard_normal(value.shape)
    # One layer was left alone, except for one of its matrices.
    for name, value in source.items():
        if ".layers.1." in name and "up_proj" not in name:
            trained[name.replace(".1.", ".3.", 1)] = value
    stack = find_layer_stack(open_checkpoint(write_model(tmp_path / "trained", trained)), opened(shelf))
    assert in_order(stack) == [("long", layer) for layer in order]
    sizes = {name: value.size for name, value in trained.items() if ".layers.3." in name}
    assert [part.share for part in stack.slices] == [0.0, pytest.approx(_share_of_layer_3(sizes) / 3)]
    assert all(0.08 < part.distance < 0.15 for part in stack.slices)
    assert set(stack.unexplained) == {
        name for name in trained if ".layers." in name and (".3." not in name or "up_proj" in name)
    }
    made = sum(trained[name].size for name in trained if name not in stack.unexplained)
    assert stack.share == pytest.approx(made / sum(value.size for value in trained.values()))


def _share_of_layer_3(sizes):
    return sum(size for name, size in sizes.items() if "up_proj" not in name) / sum(sizes.values())


def test_layers_of_no_known_model_are_said(tmp_path, shelf):
    target = merge(passthrough([taken(shelf, "short", 0, 2), taken(shelf, "long", 0, 2)]), tmp_path / "target")
    stack = find_layer_stack(target, {"short": open_checkpoint(shelf["short"])})
    assert [(part.model, part.start, part.layers) for part in stack.slices] == [("short", 0, 2), (None, 2, 2)]
    assert (stack.slices[1].share, stack.output.model) == (0.0, None)
    with pytest.raises(RecipeError, match=r"no known model has anything like its layer 2; give more models"):
        stack.to_recipe_document()


def test_zeros_without_signs_are_equal_as_numbers(tmp_path, shelf):
    # Blocks as LLaMA Pro adds them: copies whose outputs are set to zero, not multiplied with it.
    source = random_model(0, 4)
    target = dict(source)
    for name, value in source.items():
        if ".layers.3." in name:
            target[name.replace(".3.", ".4.")] = value * ("o_proj" not in name and "down_proj" not in name)
    folder = write_model(tmp_path / "target", {name: np.abs(value) * np.sign(value) for name, value in target.items()})
    stack = find_layer_stack(open_checkpoint(folder), opened(shelf))
    assert in_order(stack) == [("short", 0), ("short", 1), ("short", 2), ("short", 3), ("short", 3)]
    assert set(stack.unexplained) == {"model.layers.4.self_attn.o_proj.weight", "model.layers.4.mlp.down_proj.weight"}
    assert "2 tensors are all zero, without the signs" in stack.notices[0]
    made = merge(stack.to_recipe_document({name: str(path) for name, path in shelf.items()}), tmp_path / "again")
    assert {name for name, held in bits(made).items() if held != bits(open_checkpoint(folder))[name]} == set(
        stack.unexplained
    )


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_may_be_a_source(tmp_path):
    rng = np.random.default_rng(0)
    base = random_model(3, 4)
    paths = {"base": write_model(tmp_path / "base", base, dtype="BF16"), "adapter": tmp_path / "adapter"}
    write_adapter(paths["adapter"], rng, base, config={"task_type": "CAUSAL_LM", "base_model_name_or_path": "base"})
    reference = f"{paths['base']}+{paths['adapter']}"
    known = open_base(str(paths["base"]))
    models = {"base": known.checkpoint}
    models["adapter"] = merged_adapter(known.checkpoint, open_atom(str(paths["adapter"]), known).vector)
    slices = [taken({"m": reference}, "m", 0, 3), taken(paths, "base", 1, 4)]
    cache = {"lora_merge_cache": str(tmp_path / "cache")}
    target = merge(passthrough(slices), tmp_path / "target", **cache)
    stack = find_layer_stack(target, models)
    expected = [("adapter", 0), ("adapter", 1), ("adapter", 2), ("base", 1), ("base", 2), ("base", 3)]
    assert in_order(stack) == expected
    document = stack.to_recipe_document({"base": str(paths["base"]), "adapter": reference})
    assert bits(merge(document, tmp_path / "again", **cache)) == bits(target)
    # What the recipe makes in every bit may be more than was seen to be: products are added up in another order.
    assert stack.share > 0.9
    assert all(part.distance < 1e-4 for part in stack.slices)


def test_a_document_names_models_as_it_is_told(tmp_path, shelf):
    target = merge(passthrough([taken(shelf, "short", 0, 2)]), tmp_path / "target")
    stack = find_layer_stack(target, opened(shelf))
    assert stack.to_recipe_document({"short": "org/model@v1"}) == {
        "merge_method": "passthrough",
        "base_model": "org/model@v1",
        "slices": [{"sources": [{"model": "org/model@v1", "layer_range": [0, 2]}]}],
        "dtype": "bfloat16",
    }
    assert stack.to_recipe_document()["base_model"] == "short"


def test_an_output_layer_that_was_written_though_tied(tmp_path, shelf):
    source = random_model(5, 2)
    del source["lm_head.weight"]
    paths = {"tied": write_model(tmp_path / "tied", source, tie_word_embeddings=True)}
    target = source | {"lm_head.weight": source["model.embed_tokens.weight"]}
    stack = find_layer_stack(open_checkpoint(write_model(tmp_path / "target", target)), opened(paths))
    assert stack.unexplained == ("lm_head.weight",)
    assert "lm_head.weight is a copy of an embedding" in stack.notices[0]
    assert set(target) - set(remade(stack, paths, tmp_path / "again")) == set(stack.unexplained)


def test_a_model_with_two_stacks_is_refused(tmp_path):
    tensors = tiny_model(np.random.default_rng(0), layers=1)
    both = tensors | {name.replace("model.", "decoder.", 1): value for name, value in tensors.items()}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "both", both))
    with pytest.raises(RecipeError, match=r"layers under several names \(decoder\.layers\., model\.layers\.\)"):
        find_layer_stack(checkpoint, {"both": checkpoint})


def test_a_gap_between_layers_is_refused(tmp_path):
    tensors = tiny_model(np.random.default_rng(0), layers=3)
    gap = {name: value for name, value in tensors.items() if ".1." not in name}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "gap", gap))
    with pytest.raises(RecipeError, match=r"2 layers, but none with the number 1"):
        find_layer_stack(checkpoint, {"gap": checkpoint})


places = st.tuples(st.sampled_from("abc"), st.integers(0, 3))
ends = st.one_of(st.just(frozenset()), st.frozensets(st.sampled_from("abc"), min_size=1))


def origin(name, layer, sources):
    copies = tuple(Copy(model, name, place, "BF16", "exact", 1.0, 1.0, 0.0) for model, place in sorted(sources))
    return Origin(name, Role(layer, name), "BF16", 10, 1.0, False, 0.001, copies, ())


@given(st.lists(st.frozensets(places, min_size=1, max_size=4), min_size=1, max_size=4), ends, ends)
def test_no_stack_has_fewer_slices(layers, before, after):
    origins = {f"layers.{number}.w": origin(f"layers.{number}.w", number, held) for number, held in enumerate(layers)}
    if before:
        origins["embed_tokens.weight"] = origin("embed_tokens.weight", None, {(model, None) for model in before})
    if after:
        origins["norm.weight"] = origin("norm.weight", None, {(model, None) for model in after})
    stack = layer_stack(origins)
    assert all(place in held for place, held in zip(in_order(stack), layers, strict=True))

    def slices(path):
        breaks = sum((model, layer + 1) != later for (model, layer), later in itertools.pairwise(path))
        extra = bool(before and path[0][0] not in before) + bool(after and path[-1][0] not in after)
        return 1 + breaks + extra

    fewest = min(slices(path) for path in itertools.product(*layers))
    assert len(stack.to_recipe_document()["slices"]) == fewest
    assert stack.exact
    for part in stack.slices:
        held = layers[part.start : part.start + part.layers]
        assert {(part.model, part.first), *part.alternatives} == {
            (model, first)
            for model, first in held[0]
            if all((model, first + number) in places for number, places in enumerate(held))
        }


def test_copies_and_stack_agree(tmp_path, shelf):
    target = merge(passthrough([taken(shelf, "long", 2, 5)]), tmp_path / "target")
    assert layer_stack(find_copies(target, opened(shelf))) == find_layer_stack(target, opened(shelf))
