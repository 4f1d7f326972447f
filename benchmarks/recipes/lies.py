"""True recipes and recipes with one small lie, drawn by an explicit generator: a number always names the same two."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import numpy as np

from benchmarks.recipes.cases import DICTIONARY, Document, merge

Lie = Literal["weight", "member", "density"]

COUNT = 50
"""Recipes that are true, and as many that lie."""
LIES: tuple[Lie, ...] = ("weight", "member", "density")
TRIMMED = ("ties", "breadcrumbs", "breadcrumbs_ties")
RANDOM = ("dare_linear", "dare_ties", "della_linear", "della")
WEIGHED = ("linear", "task_arithmetic", "nuslerp", "multislerp", *TRIMMED, *RANDOM)
METHODS: dict[Lie, tuple[str, ...]] = {
    "weight": (*WEIGHED, "slerp"),
    "member": (*WEIGHED, "slerp", "karcher", "model_stock", "sce", "ram", "ramplus_tl", "passthrough"),
    "density": (*TRIMMED, *RANDOM),
}
WITHOUT_BASE = ("linear", "multislerp", "nuslerp", "karcher", "passthrough", "slerp")
SIBLING_SEEDS = (1, 2)
STEP = 0.02
"""By how much a weight is off."""
DENSITY, CLAIMED_DENSITY = 0.6, 0.5
_SEED = 30


@dataclass(frozen=True, slots=True)
class Claim:
    """A merge, and what is claimed of it.

    Attributes
    ----------
    name : str
        Unique.
    kind : str
        ``true``, or what the lie is about.
    made, claimed : dict
        The recipe that the merge was made by, and the one that is verified.
    seed : int
        mergekit's.
    seeded : bool
        Whether the seed is told.
    subject : str
        The model that is lied about, as it is named in the claimed recipe.
    says, truth : str
        What the recipe says, and what is true.
    """

    name: str
    kind: Literal["true"] | Lie
    made: Document
    claimed: Document
    seed: int
    seeded: bool
    subject: str = ""
    says: str = ""
    truth: str = ""

    @property
    def method(self) -> str:
        """The method, as mergekit calls it."""
        return str(self.made["merge_method"])


def claims() -> list[Claim]:
    """Return the true and the lying recipes, one after the other."""
    return [claim for number in range(COUNT) for claim in draw(number)]


def draw(number: int) -> tuple[Claim, Claim]:
    """Draw a true recipe, and the same merge's recipe with a lie in it."""
    generator = np.random.default_rng([_SEED, number])
    kind = LIES[number % len(LIES)]
    methods = METHODS[kind]
    method = methods[number // len(LIES) % len(methods)]
    made = _recipe(generator, method, kind)
    seed, seeded = int(generator.integers(1, 1 << 20)), method in RANDOM and bool(number // len(LIES) // 2 % 2)
    claimed, subject, says, truth = _LIARS[kind](generator, made)
    stem = f"{number:02d}-{method}"
    true = Claim(f"{stem}-true", "true", made, made, seed, seeded)
    return true, Claim(f"{stem}-{kind}", kind, made, claimed, seed, seeded, subject, says, truth)


def _recipe(generator: np.random.Generator, method: str, kind: Lie) -> Document:
    count = {"slerp": 2, "nuslerp": 2, "passthrough": 1}.get(method) or int(generator.integers(2, 5))
    models = tuple(str(name) for name in generator.choice(DICTIONARY, count, replace=False))
    if method == "slerp":
        return merge(method, models, base=models[0], shared={"t": _decimal(generator, 0.2, 0.8)})
    own: dict[str, tuple[float, ...]] = {}
    if method in WEIGHED:
        own["weight"] = tuple(_decimal(generator, 0.15, 0.9) for _ in models)
    if method in METHODS["density"]:
        # DELLA's probabilities must stay between 0 and 1.
        densities = (DENSITY,) if kind == "density" else (0.4, 0.5, 0.6, 0.7, 0.8)
        own["density"] = (float(generator.choice(densities)),) * count
    if method in ("breadcrumbs", "breadcrumbs_ties"):
        own["gamma"] = (0.02,) * count
    if method in ("della", "della_linear"):
        own["epsilon"] = (0.1,) * count
    return merge(method, models, base=None if method in WITHOUT_BASE else "base", **own)


def _decimal(generator: np.random.Generator, low: float, high: float) -> float:
    return round(float(generator.uniform(low, high)), 2)


def _lie_about_weight(generator: np.random.Generator, made: Document) -> tuple[Document, str, str, str]:
    claimed = deepcopy(made)
    step = float(generator.choice((-STEP, STEP)))
    if made["merge_method"] == "slerp":
        settings, name, subject = claimed["parameters"], "t", ""
    else:
        entry = claimed["models"][int(generator.integers(len(claimed["models"])))]
        settings, name, subject = entry["parameters"], "weight", entry["model"]
    truth = settings[name]
    settings[name] = round(truth + step, 2)
    return claimed, subject, f"{settings[name]:g}", f"{truth:g}"


def _lie_about_member(generator: np.random.Generator, made: Document) -> tuple[Document, str, str, str]:
    claimed = deepcopy(made)
    # A slerp's first model is its base_model as well, so the last one is exchanged.
    entry = claimed["models"][-1]
    truth = str(entry["model"])
    entry["model"] = f"{truth.rpartition('-')[0]}-{int(generator.choice(SIBLING_SEEDS))}"
    return claimed, entry["model"], entry["model"], truth


def _lie_about_density(generator: np.random.Generator, made: Document) -> tuple[Document, str, str, str]:
    claimed = deepcopy(made)
    entry = claimed["models"][int(generator.integers(len(claimed["models"])))]
    entry["parameters"]["density"] = CLAIMED_DENSITY
    return claimed, entry["model"], f"{CLAIMED_DENSITY:g}", f"{DENSITY:g}"


_LIARS = {"weight": _lie_about_weight, "member": _lie_about_member, "density": _lie_about_density}
