"""The generator MT19937 as torch seeds it on CPUs: its far draws as parities of its state, and tests of many seeds.

With words w_0 .. w_623 from the seed, draw i is a permutation of the bits of w_(624+i) ("tempering"), and

    w_(j+624) = w_(j+397) ^ twist(upper bit of w_j, lower 31 bits of w_(j+1)),

which is linear over GF(2). So each bit of each draw is the parity of some bits of w_0 .. w_623, always the same ones
(`parity_masks`), however far the draw is. Only the seeding, w_i = 1812433253 (w_(i-1) ^ w_(i-1) >> 30) + i, is not
linear: it is done for every seed, for many seeds at once in the lanes of vector registers. Reference: Matsumoto and
Nishimura, Mersenne Twister, 1998; jumping ahead by x^n modulo the characteristic polynomial: Haramoto et al., Efficient
jump ahead for F2-linear random number generators, 2008.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]
Function = TypeVar("Function", bound=Callable[..., Any])

SIZE, MIDDLE = 624, 397
"""Words of the state, and the offset of the word that the recurrence adds."""
NEAR = SIZE - MIDDLE
"""Draws before this one come from three words of the seeded state each."""
DEGREE = 19937
"""Of the characteristic polynomial."""
LANES = 128
"""Seeds that are tested side by side: some registers full, so that one's arithmetic hides another's latency."""
ROWS = 8
"""Words of each seed that are made before they are added to the parities; divides `SIZE`."""
_UPPER, _LOWER = np.uint32(0x80000000), np.uint32(0x7FFFFFFF)
_TWIST = np.uint32(0x9908B0DF)
_SEEDING = np.uint32(1812433253)
_BLOCKS = DEGREE // 64 + 1
_LAST = DEGREE % 64
"""Bits of a polynomial's last block of 64."""


def _compiled(function: Function) -> Function:
    """Compile at the first call; without Python's lock, so that threads run side by side."""
    return cast("Function", numba.njit(nogil=True)(function))


def _inlined(function: Function) -> Function:
    """Compile as a part of its callers: loops over lanes become vector instructions only where shapes are known."""
    return cast("Function", numba.njit(nogil=True, inline="always")(function))


@_inlined
def _next(word: np.uint32, index: np.uint32) -> np.uint32:
    """Return word `index` of the seeded state from the one before it."""
    return np.uint32(np.uint32(np.uint32(word ^ (word >> np.uint32(30))) * _SEEDING) + index)


@_inlined
def _temper(word: np.uint32) -> np.uint32:
    word ^= word >> np.uint32(11)
    word ^= np.uint32(word << np.uint32(7)) & np.uint32(0x9D2C5680)
    word ^= np.uint32(word << np.uint32(15)) & np.uint32(0xEFC60000)
    return np.uint32(word ^ (word >> np.uint32(18)))


@_inlined
def _parity(word: np.uint32) -> np.uint32:
    word ^= word >> np.uint32(16)
    word ^= word >> np.uint32(8)
    word ^= word >> np.uint32(4)
    word ^= word >> np.uint32(2)
    return np.uint32((word ^ (word >> np.uint32(1))) & np.uint32(1))


def parity_masks(index: int, bits: range) -> Words:
    """Return which bits of the seeded state make given bits of a draw.

    Parameters
    ----------
    index : int
        Of the draw, from 0.
    bits : range
        Of the draw, 0 for the lowest of 32.

    Returns
    -------
    array, shape (len(bits), 624)
        Bit ``bits[k]`` of the draw is the parity of all bits of ``masks[k] & state``.
    """
    coefficients = _power_of_x(SIZE - 1 + index, _characteristic())
    masks = np.empty((len(bits), SIZE), dtype=np.uint32)
    for mask, bit in zip(masks, bits, strict=True):
        _pull_back(coefficients, _tempered_from(bit), mask)
    return masks


def _tempered_from(bit: int) -> np.uint32:
    """Return the bits of a word whose parity is one bit of the word after tempering."""
    made = sum(((int(_temper(np.uint32(1 << source))) >> bit) & 1) << source for source in range(32))
    return np.uint32(made)


@cache
def _characteristic() -> NDArray[np.int64]:
    """Return the exponents of the characteristic polynomial's terms, the leading one left out.

    Matsumoto and Nishimura, appendix A: with a_k the bits of the twist's constant from the lowest, it is the sum of
    a_k u v^(30-k) for k < 31, and a_31, and u v^31, where u = x^624 + x^397 and v = x^623 + x^396. Polynomials are
    integers here, bit e for x^e.
    """
    powers = [1]
    for _ in range(31):
        powers.append(powers[-1] << (SIZE - 1) ^ powers[-1] << (MIDDLE - 1))
    factors = [powers[31]] + [powers[30 - k] for k in range(31) if int(_TWIST) >> k & 1]
    polynomial = int(_TWIST) >> 31
    for factor in factors:
        polynomial ^= factor << SIZE ^ factor << MIDDLE
    return np.array([exponent for exponent in range(DEGREE) if polynomial >> exponent & 1], dtype=np.int64)


def _power_of_x(exponent: int, terms: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return x^exponent modulo the characteristic polynomial: its coefficients, 64 in a block."""
    steps = max(exponent.bit_length() - DEGREE.bit_length() + 1, 0)  # what is left has no need of a reduction
    residue = np.zeros(_BLOCKS, dtype=np.uint64)
    residue[(exponent >> steps) // 64] = np.uint64(1 << (exponent >> steps) % 64)
    for step in reversed(range(steps)):
        residue = _square(residue, terms, exponent >> step & 1)
    return residue


@_compiled
def _square(residue: NDArray[np.uint64], terms: NDArray[np.int64], shift: int) -> NDArray[np.uint64]:
    """Return the square of a polynomial, times x where `shift` is 1, reduced."""
    product = np.zeros(2 * _BLOCKS + 1, dtype=np.uint64)
    for exponent in range(DEGREE):
        if residue[exponent // 64] >> np.uint64(exponent % 64) & np.uint64(1):
            square = 2 * exponent + shift
            product[square // 64] |= np.uint64(1) << np.uint64(square % 64)
    for block in range(2 * _BLOCKS, _BLOCKS - 1, -1):
        _subtract(product, terms, product[block], 64 * block - DEGREE)
    _subtract(product, terms, product[_BLOCKS - 1] >> np.uint64(_LAST), 0)
    product[_BLOCKS - 1] &= (np.uint64(1) << np.uint64(_LAST)) - np.uint64(1)
    return product[:_BLOCKS].copy()


@_compiled
def _subtract(product: NDArray[np.uint64], terms: NDArray[np.int64], factor: np.uint64, shift: int) -> None:
    """Subtract x^shift times `factor` times the characteristic polynomial without its leading term."""
    for term in terms:
        place, within = (term + shift) // 64, np.uint64((term + shift) % 64)
        product[place] ^= factor << within
        if within:
            product[place + 1] ^= factor >> (np.uint64(64) - within)


@_compiled
def _pull_back(coefficients: NDArray[np.uint64], word: np.uint32, mask: Words) -> None:
    """Write words w_1 .. w_19937, each weighed by its coefficient, as bits of w_0 .. w_623.

    The recurrence transposed: what is asked of a word is asked of those that it was made from.
    """
    asked = np.zeros(DEGREE + 1, dtype=np.uint32)
    for exponent in range(DEGREE):
        if coefficients[exponent // 64] >> np.uint64(exponent % 64) & np.uint64(1):
            asked[exponent + 1] = word
    for index in range(DEGREE, SIZE - 1, -1):
        bits = asked[index]
        asked[index - NEAR] ^= bits
        twisted = np.uint32(bits << np.uint32(1)) | _parity(bits & _TWIST)
        asked[index - SIZE] ^= twisted & _UPPER
        asked[index - SIZE + 1] ^= twisted & _LOWER
    mask[:] = asked[:SIZE]


@_compiled
def screen_words(
    seeds: Words, indices: NDArray[np.int64], thresholds: Words, kept: Words, allowed: int, passed: Words
) -> int:
    """Test seeds on draws that come from three words of the seeded state each.

    Parameters
    ----------
    seeds : array, shape (n,)
    indices : array, shape (N,)
        Ascending, all under `NEAR`.
    thresholds, kept : array, shape (N,)
        What was seen: 1 where the draw's low 24 bits are under the threshold, else 0.
    allowed : int
        A seed passes that contradicts no more observations than these.
    passed : array, shape (n,)
        Takes the seeds that pass.

    Returns
    -------
    int
        How many pass.
    """
    count = 0
    rows = indices[-1] + 2
    head = np.empty((rows, LANES), dtype=np.uint32)
    word = np.empty(LANES, dtype=np.uint32)
    missed = np.empty(LANES, dtype=np.uint32)
    most = np.uint32(allowed)
    for start in range(0, seeds.size, LANES):
        lanes = min(LANES, seeds.size - start)
        for lane in range(LANES):
            head[0, lane] = seeds[start + min(lane, lanes - 1)]
            missed[lane] = np.uint32(0)
        for row in range(1, rows):
            for lane in range(LANES):
                head[row, lane] = _next(head[row - 1, lane], np.uint32(row))
        word[:] = head[rows - 1]
        last = rows - 1
        alive = lanes
        for observation in range(indices.size):
            index = indices[observation]
            _advance(word, last, index + MIDDLE)
            last = index + MIDDLE
            alive = _compare(
                head[index], head[index + 1], word, thresholds[observation], kept[observation], missed, most
            )
            if alive == 0:
                break
        if alive:
            for lane in range(lanes):
                if missed[lane] <= most:
                    passed[count] = seeds[start + lane]
                    count += 1
    return count


@_inlined
def _advance(word: Words, last: int, index: int) -> None:
    """Seed on from word `last` to word `index`."""
    while last + ROWS <= index:
        for lane in range(LANES):
            value = word[lane]
            for step in range(ROWS):
                value = _next(value, np.uint32(last + 1 + step))
            word[lane] = value
        last += ROWS
    for following in range(last + 1, index + 1):
        for lane in range(LANES):
            word[lane] = _next(word[lane], np.uint32(following))


@_inlined
def _compare(
    first: Words, second: Words, far: Words, threshold: np.uint32, kept: np.uint32, missed: Words, most: np.uint32
) -> int:
    """Count one observation's contradictions, and return how many lanes have no more than `most`."""
    alive = 0
    for lane in range(LANES):
        joined = (first[lane] & _UPPER) | (second[lane] & _LOWER)
        twisted = np.uint32(far[lane] ^ (joined >> np.uint32(1)) ^ (np.uint32(-(joined & np.uint32(1))) & _TWIST))
        under = np.uint32((_temper(twisted) & np.uint32(0xFFFFFF)) < threshold)
        missed[lane] += under ^ kept
        alive += missed[lane] <= most
    return alive


@_compiled
def screen_parities(
    seeds: Words,
    missed: Words,
    masks: Words,
    wanted: Words,
    ends: NDArray[np.int64],
    allowed: int,
    passed: Words,
) -> int:
    """Test seeds on parities of the seeded state.

    Parameters
    ----------
    seeds : array, shape (n,)
    missed : array, shape (n,)
        Observations that each has contradicted so far; those of seeds that pass are overwritten, in their order.
    masks : array, shape (624 / ROWS, K, ROWS)
        Of `parity_masks`, in groups of `ROWS` words.
    wanted : array, shape (K,)
        What each has to be.
    ends : array, shape (N,)
        Where the parities of each observation end; one that is wrong contradicts it.
    allowed : int
        A seed passes that contradicts no more observations than these.
    passed : array, shape (n,)
        Takes the seeds that pass.

    Returns
    -------
    int
        How many pass.
    """
    count = 0
    word = np.empty(LANES, dtype=np.uint32)
    rows = np.empty((ROWS, LANES), dtype=np.uint32)
    folded = np.empty((wanted.size, LANES), dtype=np.uint32)
    wrong, total = np.empty(LANES, dtype=np.uint32), np.empty(LANES, dtype=np.uint32)
    for start in range(0, seeds.size, LANES):
        lanes = min(LANES, seeds.size - start)
        for lane in range(LANES):
            word[lane] = seeds[start + min(lane, lanes - 1)]
        folded[:] = np.uint32(0)
        for group in range(SIZE // ROWS):
            _make_rows(word, group * ROWS, rows)
            for parity in range(wanted.size):
                _fold(rows, masks, group, parity, folded)
        total[:] = np.uint32(0)
        parity = 0
        for end in ends:
            parity = _contradict(folded, wanted, parity, end, wrong, total)
        for lane in range(lanes):
            most = total[lane] + missed[start + lane]
            if most <= allowed:
                passed[count] = seeds[start + lane]
                missed[count] = most
                count += 1
    return count


@_inlined
def _make_rows(word: Words, index: int, rows: Words) -> None:
    """Write words `index` and following of each lane's state, and leave the one after them in `word`."""
    for lane in range(LANES):
        value = word[lane]
        for row in range(ROWS):
            rows[row, lane] = value
            value = _next(value, np.uint32(index + row + 1))
        word[lane] = value


@_inlined
def _contradict(folded: Words, wanted: Words, first: int, end: int, wrong: Words, total: Words) -> int:
    """Count one observation for the lanes that any of its parities contradicts, and return where they end."""
    wrong[:] = np.uint32(0)
    for parity in range(first, end):
        for lane in range(LANES):
            wrong[lane] |= _parity(folded[parity, lane]) ^ wanted[parity]
    for lane in range(LANES):
        total[lane] += wrong[lane]
    return end


@_inlined
def _fold(rows: Words, masks: Words, group: int, parity: int, folded: Words) -> None:
    """Add the masked words to each lane's sum over GF(2)."""
    for lane in range(LANES):
        value = folded[parity, lane]
        for row in range(ROWS):
            value ^= rows[row, lane] & masks[group, parity, row]
        folded[parity, lane] = value


@_compiled
def verify(
    seeds: Words,
    masks: Words,
    starts: NDArray[np.int64],
    thresholds: Words,
    kept: Words,
    allowed: int,
    passed: Words,
) -> int:
    """Test seeds, one after the other, on whole observations.

    Parameters
    ----------
    seeds : array, shape (n,)
    masks : array, shape (B, 624)
        Of bits 23 and lower of each observation's draw, as many as its threshold has to be compared with.
    starts : array, shape (N + 1,)
        Where the masks of each observation begin.
    thresholds, kept : array, shape (N,)
        As for `screen_words`.
    allowed : int
        A seed passes that contradicts no more observations than these.
    passed : array, shape (n,)
        Takes the seeds that pass.

    Returns
    -------
    int
        How many pass.
    """
    count = 0
    state = np.empty(SIZE, dtype=np.uint32)
    for seed in seeds:
        state[0] = seed
        for index in range(1, SIZE):
            state[index] = _next(state[index - 1], np.uint32(index))
        missed = 0
        for observation in range(kept.size):
            bits = masks[starts[observation] : starts[observation + 1]]
            missed += _under(state, bits, thresholds[observation]) != kept[observation]
            if missed > allowed:
                break
        if missed <= allowed:
            passed[count] = seed
            count += 1
    return count


@_compiled
def _under(state: Words, masks: Words, threshold: np.uint32) -> np.uint32:
    """Return 1 where a draw's low 24 bits are under the threshold, else 0: from the highest bit to the first other."""
    for place in range(len(masks)):
        folded = np.uint32(0)
        for index in range(SIZE):
            folded ^= state[index] & masks[place, index]
        bit = (threshold >> np.uint32(23 - place)) & np.uint32(1)
        if _parity(folded) != bit:
            return bit
    return np.uint32(0)
