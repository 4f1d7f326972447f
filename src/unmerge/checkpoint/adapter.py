"""PEFT LoRA adapters as files: the configuration, checked, and the stored factors by module.

Nothing is multiplied here. What PEFT can store and unmerge cannot represent is refused by name, never skipped.
Conventions follow PEFT 0.21 (``peft.tuners.lora``, ``peft.utils.save_and_load``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from unmerge.checkpoint.header import read_header
from unmerge.checkpoint.reader import read_json
from unmerge.checkpoint.tensor import Tensor, read_together
from unmerge.errors import CheckpointError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"

_MUTATES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Configuration keys that change what the stored factors mean; set, they are refused by name.
_UNSUPPORTED = {
    "alora_invocation_tokens": "activated LoRA acts on some tokens only, so it is not a change of weights",
    "arrow_config": "Arrow routes between experts at run time",
    "kasa_config": "KaSA changes the base weights",
    "layer_replication": "replicated layers are another architecture",
    "monteclora_config": "MonteCLoRA draws its weights at random",
    "target_parameters": "LoRA on fused parameters (mixture-of-experts layers) is not supported yet",
    "trainable_token_indices": "single trained token rows are not supported yet",
    "use_bdlora": "block-diagonal LoRA stores its factors in blocks",
    "use_qalora": "QA-LoRA pools its inputs",
    "velora_config": "VeLoRA is not supported",
}
_PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?:"
    r"lora_(?P<factor>[AB])(?:\.[^.]+)?\.(?P<kind>weight|bias)"
    r"|lora_embedding_(?P<embedding>[AB])(?:\.[^.]+)?"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.[^.]+)*)$"
)
_ANY_LORA = re.compile(r"\.lora_|\.token_adapter\.")


@dataclass(slots=True, eq=False)
class Factors:
    """The stored parts of one adapted module.

    Attributes
    ----------
    a, b : Tensor
        Shapes (r, in) and (out, r) for a linear module; (r, rows) and (columns, r) for an embedding.
    scale : float
        What PEFT multiplies ``b @ a`` with.
    embedding : bool
        Whether the product is transposed because the module is an embedding.
    bias : Tensor or None
        The bias of ``lora_B`` (``lora_bias=True``), shape (out,).
    magnitude : Tensor or None
        The DoRA magnitude vector.
    """

    a: Tensor
    b: Tensor
    scale: float
    embedding: bool = False
    bias: Tensor | None = None
    magnitude: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """A LoRA adapter on disk.

    Attributes
    ----------
    path : Path
        Its folder.
    config : mapping
        ``adapter_config.json``.
    factors : mapping
        Low-rank parts by module name, without PEFT's prefix.
    replaced : mapping
        Full tensors that replace the base's (``modules_to_save``, ``bias``, saved embeddings), by tensor name.
    fan_in_fan_out : bool
        Whether linear weights are stored as (in, out), as in GPT-2.
    """

    path: Path
    config: Mapping[str, Any]
    factors: Mapping[str, Factors]
    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    fan_in_fan_out: bool = False

    @property
    def base_reference(self) -> str | None:
        """The base model that the adapter says it was trained on."""
        reference = self.config.get("base_model_name_or_path")
        return reference if isinstance(reference, str) and reference else None

    def in_memory(self) -> Adapter:
        """Return it with every tensor read.

        Raises
        ------
        CheckpointError
            If a file cannot be read.
        """
        stored = [
            tensor
            for found in self.factors.values()
            for tensor in (found.a, found.b, found.bias, found.magnitude)
            if tensor is not None
        ]
        held = read_together([*stored, *self.replaced.values()])
        factors = {
            module: replace(
                found,
                a=held[id(found.a)],
                b=held[id(found.b)],
                bias=found.bias and held[id(found.bias)],
                magnitude=found.magnitude and held[id(found.magnitude)],
            )
            for module, found in self.factors.items()
        }
        return replace(self, factors=factors, replaced={name: held[id(item)] for name, item in self.replaced.items()})


def is_adapter(folder: Path) -> bool:
    """Tell whether a folder holds a PEFT adapter."""
    return (folder / CONFIG).is_file()


def open_adapter(folder: Path, *, allow_pickle: bool = False) -> Adapter:
    """Open a PEFT adapter folder; reads the configuration and the header, no weights.

    Raises
    ------
    CheckpointError
        If a file is missing or damaged, the adapter is of another PEFT type, or it uses an option whose
        stored factors do not describe a change of the base's weights.
    """
    config = read_json(folder / CONFIG)
    _check_config(folder, config)
    factors, replaced = _sort_tensors(folder, _read_weights(folder, allow_pickle=allow_pickle), config)
    if not factors and not replaced:
        raise CheckpointError(f"{folder}: an adapter without weights")
    return Adapter(folder, config, factors, replaced, bool(config.get("fan_in_fan_out")))


def _check_config(folder: Path, config: dict[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{folder}: PEFT type {kind!r} is not supported; expected LORA")
    for key, reason in _UNSUPPORTED.items():
        if config.get(key):
            raise CheckpointError(f"{folder}: {key} is set: {reason}")
    start = config.get("init_lora_weights", True)
    name = start.lower() if isinstance(start, str) else ""
    if name.startswith(_MUTATES_BASE) or config.get("lora_ga_config"):
        message = (
            f"{folder}: initialised with {start!r}, which changes the base weights, so its factors are not the "
            "change from the published base; convert it to a plain LoRA first (PEFT: save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )
        raise CheckpointError(message)


def _read_weights(folder: Path, *, allow_pickle: bool) -> dict[str, Tensor]:
    if (folder / WEIGHTS).is_file():
        tensors, unread = read_header(folder / WEIGHTS)
        if unread:
            raise CheckpointError(f"{folder / WEIGHTS}: tensor {unread[0].name!r} has type {unread[0].dtype}")
        return dict(tensors)
    if not (folder / PICKLED_WEIGHTS).is_file():
        raise CheckpointError(f"{folder}: an {CONFIG} without {WEIGHTS}; download it")
    if not allow_pickle:
        message = (
            f"{folder}: only pickle weights ({PICKLED_WEIGHTS}), which can run code when loaded; convert them to "
            "safetensors, or pass --allow-pickle (torch reads them with weights_only=True)"
        )
        raise CheckpointError(message)
    from unmerge.checkpoint.pickled import load_pickle

    return dict(load_pickle(folder / PICKLED_WEIGHTS))


def _sort_tensors(
    folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]
) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    replaced: dict[str, Tensor] = {}
    for key, tensor in sorted(tensors.items()):
        name = key.removeprefix(_PREFIX)
        match = _FACTOR.match(name)
        if match:
            parts.setdefault(match["module"], {})[_part(match)] = tensor
        elif _ANY_LORA.search(name):
            raise CheckpointError(f"{folder}: tensor {key!r} is not a part of LoRA that unmerge knows")
        else:
            replaced[_plain_name(name)] = tensor
    return {module: _factors(folder, module, found, config) for module, found in parts.items()}, replaced


def _part(match: re.Match[str]) -> str:
    if match["factor"]:
        return f"{match['factor']}.{match['kind']}"
    return f"E{match['embedding']}" if match["embedding"] else "magnitude"


def _plain_name(name: str) -> str:
    # `lm_head.modules_to_save.default.weight` and `q_proj.base_layer.bias` both replace a tensor of the base.
    return re.sub(r"\.(modules_to_save(\.default)?|base_layer)\.", ".", name)


def _factors(folder: Path, module: str, found: dict[str, Tensor], config: dict[str, Any]) -> Factors:
    embedding = "EA" in found or "EB" in found
    a, b = (found.get("EA"), found.get("EB")) if embedding else (found.get("A.weight"), found.get("B.weight"))
    if a is None or b is None:
        raise CheckpointError(f"{folder}: module {module!r} has only one of its two LoRA factors")
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise CheckpointError(f"{folder}: module {module!r}: LoRA on convolutions is not supported")
    rank = _by_pattern(config, "rank_pattern", module, config.get("r"))
    if a.shape[0] != b.shape[1] or a.shape[0] != rank or not a.shape[0]:
        message = (
            f"{folder}: module {module!r} has factors of shapes {list(a.shape)} and {list(b.shape)}; "
            f"{CONFIG} says rank {rank}"
        )
        raise CheckpointError(message)
    alpha = _by_pattern(config, "alpha_pattern", module, config.get("lora_alpha"))
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise CheckpointError(f"{folder}: module {module!r} has lora_alpha {alpha!r}; expected a number")
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return Factors(a, b, scale, embedding, found.get("B.bias"), found.get("magnitude"))


def _by_pattern(config: dict[str, Any], pattern: str, module: str, default: Any) -> Any:
    # peft.utils.other.get_pattern_key: the first key that matches the end of the module's name.
    patterns = config.get(pattern) or {}
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
