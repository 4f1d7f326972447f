"""The paper's cut on coefficients, kept for comparison: it is not evidence of presence."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from unmerge.solvers.base import Solution


def cut(solution: Solution, threshold: float, *, signed: bool) -> Solution:
    """Set the coefficients at or below `threshold` to zero; with `signed`, in absolute value."""
    coefficients = solution.coefficients
    kept = np.abs(coefficients) > threshold if signed else coefficients > threshold
    return replace(solution, coefficients=np.where(kept, coefficients, 0.0))
