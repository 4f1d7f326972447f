"""The truth of what is unexplained, computed densely in float64 without the code under measurement."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.evidence.material import WEIGHTS, lora_scale

FloatArray = NDArray[np.float64]


def read(path: Path) -> dict[str, FloatArray]:
    """Return all tensors of a safetensors file."""
    from safetensors.torch import load_file  # numpy has no bfloat16

    return {name: tensor.double().numpy() for name, tensor in load_file(path).items()}


def changes(adapter: Path) -> dict[str, FloatArray]:
    """Return what a LoRA adapter adds to each tensor of the base."""
    tensors, scale = read(adapter / WEIGHTS), lora_scale(adapter)
    found = {}
    for name, A in tensors.items():
        if name.endswith(".lora_A.weight"):
            stem = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[f"{stem}.weight"] = scale * (tensors[name.replace(".lora_A.", ".lora_B.")] @ A)
    return found


def unexplained_share(merged: Path, base: Path, parts: Mapping[Path, float]) -> float:
    """Return the energy of a merge's change without its known parts, over the energy of the change.

    Parameters
    ----------
    merged, base : path
        Checkpoint folders of one safetensors file.
    parts : mapping of path to float
        Adapter folders and their true weights.
    """
    after, before = _read_all(merged), _read_all(base)
    rest = {name: after[name] - value for name, value in before.items() if name in after}
    energy = sum(float(np.vdot(change, change)) for change in rest.values())
    for adapter, weight in parts.items():
        for name, change in changes(adapter).items():
            rest[name] = rest[name] - weight * change
    return sum(float(np.vdot(change, change)) for change in rest.values()) / energy


def _read_all(folder: Path) -> dict[str, FloatArray]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in read(path).items()}
