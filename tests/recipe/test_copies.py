"""Copies of tensors: against comparing all bytes, torch's casts and products, and PEFT's merges."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.recipe.passthrough import bits
from unmerge.checkpoint.dtypes import DTYPES
from unmerge.checkpoint.reader import Checkpoint, open_checkpoint
from unmerge.checkpoint.tensor import ArrayTensor, values
from unmerge.dictionary import open_atom, open_base
from unmerge.errors import AlignmentError, RecipeError
from unmerge.recipe.adapted import merged_adapter
from unmerge.recipe.copies import ROUNDING, find_copies, may_be_copied, role_of
from unmerge.testing import tiny_model, write_checkpoint

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
NAME = "model.layers.{}.mlp.up_proj.weight"


def raw(tensor):
    """The bits of a torch tensor, as unmerge keeps them."""
    array = tensor.contiguous()
    return array.view(torch.uint16).numpy() if array.element_size() == 2 else array.numpy()


def model(tmp_path, **tensors):
    """A checkpoint in memory: of torch tensors by layer (``L0``), or by name."""
    types = {value: DTYPES[key] for key, value in TORCH.items()}
    found = {}
    for key, tensor in tensors.items():
        name = NAME.format(key[1:]) if key[0] == "L" else key.replace("__", ".")
        found[name] = ArrayTensor(name, types[tensor.dtype], tuple(tensor.shape), tmp_path, raw(tensor))
    return Checkpoint(tmp_path, found)


def weights(seed, *shape, dtype=torch.bfloat16):
    return (0.05 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Counted:
    """A tensor that counts how many of its values are read."""

    tensor: ArrayTensor
    reads: list[int] = field(default_factory=list)
    name = property(lambda self: self.tensor.name)
    dtype = property(lambda self: self.tensor.dtype)
    shape = property(lambda self: self.tensor.shape)
    origin = property(lambda self: self.tensor.origin)

    def read(self, start, stop):
        found = self.tensor.read(start, stop)
        self.reads.append(found.size)
        return found

    @property
    def times(self):
        return sum(self.reads) / np.prod(self.shape)


def counted(checkpoint):
    return Checkpoint(checkpoint.path, {name: Counted(tensor) for name, tensor in checkpoint.tensors.items()})


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A base, fine-tunes that change some modules of some layers, and a model whose layers repeat."""
    folder = tmp_path_factory.mktemp("family")
    rng = np.random.default_rng(0)
    base = tiny_model(rng, layers=4)

    def tuned(*parts):
        return {
            name: value + 0.002 * rng.standard_normal(value.shape) * any(part in name for part in parts)
            for name, value in base.items()
        }

    models = {
        "base": base,
        "attention": tuned("self_attn"),
        "late": tuned("layers.2", "layers.3.mlp"),
        "head": tuned("lm_head", "embed_tokens"),
        "repeated": base | {name: base[name.replace("layers.3", "layers.1")] for name in base if "layers.3" in name},
    }
    return {name: open_checkpoint(write_checkpoint(folder / name, value)) for name, value in models.items()}


@pytest.mark.parametrize("target", ["base", "attention", "late", "head", "repeated"])
def test_exact_copies_are_those_with_the_same_bytes(family, target):
    found = find_copies(family[target], family)
    held = {name: bits(checkpoint) for name, checkpoint in family.items()}
    for name, content in held[target].items():
        expected = {
            (model, other)
            for model, tensors in held.items()
            for other, same in tensors.items()
            if role_of(other).module == role_of(name).module and same == content
        }
        assert {(copy.model, copy.tensor) for copy in found[name].copies} == expected
        assert {copy.kind for copy in found[name].copies} == {"exact"}
        assert found[name].explained
    assert list(found) == list(held[target])


def test_a_tensor_that_no_model_holds_is_nearest_to_what_it_was_made_of(family):
    others = {name: checkpoint for name, checkpoint in family.items() if name != "late"}
    for name, origin in find_copies(family["late"], others).items():
        whole = values(family["late"].tensors[name])
        for copy in (*origin.copies, *origin.others):
            gap = np.linalg.norm(values(others[copy.model].tensors[copy.tensor]) - whole)
            assert copy.distance == pytest.approx(gap / np.linalg.norm(whole), rel=1e-6)
            assert (copy.distance == 0.0) == copy.makes_every_bit
        if "layers.2" in name:
            assert {copy.kind for copy in origin.copies} == {"near"}
            assert not origin.explained
        if "layers.2" in name and origin.elements > 100:
            assert {copy.tensor for copy in origin.copies} == {name}


@pytest.mark.parametrize("stored", TORCH)
@pytest.mark.parametrize("source", TORCH)
def test_casts_are_torchs(tmp_path, source, stored):
    known = weights(1, 40, 30, dtype=TORCH[source])
    target = model(tmp_path, L7=known.to(TORCH[stored]))
    [origin] = find_copies(
        target, {"m": model(tmp_path, L2=known, L3=weights(2, 40, 30, dtype=TORCH[source]))}
    ).values()
    [copy] = origin.copies
    assert (copy.layer, copy.kind, copy.factor) == (2, "exact" if source == stored else "cast", 1.0)
    assert (origin.role.layer, origin.role.module, origin.dtype) == (7, "mlp.up_proj.weight", stored)


@pytest.mark.parametrize("dtype", TORCH)
@settings(max_examples=20)
@given(factor=st.decimals(-3, 3, places=2).filter(lambda value: value not in (0, 1)).map(float))
def test_factors_are_found(tmp_path_factory, dtype, factor):
    folder = tmp_path_factory.getbasetemp()
    known = weights(3, 64, 64, dtype=TORCH[dtype])
    target = model(folder, L0=known * factor)
    [origin] = find_copies(target, {"m": model(folder, L5=known, L6=weights(4, 64, 64, dtype=TORCH[dtype]))}).values()
    [copy] = origin.copies
    assert (copy.layer, copy.kind, copy.equal) == (5, "scaled", 1.0)
    assert copy.factor == factor


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("factor", [0.7071067812, 1 / 3, -1.2345678901])
def test_factors_of_many_digits_make_every_bit(tmp_path, factor, dtype):
    known = {f"L{layer}": weights(layer, 500, 500, dtype=TORCH[dtype]) for layer in range(2)}
    target = {name: tensor * factor for name, tensor in known.items()}
    found = find_copies(model(tmp_path, **target), {"m": model(tmp_path, **known)})
    # One number for all tensors, though each leaves several: as few digits as make every bit.
    [used] = {copy.factor for origin in found.values() for copy in origin.copies}
    assert [[copy.layer for copy in origin.copies] for origin in found.values()] == [[0], [1]]
    assert all(raw(known[name] * used).tobytes() == raw(target[name]).tobytes() for name in known)
    assert len(str(abs(used))) <= {"BF16": 8, "F16": 9, "F32": 11}[dtype]


def test_every_file_is_read_once(tmp_path):
    known = {f"L{layer}": weights(layer, 700, 1000) for layer in range(3)}
    other = {name: (tensor.float() * 1.01).bfloat16() for name, tensor in known.items()}
    models = {"a": counted(model(tmp_path, **known)), "b": counted(model(tmp_path, **other))}
    # Layers that are there several times, that two models could be the source of, and that are nearly one of both.
    parts = {"L0": known["L1"], "L1": known["L1"], "L2": other["L2"], "L3": known["L1"], "L4": other["L0"]}
    parts["L5"] = (known["L0"].float() * 1.005).bfloat16()
    target = counted(model(tmp_path, **parts))
    found = find_copies(target, models)
    layers = [[(copy.model, copy.layer) for copy in origin.copies] for origin in found.values()]
    assert layers[:5] == [[("a", 1)], [("a", 1)], [("b", 2)], [("a", 1)], [("b", 0)]]
    for checkpoint in (target, *models.values()):
        assert all(tensor.times < 1.1 for tensor in checkpoint.tensors.values())


@settings(max_examples=20)
@given(place=st.integers(0, 300 * 400 - 1), bit=st.integers(0, 15))
def test_one_flipped_bit_is_seen(tmp_path_factory, place, bit):
    folder = tmp_path_factory.getbasetemp()
    known = weights(5, 300, 400)
    known[:2] = 0.0
    changed = known.clone()
    changed.view(torch.uint16).numpy().ravel()[place] ^= np.uint16(1 << bit)
    if not torch.isfinite(changed).all():
        return
    [origin] = find_copies(model(folder, L0=changed), {"m": model(folder, L0=known)}).values()
    assert not origin.explained
    assert all(copy.equal == 1.0 - 1.0 / changed.numel() for copy in origin.copies)


def test_zeros_are_known_by_their_signs(tmp_path):
    known = {f"L{layer}": weights(layer, 30, 40) for layer in range(4)}
    target = model(tmp_path, L0=known["L2"] * 0.0, L1=known["L3"] * -0.0, L2=torch.zeros(30, 40).bfloat16())
    found = list(find_copies(target, {"m": model(tmp_path, **known)}).values())
    assert [[copy.layer for copy in origin.copies] for origin in found] == [[2], [], []]
    assert [origin.zero for origin in found] == [True, True, True]
    assert found[0].copies[0].factor == 0.0
    again = find_copies(
        model(tmp_path, L0=torch.zeros(4).bfloat16()), {"m": model(tmp_path, L1=torch.zeros(4).bfloat16())}
    )
    assert [copy.kind for copy in again[NAME.format(0)].copies] == ["exact"]


def test_zeros_in_a_sample_are_not_all_zero(tmp_path):
    target = torch.zeros(4000, 10).bfloat16()
    target[1234, 5] = 1.0
    [origin] = find_copies(model(tmp_path, L0=target), {"m": model(tmp_path, L0=weights(0, 4000, 10))}).values()
    assert not origin.zero
    assert origin.copies == ()


def test_noise_is_measured(tmp_path):
    known = {f"L{layer}": weights(layer, 200, 300, dtype=torch.float32) for layer in range(3)}
    noisy = (known["L1"] + 0.005 * weights(9, 200, 300, dtype=torch.float32) / 0.05) * 0.25
    [origin] = find_copies(model(tmp_path, L0=noisy.bfloat16()), {"m": model(tmp_path, **known)}).values()
    [copy] = origin.copies
    assert (copy.kind, copy.layer) == ("near", 1)
    assert copy.factor == pytest.approx(0.25, rel=0.02)
    assert copy.distance == pytest.approx(0.1, rel=0.02)
    assert origin.magnitude == pytest.approx(float(noisy.square().mean().sqrt()), rel=0.05)
    assert not origin.within_rounding


def test_what_rounding_does_is_within_rounding(tmp_path):
    known = weights(0, 200, 300, dtype=torch.float32)
    jittered = (
        known * (1 + 2.0**-12 * torch.randn(known.shape, generator=torch.Generator().manual_seed(1)))
    ).bfloat16()
    [origin] = find_copies(model(tmp_path, L0=jittered), {"m": model(tmp_path, L0=known)}).values()
    assert origin.copies[0].kind == "near"
    assert origin.within_rounding
    gap = np.linalg.norm(values(model(tmp_path, L0=known.bfloat16()).tensors[NAME.format(0)]) - known.double().numpy())
    assert origin.floor == pytest.approx(gap / float(known.norm()), rel=0.1)
    assert ROUNDING > 1.0


def test_unrelated_weights_are_copies_of_nothing(tmp_path):
    [origin] = find_copies(
        model(tmp_path, L0=weights(0, 64, 64)), {"m": model(tmp_path, L0=weights(1, 64, 64))}
    ).values()
    assert (origin.copies, origin.others, origin.explained, origin.within_rounding) == ((), (), False, False)


def test_values_that_are_not_finite_disturb_nothing(tmp_path):
    known, broken = weights(0, 64, 64), weights(1, 64, 64)
    broken[0, 0], broken[1, 1] = torch.nan, torch.inf
    near = (known.float() * 1.01).bfloat16()
    near[0, 3] = torch.inf
    models = {"m": model(tmp_path, L0=known, L1=broken), "n": model(tmp_path, L0=near)}
    found = list(find_copies(model(tmp_path, L0=broken, L1=known, L2=near), models).values())
    assert [[(copy.model, copy.layer) for copy in origin.copies] for origin in found] == [
        [("m", 1)],
        [("m", 0)],
        [("n", 0)],
    ]


def test_a_tied_output_layer_is_the_embedding(tmp_path):
    tensors = {"model__embed_tokens__weight": weights(0, 30, 8)}
    tied = Checkpoint(tmp_path, model(tmp_path, **tensors).tensors, {"tie_word_embeddings": True})
    target = model(tmp_path, lm_head__weight=weights(0, 30, 8))
    assert find_copies(target, {"m": tied})["lm_head.weight"].copies[0].tensor == "model.embed_tokens.weight"
    untied = Checkpoint(tmp_path, tied.tensors, {"tie_word_embeddings": False})
    with pytest.raises(AlignmentError, match=r"no known model has a tensor of the module and shape"):
        find_copies(target, {"m": untied})


def test_bad_input_is_named(tmp_path, family):
    with pytest.raises(RecipeError, match=r"no known model was given"):
        find_copies(family["base"], {})
    wider = open_checkpoint(write_checkpoint(tmp_path / "wide", tiny_model(np.random.default_rng(0), hidden=48)))
    with pytest.raises(AlignmentError, match=r"'lm_head\.weight' of shape \[64, 48\]\): another architecture or width"):
        find_copies(wider, {"base": family["base"]})


def test_tensors_without_elements_are_left_out(tmp_path):
    target = model(tmp_path, L0=torch.zeros(0, 5).bfloat16(), L1=weights(0, 4, 5))
    assert list(find_copies(target, {"m": target})) == [NAME.format(1)]


def test_progress_counts_the_targets_tensors(family):
    done = []
    find_copies(family["late"], family, advance=done.append)
    assert sum(done) == len(family["late"].tensors)


# Options of the adapter, and the modules whose weights PEFT's safe_merge rounds twice.
OPTIONS = {
    "plain": ({"target_modules": ["q_proj", "down_proj"]}, ("q_proj", "down_proj")),
    "embedding": ({"target_modules": ["embed_tokens", "v_proj"]}, ("v_proj",)),
    "saved": ({"target_modules": ["o_proj"], "modules_to_save": ["lm_head"]}, ("o_proj",)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize(("options", "twice"), OPTIONS.values(), ids=OPTIONS)
def test_a_merged_adapter_is_what_peft_stores(tmp_path, options, twice, safe_merge):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=48, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    base = Qwen2ForCausalLM(config).bfloat16()
    base.save_pretrained(tmp_path / "base")
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=6, **options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(wrapped.named_parameters()):
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    wrapped.save_pretrained(tmp_path / "adapter")
    wrapped.merge_and_unload(safe_merge=safe_merge).save_pretrained(tmp_path / "merged")
    opened = open_base(str(tmp_path / "base"))
    vector = open_atom(str(tmp_path / "adapter"), opened).vector
    target = open_checkpoint(tmp_path / "merged")
    other = merged_adapter(opened.checkpoint, vector, safe_merge=not safe_merge)
    made = merged_adapter(opened.checkpoint, vector, safe_merge=safe_merge)
    found = find_copies(target, {"base": opened.checkpoint, "made": made, "other": other})
    for name, origin in found.items():
        names = {copy.model for copy in origin.copies}
        if name not in vector.deltas:
            assert names == {"base", "made", "other"}
        else:
            # Almost: the order of additions in a product decides some roundings.
            assert "made" in names
            assert "base" not in names
            assert max(copy.equal for copy in origin.copies) > 0.998
    differing = {name for name, origin in found.items() if len(origin.copies) == 1}
    assert differing == {name for name in found if name.endswith("weight") and any(module in name for module in twice)}


def test_a_sample_tells_what_cannot_be_a_stack(tmp_path):
    known = {"a": model(tmp_path, L0=weights(0, 8, 8), L1=weights(1, 8, 8)), "b": model(tmp_path, L0=weights(2, 8, 8))}
    assert may_be_copied(model(tmp_path, L0=weights(2, 8, 8), L1=weights(0, 8, 8)), known)
    mean = ((weights(0, 8, 8).float() + weights(2, 8, 8).float()) / 2.0).to(torch.bfloat16)
    assert not may_be_copied(model(tmp_path, L0=mean, L1=weights(1, 8, 8)), known)
    assert not may_be_copied(model(tmp_path, L0=weights(0, 8, 8), L1=weights(3, 4, 8)), known)
