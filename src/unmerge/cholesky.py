"""Triangular roots of the products of thin matrices, for those whose columns can be told apart well.

They take a quarter of the time of a QR decomposition or of eigenvectors, and square the condition number; so they come
with their inverses, which bound the smallest eigenvalue.
"""

from __future__ import annotations

import numpy as np

from unmerge.checkpoint.dtypes import FloatArray

SOUND = 1e-8
"""Share of the trace of products that their smallest eigenvalue is at least, for a root that is precise enough."""


def sound_root(products: FloatArray) -> tuple[FloatArray, FloatArray] | None:
    """Return T, upper triangular, with ``T'T = products``, and its inverse; None where columns are too much alike.

    Parameters
    ----------
    products : array, shape (r, r)
        Symmetric, with no negative eigenvalue but for rounding.
    """
    try:
        lower = np.asarray(np.linalg.cholesky(products), np.float64)
    except np.linalg.LinAlgError:
        return None
    inverse = np.asarray(np.linalg.inv(lower), np.float64)
    # The smallest eigenvalue is at least 1 over the trace of the inverse products.
    if not np.trace(products) * float(np.vdot(inverse, inverse)) < 1.0 / SOUND:
        return None
    return lower.T, inverse.T


def orthonormal(vectors: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return Q with orthonormal columns and T, upper triangular, with ``Q T = vectors``, shapes (n, r) and (r, r)."""
    with np.errstate(over="ignore", invalid="ignore"):  # products that overflow have no root
        found = sound_root(vectors.T @ vectors)
    if found is None:
        columns, triangle = np.linalg.qr(vectors)
        return columns, triangle
    root, inverse = found
    return vectors @ inverse, root
