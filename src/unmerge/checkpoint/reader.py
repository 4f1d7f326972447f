"""A checkpoint in one file or in shards, as named tensors.

Layouts follow the Hugging Face conventions; where ``model.safetensors.index.json`` exists it is authoritative.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from unmerge.checkpoint.header import UnreadTensor, read_header
from unmerge.checkpoint.tensor import Tensor
from unmerge.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_JSON_BYTES = 64_000_000
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<total>\d{5})\.safetensors$")


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A full model on disk.

    Attributes
    ----------
    path : Path
        The folder or file that was opened.
    tensors : mapping
        Floating-point tensors by stored name.
    config : mapping
        ``config.json``, empty where there is none.
    unread : tuple of UnreadTensor
        Tensors of types that are not read.
    notices : tuple of str
        What a user should know about the files: unindexed tensors, a stale index.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    unread: tuple[UnreadTensor, ...] = ()
    notices: tuple[str, ...] = ()

    @property
    def ties_embeddings(self) -> bool:
        """Whether the configuration says that the output layer is the input embedding."""
        text = self.config.get("text_config")
        inner = text if isinstance(text, dict) else {}
        return bool(self.config.get("tie_word_embeddings", inner.get("tie_word_embeddings", False)))

    @property
    def parameters(self) -> int:
        """The number of floating-point parameters."""
        return sum(_size(tensor) for tensor in self.tensors.values())


def _size(tensor: Tensor) -> int:
    size = 1
    for extent in tensor.shape:
        size *= extent
    return size


def open_checkpoint(path: Path, *, allow_pickle: bool = False) -> Checkpoint:
    """Open a folder or a file as a full model; reads headers, no weights.

    Parameters
    ----------
    path : Path
        A folder in the Hugging Face layout, or one ``.safetensors`` file (``.bin`` with `allow_pickle`).
    allow_pickle : bool
        Allow ``.bin`` files, loaded by torch with ``weights_only=True``.

    Raises
    ------
    CheckpointError
        If there is no model, a shard is missing, a file is damaged, or the weights are quantised.
    """
    if path.is_dir():
        checkpoint = _open_folder(path, allow_pickle=allow_pickle)
    elif path.suffix == ".safetensors":
        checkpoint = _from_files(path, [path], {})
    elif path.suffix in {".bin", ".pt", ".pth"}:
        checkpoint = _open_pickles(path, [path], {}, allow_pickle=allow_pickle)
    else:
        raise CheckpointError(f"{path}: not a model: expected a folder or a .safetensors file")
    refuse_quantised(checkpoint)
    return checkpoint


def read_json(path: Path) -> dict[str, Any]:
    """Read a small JSON object from a file that may be anything.

    Raises
    ------
    CheckpointError
        If it is missing, larger than `MAX_JSON_BYTES`, or not a JSON object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: refused: a JSON file of more than {MAX_JSON_BYTES:,} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return value


def read_weight_map(index: Path) -> dict[str, str]:
    """Read the tensor-to-shard map of an index file; shard names that leave the folder are refused.

    Raises
    ------
    CheckpointError
        If the file is damaged, or a shard name is absolute or climbs out of the folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map; expected one entry per tensor")
    for shard in weight_map.values():
        if not isinstance(shard, str) or not _stays_inside(shard):
            raise CheckpointError(f"{index}: refused: shard name {shard!r} leaves the folder")
    return weight_map


def _stays_inside(name: str) -> bool:
    pure = PurePosixPath(name)
    return bool(name) and not pure.is_absolute() and ".." not in pure.parts and "\\" not in name


def _open_folder(folder: Path, *, allow_pickle: bool) -> Checkpoint:
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if (folder / INDEX).is_file():
        return _open_indexed(folder, config)
    if (folder / SINGLE).is_file():
        return _from_files(folder, [folder / SINGLE], config)
    files = [file for file in sorted(folder.glob("*.safetensors")) if file.name != "adapter_model.safetensors"]
    if files:
        _check_complete(folder, files)
        notice = f"{folder}: no {INDEX}; read {', '.join(file.name for file in files)}"
        return _from_files(folder, files, config, notices=[notice])
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if pickles:
        return _open_pickles(folder, pickles, config, allow_pickle=allow_pickle)
    raise CheckpointError(f"{folder}: not a model: no {SINGLE}, no {INDEX}, no adapter_config.json")


def _open_indexed(folder: Path, config: dict[str, Any]) -> Checkpoint:
    weight_map = read_weight_map(folder / INDEX)
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if len(missing) == len(shards) and (folder / SINGLE).is_file():
        notice = f"{folder / INDEX} is stale (none of its {len(shards)} shards exists); read {SINGLE} instead"
        return _from_files(folder, [folder / SINGLE], config, notices=[notice])
    if missing:
        message = (
            f"{folder}: {len(missing)} of {len(shards)} shards named by {INDEX} are missing "
            f"({', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}); download them"
        )
        raise CheckpointError(message)
    tensors: dict[str, Tensor] = {}
    unread: list[UnreadTensor] = []
    unindexed: list[str] = []
    for shard in shards:
        found, other = read_header(folder / shard)
        wanted = {name for name, where in weight_map.items() if where == shard}
        absent = sorted(wanted - found.keys() - {item.name for item in other})
        if absent:
            message = f"{folder / INDEX} is stale: it puts {absent[0]!r} in {shard}, which does not hold it"
            raise CheckpointError(message)
        tensors.update({name: found[name] for name in found if name in wanted})
        unread.extend(item for item in other if item.name in wanted)
        unindexed.extend(sorted(found.keys() - wanted))
    notices = []
    if unindexed:
        notices.append(
            f"{folder}: {len(unindexed)} tensors are in the shards but not in {INDEX}, and were ignored "
            f"(first: {unindexed[0]})"
        )
    return Checkpoint(folder, _sorted(tensors), config, tuple(unread), tuple(notices))


def _from_files(
    path: Path, files: Iterable[Path], config: dict[str, Any], *, notices: Iterable[str] = ()
) -> Checkpoint:
    tensors: dict[str, Tensor] = {}
    unread: list[UnreadTensor] = []
    for file in files:
        found, other = read_header(file)
        twice = sorted(tensors.keys() & found.keys())
        if twice:
            raise CheckpointError(f"{path}: tensor {twice[0]!r} is in two files; add a {INDEX} to say which counts")
        tensors.update(found)
        unread.extend(other)
    if not tensors and not unread:
        raise CheckpointError(f"{path}: not a model: it holds no tensors")
    return Checkpoint(path, _sorted(tensors), config, tuple(unread), tuple(notices))


def _sorted(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(sorted(tensors.items()))


def _check_complete(folder: Path, files: list[Path]) -> None:
    matches = [match for file in files if (match := _SHARD.match(file.name))]
    for match in matches:
        present = sum(other["stem"] == match["stem"] for other in matches)
        if present != int(match["total"]):
            message = (
                f"{folder}: {present} of {int(match['total'])} shards of {match['stem']!r} are there; download the rest"
            )
            raise CheckpointError(message)


def _open_pickles(path: Path, files: list[Path], config: dict[str, Any], *, allow_pickle: bool) -> Checkpoint:
    if not allow_pickle:
        message = (
            f"{path}: only pickle weights ({files[0].name}), which can run code when loaded; convert them to "
            "safetensors, or pass --allow-pickle (torch reads them with weights_only=True)"
        )
        raise CheckpointError(message)
    from unmerge.checkpoint.pickled import load_pickle

    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(load_pickle(file))
    return Checkpoint(path, _sorted(tensors), config)


def refuse_quantised(checkpoint: Checkpoint) -> None:
    """Refuse weights that were packed into integers.

    Raises
    ------
    CheckpointError
        If the configuration or the tensors say so.
    """
    quantisation = checkpoint.config.get("quantization_config")
    packed = [item for item in checkpoint.unread if item.name.endswith((".qweight", ".weight", ".absmax"))]
    if isinstance(quantisation, dict) or packed:
        how = quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else packed[0].dtype
        message = (
            f"{checkpoint.path}: quantised weights ({how}); unmerge reads BF16, F16, F32 and F64: "
            "dequantise the model first"
        )
        raise CheckpointError(message)
