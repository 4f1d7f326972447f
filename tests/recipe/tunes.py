"""Small fine-tunes whose changes are of low rank, and merges of them by the real mergekit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.recipe.worlds import CONFIG, LAYERS, World
from unmerge.checkpoint.reader import open_checkpoint
from unmerge.recipe.candidates import Members
from unmerge.recipe.document import ModelReference, Recipe, parse_recipe
from unmerge.recipe.proof import Recovery
from unmerge.recipe.recovery import Search, draw_changes, recover
from unmerge.recipe.sample import Sample
from unmerge.recipe.sources import Model, open_model
from unmerge.recipe.trial import Trial
from unmerge.testing import quantise, tiny_model, write_adapter, write_checkpoint

HIDDEN = 96
KNOWN = ("chat", "code", "law", "math")
DRAFTS = ("draft-1", "draft-2", "draft-3")
SEEDS = 5000
"""Seeds that are searched: all seeds of `MERGES` are smaller."""


@dataclass(frozen=True, slots=True)
class Merge:
    """A recipe with the names of models for their paths, and mergekit's random seed."""

    document: Mapping[str, Any]
    seed: int | None = None


def merge(method: str, models: Mapping[str, Mapping[str, Any]], seed: int | None = None, **more: Any) -> Merge:
    entries = [{"model": name, "parameters": dict(own)} for name, own in models.items()]
    base = {} if method == "linear" else {"base_model": "base"}
    return Merge({"merge_method": method, **base, "models": entries, "dtype": "bfloat16", **more}, seed)


def weights(*values: Any, names: Sequence[str] = ("math", "code", "chat"), **more: Any) -> dict[str, dict[str, Any]]:
    """Weights of so many models, and more parameters: one value for all, or a tuple of one for each."""
    return {
        name: {"weight": value, **{key: v[i] if isinstance(v, tuple) else v for key, v in more.items()}}
        for i, (name, value) in enumerate(zip(names, values, strict=False))
    }


MERGES = {
    "linear": merge("linear", weights(0.5, 0.3, 0.2)),
    "linear in float32": merge("linear", weights(0.5, 0.3, 0.15), dtype="float32", out_dtype="bfloat16"),
    "task_arithmetic": merge("task_arithmetic", weights([0.2, 0.8], 0.6)),
    "task_arithmetic in float32": merge(
        "task_arithmetic", weights(0.7, 0.4, 0.25), dtype="float32", out_dtype="bfloat16"
    ),
    "ties": merge("ties", weights(0.5, 0.3, 0.2, density=(0.7, 0.5, 0.3))),
    "ties of one density": merge("ties", weights(0.5, 0.3, 0.2, density=0.5)),
    "ties, not normalized": merge("ties", weights(0.5, 0.4, 0.3, density=0.6), parameters={"normalize": False}),
    "ties with lambda": merge("ties", weights(0.5, 0.4, density=0.6), parameters={"lambda": 1.3}),
    "breadcrumbs": merge("breadcrumbs", weights(0.7, 0.4, density=0.6, gamma=0.02)),
    "dare_linear": merge("dare_linear", weights(0.6, 0.4, names=("math", "code"), density=0.5), 42),
    "dare_ties": merge("dare_ties", weights(0.5, 0.3, 0.4, names=("math", "chat", "code"), density=0.6), 4242),
    "della": merge("della", weights(0.6, 0.4, density=0.5, epsilon=0.1), 11),
    "slerp": Merge(
        {
            "merge_method": "slerp",
            "base_model": "code",
            "models": [{"model": "code"}, {"model": "math"}],
            "parameters": {"t": 0.35},
            "dtype": "bfloat16",
        }
    ),
    "model_stock": Merge(
        {
            "merge_method": "model_stock",
            "base_model": "base",
            "models": [{"model": name} for name in DRAFTS],
            "dtype": "bfloat16",
        }
    ),
}
"""Merges of known fine-tunes."""


class Tunes(World):
    """A base in bfloat16, four fine-tunes that change its attention by a per cent, and three drafts of a fifth."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.dtype = "BF16"
        rng = np.random.default_rng(5)
        model = tiny_model(rng, layers=LAYERS, hidden=HIDDEN)
        self.base = {name: quantise(value, "BF16") for name, value in model.items()}
        self.write("base", self.base)
        for name in KNOWN:
            self._write_tune(name, self._change(rng, f"adapter-{name}"))
        common = self._change(rng, "adapter-draft")
        for name in DRAFTS:
            own = self._change(rng, f"adapter-{name}")
            self._write_tune(name, {key: common[key] + own[key] for key in own})
        self._recovered: dict[str, Recovery] = {}

    def _change(self, rng: np.random.Generator, name: str) -> dict[str, Any]:
        return write_adapter(self.folder / name, rng, self.base, rank=8, alpha=16.0, size=0.011)

    def _write_tune(self, name: str, change: Mapping[str, Any]) -> None:
        self.write(name, {key: value + change.get(key, 0.0) for key, value in self.base.items()})

    def write(self, name: str, tensors: Mapping[str, Any], dtype: str | None = None) -> Path:
        config = {**CONFIG, "hidden_size": HIDDEN, "intermediate_size": 3 * HIDDEN}
        return write_checkpoint(self.folder / name, tensors, dtype or self.dtype, config=config)

    def merged(self, name: str) -> Path:
        """Return the merge of that name in `MERGES`, which is made when it is first asked for."""
        output = self.folder / f"merged {name}"
        made = MERGES[name]
        return output if output.exists() else self.merge(output.name, made.document, seed=made.seed)

    def atoms(self, name: str) -> list[str]:
        return [self.path(atom) for atom in (*DRAFTS, "math")] if name == "model_stock" else self.known

    @property
    def known(self) -> list[str]:
        return [self.path(name) for name in KNOWN]

    def recovered(self, name: str) -> Recovery:
        """Return what is recovered of that merge, once."""
        if name not in self._recovered:
            target = str(self.merged(name))
            self._recovered[name] = recover(target, self.atoms(name), base=self.path("base"), search=Search(SEEDS))
        return self._recovered[name]

    def truth(self, name: str) -> Recipe:
        """Return the recipe that a merge was made by."""
        import yaml

        return parse_recipe(yaml.safe_dump(self.recipe(MERGES[name].document)))

    def reference(self, name: str) -> ModelReference:
        return ModelReference(self.path(name))

    def members(self, *names: str) -> Members:
        return Members(self.reference("base"), tuple(self.reference(name) for name in names))

    def models(self, members: Members) -> dict[ModelReference, Model]:
        return {reference: open_model(reference, Path()) for reference in (members.base, *members.models)}

    def sample(self, name: str, members: Members) -> Sample:
        """Return the sharp elements of a merge."""
        return draw_changes(open_checkpoint(self.merged(name)), self.models(members), members)

    def trial(self, name: str, members: Members, *tensors: str) -> Trial:
        """Return a trial on some tensors of a merge: those whose names hold one of the texts, in order."""
        stored = open_checkpoint(self.merged(name)).tensors
        names = tuple(sorted(key for key in stored if any(text in key for text in tensors)))
        return Trial(names, self.models(members), {key: stored[key] for key in names})
