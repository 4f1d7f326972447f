"""Write mergekit recipes and run the real ``mergekit-yaml`` program on them, offline."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from unmerge.errors import MissingExtraError, UnmergeError

METHODS = ("linear", "task_arithmetic", "ties", "dare_linear")
"""mergekit's names of the four methods of the paper."""


def write_recipe(
    recipe: Path,
    *,
    method: str,
    weights: Mapping[Path, float],
    base: Path,
    density: float | Mapping[Path, float] | None = None,
    normalize: bool | None = None,
    int8_mask: bool | None = None,
    dtype: str = "bfloat16",
) -> Path:
    """Write a merge as mergekit's YAML.

    Parameters
    ----------
    recipe : path
        File to write. Models are named relative to its folder, so the whole tree may be moved.
    method : str
        One of `METHODS`.
    weights : mapping of path to float
        The checkpoint folders to merge, in order, with their weights.
    base : path
        The base's checkpoint folder. Linear merges do not use it.
    density : float or mapping of path to float, optional
        Share of each task vector to keep, from 0 to 1, for all models or one by one (ties, dare_linear).
    normalize : bool, optional
        Divide by the sum of the weights; by default mergekit decides (linear and ties do).
    int8_mask : bool, optional
        Hold the masks of ties as int8.
    dtype : str
        Arithmetic and storage type.

    Returns
    -------
    path
        `recipe`.

    Raises
    ------
    UnmergeError
        The method is not one of `METHODS`, or there is no model.
    """
    if method not in METHODS or not weights:
        message = f"cannot write a {method!r} merge of {len(weights)} models: give one of {', '.join(METHODS)}"
        raise UnmergeError(f"{message} and at least one model")
    densities = density if isinstance(density, Mapping) else dict.fromkeys(weights, density)
    shared = _given(normalize=normalize, int8_mask=int8_mask)
    document: dict[str, Any] = {
        "merge_method": method,
        **({} if method == "linear" else {"base_model": _relative(base, recipe)}),
        "models": [
            {
                "model": _relative(model, recipe),
                "parameters": _given(weight=float(weight), density=densities.get(model)),
            }
            for model, weight in weights.items()
        ],
        **({"parameters": shared} if shared else {}),
        "dtype": dtype,
    }
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return recipe


def _given(**options: float | bool | None) -> dict[str, float | bool]:
    return {name: value for name, value in options.items() if value is not None}


def _relative(model: Path, recipe: Path) -> str:
    return Path(os.path.relpath(model.resolve(), recipe.parent.resolve())).as_posix()


def find_mergekit() -> Path:
    """Return the ``mergekit-yaml`` program of this environment, or else the first one on PATH.

    Raises
    ------
    MissingExtraError
        There is none.
    """
    # Not resolved: the interpreter of a virtual environment is a link to the one outside.
    search = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    program = shutil.which("mergekit-yaml", path=search)
    if program is None:
        raise MissingExtraError("mergekit-yaml was not found: pip install 'unmerge[experiment]'")
    return Path(program)


def run_mergekit(recipe: Path, output: Path, *, seed: int | None = None) -> Path:
    """Merge with the real mergekit, in a process of its own.

    Parameters
    ----------
    recipe : path
        YAML file; models in it are looked up relative to its folder.
    output : path
        Checkpoint folder to write: weights and tokenizer. An older one is replaced once the merge is done.
    seed : int, optional
        mergekit's ``--random-seed``. Without it a dare merge differs from run to run.

    Returns
    -------
    path
        `output`.

    Raises
    ------
    UnmergeError
        mergekit failed; the message ends in its last line.
    MissingExtraError
        mergekit is not installed.
    """
    options = ["--quiet", "--no-write-model-card", *([] if seed is None else ["--random-seed", str(seed)])]
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
        merged = Path(temporary).resolve() / "merged"
        command = [str(find_mergekit()), str(recipe.resolve()), str(merged), *options]
        done = subprocess.run(command, cwd=recipe.parent, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()
            message = f"mergekit failed on {recipe} with exit code {done.returncode}: {lines[-1].strip()}"
            raise UnmergeError(message)
        shutil.rmtree(output, ignore_errors=True)
        merged.rename(output)
    return output


def merge_in_process(recipe: Path, output: Path, *, seed: int, threads: int = 1) -> Path:
    """Merge with mergekit's public API: `run_mergekit` without starting a program, and without a tokenizer.

    Importing mergekit takes ten times as long as merging small models, so many merges should share a process.

    Parameters
    ----------
    recipe : path
        YAML file; models in it are looked up relative to its folder.
    output : path
        Checkpoint folder to write.
    seed : int
        Of the masks of a dare merge.
    threads : int
        torch's CPU threads.

    Returns
    -------
    path
        `output`.

    Raises
    ------
    UnmergeError
        mergekit failed; the message holds its reason.
    MissingExtraError
        mergekit is not installed.
    """
    with _repeatable_merge(threads):
        try:
            from mergekit.config import MergeConfiguration
            from mergekit.merge import run_merge
            from mergekit.options import MergeOptions
        except ImportError as error:
            message = f"merging needs the package {error.name}: pip install 'unmerge[experiment]'"
            raise MissingExtraError(message) from error
        options = MergeOptions(random_seed=seed, quiet=True, write_model_card=False, copy_tokenizer=False)
        try:
            run_merge(MergeConfiguration.model_validate(_absolute(recipe)), str(output), options)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise UnmergeError(f"mergekit failed on {recipe}: {reason}") from error
    return output


@contextmanager
def _repeatable_merge(threads: int) -> Iterator[None]:
    """Fix torch's threads and hide what mergekit makes others warn of; random states are put back afterwards."""
    import random

    import numpy as np
    import torch
    import transformers

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    previous, python, numpy_state = torch.get_num_threads(), random.getstate(), np.random.get_state()  # noqa: NPY002
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        torch.set_num_threads(previous)
        random.setstate(python)
        np.random.set_state(numpy_state)  # noqa: NPY002


def _absolute(recipe: Path) -> dict[str, Any]:
    """Return a recipe with its models' folders made absolute: this process may be somewhere else."""
    document: dict[str, Any] = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    folder = recipe.parent.resolve()
    models = [{**model, "model": str(folder / model["model"])} for model in document["models"]]
    base = {"base_model": str(folder / document["base_model"])} if "base_model" in document else {}
    return {**document, **base, "models": models}
