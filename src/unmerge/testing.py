"""Small models, adapters and mixtures with known answers, for tests and benchmarks of this and other projects.

Nothing here is trained: it makes files of the right layout quickly. Random numbers come from a generator that the
caller gives.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unmerge.checkpoint.dtypes import DTYPES, FloatArray, RawArray
from unmerge.statistics import Statistics

_SERIALISED = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


def encode(values: FloatArray, dtype: str) -> RawArray:
    """Round values to a storage type, to nearest even, and return the stored bits.

    Parameters
    ----------
    values : array
        Finite or not; NaN stays NaN.
    dtype : str
        ``"BF16"``, ``"F16"``, ``"F32"`` or ``"F64"``.
    """
    if dtype == "BF16":
        single = np.asarray(values, dtype=np.float32)
        bits = single.view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        rounded = np.where(np.isnan(single), np.uint32(0x7FC0), rounded)
        return rounded.astype("<u2")
    if dtype == "F16":
        return np.asarray(values, dtype="<f2").view("<u2")
    return np.asarray(values, dtype=DTYPES[dtype].raw)


def quantise(values: FloatArray, dtype: str) -> FloatArray:
    """Return values after storage in a type, as float64."""
    return DTYPES[dtype].widen(encode(values, dtype))


def write_safetensors(path: Path, tensors: Mapping[str, FloatArray], dtype: str = "BF16") -> None:
    """Write one safetensors file, all tensors in one storage type."""
    from safetensors import TensorSpec, serialize_file

    raw = {name: np.ascontiguousarray(encode(values, dtype)) for name, values in tensors.items()}
    specs = {
        name: TensorSpec(
            dtype=_SERIALISED[dtype], shape=list(bits.shape), data_ptr=bits.ctypes.data, data_len=bits.nbytes
        )
        for name, bits in raw.items()
    }
    serialize_file(specs, path, None)


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, FloatArray],
    dtype: str = "BF16",
    *,
    shards: int = 1,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model folder in the Hugging Face layout: one file, or shards and an index.

    Returns
    -------
    Path
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", **(config or {})}), encoding="utf-8")
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, dtype)
        return folder
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        names = list(tensors)[shard::shards]
        write_safetensors(folder / file, {name: tensors[name] for name in names}, dtype)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def tiny_model(
    generator: np.random.Generator, *, layers: int = 2, hidden: int = 32, vocabulary: int = 64
) -> dict[str, FloatArray]:
    """Return random weights under the names and shapes of a small Qwen2 model with untied embeddings."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for module, rows in (("q_proj", hidden), ("k_proj", hidden // 2), ("v_proj", hidden // 2)):
            shapes[f"{prefix}.self_attn.{module}.weight"] = (rows, hidden)
            shapes[f"{prefix}.self_attn.{module}.bias"] = (rows,)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (hidden, hidden)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (3 * hidden, hidden)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (3 * hidden, hidden)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, 3 * hidden)
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (vocabulary, hidden)
    return {name: 0.05 * generator.standard_normal(shape) + (len(shape) == 1) for name, shape in shapes.items()}


def write_adapter(
    folder: Path,
    generator: np.random.Generator,
    base: Mapping[str, FloatArray],
    *,
    modules: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj"),
    rank: int = 4,
    alpha: float = 8.0,
    size: float = 0.02,
    dtype: str = "F32",
    config: Mapping[str, Any] | None = None,
) -> dict[str, FloatArray]:
    """Write a random PEFT LoRA adapter of a model.

    Parameters
    ----------
    size : float
        Standard deviation of the factors, in weight units.
    config : mapping, optional
        Further keys of ``adapter_config.json``.

    Returns
    -------
    dict
        The change of each adapted weight, in float64, computed from the factors as stored.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(modules),
        **(config or {}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    tensors: dict[str, FloatArray] = {}
    changes: dict[str, FloatArray] = {}
    for name, weight in base.items():
        module = name.removesuffix(".weight")
        if module.rsplit(".", 1)[-1] in modules and weight.ndim == 2:
            a = quantise(size * generator.standard_normal((rank, weight.shape[1])), dtype)
            b = quantise(size * generator.standard_normal((weight.shape[0], rank)), dtype)
            tensors[f"base_model.model.{module}.lora_A.weight"] = a
            tensors[f"base_model.model.{module}.lora_B.weight"] = b
            changes[name] = (b @ a) * (alpha / rank)
    write_safetensors(folder / "adapter_model.safetensors", tensors, dtype)
    return changes


def planted_mixture(
    generator: np.random.Generator,
    coefficients: Sequence[float],
    *,
    parameters: int = 2000,
    correlation: float = 0.0,
    noise: float = 0.0,
) -> tuple[Statistics, FloatArray, FloatArray]:
    """Make a regression with a known answer.

    Parameters
    ----------
    coefficients : sequence of float
        The truth, one per atom.
    correlation : float
        Cosine between any two atoms, about; in [0, 1).
    noise : float
        Norm of the noise over that of the mixture.

    Returns
    -------
    statistics : Statistics
    atoms : array, shape (parameters, K)
    target : array, shape (parameters,)
    """
    truth = np.asarray(coefficients, dtype=np.float64)
    shared = generator.standard_normal((parameters, 1))
    own = generator.standard_normal((parameters, len(truth)))
    atoms = np.sqrt(correlation) * shared + np.sqrt(1.0 - correlation) * own
    target = atoms @ truth
    disturbance = generator.standard_normal(parameters)
    target = target + noise * np.linalg.norm(target) / np.linalg.norm(disturbance) * disturbance
    return Statistics.of(atoms, target), atoms, target
