"""Other ways to say what is inside: the paper's rule, and modelDNA."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from benchmarks.evidence.material import Material
from benchmarks.evidence.mixes import Mix
from benchmarks.evidence.rows import Answer

CUT = 0.01
"""The paper's, on a coefficient; put on modelDNA's weights too."""


def said_by_paper(answer: Answer) -> bool:
    """Tell whether the paper's rule calls an atom present."""
    return answer.coefficient > CUT


def said_by_model_dna(answer: Answer) -> bool:
    """Tell whether modelDNA's weight of an atom is over the same cut."""
    return answer.other_tool is not None and answer.other_tool > CUT


@dataclass(frozen=True, slots=True)
class Opinion:
    """What modelDNA says of a target: weights by atom, and its verdict."""

    weights: dict[str, float]
    verdict: str


def ask_model_dna(material: Material, mix: Mix, merged: Path) -> Opinion | None:
    """Decompose a target by modelDNA, with the base given, which serves it best.

    Models of this size fit into its sample, so reading complete tensors would change nothing.

    Returns
    -------
    Opinion or None
        None if the package is not installed.
    """
    try:
        model_dna = import_module("modeldna.merge")
    except ImportError:
        return None
    parents = {str(material.checkpoint(name)): name for name in mix.dictionary}
    found = model_dna.decompose_targets(str(merged), list(parents), base=str(material.base))
    return Opinion({name: float(found.alphas[path]) for path, name in parents.items()}, str(found.summary))
