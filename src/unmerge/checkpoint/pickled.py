"""PyTorch ``.bin`` files, for those who opt in. With `torch_blocks`, all of the core that imports torch."""

from __future__ import annotations

import pickle
from pathlib import Path

from unmerge.checkpoint.dtypes import DTYPES
from unmerge.checkpoint.tensor import ArrayTensor
from unmerge.errors import CheckpointError, MissingExtraError


def load_pickle(path: Path) -> dict[str, ArrayTensor]:
    """Map a ``.bin`` file with ``torch.load(weights_only=True)``, which runs no code of the file.

    Raises
    ------
    MissingExtraError
        If torch is not installed.
    CheckpointError
        If the file is damaged, or holds anything but tensors.
    """
    try:
        import torch
    except ImportError as error:
        message = f"{path}: reading .bin files needs torch: pip install 'unmerge[torch]'"
        raise MissingExtraError(message) from error
    stored_as = {
        torch.bfloat16: ("BF16", torch.uint16),
        torch.float16: ("F16", torch.uint16),
        torch.float32: ("F32", torch.float32),
        torch.float64: ("F64", torch.float64),
    }
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: not a file of plain tensors: {reason}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: expected a dictionary of tensors, found {type(state).__name__}")
    tensors: dict[str, ArrayTensor] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in stored_as:
            raise CheckpointError(f"{path}: entry {name!r} is not a BF16, F16, F32 or F64 tensor")
        label, raw = stored_as[tensor.dtype]
        bits = tensor.detach().contiguous().view(raw).numpy()
        tensors[name] = ArrayTensor(name, DTYPES[label], tuple(tensor.shape), path, bits)
    return tensors
