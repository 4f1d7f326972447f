"""Parameters that change with depth or from module to module: found by fitting parts of the model on their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from unmerge.alignment import LAYER
from unmerge.checkpoint.dtypes import FloatArray
from unmerge.recipe.decimals import gradient, simplest
from unmerge.recipe.document import Conditional, Setting
from unmerge.recipe.sample import Sample
from unmerge.recipe.structures import Parameters

Level = Literal["whole", "layer", "module", "both", "projection", "each"]
LEVELS: tuple[Level, ...] = ("whole", "layer", "module", "both")
"""How finely parameters may vary, the coarsest first; a module is the attention of all layers, for one."""
FINE_LEVELS: tuple[Level, ...] = (*LEVELS, "projection", "each")
"""The same with levels for filters within modules, such as ``q_proj``."""
WORSE, FLOORS = 10.0, 3.0
"""A level may do if it leaves at most this many times what the finest leaves, and so many floors more."""
ENOUGH = 1.05
"""Where a level leaves hardly more than the finest, none finer is needed."""
TOLERANCE = {"weights": 0.012, "densities": 0.012, "gammas": 0.004, "scale": 0.012}
"""How exactly a part's parameters are found: relative to the largest for weights and scale, absolute for shares."""

PartFit = Callable[[Sample], tuple[Parameters, float]]
"""Fits a sample: its parameters, and the share of the energy that they leave."""


@dataclass(frozen=True, slots=True, order=True)
class Part:
    """A part of a model.

    Attributes
    ----------
    module : str
        What a filter would name; empty for all of them.
    layer : int
        Its number; -1 for all of them, or for tensors outside the layers.
    """

    module: str = ""
    layer: int = -1


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """Parameters of the parts of a model.

    Attributes
    ----------
    level : str
        How finely they vary.
    parameters : mapping of Part to Parameters
    error : float
        Energy of what is left over the energy of the change.
    depth : int
        How many layers the model has.
    """

    level: Level
    parameters: Mapping[Part, Parameters]
    error: float
    depth: int

    def of(self, name: str) -> Parameters:
        """Return the parameters of one tensor; those of the nearest part, where its own was not seen."""
        part = part_of(name, self.level)
        if part in self.parameters:
            return self.parameters[part]
        alike = [other for other in self.parameters if other.module == part.module] or list(self.parameters)
        return self.parameters[min(alike, key=lambda other: (abs(other.layer - part.layer), other))]

    def values(self, read: Callable[[Parameters], float]) -> dict[Part, float]:
        """Return one number of each part."""
        return {part: read(parameters) for part, parameters in sorted(self.parameters.items())}


def part_of(name: str, level: Level) -> Part:
    """Say which part a tensor is in."""
    if level == "whole":
        return Part()
    match = LAYER.search(name)
    if match is None:
        return Part(name)
    return Part(_module_of(match["module"], level), int(match["layer"]) if level in {"layer", "both", "each"} else -1)


def _module_of(name: str, level: Level) -> str:
    if level in {"projection", "each"}:
        return name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
    return name.partition(".")[0] if level in {"module", "both"} else ""


def fit_parts(
    sample: Sample, fit: PartFit, depth: int, *, whole_first: bool = False, levels: Sequence[Level] = LEVELS
) -> Iterator[Parts]:
    """Fit a model's parts on their own, and yield the levels that may do, the coarsest first.

    What is at the threshold of a trim makes fine levels look better than they are, so the bits must decide.

    Parameters
    ----------
    sample : Sample
    fit : callable
        Fits one part.
    depth : int
        How many layers the model has.
    whole_first : bool
        Whether to yield the whole model before anything else is fitted, where fits are slow and most recipes have
        the same numbers everywhere.
    levels : sequence of str
        How finely parameters may vary, the coarsest first.
    """
    if whole_first:
        yield _fit_level(sample, fit, "whole", depth)
    finest = _fit_level(sample, fit, levels[-1], depth)
    for level in levels[int(whole_first) : -1]:
        found = _fit_level(sample, fit, level, depth)
        if found.error <= WORSE * finest.error + FLOORS * sample.floor:
            yield found
        if found.error <= ENOUGH * finest.error + sample.floor:
            return
    yield finest


def _fit_level(sample: Sample, fit: PartFit, level: Level, depth: int) -> Parts:
    members: dict[Part, list[int]] = {}
    for number, name in enumerate(sample.names):
        members.setdefault(part_of(name, level), []).append(number)
    parameters: dict[Part, Parameters] = {}
    left = 0.0
    for part, tensors in members.items():
        own = sample.of(tensors)
        if own.energy == 0.0:
            continue
        parameters[part], error = fit(own)
        left += error * own.energy
    return Parts(level, parameters, left / sample.energy, depth)


def setting(values: Mapping[Part, float], depth: int, tolerance: float) -> Setting:
    """Write the values of a parameter as a recipe would: a number, a gradient, or those with filters.

    Parameters
    ----------
    values : mapping of Part to float
    depth : int
        How many layers the model has.
    tolerance : float
        Absolute error of each value.
    """
    modules = sorted({part.module for part in values})
    profiles = {module: _profile(values, module, depth, tolerance) for module in modules}
    if len(set(profiles.values())) == 1:
        return _plain(next(iter(profiles.values())))
    counts = {module: sum(other == profile for other in profiles.values()) for module, profile in profiles.items()}
    # The commonest needs no filter. Embeddings and the like take the first value of a gradient, as in mergekit.
    default = max(sorted(profiles), key=lambda module: (counts[module], "." not in module))
    special = [
        Conditional(_plain_value(profile), module)
        for module, profile in sorted(profiles.items())
        if profile != profiles[default] and not _taken_first(module, profile, profiles[default], tolerance)
    ]
    if not special:
        return _plain(profiles[default])
    return (*special, Conditional(_plain_value(profiles[default])))


def _profile(values: Mapping[Part, float], module: str, depth: int, tolerance: float) -> tuple[float, ...]:
    own = {part.layer: value for part, value in values.items() if part.module == module}
    if set(own) == {-1}:
        return (simplest(own[-1], tolerance),)
    layers = sorted(layer for layer in own if layer >= 0)
    depths = np.array([layer / (depth - 1) if depth > 1 else 1.0 for layer in layers])
    return gradient(depths, np.array([own[layer] for layer in layers]), tolerance)


def _taken_first(module: str, profile: tuple[float, ...], default: tuple[float, ...], tolerance: float) -> bool:
    return "." in module and len(profile) == 1 and abs(profile[0] - default[0]) <= 2.0 * tolerance


def _plain(profile: tuple[float, ...]) -> Setting:
    return profile[0] if len(profile) == 1 else profile


def _plain_value(profile: tuple[float, ...]) -> float | tuple[float, ...]:
    return profile[0] if len(profile) == 1 else profile


def columns(parts: Parts, name: str, models: Sequence[int]) -> list[dict[Part, float]]:
    """Return, for each of the models, the values of an array parameter by part."""

    def reader(model: int) -> Callable[[Parameters], float]:
        return lambda parameters: float(getattr(parameters, name)[model])

    return [parts.values(reader(model)) for model in models]


def ratios(parts: Parts, reference: int) -> dict[Part, FloatArray]:
    """Return the weights of each part over the weight of one model, where only ratios are known."""
    return {
        part: np.asarray(parameters.weights / parameters.weights[reference])
        for part, parameters in sorted(parts.parameters.items())
    }
