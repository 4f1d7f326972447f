"""Small models for merges by the real mergekit, which runs in this process."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from unmerge.checkpoint.dtypes import FloatArray
from unmerge.testing import quantise, tiny_model, write_checkpoint

LAYERS, HIDDEN, VOCABULARY = 3, 32, 64
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": 3 * HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


class World:
    """A base and fine-tunes of it, whose changes are a few ulps of bfloat16, in every tensor."""

    def __init__(self, folder: Path, tunes: tuple[str, ...] = ("math", "code", "chat"), hidden: int = HIDDEN) -> None:
        self.folder = folder
        self.config = {**CONFIG, "hidden_size": hidden, "intermediate_size": 3 * hidden}
        rng = np.random.default_rng(3)
        model = tiny_model(rng, layers=LAYERS, hidden=hidden)
        self.base = {name: quantise(value, "BF16") for name, value in model.items()}
        self.write("base", self.base)
        for tune in tunes:
            # Heavy tails, as in real changes: most are small against the grid, some are not.
            self.write(tune, {n: v + 0.001 * rng.standard_t(3, v.shape) for n, v in self.base.items()})

    def write(self, name: str, tensors: Mapping[str, FloatArray], dtype: str = "BF16") -> Path:
        return write_checkpoint(self.folder / name, tensors, dtype, config=self.config)

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def recipe(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """Return a recipe with the names of models replaced by their paths."""
        known = {file.name for file in self.folder.iterdir()}

        def placed(item: Any) -> Any:
            if isinstance(item, dict):
                return {key: placed(value) for key, value in item.items()}
            if isinstance(item, list):
                return [placed(value) for value in item]
            return self.path(item) if isinstance(item, str) and item in known else item

        return {key: placed(value) for key, value in document.items()}

    def merge(self, name: str, document: Mapping[str, Any], *, seed: int | None = None) -> Path:
        """Merge with the real mergekit; the folder holds the recipe as mergekit writes it."""
        recipe = self.recipe(document)
        output = self.folder / name
        with quiet_mergekit():
            from mergekit.config import MergeConfiguration
            from mergekit.merge import run_merge
            from mergekit.options import MergeOptions

            options = MergeOptions(random_seed=seed, quiet=True, write_model_card=False, copy_tokenizer=False)
            run_merge(MergeConfiguration.model_validate(recipe), str(output), options)
        (output / "mergekit_config.yml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        return output

    def claim(self, name: str, document: Mapping[str, Any]) -> Path:
        """Write a recipe beside nothing: what somebody says of weights."""
        file = self.folder / f"{name}.yml"
        file.write_text(yaml.safe_dump(self.recipe(document), sort_keys=False), encoding="utf-8")
        return file


@contextmanager
def quiet_mergekit() -> Iterator[None]:
    """Hide what mergekit and the libraries under it warn of, and put torch's random state back."""
    import torch
    import transformers

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def models(*names: str, **parameters: Any) -> list[dict[str, Any]]:
    """Return entries of models that share their parameters."""
    return [{"model": name, "parameters": dict(parameters)} for name in names]


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
