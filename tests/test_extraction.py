"""What no atom explains comes out as the adapter that was planted, and PEFT loads it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Shelf
from unmerge.attribution import open_target
from unmerge.checkpoint.adapter import open_adapter
from unmerge.checkpoint.dtypes import FloatArray
from unmerge.checkpoint.source import Source
from unmerge.checkpoint.tensor import values
from unmerge.compress import materialise
from unmerge.dictionary import Base, open_atom, open_base, read_task_vector
from unmerge.errors import TargetError, UnmergeError
from unmerge.extraction import extract, linear_weights
from unmerge.task_vector import LowRank, Residual, TaskVector
from unmerge.testing import quantise, write_adapter, write_checkpoint


class Merge:
    """A merge of two known adapters and an unknown one."""

    weights = (("add", 0.6), ("json", 0.3))

    def __init__(self, shelf: Shelf, *, dtype: str = "F32", unknown: float = 0.5) -> None:
        self.shelf = shelf
        self.base = open_base(shelf.base)
        self.atoms = [(open_atom(shelf.path(name), self.base).vector, weight) for name, weight in self.weights]
        self.planted = {name: unknown * change for name, change in shelf.changes["xml"].items()}
        self.target = self.read(shelf.merge("mystery", dtype, **dict(self.weights), xml=unknown))

    def read(self, path: str) -> TaskVector:
        return open_target(path, self.base).vector

    def extract(self, output: Path, *, rank: int = 4) -> TaskVector:
        extract(self.target, self.atoms, self.base, output, rank=rank, tensors=self.base.shapes)
        return open_atom(str(output), self.base).vector


@pytest.fixture
def merge(shelf: Shelf) -> Merge:
    return Merge(shelf)


def cosine(found: TaskVector, planted: dict[str, FloatArray]) -> float:
    ours = {name: materialise(found, name) for name in planted}
    inner = sum(float(np.vdot(ours[name], change)) for name, change in planted.items())
    norms = [np.sqrt(sum(float(np.vdot(part, part)) for part in parts.values())) for parts in (ours, planted)]
    return inner / float(np.prod(norms))


class TestTheUnknown:
    def test_a_planted_adapter_comes_out(self, merge: Merge, tmp_path: Path) -> None:
        found = merge.extract(tmp_path / "out")
        assert cosine(found, merge.planted) > 0.99999
        for name, change in merge.planted.items():
            np.testing.assert_allclose(materialise(found, name), change, atol=1e-6)

    def test_it_comes_out_of_a_rounded_merge(self, shelf: Shelf, tmp_path: Path) -> None:
        merge = Merge(shelf, dtype="F16", unknown=1.0)
        assert cosine(merge.extract(tmp_path / "out"), merge.planted) > 0.999

    def test_weights_that_are_explained_get_zeros(self, merge: Merge, tmp_path: Path) -> None:
        merge.extract(tmp_path / "out", rank=3)
        adapter = open_adapter(tmp_path / "out")
        untouched = adapter.factors["model.layers.0.mlp.gate_proj"]
        assert (untouched.a.shape, untouched.b.shape) == ((3, 32), (96, 3))
        assert not values(untouched.a).any()
        assert not values(untouched.b).any()

    @pytest.mark.parametrize("rank", [1, 4, 40])
    def test_every_module_has_the_rank_asked_for(self, merge: Merge, tmp_path: Path, rank: int) -> None:
        found = merge.extract(tmp_path / "out", rank=rank)
        assert {delta.rank for delta in found.deltas.values() if isinstance(delta, LowRank)} == {rank}
        assert all(isinstance(delta, LowRank) and delta.scale == 1.0 for delta in found.deltas.values())
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert config["r"] == config["lora_alpha"] == rank

    def test_a_full_fine_tune_among_the_atoms(self, shelf: Shelf, tmp_path: Path) -> None:
        base = open_base(shelf.base)
        full = open_atom(shelf.path("full"), base).vector
        merged = {
            name: value + 0.7 * materialise(full, name).reshape(value.shape) + shelf.changes["xml"].get(name, 0.0)
            for name, value in shelf.model.items()
        }
        target = open_target(str(write_checkpoint(tmp_path / "merged", merged, "F32")), base).vector
        extract(target, [(full, 0.7)], base, tmp_path / "out", rank=4, tensors=shelf.changes["xml"])
        assert cosine(open_atom(str(tmp_path / "out"), base).vector, shelf.changes["xml"]) > 0.99999

    def test_an_adapter_can_be_the_target(self, merge: Merge, tmp_path: Path) -> None:
        # It changes fewer weights than the atom: elsewhere minus the atom is left.
        narrow = write_adapter(tmp_path / "narrow", np.random.default_rng(3), merge.shelf.model, modules=["q_proj"])
        target = merge.read(str(tmp_path / "narrow"))
        known = merge.atoms[:1]
        extract(target, known, merge.base, tmp_path / "out", rank=8, tensors=merge.base.shapes)
        found = open_atom(str(tmp_path / "out"), merge.base).vector
        assert set(found.deltas) == set(merge.shelf.changes["add"])
        for name, change in merge.shelf.changes["add"].items():
            np.testing.assert_allclose(materialise(found, name), narrow.get(name, 0.0) - 0.6 * change, atol=1e-7)

    def test_output_layers_of_another_size_fit_the_base(self, merge: Merge, tmp_path: Path) -> None:
        rng = np.random.default_rng(4)
        tuned = {name: value[:60] if len(value) == 64 else value for name, value in merge.shelf.model.items()}
        change = 0.01 * np.outer(rng.standard_normal(60), rng.standard_normal(32))
        tuned["lm_head.weight"] = tuned["lm_head.weight"] + change
        target = merge.read(str(write_checkpoint(tmp_path / "short", tuned, "F32")))
        extract(target, [], merge.base, tmp_path / "out", rank=2, tensors=["lm_head.weight"])
        found = materialise(open_atom(str(tmp_path / "out"), merge.base).vector, "lm_head.weight")
        assert found.shape == (64, 32)
        np.testing.assert_allclose(found[:60], change, atol=1e-7)
        assert not found[60:].any()


class TestFiles:
    def test_the_configuration_is_pefts(self, merge: Merge, tmp_path: Path) -> None:
        merge.extract(tmp_path / "out")
        assert json.loads((tmp_path / "out" / "adapter_config.json").read_text()) == {
            "base_model_name_or_path": merge.shelf.base,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": 4,
            "lora_dropout": 0.0,
            "peft_type": "LORA",
            "r": 4,
            "revision": None,
            "target_modules": [name.removesuffix(".weight") for name in linear_weights(merge.base.shapes, merge.base)],
            "task_type": "CAUSAL_LM",
        }
        adapter = open_adapter(tmp_path / "out")
        assert {factors.a.dtype.name for factors in adapter.factors.values()} == {"F32"}
        assert {factors.a.name for factors in adapter.factors.values()} >= {
            "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
        }

    @pytest.mark.parametrize("reference", ["org/base", "hf://org/base", "org/base@main"])
    def test_a_base_from_the_hub_is_named_with_its_commit(self, merge: Merge, tmp_path: Path, reference: str) -> None:
        hub = Base(Source(reference, merge.base.source.path, "0123abcd"), merge.base.checkpoint, merge.base.digest)
        extract(merge.target, merge.atoms, hub, tmp_path / "out", rank=1, tensors=merge.planted)
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "0123abcd")

    def test_the_same_input_gives_the_same_bytes(self, merge: Merge, tmp_path: Path) -> None:
        for name, workers in (("one", 1), ("two", 3)):
            extract(
                merge.target, merge.atoms, merge.base, tmp_path / name, rank=4, tensors=merge.planted, workers=workers
            )
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()

    def test_folders_above_are_made_and_nothing_else_is_left(self, merge: Merge, tmp_path: Path) -> None:
        merge.extract(tmp_path / "new" / "out")
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
        assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]


def test_linear_weights_are_no_embeddings_norms_or_biases(tmp_path: Path) -> None:
    linear = [
        "model.layers.0.mlp.gate_proj.weight",
        "lm_head.weight",
        "embed_out.weight",
        "h.0.mlp.shared_expert.weight",
    ]
    others = [
        "model.embed_tokens.weight",
        "transformer.wte.weight",
        "transformer.wpe.weight",
        "model.embed_positions.weight",
        "shared.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "h.0.ln_1.weight",
        "model.layers.0.mlp.gate_proj.scale",
    ]
    tensors = {name: np.ones((8, 4)) for name in (*linear, *others)}
    tensors |= {"h.0.conv.weight": np.ones((4, 4, 3)), "score.weight": np.ones((1, 4)), "h.0.weight": np.ones(8)}
    base = open_base(str(write_checkpoint(tmp_path / "base", tensors)))
    assert linear_weights([*base.shapes, "absent.weight"], base) == sorted(linear)


class TestRefusals:
    def test_an_output_in_use(self, merge: Merge, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        with pytest.raises(UnmergeError, match=r"out: already exists; choose another folder$"):
            merge.extract(tmp_path / "out")
        assert not any((tmp_path / "out").iterdir())

    def test_no_rank(self, merge: Merge, tmp_path: Path) -> None:
        with pytest.raises(UnmergeError, match=r"^rank 0 given; an adapter needs a rank of at least 1$"):
            merge.extract(tmp_path / "out", rank=0)

    @pytest.mark.parametrize("tensors", [[], ["model.norm.weight", "model.embed_tokens.weight", "absent.weight"]])
    def test_nothing_to_write(self, merge: Merge, tmp_path: Path, tensors: list[str]) -> None:
        with pytest.raises(UnmergeError, match=rf"^target: none of the {len(tensors)} tensors given is a changed lin"):
            extract(merge.target, merge.atoms, merge.base, tmp_path / "out", rank=2, tensors=tensors)

    def test_what_is_not_finite_leaves_nothing(self, merge: Merge, tmp_path: Path) -> None:
        broken = {name: value.copy() for name, value in merge.shelf.model.items()}
        broken["lm_head.weight"][3, 4] = np.nan
        target = merge.read(str(write_checkpoint(tmp_path / "broken", broken, "F32")))
        with pytest.raises(TargetError, match=r"^target: tensor 'lm_head\.weight': it has NaN or Inf"):
            extract(target, merge.atoms, merge.base, tmp_path / "new" / "out", rank=2, tensors=merge.base.shapes)
        assert not (tmp_path / "new").exists()


class TestResidual:
    def test_blocks_and_rounding_are_those_of_the_parts(self, merge: Merge) -> None:
        full = open_atom(merge.shelf.path("full"), merge.base).vector
        name = "model.layers.0.self_attn.q_proj.weight"
        add, target = merge.atoms[0][0].deltas[name], merge.target.deltas[name]
        residual = Residual(target, ((add, 0.5), (full.deltas[name], -2.0)))
        found, rounding = residual.block(3, 9)
        expected = target.block(3, 9)[0] - 0.5 * add.block(3, 9)[0] + 2.0 * full.deltas[name].block(3, 9)[0]
        np.testing.assert_array_equal(found, expected)
        assert rounding == pytest.approx(target.block(3, 9)[1] + 4.0 * full.deltas[name].block(3, 9)[1])
        assert residual.shape == target.shape
        assert residual.nbytes == target.nbytes + add.nbytes + full.deltas[name].nbytes

    def test_no_target_is_a_target_of_zeros(self, merge: Merge) -> None:
        add = next(iter(merge.atoms[0][0].deltas.values()))
        residual = Residual(None, ((add, 0.5),))
        assert (residual.shape, residual.nbytes) == (add.shape, add.nbytes)
        np.testing.assert_array_equal(residual.block(2, 5)[0], -0.5 * add.block(2, 5)[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_peft_loads_it_and_merges_what_was_planted(family: str, tmp_path: Path) -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    if family == "gpt2":  # keeps its weights as (in, out)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4, tie_word_embeddings=False))
    else:
        sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
        model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2))
    model.save_pretrained(tmp_path / "base")
    base = open_base(str(tmp_path / "base"))
    weights = {name: values(tensor).reshape(tensor.shape) for name, tensor in base.checkpoint.tensors.items()}
    linear = linear_weights(weights, base)
    rng = np.random.default_rng(1)
    planted = {
        name: 0.01 * rng.standard_normal((len(weights[name]), 2)) @ rng.standard_normal((2, weights[name].shape[1]))
        for name in linear
    }
    merged = {name: quantise(value + planted.get(name, 0.0), "F32") for name, value in weights.items()}
    write_checkpoint(tmp_path / "merged", merged, "F32", config=dict(base.checkpoint.config))
    target, _ = read_task_vector(tmp_path / "merged", base, "target")

    extract(target, [], base, tmp_path / "out", rank=3, tensors=linear)

    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "out").merge_and_unload().state_dict()
    assert linear
    for name in linear:
        np.testing.assert_allclose(loaded[name].numpy(), merged[name], rtol=0, atol=1e-6, err_msg=name)
    # Read back by unmerge it is the same.
    found = open_atom(str(tmp_path / "out"), base).vector
    for name in linear:
        np.testing.assert_allclose(materialise(found, name), planted[name], rtol=0, atol=1e-6, err_msg=name)
