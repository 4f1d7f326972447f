"""Merges made by mergekit in this process, of the benchmark's fine-tunes."""

from __future__ import annotations

import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from benchmarks.evidence.material import Material
from benchmarks.recipes.cases import Document
from unmerge.errors import UnmergeError


def path_of(material: Material, name: str) -> str:
    """Return what a recipe calls a model: a folder, or two where it is an adapter on the base."""
    if name == "base":
        return str(material.base.resolve())
    if name.startswith("base+"):
        return f"{path_of(material, 'base')}+{material.adapter(name.removeprefix('base+')).resolve()}"
    return str(material.checkpoint(name).resolve())


def placed(document: Document, material: Material) -> Document:
    """Return a recipe with paths in the place of names."""
    found = deepcopy(document)
    sources = [one for part in found.get("slices", ()) for one in part["sources"]]
    for entry in (*found.get("models", ()), *sources):
        entry["model"] = path_of(material, entry["model"])
    if "base_model" in found:
        found["base_model"] = path_of(material, found["base_model"])
    return found


def run_mergekit(document: Document, output: Path, *, seed: int, threads: int) -> Path:
    """Merge.

    Parameters
    ----------
    document : dict
        The recipe, with paths.
    output : path
        The folder to write; adapters are merged beside it first.
    seed : int
        mergekit's ``--random-seed``.
    threads : int
        torch's.

    Raises
    ------
    UnmergeError
        If mergekit fails.
    """
    import torch
    import transformers
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    told: dict[str, Any] = {"quiet": True, "write_model_card": False, "copy_tokenizer": False}
    options = MergeOptions(random_seed=seed, lora_merge_cache=str(output.with_name("adapted")), **told)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            run_merge(MergeConfiguration.model_validate(document), str(output), options)
        except (RuntimeError, ValueError, KeyError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise UnmergeError(f"mergekit failed on {output.name}: {reason}") from error
    return output


def loaded(text: str) -> Document:
    """Return a recipe's file as a document."""
    document: Document = yaml.safe_load(text)
    return document


def dumped(document: Document) -> str:
    """Return a document as a recipe's file."""
    return yaml.safe_dump(document, sort_keys=False)
