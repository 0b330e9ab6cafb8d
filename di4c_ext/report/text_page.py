"""What a report of text shows in the place of pictures: samples to be read, and perplexity against entropy."""

from __future__ import annotations

from di4c_ext.report import charts
from di4c_ext.report.facts import LOWER_IS_BETTER, Facts
from di4c_ext.report.side_by_side import quotations, side_by_side

SHOWN = 3  # samples of each model and number of steps


def samples(facts: Facts) -> str:
    """The first samples of every model side by side, a row for each number of steps, below real text."""
    texts = facts.results["grids"]
    real = facts.images.text(facts.images.tokens[:SHOWN])  # type: ignore[union-attr]  # text, as asked
    return side_by_side(
        facts.models,
        facts.steps,
        lambda model, n: quotations(texts[model, n][:SHOWN]),
        ("Real text", quotations(real)),
        is_text=True,
    )


def frontier(facts: Facts) -> str:
    """Perplexity against entropy, both the means over seeds; nothing where no perplexity was measured."""
    figure = facts.main_figure
    if figure not in LOWER_IS_BETTER:
        return ""
    points = [
        (model, n, facts.mean(model, n, "entropy"), facts.mean(model, n, figure))
        for model in facts.models
        for n in facts.steps
    ]
    floors = facts.results["floors"]
    real = (floors["entropy"], floors[figure]) if figure in floors else None
    return (
        f'<figure class="chart">{charts.frontier(points, real)}<figcaption>Perplexity against entropy, a dot for each '
        "number of steps: to the right and below is better; below and to the left may only be duller</figcaption>"
        "</figure>"
    )
