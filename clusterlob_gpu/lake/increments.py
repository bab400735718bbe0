"""Decimal prices and sizes as exact integers, and the steps that they keep.

An increment is a fraction p/q, usually 1/10^k.  A cell was parsed to the double nearest to its text, so
the integer is n = round(x q / p), and n stands for the text exactly when n p / q, rounded once, is that
very double.  Two texts of up to 15 significant digits never share a double, hence nothing is guessed.
Texts with float noise such as 0.30000000000000004 are allowed two units in the last place, and counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import gcd

import numpy as np

MAX_INTEGER = 2**53
MAX_DECIMALS = 18

_NOISE_ULPS = 2.0


@dataclass(frozen=True)
class Integers:
    """integers : int64, the shape of the input, 0 where it was NaN; rounded : cells with float noise."""

    integers: np.ndarray
    rounded: int


class NotMultipleError(ValueError):
    """`index`, flat, is the first of the values that are no whole multiple; `misfits` are all of them."""

    def __init__(self, index: int, misfits: np.ndarray) -> None:
        super().__init__(f"{misfits[0]!r} is no whole multiple of the increment")
        self.index = index
        self.misfits = misfits


def to_integers(values: np.ndarray, increment: Fraction) -> Integers:
    """Whole multiples n of `increment`, such that n * increment is the decimal behind each value.

    values : float64 of any shape, NaN where missing.  Raises NotMultipleError if a value is between two
    multiples, is infinite, or needs an integer of more than 53 bits.
    """
    p, q = increment.numerator, increment.denominator
    missing = np.isnan(values)
    x = np.where(missing, 0.0, values) if missing.any() else values
    with np.errstate(over="ignore", invalid="ignore"):
        n = np.rint(x * q if p == 1 else x * q / p)
        back = n / q if p == 1 else n * p / q
        wrong = back != x
        rounded = 0
        if wrong.any():
            noise = wrong & (np.abs(back - x) <= _NOISE_ULPS * np.spacing(np.abs(x)))
            rounded = int(noise.sum())
            wrong &= ~noise
    wrong |= ~(np.abs(n) * p < MAX_INTEGER)
    if wrong.any():
        raise NotMultipleError(int(np.argmax(wrong)), x[wrong])
    return Integers(n.astype(np.int64), rounded)


def decimal_increment(values: np.ndarray) -> Fraction | None:
    """The largest of 1, 0.1, 0.01, ... of which all values are multiples; None if there is none."""
    for decimals in range(MAX_DECIMALS + 1):
        try:
            to_integers(values, Fraction(1, 10**decimals))
        except NotMultipleError as error:
            values = error.misfits
        else:
            return Fraction(1, 10**decimals)
    return None


def common(a: Fraction, b: Fraction) -> Fraction:
    """Greatest common divisor of two fractions: the largest of which both are whole multiples."""
    return Fraction(
        gcd(a.numerator * b.denominator, b.numerator * a.denominator), a.denominator * b.denominator
    )


class StepTracker:
    """Greatest common divisor of all integers seen: the tick, or the lot, in increments."""

    def __init__(self) -> None:
        self.divisor = 0
        """0 as long as nothing but zeros was seen."""
        self.varied = False
        """Whether two different values were seen; one alone does not tell a step of its own."""
        self._first = 0

    def add(self, integers: np.ndarray) -> None:
        """Take more integers into account; zeros (missing cells) say nothing."""
        flat = integers.ravel()
        if not self.divisor:
            flat = flat[flat != 0]
            if not len(flat):
                return
            self._first = int(flat[0])
            self.divisor = abs(self._first)
        rest = flat[flat % self.divisor != 0]
        if len(rest):
            self.divisor = int(np.gcd.reduce(rest, initial=self.divisor))
        self.varied = self.varied or bool(((flat != self._first) & (flat != 0)).any())
