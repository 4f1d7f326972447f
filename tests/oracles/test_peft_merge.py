"""Adapter changes against PEFT's own merge, for every option that unmerge claims to read."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from unmerge.checkpoint.tensor import values
from unmerge.compress import materialise
from unmerge.dictionary import open_atom, open_base
from unmerge.errors import AlignmentError, CheckpointError

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj"]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": LINEAR},
    "all-linear": {"target_modules": "all-linear"},
    "patterns": {
        "target_modules": LINEAR,
        "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 7},
        "alpha_pattern": {"k_proj": 3, "^model.layers.0.self_attn.o_proj": 40},
    },
    "rslora": {"target_modules": LINEAR, "use_rslora": True},
    "bias-all": {"target_modules": LINEAR, "bias": "all"},
    "bias-lora-only": {"target_modules": LINEAR, "bias": "lora_only"},
    "lora-bias": {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
    "modules-to-save": {"target_modules": LINEAR, "modules_to_save": ["lm_head", "input_layernorm"]},
    "embedding": {"target_modules": [*LINEAR, "embed_tokens"]},
    "embedding-rslora": {"target_modules": ["embed_tokens"], "use_rslora": True},
    "dora": {"target_modules": LINEAR, "use_dora": True},
    "dora-embedding": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "head": {"target_modules": ["lm_head", "gate_proj"]},
    "orthogonal": {"target_modules": LINEAR, "init_lora_weights": "orthogonal"},
    "gaussian": {"target_modules": LINEAR, "init_lora_weights": "gaussian"},
}
CONV1D: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    "said-wrongly": {"target_modules": ["c_attn"], "fan_in_fan_out": False},
    "dora": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True},
    "bias-all": {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"},
}


def qwen2() -> torch.nn.Module:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=48, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def gpt2() -> torch.nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4, tie_word_embeddings=False))


def adapted(model: torch.nn.Module, options: dict[str, Any]) -> Any:
    """Return a PEFT model whose trainable weights were all moved, as training would."""
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, lora_alpha=6, **options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(wrapped.named_parameters()):
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return wrapped


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "options"),
    [pytest.param(qwen2, value, id=f"qwen2-{key}") for key, value in OPTIONS.items()]
    + [pytest.param(gpt2, value, id=f"gpt2-{key}") for key, value in CONV1D.items()],
)
def test_deltas_equal_peft_merge(make: Any, options: dict[str, Any], tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path / "base")
    wrapped = adapted(model, options)
    wrapped.save_pretrained(tmp_path / "adapter")
    before = {name: value.double().numpy() for name, value in model.state_dict().items()}
    single = copy.deepcopy(wrapped).merge_and_unload().state_dict()
    # The same merge, by PEFT, in double precision: what its arithmetic means before fp32 rounds it.
    double = wrapped.double().merge_and_unload().state_dict()

    base = open_base(str(tmp_path / "base"))
    atom = open_atom(str(tmp_path / "adapter"), base)

    changed = {name for name, value in double.items() if not np.array_equal(value.numpy(), before[name])}
    moved = {name for name in atom.vector.deltas if np.any(materialise(atom.vector, name))}
    assert changed
    assert changed == moved
    for name in sorted(changed):
        ours = before[name] + materialise(atom.vector, name).reshape(before[name].shape)
        np.testing.assert_array_equal(ours.astype(np.float32), double[name].numpy().astype(np.float32), err_msg=name)
        # PEFT's fp32 sums differ from the exact ones in their last bits only.
        ulp = np.spacing(np.abs(ours).max(initial=0.0).astype(np.float32))
        np.testing.assert_allclose(ours, single[name].double().numpy(), rtol=0, atol=4 * ulp, err_msg=name)


@pytest.mark.filterwarnings("ignore")
def test_low_rank_delta_is_peft_delta_weight_to_the_last_bit(tmp_path: Path) -> None:
    model = qwen2()
    model.save_pretrained(tmp_path / "base")
    wrapped = adapted(model, OPTIONS["patterns"])
    wrapped.save_pretrained(tmp_path / "adapter")
    wrapped = wrapped.double()
    base = open_base(str(tmp_path / "base"))
    atom = open_atom(str(tmp_path / "adapter"), base)
    compared = 0
    for name, module in wrapped.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            theirs = module.get_delta_weight("default").detach().numpy().astype(np.float32)
            ours = materialise(atom.vector, f"{name}.weight").astype(np.float32)
            np.testing.assert_array_equal(ours, theirs, err_msg=name)
            compared += 1
    assert compared == 8


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_initialisations_that_change_the_base_are_refused(start: str, tmp_path: Path) -> None:
    model = qwen2()
    model.save_pretrained(tmp_path / "base")
    adapted(model, {"target_modules": LINEAR, "init_lora_weights": start}).save_pretrained(tmp_path / "adapter")
    base = open_base(str(tmp_path / "base"))
    with pytest.raises(CheckpointError, match=rf"initialised with '{start}', which changes the base"):
        open_atom(str(tmp_path / "adapter"), base)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
        peft.LoHaConfig(target_modules=["q_proj"]),
        peft.LoKrConfig(target_modules=["q_proj"]),
        peft.VeraConfig(target_modules=["q_proj"]),
        peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_other_peft_types_are_refused_by_name(config: peft.PeftConfig, tmp_path: Path) -> None:
    model = qwen2()
    model.save_pretrained(tmp_path / "base")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    base = open_base(str(tmp_path / "base"))
    with pytest.raises(CheckpointError, match=rf"PEFT type '{config.peft_type.value}' is not supported"):
        open_atom(str(tmp_path / "adapter"), base)


@pytest.mark.filterwarnings("ignore")
def test_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path / "base")
    adapted(qwen2(), OPTIONS["plain"]).save_pretrained(tmp_path / "adapter")
    base = open_base(str(tmp_path / "base"))
    with pytest.raises(AlignmentError, match="which the base does not have: an adapter of another model"):
        open_atom(str(tmp_path / "adapter"), base)


@pytest.mark.filterwarnings("ignore")
def test_adapter_of_another_width_is_refused(tmp_path: Path) -> None:
    wide = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=48,
            hidden_size=64,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    wide.save_pretrained(tmp_path / "base")
    adapted(qwen2(), OPTIONS["plain"]).save_pretrained(tmp_path / "adapter")
    base = open_base(str(tmp_path / "base"))
    with pytest.raises(AlignmentError, match=r"has shape \[16, 32\], the base's tensor has \[32, 64\]"):
        open_atom(str(tmp_path / "adapter"), base)


@pytest.mark.filterwarnings("ignore")
def test_resized_embeddings_of_an_adapter_are_compared_in_common_rows_and_told(tmp_path: Path) -> None:
    model = qwen2()
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(50)
    wrapped = adapted(model, {"target_modules": LINEAR, "modules_to_save": ["embed_tokens", "lm_head"]})
    wrapped.save_pretrained(tmp_path / "adapter")
    merged = wrapped.double().merge_and_unload().state_dict()
    base = open_base(str(tmp_path / "base"))
    vector = open_atom(str(tmp_path / "adapter"), base).vector
    told = {(item.name, item.model, item.reason) for item in vector.skipped}
    reason = "2 rows beyond the 48 that both have (resized vocabulary)"
    assert told == {("model.embed_tokens.weight", "adapter", reason), ("lm_head.weight", "adapter", reason)}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        ours = values(base.checkpoint.tensors[name]) + materialise(vector, name)
        np.testing.assert_array_equal(ours.astype(np.float32), merged[name].numpy()[:48].astype(np.float32))
