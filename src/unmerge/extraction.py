"""What no atom explains, written as an adapter that PEFT loads.

A merge may hold a fine-tune that nobody has. What the known ones leave of the target is approximated, weight by
weight, by its leading singular directions; these are LoRA factors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unmerge.alignment import has_vocabulary_rows
from unmerge.checkpoint.adapter import CONFIG, WEIGHTS
from unmerge.dictionary import Base, temporary_folder
from unmerge.directions import directions
from unmerge.errors import UnmergeError
from unmerge.task_vector import Delta, LowRank, Residual, TaskVector

_NOT_LINEAR = re.compile(r"(?:^|\.)(?:(?!embed_out\.)[^.]*embed[^.]*|wte|wpe|shared|[^.]*norm[^.]*|ln_[^.]*)\.weight$")
# Models whose layers keep weights as (in, out), transformers' Conv1D; all others keep (out, in).
_CONV1D_MODELS = {"gpt2", "openai-gpt"}

Matrix32 = NDArray[np.float32]


def extract(
    target: TaskVector,
    atoms: Sequence[tuple[TaskVector, float]],
    base: Base,
    output: Path,
    *,
    rank: int,
    tensors: Collection[str],
    workers: int = 1,
) -> None:
    """Write the target minus ``sum(coefficient * atom)`` as a PEFT LoRA adapter, in F32.

    Parameters
    ----------
    target : TaskVector
        What was taken apart.
    atoms : sequence of (TaskVector, float)
        What explains it, and the coefficients.
    base : Base
        The model that the adapter is for.
    output : Path
        A folder that does not exist yet.
    rank : int
        Rank of the adapter in every module; filled with zeros where what is left has fewer directions.
    tensors : collection of str
        Base names of the weights to look at; those that are not in `linear_weights`, and those that neither the
        target nor an atom changes, have no place in the adapter.
    workers : int
        Threads; the result does not depend on it.

    Raises
    ------
    UnmergeError
        If `output` exists, `rank` is not positive, no linear weight is left to write, or a weight is not finite.
    """
    if output.exists():
        raise UnmergeError(f"{output}: already exists; choose another folder")
    if rank < 1:
        raise UnmergeError(f"rank {rank} given; an adapter needs a rank of at least 1")
    residual = _residual(target, atoms, linear_weights(tensors, base))
    if not residual.deltas:
        message = f"{target.name}: none of the {len(tensors)} tensors given is a changed linear weight; name some"
        raise UnmergeError(message)
    found = directions(residual, rank, workers=workers)
    factors = {name: _factors(found.deltas.get(name), base.shapes[name], rank) for name in residual.deltas}
    output.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(output) as folder:
        _write(folder, factors, base, rank)
        folder.rename(output)


def linear_weights(names: Iterable[str], base: Base) -> list[str]:
    """Return, sorted, the names that are weights of linear layers: matrices, but no embeddings and no norms."""
    stored = base.checkpoint.tensors
    matrices = (name for name in names if name in stored and len(stored[name].shape) == 2)
    return sorted(
        name
        for name in matrices
        if name.endswith(".weight") and not _NOT_LINEAR.search(name) and min(base.shapes[name]) >= 2
    )


def _residual(target: TaskVector, atoms: Sequence[tuple[TaskVector, float]], names: Iterable[str]) -> TaskVector:
    deltas = {}
    for name in names:
        known = tuple((vector.deltas[name], weight) for vector, weight in atoms if name in vector.deltas)
        if name in target.deltas or known:
            deltas[name] = Residual(target.deltas.get(name), known)
    return TaskVector(target.name, target.digest, deltas)


def _factors(delta: Delta | None, shape: tuple[int, int], rank: int) -> tuple[Matrix32, Matrix32]:
    """Return the factors of a change as (rows, rank) and (rank, columns), filled with zeros to `shape` and rank."""
    left, right = np.zeros((shape[0], rank), np.float32), np.zeros((rank, shape[1]), np.float32)
    if isinstance(delta, LowRank):
        left[:, : delta.rank] = delta.left(0, shape[0]) * delta.scale
        right[: delta.rank] = delta.right()
    return left, right


def _write(folder: Path, factors: Mapping[str, tuple[Matrix32, Matrix32]], base: Base, rank: int) -> None:
    from safetensors.numpy import save_file

    transposed = base.checkpoint.config.get("model_type") in _CONV1D_MODELS
    tensors: dict[str, Matrix32] = {}
    for name, (left, right) in factors.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        # lm_head and embed_out are linear layers in these models too.
        a, b = (left.T, right.T) if transposed and not has_vocabulary_rows(name) else (right, left)
        tensors[f"{key}.lora_A.weight"] = np.ascontiguousarray(a)
        tensors[f"{key}.lora_B.weight"] = np.ascontiguousarray(b)
    # The header's entry tells the Hub's and PEFT's readers which framework's names these are.
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    modules = sorted(name.removesuffix(".weight") for name in factors)
    config = _config(base, rank, modules, fan_in_fan_out=transposed)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _config(base: Base, rank: int, modules: list[str], *, fan_in_fan_out: bool) -> dict[str, Any]:
    source = base.source
    reference = source.reference.removeprefix("hf://").partition("@")[0] if source.commit else source.reference
    return {
        "base_model_name_or_path": reference,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,  # PEFT scales by lora_alpha / r
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "revision": source.commit,
        "target_modules": modules,
        "task_type": "CAUSAL_LM",
    }
