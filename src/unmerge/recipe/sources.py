"""The models that a recipe names: found, opened, and read a tensor at a time.

mergekit merges ``MODEL+ADAPTER`` before anything else, by PEFT's ``merge_and_unload``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from unmerge.checkpoint.adapter import is_adapter, open_adapter
from unmerge.checkpoint.reader import Checkpoint, open_checkpoint
from unmerge.checkpoint.source import Source, resolve, split_name
from unmerge.checkpoint.tensor import Tensor, matrix_shape, values
from unmerge.errors import CheckpointError, SourceError
from unmerge.merging.arithmetic import Arithmetic, Array
from unmerge.recipe.adapted import merged_adapter
from unmerge.recipe.document import CARD, CONFIG, ModelReference, find_recipe
from unmerge.task_vector import TaskVector, adapter_deltas, blocks


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A model that can be merged.

    Attributes
    ----------
    name : str
        What messages call it.
    source : Source
        Where its weights were found.
    tensors : mapping of str to Tensor
    notices : tuple of str
        What a user should know about its files.
    """

    name: str
    source: Source
    tensors: Mapping[str, Tensor]
    notices: tuple[str, ...] = field(default=())


def open_model(reference: ModelReference, folder: Path) -> Model:
    """Open a model that a recipe names.

    Parameters
    ----------
    reference : ModelReference
    folder : Path
        The recipe's folder: relative paths are looked for there first, then in the working directory, then on the Hub.

    Raises
    ------
    SourceError, CheckpointError, AlignmentError
        If it, or its adapter, cannot be found or read.
    """
    source = resolve(_local(reference.path, folder) or reference.model)
    checkpoint = open_checkpoint(source.path)
    if reference.adapter is None:
        return Model(str(reference), source, checkpoint.tensors, checkpoint.notices)
    revision = reference.adapter_revision
    remote = reference.adapter if revision is None else f"{reference.adapter}@{revision}"
    adapter = resolve(_local(reference.adapter, folder) or remote)
    return _adapted(str(reference), source, checkpoint, adapter)


def open_candidate(text: str, base: Model | None) -> Model:
    """Open another known fine-tune: a full model, or a PEFT adapter on the recipe's base.

    Parameters
    ----------
    text : str
        A path, a Hub id, or ``NAME=PATH``.
    base : Model or None
        The recipe's base, which adapters are merged into.

    Raises
    ------
    SourceError, CheckpointError, AlignmentError
        If it cannot be found or read, or is an adapter and there is no base.
    """
    name, reference = split_name(text)
    source = resolve(reference)
    label = name or source.default_name
    if not is_adapter(source.path):
        checkpoint = open_checkpoint(source.path)
        return Model(label, source, checkpoint.tensors, checkpoint.notices)
    if base is None:
        raise CheckpointError(f"{text}: an adapter, and the recipe names no base to merge it into; give a full model")
    return _adapted(label, base.source, open_checkpoint(base.source.path), source)


def _local(path: str, folder: Path) -> str | None:
    given = Path(path).expanduser()
    return next((str(found) for found in (folder / given, given) if found.exists()), None)


def _adapted(label: str, source: Source, base: Checkpoint, adapter: Source) -> Model:
    changes, skipped, notices = adapter_deltas(open_adapter(adapter.path), base, label)
    merged = merged_adapter(base, TaskVector(label, "", changes, skipped, notices))
    beyond = tuple(f"{item.name} ({item.model}): {item.reason}" for item in skipped)
    return Model(label, source, merged.tensors, (*merged.notices, *beyond))


def load(tensor: Tensor, arithmetic: Arithmetic, rows: int | None = None) -> Array:
    """Read a tensor and round it to a working type, as ``tensor.to(dtype)`` does.

    Parameters
    ----------
    tensor : Tensor
    arithmetic : Arithmetic
        The working type.
    rows : int, optional
        How many rows to read; all by default.

    Returns
    -------
    array
        In the tensor's shape, held as `arithmetic.holder`.
    """
    whole, columns = matrix_shape(tensor.shape)
    count = whole if rows is None else min(rows, whole)
    loaded = np.empty((count, columns), dtype=arithmetic.holder)
    for start, stop in blocks(0, count, columns):
        loaded[start:stop] = arithmetic.round(values(tensor, start, stop))
    return loaded.reshape(tensor.shape if count == whole else (count, *tensor.shape[1:]))


def claimed_recipe(target: Source) -> Path | None:
    """Return the file beside a target that says how it was made, fetched from the Hub if it lies there.

    ``mergekit_config.yml`` comes before the model card, which counts if it holds a recipe.
    """
    folder = target.path if target.path.is_dir() else target.path.parent
    found = find_recipe(folder)
    if found is not None or target.commit is None:
        return found
    for name in (CONFIG, CARD):
        _fetch(target.reference, name, target.commit)
        found = find_recipe(folder)
        if found is not None:
            return found
    return None


def _fetch(reference: str, name: str, commit: str) -> None:
    """Put one file of a Hub repository beside its weights in the cache; a file that it does not have is no fault."""
    from huggingface_hub import errors, hf_hub_download

    repository = reference.removeprefix("hf://").partition("@")[0]
    try:
        hf_hub_download(repository, name, revision=commit)
    except (errors.EntryNotFoundError, errors.LocalEntryNotFoundError):
        return
    except (errors.HfHubHTTPError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise SourceError(f"{reference}: its {name} could not be fetched: {reason}") from error
