"""Two models of text compared at equal entropy, since a lower temperature buys a lower perplexity with less variety.

A model sampled at several temperatures draws a line through (entropy, log of perplexity); another stands above or below
it where their entropies are the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Point(NamedTuple):
    """What samples of one model at one temperature score."""

    entropy: float
    perplexity: float


def perplexity_at(entropy: float, line: Sequence[Point]) -> float | None:
    """A model's perplexity at an entropy between those it was measured at, None outside: nothing is guessed.

    The logarithm is interpolated linearly between the two measured entropies around. Raises ValueError for a line of
    fewer than 2 points, or numbers that are not finite.
    """
    if len(line) < 2 or not all(math.isfinite(point.entropy) and 0 < point.perplexity < math.inf for point in line):
        raise ValueError(f"perplexity_at: a line of 2 or more finite points is wanted, got {list(line)}")
    for low, high in pairwise(sorted(line)):
        if low.entropy <= entropy <= high.entropy:
            width = high.entropy - low.entropy
            share = (entropy - low.entropy) / width if width else 0.5
            return math.exp((1 - share) * math.log(low.perplexity) + share * math.log(high.perplexity))
    return None


def at_equal_entropy(
    line: Sequence[Point], other: Sequence[Point], number: int = 3
) -> list[tuple[float, float, float]]:
    """(entropy, perplexity on the line, on the other) at `number` entropies spread evenly over those that both reach.

    None where they share no entropy, one where they share a single one. Raises ValueError as `perplexity_at` does, and
    for a number below 2.
    """
    if number < 2:
        raise ValueError(f"at_equal_entropy: number must be at least 2, got {number}")
    for points in (line, other):
        perplexity_at(0.0, points)  # refuses what is no line
    low, high = max(min(line).entropy, min(other).entropy), min(max(line).entropy, max(other).entropy)
    evenly = (low + (high - low) * i / (number - 1) for i in range(number))
    found = []
    for entropy in sorted({min(entropy, high) for entropy in evenly}) if low <= high else ():
        mine, theirs = perplexity_at(entropy, line), perplexity_at(entropy, other)
        if mine is not None and theirs is not None:
            found.append((entropy, mine, theirs))
    return found


def is_at_or_below(point: Point, line: Sequence[Point]) -> bool:
    """Whether a model's point is no worse than another's line: a perplexity at most that of the line at its entropy.

    A point of more entropy than all of the line is no worse where its perplexity is at most that of the line's end:
    it has both. One of less entropy than all of the line does not compare, and counts as worse.
    """
    other = perplexity_at(point.entropy, line)
    if other is None:
        end = max(line)
        return point.entropy > end.entropy and point.perplexity <= end.perplexity
    return point.perplexity <= other
