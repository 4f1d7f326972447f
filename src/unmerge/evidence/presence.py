"""Tells whether a fine-tune itself is in a target, or only something that resembles it.

What a coefficient cannot tell, directions can. If the change d_j = U S W' of a fine-tune is in the target with
weight a, then what the other atoms leave of the target, seen in the directions of d_j, is M = U' R W = a S plus
noise: in every direction, weak ones too, and in all tensors in the same proportion. A stranger that learned
similar things gives the strong directions, which everybody learns, and leaves the weak ones, which come from
random initial matrices and the order of the data, to chance.

The test is a matched filter for S in M, made adaptive and robust:

- The noise is measured in the target itself. What the residual holds in the rows that W reads, but outside of
  U, shows how strongly strangers use the same input directions (`Core.right`); likewise `Core.left`. Whitening
  by both lets the filter look where the strangers are not.
- Shared drift grows with the strength of a direction. The filter is fitted twice: alone, and beside a second
  column S^2, the profile of drift. Both fits must show the weight; the p-value is the larger of the two (an
  intersection-union test).
- Tensors are the independent observations: errors are the larger of the model's and of the sandwich estimate
  over tensors, quantiles are Student's.

References: Kelly, An adaptive detection algorithm, 1986 (whitening by the interference measured beside the
signal); Berger, Multiparameter hypothesis testing and acceptance sampling, 1982 (intersection-union).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unmerge.statistics import FloatArray

FLOOR = 1e-2
"""An eigenvalue of a noise covariance is taken to be at least this share of the largest: smaller ones are chance."""
HEAVIEST = 4.0
"""What the precision of a tensor may be at most, in medians over tensors."""
FEWEST = 3.0
"""Effective tensors that a test needs at least."""


@dataclass(frozen=True, slots=True, eq=False)
class Core:
    """What the other atoms leave of the target, in the k leading directions of an atom in one tensor.

    With d = U S W' the atom's change of the tensor (m x n) and R what the other atoms leave of the target's.

    Attributes
    ----------
    layer : int or None
        The tensor's layer; None outside of the layers.
    singular : array, shape (k,)
        S, descending, in weight units.
    matched : array, shape (k, k)
        U' R W, in weight units.
    left : array, shape (k, k)
        Covariance of the rows of U' R over the columns outside of W: the mean of the products, in squared
        weight units.
    right : array, shape (k, k)
        Covariance of the columns of R W over the rows outside of U, likewise.
    level : float
        Mean square of R outside of both, in squared weight units.
    relatives : array, shape (q, k, k)
        U' d_i W of the atoms that are so alike that their weights must be estimated together.
    """

    layer: int | None
    singular: FloatArray
    matched: FloatArray
    left: FloatArray
    right: FloatArray
    level: float
    relatives: FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class Presence:
    """The outcome of the test of one atom.

    Attributes
    ----------
    weight : float
        Estimate of the weight, free of drift; dimensionless.
    error : float
        Its standard error.
    matched_weight, matched_error : float
        The same without the drift column: more precise where there is no stranger, too large where there is.
    freedom : float
        Degrees of freedom: effective tensors less one.
    p_value : float
        One-sided probability of what was seen if the atom is absent; 1 if there are too few tensors.
    layers : array, shape (L, 3)
        Layer, weight and standard error, by matched filter; layers in ascending order.
    """

    weight: float
    error: float
    matched_weight: float
    matched_error: float
    freedom: float
    p_value: float
    layers: FloatArray

    @property
    def decidable(self) -> bool:
        """Whether there were enough tensors for a test."""
        return self.freedom >= FEWEST - 1.0


@dataclass(frozen=True, slots=True, eq=False)
class _Whitened:
    """One tensor's equations: observations (k^2,), columns (k^2, 2 + q): S, S^2, relatives."""

    layer: int | None
    observed: FloatArray
    columns: FloatArray


def presence(cores: Sequence[Core], *, signed: bool = False) -> Presence:
    """Test whether an atom itself is in the target.

    Parameters
    ----------
    cores : sequence of Core
        One for each tensor that both change.
    signed : bool
        A negative weight counts as presence too; the p-value is then two-sided.

    Returns
    -------
    Presence
        Not decidable, with infinite errors, if fewer than 3 effective tensors meet.
    """
    from scipy.special import stdtr

    tensors = _balanced([_whiten(core) for core in cores])
    freedom = _effective(tensors) - 1.0
    if freedom < FEWEST - 1.0:
        return Presence(0.0, np.inf, 0.0, np.inf, max(freedom, 0.0), 1.0, np.zeros((0, 3)))
    own, drifting = _fit(tensors, drift=False), _fit(tensors, drift=True)
    scores = np.array([own.weight / own.error, drifting.weight / drifting.error])
    if signed:
        score = np.abs(scores).min() if scores[0] * scores[1] > 0.0 else 0.0
        p_value = min(1.0, 2.0 * float(stdtr(freedom, -score)))
    else:
        p_value = float(stdtr(freedom, -scores.min()))
    return Presence(
        weight=drifting.weight,
        error=drifting.error,
        matched_weight=own.weight,
        matched_error=own.error,
        freedom=freedom,
        p_value=p_value,
        layers=_by_layer(tensors, own),
    )


def _whiten(core: Core) -> _Whitened:
    """Write M = a S + b S^2 + ... + noise so that the noise of all entries is independent and alike.

    The noise of M is taken to be separable: Cov(M_kl, M_pq) = left_kp right_lq / level.
    """
    before = np.sqrt(core.level) * _inverse_root(core.left)
    after = _inverse_root(core.right)
    profile = core.singular**2 / np.linalg.norm(core.singular)
    columns = [np.diag(core.singular), np.diag(profile), *core.relatives]
    return _Whitened(
        core.layer,
        (before @ core.matched @ after).ravel(),
        np.stack([(before @ column @ after).ravel() for column in columns], axis=1),
    )


def _inverse_root(covariance: FloatArray) -> FloatArray:
    values, vectors = np.linalg.eigh(covariance)
    scaled = vectors / np.sqrt(np.maximum(values, FLOOR * values[-1]))
    root: FloatArray = scaled @ vectors.T
    return root


def _balanced(tensors: Sequence[_Whitened]) -> list[_Whitened]:
    """Trust no tensor more than `HEAVIEST` times as much as the median one, by raising its noise.

    Precisions are estimates. Where a stranger happens to leave some directions of a tensor almost free, that tensor
    alone would decide, and nothing would tell how far it errs.
    """
    precisions = np.array([_precision(tensor) for tensor in tensors])
    most = HEAVIEST * float(np.median(precisions)) if len(tensors) else 0.0
    scales = np.sqrt(np.divide(most, precisions, out=np.ones(len(tensors)), where=precisions > most))
    return [
        _Whitened(tensor.layer, scale * tensor.observed, scale * tensor.columns)
        for tensor, scale in zip(tensors, scales, strict=True)
    ]


def _precision(tensor: _Whitened) -> float:
    return float(tensor.columns[:, 0] @ tensor.columns[:, 0])


def _effective(tensors: Sequence[_Whitened]) -> float:
    """Return the effective number of tensors: (sum p)^2 / sum p^2 of their precisions p."""
    precisions = np.array([_precision(tensor) for tensor in tensors])
    if not precisions.max(initial=0.0) > 0.0:
        return 0.0
    precisions /= precisions.max()  # their squares may overflow
    return float(precisions.sum() ** 2 / (precisions**2).sum())


@dataclass(frozen=True, slots=True, eq=False)
class _Fit:
    weight: float
    error: float
    scale: float
    nuisance: FloatArray


def _fit(tensors: Sequence[_Whitened], *, drift: bool) -> _Fit:
    """Fit the atom's weight, with or without the drift column, by least squares over all tensors."""
    used = [True, drift] + [True] * (tensors[0].columns.shape[1] - 2)
    columns = [tensor.columns[:, used] for tensor in tensors]
    # Relatives may be collinear with the atom: the pseudo-inverse then leaves the weight to be shared.
    inverse = np.linalg.pinv(sum(X.T @ X for X in columns), hermitian=True)
    coefficients = inverse @ sum(X.T @ tensor.observed for X, tensor in zip(columns, tensors, strict=True))
    residuals = [tensor.observed - X @ coefficients for X, tensor in zip(columns, tensors, strict=True)]
    count = sum(len(residual) for residual in residuals)
    energy = sum(float(residual @ residual) for residual in residuals)
    scale = float(np.sqrt(energy / max(1, count - len(coefficients))))
    # Divided by what a tensor does not determine itself: the jackknife's errors (CR3), not too small for few tensors.
    influences = np.array(
        [
            inverse[0] @ (X.T @ residual) / max(1.0 - float(np.vdot(inverse[0], (X.T @ X)[0])), FLOOR)
            for X, residual in zip(columns, residuals, strict=True)
        ]
    )
    sandwich = float(np.sqrt((influences**2).sum()))
    error = max(scale * float(np.sqrt(inverse[0, 0])), sandwich, np.finfo(np.float64).tiny)
    return _Fit(float(coefficients[0]), error, scale, coefficients[1:])


def _by_layer(tensors: Sequence[_Whitened], fit: _Fit) -> FloatArray:
    """Return layer, weight and standard error of each layer, the relatives' part taken out."""
    rows = []
    for layer in sorted({tensor.layer for tensor in tensors if tensor.layer is not None}):
        own = [tensor for tensor in tensors if tensor.layer == layer]
        precision = sum(_precision(tensor) for tensor in own)
        hits = sum(
            float(tensor.columns[:, 0] @ (tensor.observed - tensor.columns[:, 2:] @ fit.nuisance)) for tensor in own
        )
        if precision > 0.0:
            rows.append([layer, hits / precision, fit.scale / np.sqrt(precision)])
    return np.array(rows).reshape(-1, 3)
