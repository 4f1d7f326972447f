"""What shape a component's coefficients have over the layers: constant, a gradient, some layers only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from unmerge.statistics import FloatArray

Kind = Literal["constant", "gradient", "some layers", "varies", "unclear"]

LEVEL = 0.001
"""A shape is given up if it would fit this badly, by chance alone, at most so often."""
MATERIAL = 0.02
"""Departures from a shape below this share of the coefficients' size do not count."""
NOTICED = 0.5
"""A constant is one only if departures of this share of it would have been noticed."""
TRACE = 0.05
"""Around a coefficient of zero, departures of this share of a whole fine-tune would have to be."""
POWER = 0.9
"""How surely."""
FEWEST_LAYERS = 3
MOST_ANCHORS = 5
LAYERS_PER_ANCHOR = 2
"""A gradient of fewer layers than this per anchor would fit anything."""
MOST_FREEDOM = 1e6
"""Student's distribution is normal far below it, and infinity times zero is not a number."""
SMALLEST_ERROR = 1e-9
"""Coefficients are never known better than this: a tensor's inner products are sums in float64."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a component's coefficients do from layer to layer.

    Attributes
    ----------
    kind : {"constant", "gradient", "some layers", "varies", "unclear"}
        "varies" is none of the first three; "unclear" could be several.
    low, high : float
        Dimensionless. The same fitted value twice for a constant, and for some layers; the fitted values at the
        first and the last layer for a gradient; otherwise the smallest and the largest coefficient, NaN if
        there is none.
    layers : tuple of int
        Where the component is present, ascending; empty unless `kind` is "some layers".
    anchors : tuple of float
        A gradient's values at equally spaced places between the first and the last layer, as mergekit takes
        them; empty unless `kind` is "gradient".
    """

    kind: Kind
    low: float
    high: float
    layers: tuple[int, ...] = ()
    anchors: tuple[float, ...] = ()

    @property
    def words(self) -> str:
        """The shape in a few words, for a report."""
        if self.kind == "constant":
            return f"constant {_number(self.low)}"
        if self.kind == "gradient":
            first, *between, last = map(_number, self.anchors)
            way = f" through {', '.join(between)}" if between else ""
            return f"gradient from {first}{way} to {last}"
        if self.kind == "some layers":
            plural = "" if len(self.layers) == 1 else "s"
            return f"only layer{plural} {_listed(self.layers)}, at {_number(self.low)}"
        return "varies between layers" if self.kind == "varies" else "unclear between layers"


def describe_profile(layers: FloatArray, values: FloatArray, errors: FloatArray, freedom: float | FloatArray) -> Shape:
    """Say what shape coefficients have over the layers.

    A constant is kept unless it is rejected at the level 0.001. If it is, a gradient of 2 to 5 anchors, one block
    of layers and a set of single layers are tried; of those that are not rejected, and that fit better than the
    constant at the same level, the one with the fewest parameters is taken. A block has its level and its ends
    for parameters.

    Parameters
    ----------
    layers : array, shape (L,)
        Layer numbers, all different.
    values : array, shape (L,)
        The component's coefficient in each layer, dimensionless.
    errors : array, shape (L,)
        Their standard errors. Layers where one of the two is not finite are left out.
    freedom : float or array, shape (L,)
        Degrees of freedom that the errors are estimated with, such as a layer's tensors less one; infinity if the
        errors are known. Layers with less than 1 are left out.

    Returns
    -------
    Shape
        "unclear" with fewer than 3 layers, and if the errors are so large that coefficients which depart by half
        of their mean (root mean square) would pass for a constant more often than one time in ten.

    Raises
    ------
    ValueError
        The arrays differ in length, or an error is negative.

    Notes
    -----
    The test is Cochran's Q for errors that are estimated: each t statistic is replaced by the normal deviate of
    the same probability (Wallace's approximation), and their squares are summed and minimised. Welch's correction
    of Q instead would reject two constants in a hundred at 28 layers and 4 degrees of freedom, not one in a
    thousand.

    Departures that do not matter are an error of their own, of 2 % of the coefficients' size, so that exact
    measurements of an almost constant profile leave it constant.

    mergekit spaces anchors over all layers of a slice. If the first or the last of them is left out, a gradient's
    anchors are those of the layers that are there. A coefficient along a slerp whose t is a gradient of two
    values bends a little, and is described by two or three anchors.

    References
    ----------
    Cochran, The combination of estimates from different experiments, Biometrics 10, 1954. Wallace, Bounds on
    normal approximations to Student's and the chi-square distributions, Ann. Math. Statist. 30, 1959.
    """
    profile = _Profile.of(layers, values, errors, freedom)
    if len(profile.values) < FEWEST_LAYERS:
        return profile.shapeless("unclear")
    constant = profile.fit(np.ones((len(profile.values), 1)))
    if not constant.rejected:
        level = float(constant.coefficients[0])
        return Shape("constant", level, level) if profile.is_clear(level) else profile.shapeless("unclear")
    better = [one for one in _alternatives(profile) if not one.fit.rejected and one.improves_on(constant)]
    if not better:
        return profile.shapeless("varies")
    return min(better, key=lambda one: (one.parameters, one.fit.deviance)).shape


@dataclass(frozen=True, slots=True, eq=False)
class _Fit:
    """A linear model of the coefficients; the deviance is chi-square with `freedom` degrees if it is right."""

    coefficients: FloatArray
    deviance: float
    freedom: int

    @property
    def rejected(self) -> bool:
        return _chance(self.freedom, self.deviance) < LEVEL


@dataclass(frozen=True, slots=True, eq=False)
class _Alternative:
    shape: Shape
    fit: _Fit
    parameters: int

    def improves_on(self, constant: _Fit) -> bool:
        return _chance(self.parameters - 1, constant.deviance - self.fit.deviance) < LEVEL


@dataclass(frozen=True, slots=True, eq=False)
class _Profile:
    """Usable coefficients in the order of the layers; errors include departures that do not matter."""

    layers: FloatArray
    values: FloatArray
    errors: FloatArray
    freedom: FloatArray

    @classmethod
    def of(cls, layers: FloatArray, values: FloatArray, errors: FloatArray, freedom: float | FloatArray) -> _Profile:
        table = [np.asarray(column, dtype=np.float64) for column in (layers, values, errors)]
        if len({column.shape for column in table}) > 1 or table[0].ndim != 1:
            shapes = ", ".join(str(column.shape) for column in table)
            raise ValueError(f"layers, values and errors have shapes {shapes}, expected three times (L,)")
        if (table[2] < 0.0).any():
            raise ValueError(f"errors holds {table[2].min()}, expected standard errors")
        degrees = np.minimum(np.broadcast_to(freedom, table[0].shape), MOST_FREEDOM)
        usable = np.isfinite(table[1]) & np.isfinite(table[2]) & (degrees >= 1.0)
        order = np.flatnonzero(usable)[np.argsort(table[0][usable], kind="stable")]
        layers, values, errors = (column[order] for column in table)
        return cls(layers, values, _with_slack(values, np.maximum(errors, SMALLEST_ERROR)), degrees[order])

    def fit(self, design: FloatArray, freedom: int | None = None) -> _Fit:
        """Fit a linear model by minimising the sum of squared normal deviates.

        Each step is a weighted least-squares problem whose weights bound the deviance from above, so it falls
        until it is at a minimum.

        Parameters
        ----------
        design : array, shape (L, p)
            One column per parameter.
        freedom : int, optional
            Degrees of freedom of the deviance, L - p by default.
        """
        weights = self.errors**-2
        deviance = np.inf
        for _ in range(100):
            roots = np.sqrt(weights)
            solution = np.linalg.lstsq(design * roots[:, None], self.values * roots)[0]
            coefficients = np.asarray(solution, dtype=np.float64)
            terms, slopes = self.squared_deviates(design @ coefficients)
            previous, deviance = deviance, float(terms.sum())
            if previous - deviance <= 1e-9 * deviance:
                break
            weights = slopes
        return _Fit(coefficients, deviance, len(design) - design.shape[1] if freedom is None else freedom)

    def squared_deviates(self, expected: FloatArray | float) -> tuple[FloatArray, FloatArray]:
        """Return the squared normal deviate of each layer, and its slope by the squared distance."""
        squares = ((self.values - expected) / self.errors) ** 2
        slopes = self.wallace / (1.0 + squares / self.freedom) / self.errors**2
        return self.normalised(squares), slopes

    @property
    def wallace(self) -> FloatArray:
        return ((8.0 * self.freedom + 1.0) / (8.0 * self.freedom + 3.0)) ** 2

    def normalised(self, squares: FloatArray) -> FloatArray:
        """Return the square of the normal deviate that is as probable as the t statistic of each layer."""
        return self.wallace * self.freedom * np.log1p(squares / self.freedom)

    def shapeless(self, kind: Kind) -> Shape:
        if not len(self.values):
            return Shape(kind, float("nan"), float("nan"))
        return Shape(kind, float(self.values.min()), float(self.values.max()))

    def is_clear(self, level: float) -> bool:
        """Return whether coefficients with this mean that are not constant would have been told from a constant."""
        from scipy.special import chdtri, chndtr

        freedom = len(self.values) - 1
        departures = np.full(len(self.values), max(NOTICED * abs(level), TRACE))
        # Errors that are estimated are often too small, and tell less. Counts of simulated profiles show that
        # this discount keeps the promise, from 2 degrees of freedom on.
        fair = (self.freedom - 1.0) / (self.freedom + 1.0)
        noncentrality = float(self.normalised(fair * (departures / self.errors) ** 2).sum())
        missed = chndtr(chdtri(freedom, LEVEL), freedom, noncentrality)
        return bool(missed <= 1.0 - POWER)


def _with_slack(values: FloatArray, errors: FloatArray) -> FloatArray:
    """Return the errors with departures that do not matter added to them.

    The degrees of freedom stay as they are. Satterthwaite's would be more, most for the errors that chance makes
    small, and reject several times as many constants at 4 degrees of freedom.
    """
    if not len(values):
        return errors
    # Badly known layers tell little about the size of the coefficients, exactly known ones not everything.
    weights = 1.0 / (errors**2 + np.median(errors) ** 2)
    slack = MATERIAL**2 * np.average(values**2, weights=weights)
    return np.asarray(np.sqrt(errors**2 + slack))


def _alternatives(profile: _Profile) -> Iterator[_Alternative]:
    for anchors in range(2, min(MOST_ANCHORS, len(profile.values) // LAYERS_PER_ANCHOR) + 1):
        yield _gradient(profile, anchors)
    clear = _clearly_present(profile)
    if clear.any():
        for present in (_block(profile, clear), clear & (_gains(profile, clear) > 0.0)):
            if present.any() and not present.all():
                yield _some_layers(profile, present)


def _gradient(profile: _Profile, anchors: int) -> _Alternative:
    """Fit mergekit's gradient: straight lines between equally spaced anchors."""
    places = np.linspace(profile.layers[0], profile.layers[-1], anchors)
    design = np.column_stack([np.interp(profile.layers, places, hat) for hat in np.eye(anchors)])
    fit = profile.fit(design)
    found = tuple(fit.coefficients.tolist())
    return _Alternative(Shape("gradient", found[0], found[-1], anchors=found), fit, anchors)


def _some_layers(profile: _Profile, present: NDArray[np.bool_]) -> _Alternative:
    """Fit one value for the layers given, and zero for the others."""
    # Which layers there are is chosen from few possibilities, if clearly: only the level is fitted.
    fit = profile.fit(present[:, None].astype(np.float64), len(present) - 1)
    level = float(fit.coefficients[0])
    layers = tuple(round(layer) for layer in profile.layers[present].tolist())
    ends = int(np.count_nonzero(present[1:] != present[:-1]))
    return _Alternative(Shape("some layers", level, level, layers=layers), fit, 1 + ends)


def _clearly_present(profile: _Profile) -> NDArray[np.bool_]:
    """Return the layers whose interval excludes 0, all intervals together covering at 95 %."""
    from scipy.special import stdtrit

    quantiles = stdtrit(profile.freedom, 1.0 - 0.025 / len(profile.values))
    return np.asarray(np.abs(profile.values) > quantiles * profile.errors)


def _gains(profile: _Profile, present: NDArray[np.bool_]) -> FloatArray:
    """Return how much better each layer fits the value of those present than it fits zero."""
    level = float(np.median(profile.values[present]))
    return profile.squared_deviates(0.0)[0] - profile.squared_deviates(level)[0]


def _block(profile: _Profile, present: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the run of layers that has one value, if the others have none, most probably."""
    for _ in range(20):
        previous, present = present, _heaviest_run(_gains(profile, present))
        if np.array_equal(previous, present):
            break
    return present


def _heaviest_run(gains: FloatArray) -> NDArray[np.bool_]:
    """Return the run of elements with the largest sum."""
    sums = np.concatenate([[0.0], np.cumsum(gains)])
    rises = sums[1:] - np.minimum.accumulate(sums[:-1])
    end = int(np.argmax(rises))
    start = int(np.argmin(sums[: end + 1]))
    places = np.arange(len(gains))
    return (places >= start) & (places <= end)


def _chance(freedom: int, deviance: float) -> float:
    """Return how often chance alone would exceed a deviance."""
    from scipy.special import chdtrc

    return float(chdtrc(freedom, max(0.0, deviance)))


def _number(value: float) -> str:
    # Adding zero turns -0.0 into 0.0.
    return f"{round(value, 2) + 0.0:.2f}"


def _listed(layers: tuple[int, ...]) -> str:
    """Return layer numbers in words, runs by their ends: 3, 8 to 15 and 20."""
    breaks = [place for place in range(1, len(layers)) if layers[place] != layers[place - 1] + 1]
    runs = [layers[start:end] for start, end in zip([0, *breaks], [*breaks, len(layers)], strict=True)]
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    return " and ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))
