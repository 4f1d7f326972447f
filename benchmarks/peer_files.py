"""Models that all of the field's tools take: real configuration and tokenizer files, random weights, known merges."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from unmerge.testing import quantise, write_adapter, write_checkpoint

ATOMS = ("full0", "full1", "full2", "full3")
ADAPTERS = ("adapter0", "adapter1", "adapter2", "adapter3")
"""The same changes as those of `ATOMS`, as PEFT adapters."""
RANK = 16
FACTOR = 0.01414
"""Standard deviation of both factors: with alpha / r of a half, a change of two per cent of the weights' norm."""
SPREAD = 0.02
"""Standard deviation of the weights."""
HEADS, GROUPS, VOCABULARY = 16, 4, 32_000
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Merge:
    """A merge of full checkpoints.

    Attributes
    ----------
    method : str
        mergekit's name of it.
    weights : mapping of str to float
        Of each member; for ``slerp`` the shares 1 - t and t.
    options : mapping
        Further parameters of each member.
    linear : bool
        Whether the truth is a coefficient for each member, so that errors have a meaning.
    """

    method: str
    weights: Mapping[str, float]
    options: Mapping[str, float] = field(default_factory=dict)
    linear: bool = True

    @property
    def truth(self) -> dict[str, float]:
        """Effective weight of each atom, with the others at 0; all but task arithmetic divide by the sum."""
        total = 1.0 if self.method == "task_arithmetic" else sum(self.weights.values())
        return {atom: self.weights.get(atom, 0.0) / total for atom in ATOMS}

    def write(self, folder: Path, name: str) -> Path:
        """Write it as a recipe beside the models, and return the file."""
        file = folder / f"{name}.yml"
        file.write_text(yaml.safe_dump(self._document(), sort_keys=False), encoding="utf-8")
        return file

    def _document(self) -> dict[str, Any]:
        if self.method == "slerp":
            first, second = self.weights
            parts = {"parameters": {"t": self.weights[second]}, "models": [{"model": first}, {"model": second}]}
            return {"merge_method": "slerp", "base_model": first, **parts, "dtype": "bfloat16"}
        models = [
            {"model": model, "parameters": {"weight": weight, **self.options}} for model, weight in self.weights.items()
        ]
        base = {} if self.method == "linear" else {"base_model": "base"}
        return {"merge_method": self.method, **base, "models": models, "dtype": "bfloat16"}


A, B, C, D = ATOMS
MERGES = {
    "linear of 2": Merge("linear", {A: 0.6, B: 0.4}),
    "linear of 4": Merge("linear", {A: 0.4, B: 0.3, C: 0.2, D: 0.1}),
    "task arithmetic of 3": Merge("task_arithmetic", {A: 0.75, B: 0.5, C: 0.25}),
    "slerp of 2": Merge("slerp", {A: 0.65, B: 0.35}),
    "ties of 4": Merge("ties", {A: 0.4, B: 0.3, C: 0.2, D: 0.1}, {"density": 0.5}, linear=False),
    "dare_ties of 4": Merge("dare_ties", {A: 0.4, B: 0.3, C: 0.2, D: 0.1}, {"density": 0.5}, linear=False),
}


def write_models(folder: Path, layers: int, hidden: int) -> None:
    """Write a base, four adapters of it, and four full checkpoints with the same changes, in BF16."""
    generator = np.random.default_rng(0)
    inner = 11 * hidden // 4
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    base = {
        name: quantise(_draw(generator, name, shape), "BF16") for name, shape in _shapes(layers, hidden, inner).items()
    }
    _write(folder / "base", base, config)
    for full, adapter in zip(ATOMS, ADAPTERS, strict=True):
        changes = write_adapter(
            folder / adapter, generator, base, modules=PROJECTIONS, rank=RANK, alpha=RANK / 2, size=FACTOR
        )
        _write(folder / full, {name: value + changes.get(name, 0.0) for name, value in base.items()}, config)


def _write(folder: Path, tensors: Mapping[str, np.ndarray[Any, Any]], config: Mapping[str, Any]) -> None:
    write_checkpoint(folder, tensors, config=config)
    words = {f"w{number}": number for number in range(VOCABULARY)}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "w0"}
    parts = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    tokenizer = {"version": "1.0", **parts, "added_tokens": [], "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0", "eos_token": "w1"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def _draw(generator: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    return SPREAD * generator.standard_normal(shape, dtype=np.float32) + ("norm" in name)


def _shapes(layers: int, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    keys = hidden * GROUPS // HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for module, rows in (("q_proj", hidden), ("k_proj", keys), ("v_proj", keys)):
            shapes[f"{prefix}.self_attn.{module}.weight"] = (rows, hidden)
            shapes[f"{prefix}.self_attn.{module}.bias"] = (rows,)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
    return {**shapes, "model.norm.weight": (hidden,), "lm_head.weight": (VOCABULARY, hidden)}
