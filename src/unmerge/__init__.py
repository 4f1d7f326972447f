"""unmerge takes a merged LLM checkpoint apart: which fine-tunes are inside, with what coefficients, how sure."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from unmerge._version import __version__
from unmerge.errors import UnmergeError

if TYPE_CHECKING:
    from unmerge.attribution import attribute
    from unmerge.cluster import on_cluster
    from unmerge.dictionary import add as add_to_dictionary
    from unmerge.dictionary import build as build_dictionary
    from unmerge.dictionary import verify as verify_dictionary
    from unmerge.result import Attribution
    from unmerge.solvers import SOLVERS
    from unmerge.statistics import Statistics
    from unmerge.survey import attribute_many

__all__ = [
    "SOLVERS",
    "Attribution",
    "Statistics",
    "UnmergeError",
    "__version__",
    "add_to_dictionary",
    "attribute",
    "attribute_many",
    "build_dictionary",
    "on_cluster",
    "verify_dictionary",
]

_HOMES = {
    "SOLVERS": ("unmerge.solvers", "SOLVERS"),
    "Attribution": ("unmerge.result", "Attribution"),
    "Statistics": ("unmerge.statistics", "Statistics"),
    "add_to_dictionary": ("unmerge.dictionary", "add"),
    "attribute": ("unmerge.attribution", "attribute"),
    "attribute_many": ("unmerge.survey", "attribute_many"),
    "build_dictionary": ("unmerge.dictionary", "build"),
    "on_cluster": ("unmerge.cluster", "on_cluster"),
    "verify_dictionary": ("unmerge.dictionary", "verify"),
}


def __getattr__(name: str) -> object:
    """Import what a public name needs when it is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'unmerge' has no attribute {name!r}")
    module, own = _HOMES[name]
    found: object = getattr(import_module(module), own)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
