"""Recipes as text: what is read is what mergekit reads, and what is written mergekit accepts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.recipe.worlds import quiet_mergekit
from unmerge.errors import RecipeError
from unmerge.recipe.document import (
    MAX_RECIPE_BYTES,
    ModelReference,
    parse_recipe,
    read_recipe,
    storage_type,
    to_yaml,
)

PLAIN = "merge_method: linear\nmodels:\n- model: a/b\n  parameters: {weight: 0.5}\ndtype: bfloat16\n"
scalars = st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(-5, 5), st.booleans())
values = st.one_of(scalars, st.lists(scalars, max_size=3))
conditionals = st.lists(st.fixed_dictionaries({"filter": st.just("mlp"), "value": values}), min_size=1, max_size=2)
parameters = st.dictionaries(st.sampled_from(["weight", "density", "t"]), st.one_of(values, conditionals), max_size=2)
references = st.sampled_from(
    ["org/model", "org/model@v1", "./a folder", "org/model+org/lora", "org/m@1+org/l@2", "/abs/ol-ute"]
)


@pytest.fixture(scope="module", autouse=True)
def _mergekit() -> None:
    with quiet_mergekit():
        import mergekit.config  # noqa: F401 - its first import warns


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    body: dict[str, Any] = {"merge_method": draw(st.sampled_from(["linear", "ties", "slerp"]))}
    if draw(st.booleans()):
        entry = st.fixed_dictionaries({"model": references}, optional={"parameters": parameters})
        body["models"] = draw(st.lists(entry, min_size=1, max_size=3))
    else:
        source = st.fixed_dictionaries(
            {"model": references, "layer_range": st.just([2, 6])}, optional={"parameters": parameters}
        )
        part = st.fixed_dictionaries(
            {"sources": st.lists(source, min_size=1, max_size=2)},
            optional={"parameters": parameters, "base_model": references},
        )
        body["slices"] = draw(st.lists(part, min_size=1, max_size=2))
    optional = {
        "base_model": references,
        "parameters": parameters,
        "dtype": st.sampled_from(["bfloat16", "torch.float32"]),
        "out_dtype": st.just("float16"),
        "tokenizer_source": st.one_of(st.sampled_from(["union", "base"]), references),
        "chat_template": st.just("chatml"),
        "something_new": st.integers(),
    }
    return {**body, **draw(st.fixed_dictionaries({}, optional=optional))}


@settings(max_examples=150, deadline=None)
@given(documents())
def test_what_is_written_is_read_back_and_accepted_by_mergekit(document: dict[str, Any]) -> None:
    from mergekit.config import MergeConfiguration

    recipe = parse_recipe(yaml.safe_dump(document))
    text = to_yaml(recipe)
    assert parse_recipe(text) == recipe
    assert to_yaml(parse_recipe(text)) == text
    original = MergeConfiguration.model_validate(document)
    written = MergeConfiguration.model_validate(yaml.safe_load(text))
    for key in ("merge_method", "base_model", "dtype", "out_dtype", "tokenizer_source", "chat_template"):
        assert getattr(written, key) == getattr(original, key)
    assert set(written.referenced_models()) == set(original.referenced_models())
    assert {str(model) for model in original.referenced_models()} <= {str(model) for model in recipe.references}


anything = st.recursive(
    st.one_of(st.none(), scalars, st.sampled_from(["linear", "a/b", "a+b+c", "a@b@c", "", "float8"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["model", "parameters", "sources", "layer_range", "weight", "value", "filter"]),
            inner,
            max_size=3,
        ),
    ),
    max_leaves=8,
)


@settings(max_examples=400, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(
            ["merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "tokenizer"]
        ),
        anything,
        max_size=6,
    )
)
def test_nonsense_is_one_line_and_what_is_read_mergekit_reads(document: dict[str, Any]) -> None:
    from mergekit.config import MergeConfiguration

    try:
        recipe = parse_recipe(yaml.safe_dump(document))
    except RecipeError as error:
        problem = str(error)
    else:
        problem = ""
        MergeConfiguration.model_validate(yaml.safe_load(to_yaml(recipe)))
    assert "\n" not in problem


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
        ("just text", "expected a mapping with merge_method, found a str"),
        ("models: []", "no merge_method"),
        ("merge_method: linear", "expected exactly one of models, slices and modules, found none of them"),
        ("merge_method: linear\nmodules: {default: {models: []}}", "a merge by modules, which is not supported"),
        (PLAIN + "slices: [{}]", "found models and slices"),
        (PLAIN.replace("0.5", ".nan"), "parameter weight is not a finite number"),
        (PLAIN.replace("0.5", "{value: [1, [2]]}"), "expected a number, true, false, or a list, found a list"),
        (PLAIN.replace("a/b", "a+b+c"), "expected MODEL or MODEL\\+ADAPTER"),
        (PLAIN.replace("a/b", "a@b@c"), "expected PATH or PATH@REVISION"),
        (PLAIN.replace("bfloat16", "int8"), "dtype is 'int8'; expected one of bfloat16, float16, float32, float64"),
        (PLAIN + "tokenizer_source: base\ntokenizer: {source: base}", "both tokenizer_source and tokenizer"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_what_is_wrong_is_said(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(text)


def slices(first: list[int], second: list[int]) -> str:
    sources = [{"model": "a/b", "layer_range": first}, {"model": "c/d", "layer_range": second}]
    return yaml.safe_dump({"merge_method": "slerp", "slices": [{"sources": sources}]})


def test_slices_have_as_many_layers_of_every_source() -> None:
    assert parse_recipe(slices([0, 2], [1, 3])).slices[0].sources[1].first == 1
    with pytest.raises(RecipeError, match="must have as many layers; found 2, 1"):
        parse_recipe(slices([0, 2], [1, 2]))
    with pytest.raises(RecipeError, match="a layer_range of two layer numbers"):
        parse_recipe(slices([2, 2], [2, 2]))


def test_references_name_a_model_and_an_adapter() -> None:
    text = PLAIN.replace("a/b", "{model: {path: a/b, revision: v1}, lora: c/d@v2}")
    assert parse_recipe(text).models[0].model == ModelReference("a/b", "v1", "c/d", "v2")
    assert str(parse_recipe(text).models[0].model) == "a/b@v1+c/d@v2"


def test_types_go_by_their_safetensors_names() -> None:
    assert [storage_type(name) for name in ("torch.bfloat16", "float16", None, "")] == ["BF16", "F16", None, None]


def test_recipes_are_found_in_folders_and_cards(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no recipe: expected mergekit_config"):
        read_recipe(tmp_path)
    block = f"```yaml\n{PLAIN}```\n"
    (tmp_path / "README.md").write_text(f"# A merge\n\n```yaml\ntags: [merge]\n```\n\n{block}\n{block}")
    from_card = read_recipe(tmp_path)
    assert from_card == parse_recipe(PLAIN)
    (tmp_path / "README.md").write_text(block + block.replace("0.5", "0.25"))
    with pytest.raises(RecipeError, match="it holds 2 recipes"):
        read_recipe(tmp_path)
    (tmp_path / "mergekit_config.yml").write_text(PLAIN.replace("0.5", "0.75"))
    assert read_recipe(tmp_path).models[0].parameters == {"weight": 0.75}


def test_a_card_that_mergekit_writes_is_read(tmp_path: Path) -> None:
    with quiet_mergekit():
        from mergekit.card import generate_card
        from mergekit.config import MergeConfiguration

        config = MergeConfiguration.model_validate(yaml.safe_load(PLAIN.replace("a/b", "/not/on/the/hub")))
        card = generate_card(config=config, config_yaml=config.to_yaml(), name="merge")
    (tmp_path / "README.md").write_text(card)
    assert read_recipe(tmp_path).models[0].model.path == "/not/on/the/hub"


def test_files_are_bounded_and_text(tmp_path: Path) -> None:
    big, binary = tmp_path / "big.yml", tmp_path / "binary.yml"
    big.write_text("#" * (MAX_RECIPE_BYTES + 1))
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="refused: a recipe of more than"):
        read_recipe(big)
    with pytest.raises(RecipeError, match="not a text in UTF-8"):
        read_recipe(binary)
