"""unmerge takes a merged LLM checkpoint apart: which fine-tunes are inside, with what coefficients, how sure."""

from unmerge._version import __version__
from unmerge.attribution import attribute
from unmerge.cluster import on_cluster
from unmerge.dictionary import add as add_to_dictionary
from unmerge.dictionary import build as build_dictionary
from unmerge.dictionary import verify as verify_dictionary
from unmerge.errors import UnmergeError
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
