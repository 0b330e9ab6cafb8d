"""What a report of text shows in the place of pictures: samples to be read, and perplexity against entropy."""

from __future__ import annotations

from html import escape

from di4c_ext.report import charts
from di4c_ext.report.facts import LOWER_IS_BETTER, Facts, plural

SHOWN = 3  # samples of each model and number of steps


def samples(facts: Facts) -> str:
    """The first samples of every model side by side, a row for each number of steps, below real text."""
    texts = facts.results["grids"]
    columns = "" if len(facts.models) == 2 else f' style="grid-template-columns: 70px repeat({len(facts.models)}, 1fr)"'
    heads = "".join(f'<h3 class="{model}">{model.capitalize()}</h3>' for model in facts.models)
    real = _blocks(facts.images.text(facts.images.tokens[:SHOWN]))  # type: ignore[union-attr]  # text, as asked
    rows = [
        f'<div class="real"><h3>Real text</h3>{real}</div>',
        f'<div class="pair head"{columns}><span></span>{heads}</div>',
    ]
    for n in facts.steps:
        unit = plural(n, "step").split()[1]
        cells = "".join(f"<figure>{_blocks(texts[model, n][:SHOWN])}</figure>" for model in facts.models)
        rows.append(f'<div class="pair words"{columns}><span class="count"><b>{n}</b> {unit}</span>{cells}</div>')
    return "".join(rows)


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


def _blocks(texts: list[str]) -> str:
    return "".join(f"<blockquote>{escape(text.strip())}</blockquote>" for text in texts)
