"""Comparison at equal entropy."""

from __future__ import annotations

import pytest

from di4c_ext.metrics.frontier import Point, at_equal_entropy, is_at_or_below, perplexity_at

LINE = [Point(4.0, 400.0), Point(3.0, 100.0), Point(3.5, 200.0)]


def test_the_logarithm_is_interpolated() -> None:
    assert perplexity_at(3.0, LINE) == pytest.approx(100)
    assert perplexity_at(3.25, LINE) == pytest.approx(2**0.5 * 100)
    assert perplexity_at(3.75, LINE) == pytest.approx(2**0.5 * 200)
    assert perplexity_at(2.9, LINE) is None and perplexity_at(4.1, LINE) is None
    assert perplexity_at(3.0, [Point(3.0, 100.0), Point(3.0, 400.0)]) == pytest.approx(200)


@pytest.mark.parametrize(
    ("point", "no_worse"),
    [
        (Point(3.25, 141.0), True),
        (Point(3.25, 142.0), False),
        (Point(2.9, 10.0), False),  # a lower perplexity bought with entropy
        (Point(4.1, 400.0), True),  # more entropy and no more perplexity
        (Point(4.1, 401.0), False),
    ],
)
def test_a_point_is_held_against_the_line_at_its_entropy(point: Point, no_worse: bool) -> None:
    assert is_at_or_below(point, LINE) == no_worse


@pytest.mark.parametrize("line", [LINE[:1], [Point(3.0, 0.0), *LINE], [Point(float("nan"), 3.0), *LINE]])
def test_a_line_needs_two_finite_points(line: list[Point]) -> None:
    with pytest.raises(ValueError, match="a line of 2 or more finite points"):
        perplexity_at(3.0, line)


def test_two_lines_are_held_together_where_both_reach() -> None:
    other = [Point(3.5, 90.0), Point(4.5, 900.0)]
    found = at_equal_entropy(LINE, other)
    assert [entropy for entropy, *_ in found] == pytest.approx([3.5, 3.75, 4.0])
    assert [mine for _, mine, _ in found] == pytest.approx([200, 2**0.5 * 200, 400])
    assert [theirs for *_, theirs in found] == pytest.approx([90, 90 * 10**0.25, 90 * 10**0.5])
    assert [(e, b, a) for e, a, b in at_equal_entropy(other, LINE)] == found
    assert at_equal_entropy(LINE, [Point(4.0, 7.0), Point(5.0, 8.0)]) == [(4.0, pytest.approx(400), pytest.approx(7))]
    assert at_equal_entropy(LINE, [Point(4.1, 7.0), Point(5.0, 8.0)]) == []
    assert len(at_equal_entropy(LINE, LINE, number=7)) == 7
    with pytest.raises(ValueError, match="number must be at least 2, got 1"):
        at_equal_entropy(LINE, other, number=1)
    for lines in ((LINE, other[:1]), ([], LINE)):
        with pytest.raises(ValueError, match="a line of 2 or more finite points"):
            at_equal_entropy(*lines)
