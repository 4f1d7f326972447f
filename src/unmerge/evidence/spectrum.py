"""What kind of change an unexplained residual is: none, of low rank, or of all weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from unmerge.statistics import FloatArray

Kind = Literal["nothing", "low rank", "full rank"]

TOLERANCE = 0.1
"""Energy beside the spikes, up to this share of what rounding accounts for, may be rounding's too: merging tools
round more than once, and a sample of 256 x 256 knows its own noise to half a percent."""
RARE = 0.05
"""Spikes in no more than this share of the tensors are accidents."""
MOSTLY = 0.8
"""Share of the energy beyond rounding that the spikes of a low-rank change hold."""
LOW = 0.25
"""A low rank is at most this share of the smaller extent of a sample."""
EXTRACTED = 0.9
"""The rank to extract is enough for this share of the tensors with spikes."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Singular values of one sampled sub-matrix, summed up.

    Attributes
    ----------
    extent : int
        The smaller one of rows and columns.
    rank : int
        Spikes: singular values that noise does not make.
    effective_rank : float
        Exponential of the entropy of the squared singular values, rounding taken off; 0 if nothing is left.
    noise : float
        Standard deviation of an element without the spikes, in weight units; at least what was given.
    energy : float
        Sum of squares, in squared weight units.
    spiked : float
        What the spikes add to it, in squared weight units: less than their squares, which noise raises.
    rounding : float
        What rounding accounts for, in squared weight units.
    """

    extent: int
    rank: int
    effective_rank: float
    noise: float
    energy: float
    spiked: float
    rounding: float

    @property
    def share(self) -> float:
        """Share of the energy that is in the spikes, between 0 and 1."""
        return min(1.0, self.spiked / self.energy) if self.energy > 0.0 else 0.0


@dataclass(frozen=True, slots=True)
class Character:
    """What kind of change the residual of a checkpoint is.

    Attributes
    ----------
    kind : {"nothing", "low rank", "full rank"}
        "nothing" beyond rounding; "low rank", as one or a few LoRA fine-tunes leave it; "full rank", as training
        of all weights, sparsified merging or noise leave it.
    rank : int
        The rank to extract from each tensor, 0 unless `kind` is "low rank".
    share : float
        Share of the energy beyond rounding that is in the spikes, between 0 and 1; 0 for nothing.
    """

    kind: Kind
    rank: int
    share: float

    @property
    def words(self) -> str:
        """The character in a few words, for a report."""
        if self.kind == "nothing":
            return "nothing beyond rounding"
        if self.kind == "low rank":
            return f"of rank {self.rank} or so: one or a few LoRA-like fine-tunes"
        return "of full rank: training of all weights, sparsified merging, or noise"


def spikes(residual: FloatArray, noise: float) -> Spectrum:
    """Count the singular values of a residual that stand out of the noise.

    Parameters
    ----------
    residual : array, shape (s, c)
        Rows and columns sampled from the residual of one tensor, in weight units.
    noise : float
        Standard deviation of the storage rounding, in weight units: the noise is never taken for less.

    Returns
    -------
    Spectrum

    Raises
    ------
    ValueError
        The residual is not a matrix with elements, holds NaN or infinity, or the noise is negative.

    Notes
    -----
    The noise is estimated from the median singular value, and again without the spikes until their number no
    longer grows. The threshold is 4 / sqrt(3) of its size for a square sample, a little above the largest
    singular value of noise alone, 2.

    The noise is taken to be alike in all elements. Rounding grows with the weights: a column of weights more than
    2.3 times as large as the others passes for a spike.

    References
    ----------
    Gavish and Donoho, The optimal hard threshold for singular values is 4/sqrt(3), IEEE Trans. Inf. Theory 60,
    2014. Benaych-Georges and Nadakuditi, The singular values and vectors of low rank perturbations of large
    rectangular random matrices, J. Multivariate Analysis 111, 2012: by how much noise raises a spike.
    """
    _check(residual, noise)
    values: FloatArray = np.linalg.svd(np.asarray(residual, dtype=np.float64), compute_uv=False)
    rows, columns = residual.shape
    # Without any noise the smallest singular values are the decomposition's own rounding.
    least = max(noise, float(np.finfo(np.float64).eps * values[0]))
    rank, found = _rank_and_noise(values, rows, columns, least)
    return Spectrum(
        extent=min(rows, columns),
        rank=rank,
        effective_rank=_effective_rank(_before_noise(values, rows, columns, least)),
        noise=found,
        energy=float(values @ values),
        spiked=float(_before_noise(values[:rank], rows, columns, found).sum()),
        rounding=rows * columns * noise**2,
    )


def character(spectra: Sequence[Spectrum], weights: Sequence[float] | FloatArray) -> Character:
    """Say what kind of change the tensors of a residual are, taken together.

    Parameters
    ----------
    spectra : sequence of Spectrum
        One per tensor; at least one.
    weights : sequence of float
        For each, how many parameters one of the sampled stands for.

    Returns
    -------
    Character
        Nothing: spikes in at most 5 % of the tensors, and beside them at most 110 % of the energy of rounding.
        Low rank: spikes hold 80 % of what is beyond that, and half of the tensors with spikes have a rank of at
        most a quarter of the sample; then the rank to extract is their 90th percentile.

    Raises
    ------
    ValueError
        There are no spectra, or not one weight for each.
    """
    if not spectra or len(spectra) != len(weights):
        raise ValueError(f"{len(spectra)} spectra and {len(weights)} weights, expected one each and at least one")
    energy, spiked, rounding = np.array([[s.energy, s.spiked, s.rounding] for s in spectra]).T @ weights
    beside = max(0.0, energy - spiked - (1.0 + TOLERANCE) * rounding)
    ranks = np.array([spectrum.rank for spectrum in spectra])
    if beside == 0.0 and np.mean(ranks > 0) <= RARE:
        return Character("nothing", 0, 0.0)
    share = float(spiked / (spiked + beside))
    relative = ranks / [spectrum.extent for spectrum in spectra]
    if share >= MOSTLY and np.median(relative[ranks > 0]) <= LOW:
        return Character("low rank", _enough(ranks[ranks > 0]), share)
    return Character("full rank", 0, share)


def _check(residual: FloatArray, noise: float) -> None:
    if residual.ndim != 2 or not residual.size:
        raise ValueError(f"residual has shape {residual.shape}, expected a matrix with elements")
    if not np.isfinite(residual).all():
        raise ValueError("residual holds NaN or infinity, expected finite weights")
    if not noise >= 0.0:
        raise ValueError(f"noise is {noise}, expected a standard deviation")


def _rank_and_noise(values: FloatArray, rows: int, columns: int, least: float) -> tuple[int, float]:
    """Return the number of spikes, and the standard deviation of the rest."""
    rank = 0
    while True:
        # What is left without the spikes is like noise in a matrix that is smaller by their number.
        s, c = rows - rank, columns - rank
        noise = least
        if min(s, c) > 0:
            unit = np.sqrt(max(s, c) * _median(min(s, c) / max(s, c)))
            noise = max(noise, float(np.median(values[rank:]) / unit))
        previous, rank = rank, int(np.count_nonzero(values > _threshold(rows, columns) * noise))
        if rank <= previous:
            return rank, noise


def _threshold(rows: int, columns: int) -> float:
    """Return Gavish and Donoho's threshold for singular values, in units of the noise."""
    beta = min(rows, columns) / max(rows, columns)
    ratio = np.sqrt(2.0 * (beta + 1.0) + 8.0 * beta / (beta + 1.0 + np.sqrt(beta**2 + 14.0 * beta + 1.0)))
    return float(ratio * np.sqrt(max(rows, columns)))


@lru_cache(maxsize=1024)
def _median(beta: float) -> float:
    """Return the median of the Marchenko-Pastur distribution of aspect ratio `beta` in (0, 1], unit variance."""
    low, high = (1.0 - np.sqrt(beta)) ** 2, (1.0 + np.sqrt(beta)) ** 2
    # By the angle the density has no poles; midpoints avoid 0 / 0 at the lower end of a square matrix.
    edges = np.linspace(0.0, np.pi / 2.0, 4001)
    angles = (edges[1:] + edges[:-1]) / 2.0
    masses = np.sin(2.0 * angles) ** 2 / (low + (high - low) * np.sin(angles) ** 2)
    below = np.concatenate([[0.0], np.cumsum(masses)])
    angle = np.interp(below[-1] / 2.0, below, edges)
    return float(low + (high - low) * np.sin(angle) ** 2)


def _before_noise(values: FloatArray, rows: int, columns: int, noise: float) -> FloatArray:
    """Return the squares that singular values had before noise raised them; 0 for those that noise makes."""
    if noise == 0.0:
        return values**2
    beta, unit = min(rows, columns) / max(rows, columns), max(rows, columns) * noise**2
    excess = np.maximum(values**2 / unit - beta - 1.0, 2.0 * np.sqrt(beta))
    squares = 0.5 * (excess + np.sqrt(np.maximum(excess**2 - 4.0 * beta, 0.0))) * unit
    return np.where(values > _threshold(rows, columns) * noise, squares, 0.0)


def _effective_rank(squares: FloatArray) -> float:
    if not squares.sum() > 0.0:
        return 0.0
    shares = squares[squares > 0.0] / squares.sum()
    return float(np.exp(-(shares @ np.log(shares))))


def _enough(ranks: FloatArray) -> int:
    return int(np.quantile(ranks, EXTRACTED, method="higher"))
