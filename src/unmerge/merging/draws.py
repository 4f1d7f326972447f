"""Random masks as torch draws them on a CPU."""

from __future__ import annotations

import math

import numpy as np

from unmerge.errors import RecipeError
from unmerge.merging.arithmetic import Arithmetic, Array
from unmerge.merging.method import Draws

_BITS = 24
_BLOCK = 1 << 20


class TorchDraws:
    """The low 24 bits of the outputs of torch's CPU generator, which is a 32-bit Mersenne twister.

    Parameters
    ----------
    seed : int
        As given to ``torch.manual_seed``; torch uses its low 32 bits only.
    """

    __slots__ = ("_twister",)

    def __init__(self, seed: int) -> None:
        # The legacy interface seeds as torch does, and is frozen.
        self._twister = np.random.RandomState(seed & 0xFFFFFFFF)

    def take(self, count: int) -> Array:
        """Return the next `count` draws, uint32."""
        drawn: Array = self._twister.randint(0, 1 << 32, size=count, dtype=np.uint32)
        drawn &= np.uint32((1 << _BITS) - 1)
        return drawn

    def skip(self, count: int) -> None:
        """Pass over `count` draws."""
        for start in range(0, count, _BLOCK):
            self.take(min(_BLOCK, count - start))


class KeptDraws:
    """A stream whose numbers are drawn once and handed out as often as they are asked for.

    Parameters
    ----------
    source : Draws
        At the place where the stream begins.
    """

    __slots__ = ("_drawn", "_source")

    def __init__(self, source: Draws) -> None:
        self._source = source
        self._drawn: Array = np.empty(0, np.uint32)

    def part(self, start: int, stop: int) -> Array:
        """Return draws `start` to `stop`."""
        if stop > len(self._drawn):
            self._drawn = np.concatenate([self._drawn, self._source.take(stop - len(self._drawn))])
        return self._drawn[start:stop]

    def again(self) -> Draws:
        """Return the stream from its beginning."""
        return _Again(self)


class _Again:
    __slots__ = ("_kept", "_taken")

    def __init__(self, kept: KeptDraws) -> None:
        self._kept, self._taken = kept, 0

    def take(self, count: int) -> Array:
        """Return the next `count` draws."""
        first, self._taken = self._taken, self._taken + count
        return self._kept.part(first, self._taken)


def bernoulli(draws: Draws, probabilities: Array | float, shape: tuple[int, ...], arithmetic: Arithmetic) -> Array:
    """Return ``torch.bernoulli`` of a tensor of probabilities: one draw for each element, in row-major order.

    Parameters
    ----------
    draws : Draws
    probabilities : float or array
        One for all elements, or one for each.
    shape : tuple of int
    arithmetic : Arithmetic
        The type of the tensor of probabilities; of float64 torch takes two outputs for an element, which is not done
        here.

    Returns
    -------
    array of bool, `shape`
        True where the draw is below the probability.

    Raises
    ------
    RecipeError
        A probability below 0 or above 1, or not a number.
    """
    rounded = arithmetic.round(probabilities)
    if not np.all((rounded >= 0) & (rounded <= 1)):
        raise RecipeError("a probability of a random mask is not between 0 and 1: give a density between them")
    # A draw is an integer, so it is below a number where it is below the next integer.
    limits = np.ceil(np.ldexp(rounded, _BITS)).astype(np.uint32)
    below: Array = draws.take(math.prod(shape)).reshape(shape) < limits
    return below
