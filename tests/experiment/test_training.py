from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from unmerge.experiment.tasks import TASKS
from unmerge.experiment.training import (
    ATTENTION,
    CHARACTERS,
    _answer_batch,
    character_tokenizer,
    draw_examples,
    relative_delta_norm,
    train_adapter,
)


def test_the_tokenizer_has_a_token_for_every_character_of_every_task():
    tokenizer = character_tokenizer()
    rng = np.random.default_rng(0)
    for task in TASKS.values():
        example = task.example(rng)
        text = f"{example.prompt}\n{example.answer}"
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text)
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_the_tokenizer_is_the_same_after_a_round_trip_through_transformers(tiny_world):
    read = transformers.AutoTokenizer.from_pretrained(tiny_world.base)
    text = "".join(map(chr, range(32, 127))) + "\n    x  y"
    assert read(text)["input_ids"] == character_tokenizer()(text)["input_ids"]
    assert len(read) == len(CHARACTERS) + 4


def test_only_answers_are_labelled():
    tokenizer = character_tokenizer()
    example = TASKS["imdb_sentiment"].example(np.random.default_rng(0))
    inputs, labels = _answer_batch(tokenizer, [example])
    labelled = labels[labels != -100]
    assert tokenizer.decode(labelled) == example.answer + "<eos>"
    assert torch.equal(inputs[labels != -100], labelled)


def test_held_out_examples_are_not_trained_on():
    train, tests = draw_examples(TASKS["arjun_python_qa"], seed=0, train=50, held_out=20)
    assert len(train) == 50
    assert not set(train) & set(tests)


def test_the_base_is_a_bfloat16_qwen2(tiny_world):
    config = json.loads((tiny_world.base / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["tie_word_embeddings"] is False
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert {tensor.dtype for tensor in load_file(tiny_world.base / "model.safetensors").values()} == {torch.bfloat16}


def test_an_adapter_is_a_peft_folder_that_names_its_base(tiny_world):
    config = peft.PeftConfig.from_pretrained(tiny_world.adapter("xsum"))
    assert config.base_model_name_or_path == "base"
    assert config.target_modules == set(ATTENTION)


def test_a_merged_checkpoint_is_the_base_plus_the_adapter(tiny_world):
    """The checkpoint is the bfloat16 rounding of W + alpha / r * B A, tensor by tensor."""
    base = load_file(tiny_world.base / "model.safetensors")
    merged = load_file(tiny_world.checkpoint("xsum") / "model.safetensors")
    adapter = load_file(tiny_world.adapter("xsum") / "adapter_model.safetensors")
    assert merged.keys() == base.keys()
    for name, weight in base.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        expected = weight
        if f"{stem}.lora_A.weight" in adapter:
            delta = adapter[f"{stem}.lora_B.weight"] @ adapter[f"{stem}.lora_A.weight"] * 2
            expected = (weight.float() + delta).bfloat16()
        assert torch.equal(merged[name], expected), name


def test_relative_delta_norm_is_that_of_the_dense_change(tiny_world):
    base = load_file(tiny_world.base / "model.safetensors")
    adapter = load_file(tiny_world.adapter("xsum") / "adapter_model.safetensors")
    touched = [key for key in base if any(f"{module}.weight" in key for module in ATTENTION)]
    change = norm = 0.0
    for key in touched:
        stem = f"base_model.model.{key.removesuffix('.weight')}"
        delta = adapter[f"{stem}.lora_B.weight"].numpy() @ adapter[f"{stem}.lora_A.weight"].numpy() * 2
        change += np.sum(delta.astype(np.float64) ** 2)
        norm += np.sum(base[key].float().numpy().astype(np.float64) ** 2)
    measured = relative_delta_norm(tiny_world.adapter("xsum"), tiny_world.base)
    assert measured == pytest.approx(np.sqrt(change / norm), rel=1e-5)


def test_training_leaves_torchs_settings_alone(tiny_world, tmp_path):
    before = torch.get_num_threads(), torch.get_rng_state()
    options = {"seed": 0, "steps": 1, "batch": 2, "examples": 4, "rank": 2}
    train_adapter(tiny_world.base, TASKS["xsum"], tmp_path, **options)
    assert torch.get_num_threads() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_a_missing_extra_is_named():
    code = "import sys; sys.modules['peft'] = None; import unmerge.experiment.training"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "MissingExtraError" in done.stderr
    assert "pip install 'unmerge[experiment]'" in done.stderr
