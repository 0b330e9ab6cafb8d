"""report.html of an evaluation: one file, no external resources, readable in light and dark and on paper."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from torch import Tensor

from di4c_ext.arguments import as_yaml
from di4c_ext.data import ImageTokens
from di4c_ext.report import charts, evaluation_words
from di4c_ext.report.evaluated import Evaluated, environment, headline, short, title
from di4c_ext.report.evaluation_words import milliseconds
from di4c_ext.report.facts import LOWER_IS_BETTER, better, number
from di4c_ext.report.side_by_side import picture, quotations, side_by_side

ASSETS = Path(__file__).parents[1] / "assets"
COLUMNS = 16  # of a grid of images
TEXTS = 3  # samples of text of each model and number of steps
AXES = {"num_evaluations": ("network evaluations a sample", 1.0), "latency": ("milliseconds a sample", 1000.0)}


def page(facts: Evaluated) -> str:
    """The whole report as HTML."""
    template = Template((ASSETS / "evaluation.html").read_text(encoding="utf-8"))
    has = {name: bool(facts.report[name]) for name in ("latents", "exact")}
    return template.substitute(
        css=(ASSETS / "report.css").read_text(encoding="utf-8"),
        title=escape(f"{facts.shown.name}: {' and '.join(facts.models)} measured"),
        headline=escape(headline(facts)),
        lead=escape(evaluation_words.lead(facts)),
        links="".join(f'<a href="#{name}">{name.capitalize()}</a>' for name in has if has[name]),
        samples=_samples(facts),
        protocol=escape(evaluation_words.protocol(facts)),
        quality="".join(_charts(facts, figure) for figure in _charted(facts)),
        matched=_matched(facts),
        tables="".join(_figure_table(facts, figure) for figure in facts.figures),
        time=_time(facts),
        latents=_latents(facts) if has["latents"] else "",
        exact=_exact(facts) if has["exact"] else "",
        settings=escape(as_yaml(facts.report["settings"])),
        environment=_definitions(environment()),
        judge=_definitions([*facts.report["sizes"].items(), *facts.report["judge"].items()]),
    )


def _samples(facts: Evaluated) -> str:
    shown: Any = facts.shown
    steps = sorted({n for _, n in facts.samples})
    models = [model for model in facts.models if any(name == model for name, _ in facts.samples)]

    def drawn(tokens: Tensor, text: str) -> str:
        if isinstance(shown, ImageTokens):
            return picture(tokens, shown, COLUMNS, text)
        return quotations(shown.text(tokens[:TEXTS]))

    def cell(model: str, n: int) -> str:
        tokens = facts.samples.get((model, n))
        return "" if tokens is None else drawn(tokens, f"{model}, {n} steps")

    most = max(len(tokens) for tokens in facts.samples.values())
    kind = "text" if facts.is_text else "images"
    real = drawn(shown.tokens[:most].long(), f"real {kind}")
    return side_by_side(models, steps, cell, (f"Real {kind}", real), is_text=facts.is_text)


def _charted(facts: Evaluated) -> list[str]:
    """The figures that are drawn: but those against a part of the data, and the entropy below all of them."""
    return [name for name in facts.figures if not name.endswith("_heldout") and name != facts.diversity]


def _charts(facts: Evaluated, figure: str) -> str:
    """A figure above the entropy, once against evaluations and once against time."""
    floors = (facts.floors.get(figure), facts.floors.get(facts.diversity))
    real = "real text" if facts.is_text else "real images"
    drawn = ""
    for axis, (words, scale) in AXES.items():
        upper, lower = (_curves(facts, name, axis, scale) for name in (figure, facts.diversity))
        values = [y for points in upper.values() for _, _, ends, each in points for y in (*(ends or ()), *each)]
        log = figure in LOWER_IS_BETTER and min(values) > 0
        svg = charts.two_panels(upper, lower, short(figure), words, floors, real, log)
        caption = escape(f"{title(figure)}: {better(figure)}")
        drawn += f'<figure class="chart">{svg}<figcaption>{caption}</figcaption></figure>'
    return drawn


def _curves(facts: Evaluated, figure: str, axis: str, scale: float) -> charts.Curves:
    curves: dict[str, list[tuple[float, float, tuple[float, float] | None, list[float]]]] = {}
    for model in facts.models:
        for n in facts.steps_of(model):
            x, y = facts.measured(model, n, axis).mean * scale, facts.value(model, n, figure)
            if y is not None:
                ends = None if y.low is None or y.high is None else (y.low, y.high)
                curves.setdefault(model, []).append((x, y.mean, ends, y.each))
    return curves


def _matched(facts: Evaluated) -> str:
    """The comparison at equal entropy: the lines over temperature, and a table of where they are held together."""
    lines = [(model, n, facts.line(model, n)) for model in facts.models for n in facts.steps_of(model)]
    lines = [(model, n, line) for model, n, line in lines if len(line) > 1]
    figure = facts.main_figure
    if not lines or figure == facts.diversity or any(point.perplexity <= 0 for *_, line in lines for point in line):
        return ""
    real = None
    if figure in facts.floors and facts.diversity in facts.floors:
        real = (facts.floors[facts.diversity], facts.floors[figure])
    svg = charts.temperature_lines(lines, real, short(figure))
    temperatures = ", ".join(f"{t:g}" for t in facts.temperatures)
    best = "to the right and below is better" if facts.is_text else "below, at the entropy of real images, is best"
    caption = f"A line through the temperatures {temperatures} for each number of steps: {best}"
    head = ("student's steps", "teacher's steps", "entropy", "student", "teacher")
    rows = [
        [
            str(row["student_steps"]),
            str(row["teacher_steps"]),
            f"{row['entropy']:.3f}",
            number(row["student"]),
            "outside its entropies" if row["teacher"] is None else number(row["teacher"]),
        ]
        for row in facts.matched()
    ]
    words = "The student's figure and its teacher's at the same entropies"
    table = f"<details><summary>{words}</summary>{_table(head, rows)}</details>" if rows else ""
    return (
        "<h3>At equal entropy</h3><p>A lower temperature makes samples likelier and less varied, so one model's figure "
        "is held against another's line where their entropies are the same, interpolated in the logarithm.</p>"
        f'<figure class="chart" style="max-width: 560px">{svg}<figcaption>{escape(caption)}</figcaption></figure>'
        f"{table}"
    )


def _figure_table(facts: Evaluated, figure: str) -> str:
    """A figure by model and steps, its interval and the entropy in every cell, each seed's value on hovering."""
    body = []
    for model in facts.models:
        cells = [f'<th class="{model}">{model}</th>']
        for n in facts.steps:
            value, entropy = facts.value(model, n, figure), facts.value(model, n, facts.diversity)
            if value is None:
                cells.append("<td></td>")
                continue
            beside = "" if entropy is None or figure == facts.diversity else f"<small>entropy {entropy}</small>"
            interval = f"<small>{value.interval}</small>" if value.interval else ""
            each = ", ".join(f"{one:.4g}" for one in value.each)
            cells.append(f'<td title="by seed: {each}">{value}{interval}{beside}</td>')
        body.append(f"<tr>{''.join(cells)}</tr>")
    floor = facts.floors.get(figure)
    real = "" if floor is None else f" <span>real: {number(floor)}</span>"
    opened = " open" if figure == facts.main_figure else ""
    head = "".join(f"<th>{n}</th>" for n in facts.steps)
    return (
        f"<details{opened}><summary>{escape(title(figure))}{real}</summary>"
        f"<table><thead><tr><th>steps</th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></details>"
    )


def _time(facts: Evaluated) -> str:
    """Evaluations and latencies by model and steps, and what the latent costs."""
    alone = any("latency_1" in row for row in facts.rows)
    head = ["model", "steps", "evaluations", "a sample in batches", *(["one sample alone"] if alone else [])]
    rows = []
    for model in facts.models:
        for n in facts.steps_of(model):
            cells = [model, str(n), f"{facts.measured(model, n, 'num_evaluations').mean:g}"]
            cells.append(milliseconds(facts.measured(model, n, "latency").mean))
            one = facts.value(model, n, "latency_1")
            rows.append([*cells, *([""] if alone and one is None else [] if one is None else [milliseconds(one.mean)])])
    told = "".join(f"<p>{escape(evaluation_words.overhead(row))}</p>" for row in facts.report["overhead"])
    return told + _table(head, rows)


def _latents(facts: Evaluated) -> str:
    rows = [
        [
            f"{row['t']:g}",
            *(_with_ends(row, name) for name in ("correlation", "information", "variation")),
            number(-row["joint"]),
        ]
        for row in facts.report["latents"]
    ]
    head = ("t", "correlation, nats", "a latent about single positions, nats", "variation", "noised positions, bound")
    first = facts.report["latents"][0]
    note = (
        f"Means over {first['num_images']} held-out examples and {first['num_latents']} latents; at t = 1 all is "
        "noise. Correlation is the log-likelihood of the mixture above that of the product of its own marginals, "
        "variation the mean total variation between the law of a position under one latent and under all."
    )
    return (
        f'<section id="latents"><h2>What the latents carry</h2><p>{escape(evaluation_words.latents(facts))}</p>'
        f'{_table(head, rows)}<p class="note">{escape(note)}</p></section>'
    )


def _with_ends(row: dict[str, float], name: str) -> str:
    ends = f"<small>{row[f'{name}_low']:.3f} to {row[f'{name}_high']:.3f}</small>" if f"{name}_low" in row else ""
    return f"{row[name]:.3f}{ends}"


def _exact(facts: Evaluated) -> str:
    found = facts.report["exact"]
    names = {"teacher": "teacher to the goal", "student": "student to the goal"}
    names |= {"same_steps": "student to the teacher of as many steps"}
    held = {name: words for name, words in names.items() if name in found[0]}
    rows = [[str(row["num_steps"]), *(f"{row[name]:.4f}" for name in held)] for row in found]
    return (
        f'<section id="exact"><h2>Exact distance</h2><p>{escape(evaluation_words.exact(facts))}</p>'
        f"{_table(('steps', *held.values()), rows)}</section>"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    heads = "".join(f"<th>{name}</th>" for name in head)
    body = "".join(f"<tr><th>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>" for row in rows)
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"


def _definitions(rows: Iterable[tuple[str, Any]]) -> str:
    told = "".join(f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in rows)
    return f"<dl>{told}</dl>"
