"""Verdicts on merges of the real mergekit: true recipes pass, false ones fail for the right reason."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.hub import Hub, serve
from tests.recipe.worlds import World, models, quiet_mergekit
from unmerge.checkpoint.reader import open_checkpoint
from unmerge.checkpoint.tensor import values
from unmerge.cli import app
from unmerge.errors import CheckpointError, RecipeError
from unmerge.recipe.verification import Verification
from unmerge.recipe.verify import verify
from unmerge.report.verification import print_verification
from unmerge.testing import write_adapter

BF16 = {"dtype": "bfloat16"}
MIXED = {"dtype": "float32", "out_dtype": "bfloat16"}
TWO = models("math", "code", weight=0.4, density=0.6)
TRUTHS: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", "models": models("math", "code", weight=0.5), **BF16},
    "task_arithmetic": {"merge_method": "task_arithmetic", "base_model": "base", "models": TWO, **BF16},
    "ties": {"merge_method": "ties", "base_model": "base", "models": TWO, **MIXED},
    "breadcrumbs": {"merge_method": "breadcrumbs", "base_model": "base", "models": TWO, **BF16},
    "dare_ties": {"merge_method": "dare_ties", "base_model": "base", "models": TWO, **BF16},
    "dare_linear": {"merge_method": "dare_linear", "base_model": "base", "models": TWO, **MIXED},
    "della": {
        "merge_method": "della", "base_model": "base", "models": models("math", "code", weight=0.4, density=0.5), **BF16
    },
    "slerp": {
        "merge_method": "slerp", "base_model": "math", "models": models("code"),
        "parameters": {"t": [{"filter": "mlp", "value": [0.2, 0.6]}, {"value": 0.4}]}, **BF16,
    },
    "slices": {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "math", "layer_range": [0, 2]}]},
            {"sources": [{"model": "code", "layer_range": [2, 3]}]},
        ],
        **BF16,
    },
}  # fmt: skip
SEED = 3


class Merges:
    """Merges by name; each is made once."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.made = {name: world.merge(f"merge-{name}", truth, seed=SEED) for name, truth in TRUTHS.items()}

    def verify(self, name: str, claim: Mapping[str, Any] | None = None, **options: Any) -> Verification:
        recipe = None if claim is None else self.world.claim(f"claim-{name}", claim)
        return verify(str(self.made[name]), recipe, **options)


@pytest.fixture(scope="module")
def merges(tmp_path_factory: pytest.TempPathFactory) -> Merges:
    world = World(tmp_path_factory.mktemp("world"), tunes=("math", "code", "chat"))
    rng = np.random.default_rng(4)
    change = {name: values(tensor) for name, tensor in open_checkpoint(world.folder / "math").tensors.items()}
    # The same task again, from another seed: alike, and not the same.
    world.write("math-again", {n: v.reshape(world.base[n].shape) for n, v in _sibling(world, change, rng).items()})
    return Merges(world)


def _sibling(world: World, tuned: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    return {
        name: world.base[name] + 0.7 * (tuned[name].reshape(base.shape) - base) + 0.0007 * rng.standard_t(3, base.shape)
        for name, base in world.base.items()
    }


@pytest.mark.parametrize("name", TRUTHS)
def test_a_true_recipe_passes(merges: Merges, name: str) -> None:
    found = merges.verify(name)
    assert found.verdict == "pass", found.reason
    assert found.exit_code == 0
    assert found.wrong_claims == ()
    assert found.counts is not None
    assert found.counts.wrong <= (0.001 * found.counts.looked_at if found.masks else 0)
    assert bool(found.masks) == (name in {"dare_ties", "dare_linear", "della"})


@pytest.mark.parametrize("name", ["dare_ties", "della"])
def test_with_its_seed_a_merge_is_compared_bit_by_bit(merges: Merges, name: str) -> None:
    found = merges.verify(name, seed=SEED)
    assert found.verdict == "pass"
    assert found.masks == ()
    assert found.reason == "every element is as the recipe makes it"
    other = merges.verify(name, seed=SEED + 1)
    assert (other.verdict, other.wrong_claims[0].claim) == ("fail", "seed")


@dataclass(frozen=True)
class Lie:
    """A claim that is false, and what should be said of it."""

    truth: str
    where: tuple[Any, ...]
    says: Any
    claim: str
    text: str

    def told(self) -> dict[str, Any]:
        document: Any = copy.deepcopy(TRUTHS[self.truth])
        inner = document
        for key in self.where[:-1]:
            inner = inner.setdefault(key, {}) if isinstance(inner, dict) else inner[key]
        inner[self.where[-1]] = self.says
        return dict(document)


def weight(index: int) -> tuple[Any, ...]:
    return ("models", index, "parameters", "weight")


def density(index: int) -> tuple[Any, ...]:
    return ("models", index, "parameters", "density")


def said(subject: str, says: object, found: object) -> str:
    return f"{subject}: the recipe says {says}, the weights say {found}"


AGAIN = "member math-again: the weights hold math in its place"
LIES = [
    Lie("linear", weight(0), 0.52, "weight", said("weight of math", 0.52, 0.5)),
    Lie("task_arithmetic", weight(1), 0.42, "weight", said("weight of code", 0.42, 0.4)),
    Lie("ties", weight(1), 0.38, "weight", said("weight of code", 0.38, 0.4)),
    Lie("breadcrumbs", weight(0), 0.42, "weight", said("weight of math", 0.42, 0.4)),
    Lie("dare_linear", weight(0), 0.45, "weight", said("weight of math", 0.45, 0.4)),
    Lie("ties", density(0), 0.7, "density", said("density of math", 0.7, 0.6)),
    Lie("dare_linear", density(1), 0.7, "density", said("density of code", 0.7, 0.6)),
    Lie("task_arithmetic", ("models", 0, "model"), "math-again", "member", AGAIN),
    Lie("dare_ties", ("models", 0, "model"), "math-again", "member", AGAIN),
    Lie("slices", ("slices", 0, "sources", 0, "model"), "math-again", "member", AGAIN),
    Lie("slerp", ("parameters", "t", 0, "value"), [0.2, 0.65], "t", said("t for mlp, value 2 of 2", 0.65, 0.6)),
    Lie("ties", ("parameters", "normalize"), False, "normalize", said("normalize", "false", "true")),
    Lie("ties", ("merge_method",), "breadcrumbs_ties", "method", said("method", "breadcrumbs_ties", "ties")),
    Lie("ties", ("dtype",), "bfloat16", "dtype", "the weights say dtype float32 and out_dtype bfloat16"),
    Lie("linear", ("dtype",), "float32", "dtype", said("types", "dtype float32", "dtype bfloat16")),
    Lie("task_arithmetic", ("base_model",), "chat", "base", said("base", "chat", "base")),
    Lie("linear", ("models",), models("math", "code", "chat", weight=0.5), "member", "chat: it contributes nothing"),
    Lie(
        "linear",
        ("models",),
        models("math", weight=0.5),
        "member",
        "code: the weights hold it, and the recipe does not",
    ),
]


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: f"{lie.truth}-{lie.claim}")
def test_a_false_claim_is_named(merges: Merges, lie: Lie) -> None:
    told = lie.told()
    others = [merges.world.path(name) for name in ("base", "math", "code") if f'"{name}"' not in json.dumps(told)]
    found = merges.verify(lie.truth, told, candidates=others)
    assert found.verdict == "fail"
    assert found.exit_code == 1
    assert [claim.claim for claim in found.wrong_claims] == [lie.claim]
    assert lie.text in found.reason
    assert found.wrong_claims[0].restored is not None
    assert found.wrong_claims[0].restored > 0.999


@pytest.mark.parametrize("seed", [SEED, None], ids=["seed told", "no seed"])
@pytest.mark.parametrize(
    ("name", "says", "truth"), [("dare_linear", 0.5, 0.6), ("dare_ties", 0.5, 0.6), ("della", 0.6, 0.5)]
)
def test_a_false_density_of_random_masks_is_named(
    merges: Merges, name: str, says: float, truth: float, seed: int | None
) -> None:
    found = merges.verify(name, Lie(name, density(1), says, "", "").told(), seed=seed)
    assert [claim.text.partition(":")[0] for claim in found.wrong_claims] == ["density of code"]
    # So few elements tell a distribution to some hundredths only; bits tell all.
    assert abs(float(found.wrong_claims[0].found) - truth) <= (0.02 if seed is None else 0.0)
    assert found.wrong_claims[0].restored is not None
    assert found.wrong_claims[0].restored > 0.999


def test_with_the_seed_small_lies_are_told_by_bits(merges: Merges) -> None:
    for where, says, text in (
        (density(0), 0.605, said("density of math", 0.605, 0.6)),
        (weight(1), 0.41, said("weight of code", 0.41, 0.4)),
    ):
        found = merges.verify("dare_linear", Lie("dare_linear", where, says, "", "").told(), seed=SEED)
        assert [claim.text for claim in found.wrong_claims] == [text]
        assert found.counts is not None
        assert found.masks == ()


def test_a_false_seed_and_a_false_density_are_both_named(merges: Merges) -> None:
    claim = Lie("dare_linear", density(1), 0.7, "", "").told()
    found = merges.verify("dare_linear", claim, seed=SEED + 1)
    assert [item.claim for item in found.wrong_claims] == ["density", "seed"]
    assert said("density of code", 0.7, 0.6) in found.reason


def test_two_false_weights_are_both_named(merges: Merges) -> None:
    claim = {
        **TRUTHS["task_arithmetic"],
        "models": [
            {"model": "math", "parameters": {"weight": 0.37}},
            {"model": "code", "parameters": {"weight": 0.46}},
        ],
    }
    found = merges.verify("task_arithmetic", claim)
    assert found.verdict == "fail"
    assert {item.text for item in found.wrong_claims} == {
        "weight of math: the recipe says 0.37, the weights say 0.4",
        "weight of code: the recipe says 0.46, the weights say 0.4",
    }


def test_an_edited_tensor_is_found_and_no_claim_is_blamed(merges: Merges) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = {n: values(t).reshape(t.shape) for n, t in open_checkpoint(merges.made["ties"]).tensors.items()}
    tensors[name] = tensors[name] * 1.25
    edited = merges.world.write("edited", tensors)
    found = verify(str(edited), merges.made["ties"])
    assert found.verdict == "fail"
    assert "no single claim that was changed restores the rest" in found.reason
    assert [item.name for item in found.differences] == [name]
    assert found.wrong_claims == ()


def test_an_older_mergekit_is_an_excuse(merges: Merges) -> None:
    import torch

    claim = {"merge_method": "linear", "models": models("math", "code", "chat", weight=0.3), **BF16}
    stored = [open_checkpoint(merges.world.folder / name).tensors for name in ("math", "code", "chat")]
    weights = torch.tensor([0.3] * 3, dtype=torch.bfloat16)
    tensors = {}
    for name, tensor in stored[0].items():
        stack = torch.stack([torch.tensor(values(model[name])).to(torch.bfloat16) for model in stored])
        merged = (weights.reshape(-1, 1, 1) * stack).sum(dim=0) / weights.sum()
        tensors[name] = merged.double().numpy().reshape(tensor.shape)
    older = merges.world.write("older", tensors)
    found = verify(str(older), merges.world.claim("older", claim))
    assert found.verdict == "pass"
    assert "mergekit 0.1.4 or older" in found.notices[0]


def test_threads_are_an_excuse(merges: Merges) -> None:
    import torch

    world = World(merges.world.folder / "wide", tunes=("math", "code"), hidden=192)
    document = {"merge_method": "dare_ties", "base_model": "base", "models": TWO, **MIXED}
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        folder = world.merge("threads", document, seed=SEED)
    finally:
        torch.set_num_threads(threads)
    found = verify(str(folder), seed=SEED)
    assert found.verdict == "pass"
    assert any("3 threads" in notice for notice in found.notices)
    assert found.counts is not None
    assert found.counts.wrong == 0


def test_close_numbers_and_other_bits_cannot_be_told(merges: Merges) -> None:
    rng = np.random.default_rng(6)
    tensors = {
        n: values(t).reshape(t.shape) for n, t in open_checkpoint(merges.made["task_arithmetic"]).tensors.items()
    }
    nudged = {
        n: np.where(rng.random(v.shape) < 0.3, v * (1 + rng.choice([-1, 1], v.shape) / 256), v)
        for n, v in tensors.items()
    }
    found = verify(str(merges.world.write("nudged", nudged)), merges.made["task_arithmetic"])
    assert found.verdict == "cannot tell"
    assert found.exit_code == 2
    assert "its numbers fit, but not its bits" in found.reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"merge_method": "magic"}, "merge method 'magic' is not known; known are arcee_fusion"),
        (
            {"models": models("math", "./nowhere", weight=0.5)},
            "member ./nowhere cannot be read: ./nowhere: no such file",
        ),
        (
            {"models": models("math", "code")},
            "mergekit 0.1.5 makes nothing of this recipe: parameter weight is missing",
        ),
        ({"models": models("math", "math", weight=1)}, "mergekit 0.1.5 makes nothing of this recipe: the recipe names"),
    ],
)
def test_what_cannot_be_told_says_why(merges: Merges, change: dict[str, Any], reason: str) -> None:
    found = merges.verify("linear", {**TRUTHS["linear"], **change})
    assert found.verdict == "cannot tell"
    assert reason in found.reason
    assert found.counts is None


def test_a_tokenizer_that_moves_rows_keeps_from_a_verdict(merges: Merges) -> None:
    claim = {**TRUTHS["linear"], "tokenizer_source": "union"}
    assert merges.verify("linear", claim).verdict == "pass"
    tensors = {n: values(t).reshape(t.shape) for n, t in open_checkpoint(merges.made["linear"]).tensors.items()}
    tensors["model.embed_tokens.weight"] = np.roll(tensors["model.embed_tokens.weight"], 1, axis=0)
    found = verify(str(merges.world.write("moved", tensors)), merges.world.claim("moved", claim))
    assert found.verdict == "cannot tell"
    assert found.reason.endswith("the tokenizer moved the rows of model.embed_tokens.weight")
    assert [item.name for item in found.not_compared] == ["model.embed_tokens.weight"]


def test_tensors_that_only_one_side_has_fail(merges: Merges) -> None:
    tensors = {n: values(t).reshape(t.shape) for n, t in open_checkpoint(merges.made["linear"]).tensors.items()}
    tensors["model.layers.3.mlp.up_proj.weight"] = tensors.pop("model.norm.weight")
    found = verify(str(merges.world.write("torn", tensors)), merges.made["linear"])
    assert found.verdict == "fail"
    assert "lacks a tensor that the recipe makes (first: model.norm.weight)" in found.reason
    assert "holds a tensor that the recipe does not make (first: model.layers.3.mlp.up_proj.weight)" in found.reason


def test_an_adapter_may_stand_in_a_member_s_place(merges: Merges) -> None:
    world = merges.world
    write_adapter(world.folder / "lora", np.random.default_rng(1), world.base, size=0.05)
    found = merges.verify("task_arithmetic", candidates=[world.path("lora")])
    assert found.verdict == "pass"
    document = {"merge_method": "task_arithmetic", "base_model": "base", "models": TWO, **BF16}
    truth = {
        **document,
        "models": [{"model": f"{world.path('base')}+{world.path('lora')}", "parameters": {"weight": 0.8}}],
    }
    with quiet_mergekit():
        from mergekit.common import ModelReference

        merged = ModelReference.parse(truth["models"][0]["model"]).merged(cache_dir=str(world.folder / "cache"))
    made = world.merge("of-lora", {**truth, "models": [{"model": merged.model.path, "parameters": {"weight": 0.8}}]})
    assert verify(str(made), world.claim("of-lora", truth)).verdict == "pass"
    lie = world.claim("not-lora", {**truth, "models": models("chat", weight=0.8)})
    found = verify(str(made), lie, candidates=[f"adapter={world.path('lora')}"])
    assert found.wrong_claims[0].text == "member chat: the weights hold adapter in its place"


def test_bad_input_is_one_line(merges: Merges, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no recipe beside the weights"):
        verify(merges.world.path("math"))
    with pytest.raises(RecipeError, match="no such file or folder; expected a recipe"):
        verify(merges.world.path("math"), tmp_path / "nothing.yml")
    merges.world.write("narrow", {"model.norm.weight": np.ones(8)})
    lie = {**TRUTHS["linear"], "models": models("math", "code", weight=[0.4, 0.9])}
    with pytest.raises(CheckpointError, match=r"candidate narrow: its tensor .* is not like the recipe's"):
        merges.verify("linear", lie, candidates=[merges.world.path("narrow")])


def test_the_recipe_of_a_hub_model_is_fetched(merges: Merges, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub = Hub(tmp_path / "hub")
    repository = tmp_path / "hub" / "org" / "merge"
    repository.mkdir(parents=True)
    for file in ("config.json", "model.safetensors"):
        (repository / file).write_bytes((merges.made["linear"] / file).read_bytes())
    config = (merges.made["linear"] / "mergekit_config.yml").read_text()
    (repository / "README.md").write_text(f"# Merge\n\n```yaml\n{config}```\n")
    with serve(hub) as endpoint:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        found = verify("org/merge")
    assert found.verdict == "pass"


def test_the_document_and_the_table_say_the_same(merges: Merges) -> None:
    runner = CliRunner()
    claim = merges.world.claim("told", LIES[1].told())
    target = str(merges.made["task_arithmetic"])
    printed = runner.invoke(app, ["verify", target, "--recipe", str(claim), "--json", "--quiet"])
    assert printed.exit_code == 1
    document = Verification.model_validate_json(printed.stdout)
    assert document.to_json() + "\n" == printed.stdout
    assert json.loads(printed.stdout)["schema"] == "unmerge/verification/1"
    assert verify(target, claim).to_json() == document.to_json()
    console = Console(width=140, record=True)
    print_verification(document, console)
    shown = console.export_text()
    for text in (document.reason, "With that changed, the recipe makes 100.00 %", document.differences[0].name):
        assert text in shown
    passed = runner.invoke(app, ["verify", str(merges.made["dare_ties"]), "--quiet"])
    assert passed.exit_code == 0
    assert "pass: 100.00 %" in passed.stdout
