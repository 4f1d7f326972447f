"""Solvers: statistics to coefficients, one file each."""

from __future__ import annotations

from collections.abc import Callable

from unmerge.solvers.base import Solution, Solver, Status
from unmerge.solvers.dot_product import DotProduct
from unmerge.solvers.elastic_net import ElasticNet
from unmerge.solvers.lasso import Lasso
from unmerge.solvers.nnls import Nnls
from unmerge.solvers.omp import Omp
from unmerge.solvers.ridge import Ridge

SOLVERS: dict[str, Callable[..., Solver]] = {
    DotProduct.name: DotProduct,
    ElasticNet.name: ElasticNet,
    Lasso.name: Lasso,
    Nnls.name: Nnls,
    Omp.name: Omp,
    Ridge.name: Ridge,
}
"""The solvers by name; calling one makes it, with its hyper-parameters as keywords."""

__all__ = [
    "SOLVERS",
    "DotProduct",
    "ElasticNet",
    "Lasso",
    "Nnls",
    "Omp",
    "Ridge",
    "Solution",
    "Solver",
    "Status",
]
