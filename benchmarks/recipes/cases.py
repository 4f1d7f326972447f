"""Which merges are made to be recovered: mergekit's recipes, with names in the place of paths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.evidence.material import dictionary_of

Document = dict[str, Any]
"""A recipe as YAML is loaded; models are ``base``, ``TASK-SEED`` (a checkpoint), ``base+TASK-SEED`` (an adapter)."""
Group = Literal["method", "no seed", "unknown member", "strangers"]

DICTIONARY = dictionary_of(0)
"""The fine-tunes that recovery is given."""
SIBLINGS = tuple(f"{name.rpartition('-')[0]}-1" for name in DICTIONARY)
"""The same tasks, trained in another world: strangers to every merge."""
MATH, XSUM, LATIN, REASON, CODE = (
    f"{task}-0" for task in ("gsm8k_math", "xsum", "latin_translation", "reason_math", "codesearchnet_python")
)
FIVE = (MATH, XSUM, LATIN, REASON, CODE)
UNKNOWN = "squad_qa-0"
"""A fine-tune that the dictionary does not have."""


@dataclass(frozen=True, slots=True)
class Case:
    """A merge and how it is recovered.

    Attributes
    ----------
    name : str
        Unique.
    document : dict
        The recipe.
    group : str
        ``method``: everything is known. ``no seed``: the seed of the masks is not looked for. ``unknown member``: the
        dictionary lacks one. ``strangers``: it lacks all.
    seed : int
        mergekit's ``--random-seed``.
    threads : int
        torch's, in the merge.
    dictionary : tuple of str
        The atoms.
    adapters : bool
        Whether recovery is given adapters rather than checkpoints.
    """

    name: str
    document: Document
    group: Group = "method"
    seed: int = 0
    threads: int = 1
    dictionary: tuple[str, ...] = DICTIONARY
    adapters: bool = False

    @property
    def method(self) -> str:
        """The method, as mergekit calls it."""
        return str(self.document["merge_method"])

    @property
    def members(self) -> frozenset[str]:
        """The fine-tunes that the recipe names."""
        return frozenset(plain_name(name) for name in names_of(self.document)) - {"base"}

    @property
    def known(self) -> frozenset[str]:
        """The members that are in the dictionary."""
        return self.members & set(self.dictionary)


def plain_name(name: str) -> str:
    """Return the fine-tune of a name: an adapter's, where it is on the base."""
    return name.removeprefix("base+")


def names_of(document: Document) -> list[str]:
    """Return the models that a recipe names, in its order."""
    parts = [*document.get("models", ()), *(one for part in document.get("slices", ()) for one in part["sources"])]
    bases = [document["base_model"]] if "base_model" in document else []
    return list(dict.fromkeys([*(part["model"] for part in parts), *bases]))


def merge(
    method: str,
    models: Sequence[str],
    *,
    base: str | None = None,
    shared: Mapping[str, Any] | None = None,
    dtype: str = "bfloat16",
    **own: Any,
) -> Document:
    """Return the recipe of a merge of whole models.

    Parameters
    ----------
    method : str
    models : sequence of str
    base : str, optional
    shared : mapping, optional
        Parameters of the merge.
    dtype : str
        The working type; results are stored in bfloat16.
    **own
        Parameters of each model: a tuple has one for each; anything else, also a gradient (a list), is that of all.
    """
    entries: list[Document] = []
    for place, model in enumerate(models):
        settings = {name: value[place] if isinstance(value, tuple) else value for name, value in own.items()}
        entries.append({"model": model, **({"parameters": settings} if settings else {})})
    return {
        "merge_method": method,
        **({"base_model": base} if base else {}),
        "models": entries,
        **({"parameters": dict(shared)} if shared else {}),
        "dtype": dtype,
        **({"out_dtype": "bfloat16"} if dtype != "bfloat16" else {}),
    }


def stack(*parts: tuple[str, int, int]) -> Document:
    """Return the recipe of layers put on top of each other."""
    slices = [{"sources": [{"model": model, "layer_range": [first, stop]}]} for model, first, stop in parts]
    return {"merge_method": "passthrough", "slices": slices, "dtype": "bfloat16"}


def cases() -> list[Case]:
    """Return all cases, each group from plain to hard."""
    return [
        *_linear(),
        *_task_arithmetic(),
        *_ties(),
        *_dare(),
        *_outliers(),
        *_della(),
        *_spherical(),
        *_others(),
        *_copies(),
        *_without_seed(),
        *_with_unknown(),
        *_with_strangers(),
    ]


def _linear() -> list[Case]:
    return [
        Case("linear-2", merge("linear", FIVE[:2], weight=(0.6, 0.4))),
        Case("linear-3", merge("linear", FIVE[:3], weight=(0.5, 0.3, 0.2))),
        Case("linear-5", merge("linear", FIVE, weight=(0.35, 0.25, 0.2, 0.15, 0.05))),
        Case("linear-float32", merge("linear", FIVE[:3], weight=(0.55, 0.3, 0.15), dtype="float32")),
        Case(
            "linear-not-normalized", merge("linear", FIVE[:2], weight=(0.7, 0.5), shared={"normalize": False})
        ),
        Case("linear-base-counted", merge("linear", (*FIVE[:2], "base"), weight=(0.5, 0.3, 0.2))),
        Case("linear-gradient", merge("linear", FIVE[:2], weight=([0.2, 0.8, 0.3], [0.8, 0.2, 0.7]))),
    ]  # fmt: skip


def _task_arithmetic() -> list[Case]:
    def own(models: Sequence[str], weight: Any, **more: Any) -> Document:
        return merge("task_arithmetic", models, base="base", weight=weight, **more)

    adapted = tuple(f"base+{name}" for name in FIVE[:2])
    return [
        Case("task-arithmetic-3", own(FIVE[:3], (0.7, 0.4, 0.25))),
        Case("task-arithmetic-5", own(FIVE, (0.5, 0.4, 0.3, 0.2, 0.1))),
        Case("task-arithmetic-lambda", own(FIVE[:2], (0.7, 0.4), shared={"lambda": 0.8})),
        Case("task-arithmetic-normalized", own(FIVE[:2], (0.6, 0.3), shared={"normalize": True})),
        Case("task-arithmetic-float32", own(FIVE[:3], (0.7, 0.4, 0.25), dtype="float32")),
        Case("task-arithmetic-gradient", own(FIVE[:2], ([0.2, 0.8], [0.6, 0.1]))),
        Case("task-arithmetic-adapters-known", own(FIVE[:3], (0.7, 0.4, 0.25)), adapters=True),
        Case("task-arithmetic-adapters-merged", own(adapted, (0.7, 0.4)), adapters=True),
    ]


def _ties() -> list[Case]:
    def own(models: Sequence[str], weight: Any, density: Any, **more: Any) -> Document:
        return merge("ties", models, base="base", weight=weight, density=density, **more)

    adapted = tuple(f"base+{name}" for name in FIVE[:2])
    return [
        Case("ties-2", own(FIVE[:2], 1.0, 0.3)),
        Case("ties-3", own(FIVE[:3], (0.5, 0.3, 0.2), 0.5)),
        Case("ties-4-densities", own(FIVE[:4], (0.6, 0.5, 0.3, 0.2), (0.7, 0.5, 0.3, 0.9))),
        Case("ties-5", own(FIVE, (0.3, 0.3, 0.2, 0.1, 0.1), 0.5)),
        Case("ties-sparse", own(FIVE[:3], (0.5, 0.3, 0.4), 0.1)),
        Case("ties-dense", own(FIVE[:3], (0.5, 0.3, 0.4), 0.9)),
        Case("ties-not-normalized", own(FIVE[:3], (0.5, 0.4, 0.3), 0.6, shared={"normalize": False})),
        Case("ties-lambda", own(FIVE[:3], (0.5, 0.4, 0.3), 0.6, shared={"lambda": 1.3})),
        Case("ties-float32", own(FIVE[:3], (0.5, 0.4, 0.3), 0.4, dtype="float32")),
        Case("ties-gradient", own(FIVE[:3], ([0.2, 0.8], [0.6, 0.1], 0.4), (0.5, [0.3, 0.9], 0.6))),
        Case("ties-adapters-known", own(FIVE[:2], (0.7, 0.4), 0.5), adapters=True),
        Case("ties-adapters-merged", own(adapted, (0.7, 0.4), 0.5), adapters=True),
    ]


def _dare() -> list[Case]:
    def linear(models: Sequence[str], weight: Any, density: Any, **more: Any) -> Document:
        return merge("dare_linear", models, base="base", weight=weight, density=density, **more)

    def ties(models: Sequence[str], weight: Any, density: Any, **more: Any) -> Document:
        return merge("dare_ties", models, base="base", weight=weight, density=density, **more)

    return [
        Case("dare-linear-2", linear(FIVE[:2], (0.6, 0.4), 0.9), seed=7),
        Case("dare-linear-3", linear(FIVE[:3], (0.5, 0.3, 0.4), 0.5), seed=42),
        Case("dare-linear-3-two-threads", linear(FIVE[:3], (0.5, 0.3, 0.4), 0.5), seed=42, threads=2),
        Case("dare-linear-4-densities", linear(FIVE[:4], (0.5, 0.3, 0.4, 0.2), (0.7, 0.5, 0.3, 0.8)), seed=31337),
        Case("dare-linear-5-sparse", linear(FIVE, (0.3, 0.3, 0.2, 0.1, 0.1), 0.1), seed=123),
        Case("dare-linear-normalized", linear(FIVE[:2], (0.6, 0.3), 0.4, shared={"normalize": True}), seed=8),
        Case("dare-linear-lambda", linear(FIVE[:2], (0.6, 0.5), 0.5, shared={"lambda": 1.2}), seed=9),
        Case("dare-linear-float32", linear(FIVE[:2], (0.6, 0.3), 0.5, dtype="float32"), seed=10),
        Case("dare-linear-gradient", linear(FIVE[:2], ([0.3, 0.8], 0.4), (0.5, [0.3, 0.8])), seed=1001),
        Case("dare-linear-adapters-known", linear(FIVE[:2], (0.6, 0.4), 0.5), seed=77, adapters=True),
        Case("dare-ties-3", ties(FIVE[:3], (0.5, 0.3, 0.4), 0.6), seed=42),
        Case("dare-ties-4", ties(FIVE[:4], (0.4, 0.3, 0.4, 0.2), 0.7), seed=999999),
        Case("dare-ties-normalized", ties(FIVE[:2], (0.6, 0.4), 0.3, shared={"normalize": True}), seed=4242),
    ]


def _outliers() -> list[Case]:
    def own(method: str, models: Sequence[str], weight: Any, **more: Any) -> Document:
        return merge(method, models, base="base", weight=weight, **more)

    return [
        Case("breadcrumbs-3", own("breadcrumbs", FIVE[:3], (0.5, 0.3, 0.4), density=0.6, gamma=0.02)),
        Case("breadcrumbs-2-sparse", own("breadcrumbs", FIVE[:2], (0.5, 0.7), density=0.3, gamma=0.05)),
        Case("breadcrumbs-ties-2", own("breadcrumbs_ties", FIVE[:2], (0.7, 0.4), density=0.8, gamma=0.01)),
        Case("breadcrumbs-ties-4", own("breadcrumbs_ties", FIVE[:4], (0.6, 0.4, 0.3, 0.5), density=0.5, gamma=0.03)),
    ]


def _della() -> list[Case]:
    def own(method: str, models: Sequence[str], weight: Any, density: Any, epsilon: float) -> Document:
        return merge(method, models, base="base", weight=weight, density=density, epsilon=epsilon)

    return [
        Case("della-3", own("della", FIVE[:3], (0.5, 0.3, 0.4), 0.5, 0.1), seed=11),
        Case("della-2", own("della", FIVE[:2], (0.6, 0.5), 0.4, 0.15), seed=13),
        Case("della-linear-2", own("della_linear", FIVE[:2], (0.7, 0.4), 0.7, 0.2), seed=12),
        Case("della-linear-3", own("della_linear", FIVE[:3], (0.5, 0.3, 0.4), 0.5, 0.1), seed=14),
    ]


def _spherical() -> list[Case]:
    two = (XSUM, MATH)
    curve = [
        {"filter": "q_proj", "value": [0.0, 0.5, 0.3, 0.7]},
        {"filter": "o_proj", "value": [1.0, 0.5, 0.7, 0.3]},
        {"value": 0.5},
    ]
    return [
        Case("slerp", merge("slerp", two, base=XSUM, shared={"t": 0.35})),
        Case("slerp-float32", merge("slerp", two, base=XSUM, shared={"t": 0.6}, dtype="float32")),
        Case("slerp-gradient", merge("slerp", two, base=XSUM, shared={"t": [0.2, 0.5, 0.9]})),
        Case("slerp-filters", merge("slerp", two, base=XSUM, shared={"t": curve})),
        Case("nuslerp", merge("nuslerp", FIVE[:2], weight=(0.7, 0.4))),
        Case("nuslerp-of-changes", merge("nuslerp", FIVE[:2], base="base", weight=(0.7, 0.4))),
        Case("multislerp-3", merge("multislerp", FIVE[:3], weight=(0.5, 0.3, 0.4))),
        Case("multislerp-4", merge("multislerp", FIVE[:4], weight=(0.4, 0.3, 0.2, 0.1))),
        Case("karcher-2", merge("karcher", FIVE[:2])),
        Case("karcher-3", merge("karcher", FIVE[:3])),
    ]


def _others() -> list[Case]:
    return [
        Case("model-stock-2", merge("model_stock", FIVE[:2], base="base")),
        Case("model-stock-3", merge("model_stock", FIVE[:3], base="base")),
        Case("sce-2", merge("sce", FIVE[:2], base="base")),
        Case("sce-3", merge("sce", FIVE[:3], base="base", shared={"select_topk": 0.3})),
        Case("ram-3", merge("ram", FIVE[:3], base="base")),
        Case("ramplus-tl-3", merge("ramplus_tl", FIVE[:3], base="base")),
        Case("nearswap", merge("nearswap", (MATH,), base=XSUM, shared={"t": 0.0005})),
        Case("arcee-fusion", merge("arcee_fusion", (MATH,), base=XSUM)),
    ]


def _copies() -> list[Case]:
    return [
        Case("passthrough-copy", merge("passthrough", (MATH,))),
        Case("passthrough-stack-2", stack((XSUM, 0, 2), (MATH, 2, 4))),
        Case("passthrough-stack-3", stack((XSUM, 0, 1), (MATH, 1, 3), (LATIN, 3, 4))),
        Case("passthrough-shuffled", stack((XSUM, 2, 4), (MATH, 0, 2))),
    ]


def _without_seed() -> list[Case]:
    def own(method: str, count: int, weight: Any, density: Any, **more: Any) -> Document:
        return merge(method, FIVE[:count], base="base", weight=weight, density=density, **more)

    return [
        Case("no-seed-dare-linear-2", own("dare_linear", 2, (0.6, 0.4), 0.9), "no seed", seed=7),
        Case("no-seed-dare-linear-3", own("dare_linear", 3, (0.5, 0.3, 0.4), 0.5), "no seed", seed=42),
        Case("no-seed-dare-linear-5", own("dare_linear", 5, (0.3, 0.3, 0.2, 0.1, 0.1), 0.1), "no seed", seed=123),
        Case("no-seed-dare-ties-3", own("dare_ties", 3, (0.5, 0.3, 0.4), 0.6), "no seed", seed=43),
        Case("no-seed-della-3", own("della", 3, (0.5, 0.3, 0.4), 0.5, epsilon=0.1), "no seed", seed=11),
        Case("no-seed-della-linear-2", own("della_linear", 2, (0.7, 0.4), 0.7, epsilon=0.2), "no seed", seed=12),
    ]


def _with_unknown() -> list[Case]:
    models = (MATH, XSUM, UNKNOWN)
    weight = (0.5, 0.3, 0.4)
    return [
        Case("unknown-linear", merge("linear", models, weight=weight), "unknown member"),
        Case(
            "unknown-task-arithmetic", merge("task_arithmetic", models, base="base", weight=weight), "unknown member"
        ),
        Case("unknown-ties", merge("ties", models, base="base", weight=weight, density=0.5), "unknown member"),
        Case(
            "unknown-dare-linear",
            merge("dare_linear", models, base="base", weight=weight, density=0.5),
            "unknown member",
            seed=42,
        ),
    ]  # fmt: skip


def _with_strangers() -> list[Case]:
    """Return merges for a dictionary that has none of their members, but a sibling of each."""
    weight = (0.5, 0.3, 0.4)
    linear = merge("linear", FIVE[:3], weight=weight)
    ties = merge("ties", FIVE[:3], base="base", weight=weight, density=0.5)
    dare = merge("dare_linear", FIVE[:3], base="base", weight=weight, density=0.5)
    return [
        Case("strangers-linear", linear, "strangers", dictionary=SIBLINGS),
        Case("strangers-ties", ties, "strangers", dictionary=SIBLINGS),
        Case("strangers-dare-linear", dare, "strangers", seed=42, dictionary=SIBLINGS),
    ]
