"""report.html: one file, no external resources, readable in light and dark and on paper."""

from __future__ import annotations

from html import escape
from pathlib import Path
from string import Template

import torch

from di4c_ext import pictures
from di4c_ext.arguments import as_yaml
from di4c_ext.report import charts
from di4c_ext.report.card import protocol
from di4c_ext.report.facts import FIGURES, Facts, doubling, headline, latent_verdict, number, plural, teacher_needs

ASSETS = Path(__file__).parents[1] / "assets"
COLUMNS = 16
DIAGNOSTICS = ("gain_data", "gain_consistency", "latent_information")
LEARNED = (
    "What the latents came to carry: the correlation gained at the data and at samples of the consistency target, and "
    "what a latent tells about single pixels"
)
NOT_PARTS = {"phase", "step", "seconds", "loss", "grad_norm", "learning_rate", "epoch", *DIAGNOSTICS}


def page(facts: Facts) -> str:
    """The whole report as HTML."""
    template = Template((ASSETS / "report.html").read_text(encoding="utf-8"))
    return template.substitute(
        css=(ASSETS / "report.css").read_text(encoding="utf-8"),
        title=escape(f"{facts.images.name}: few-step student"),
        headline=escape(headline(facts)),
        lead=_lead(facts),
        cards=_cards(facts),
        samples=_samples(facts),
        quality=_quality(facts),
        doubling=_doubling(facts),
        protocol=escape(protocol(facts)),
        tables="".join(_table(facts, figure) for figure in facts.figures),
        latents=escape(latent_verdict(facts)),
        latent_table=_latent_table(facts),
        training=_training(facts),
        bounds=_bounds(facts),
        settings=escape(as_yaml(facts.settings)),
        environment=_definitions(facts.environment()),
        timing=_definitions([(name, f"{seconds:,.1f} s") for name, seconds in facts.seconds.items()]),
    )


def _lead(facts: Facts) -> str:
    shape = " x ".join(map(str, facts.images.shape))
    latents = facts.results["latents"][0]["num_latents"]
    return escape(
        f"{facts.images.name}: images of {shape}, {facts.images.num_states} states a pixel, {facts.diffusion} "
        f"diffusion. The teacher ({facts.teacher_parameters:,} parameters, {facts.teacher_origin}) draws every pixel "
        "of a step independently; "
        f"the student ({facts.num_parameters:,}) is a mixture over a latent, trained with {plural(latents, 'latent')} "
        "an image, and draws pixels that agree with one another."
    )


def _cards(facts: Facts) -> str:
    figure = facts.main_figure
    cards = []
    for n in facts.steps[:4]:
        student, teacher = (facts.mean(model, n, figure) for model in ("student", "teacher"))
        cards.append(
            f'<div class="card"><div class="steps">{plural(n, "step")}</div>'
            f'<div class="big">{number(student)}</div>'
            f'<div class="small">teacher at {plural(n, "step")}: {number(teacher)}<br>'
            f"teacher's steps to get there: {teacher_needs(facts, n)}</div></div>"
        )
    return "".join(cards)


def _image(tokens: torch.Tensor, facts: Facts, text: str) -> str:
    pixels = pictures.grid(tokens, facts.images.shape, facts.images.num_states, COLUMNS, facts.images.layout)
    height, width = pixels.shape[:2]
    source = pictures.data_url(pixels)
    return f'<img src="{source}" width="{width * 4}" height="{height * 4}" alt="{escape(text)}">'


def _samples(facts: Facts) -> str:
    grids = facts.results["grids"]
    shown = max(len(grid) for grid in grids.values())
    real = _image(facts.images.tokens[:shown].long(), facts, "real images")
    columns = "" if len(facts.models) == 2 else f' style="grid-template-columns: 70px repeat({len(facts.models)}, 1fr)"'
    heads = "".join(f'<h3 class="{model}">{model.capitalize()}</h3>' for model in facts.models)
    rows = [
        f'<div class="real"><h3>Real images</h3>{real}</div>',
        f'<div class="pair head"{columns}><span></span>{heads}</div>',
    ]
    for n in facts.steps:
        count = plural(n, "step")
        images = [_image(grids[model, n], facts, f"{model}, {count}") for model in facts.models]
        pair = "".join(f"<figure>{image}</figure>" for image in images)
        unit = count.split()[1]
        rows.append(f'<div class="pair"{columns}><span class="count"><b>{n}</b> {unit}</span>{pair}</div>')
    return "".join(rows)


def _quality(facts: Facts) -> str:
    drawn = []
    for figure in facts.figures:
        if figure.endswith("_heldout"):
            continue
        title, unit = FIGURES[figure]
        points = [(m, n, facts.values(m, n, figure)) for m in facts.models for n in facts.steps]
        distance = figure.startswith("frechet")
        svg = charts.against_steps(
            points,
            facts.results["floors"].get(figure),
            title + (f" ({unit})" if unit else ""),
            "real against real" if distance else "real images",
            log=distance,
        )
        better = "lower is better" if distance else "closest to the dashed line is best"
        if figure.endswith("_score"):
            better = "higher is better, as far as the dashed line"
        drawn.append(f'<figure class="chart">{svg}<figcaption>{escape(title)}: {better}</figcaption></figure>')
    return "".join(drawn)


def _doubling(facts: Facts) -> str:
    rows = ""
    for k, student, teacher, wins in doubling(facts):
        mark = "good" if wins == len(facts.seeds) else "bad"
        same = facts.mean("teacher", k, facts.main_figure)
        rows += f"<tr><th>{k}</th><td>{number(student)}</td><td>{number(same)}</td><td>{number(teacher)}</td>"
        rows += f'<td class="{mark}">{wins} of {len(facts.seeds)}</td></tr>'
    if not rows:
        return ""
    return (
        "<h3>Half the steps</h3>"
        "<p>The student after k steps beside its teacher after k and after 2k; means over seeds.</p>"
        "<table><thead><tr><th>k</th><th>student at k</th><th>teacher at k</th>"
        "<th>teacher at 2k</th><th>seeds where student at k is no worse</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )


def _table(facts: Facts, figure: str) -> str:
    title, unit = FIGURES[figure]
    floor = facts.results["floors"].get(figure)
    head = "".join(f"<th>{n}</th>" for n in facts.steps)
    body = ""
    for model in facts.models:
        cells = ""
        for n in facts.steps:
            values = facts.values(model, n, figure)
            span = f"{number(min(values))} to {number(max(values))}"
            each = ", ".join(f"seed {seed}: {value:.4g}" for seed, value in zip(facts.seeds, values, strict=True))
            cells += f'<td title="{each}">{number(sum(values) / len(values))}<small>{span}</small></td>'
        body += f'<tr><th class="{model}">{model}</th>{cells}</tr>'
        for i, seed in enumerate(facts.seeds):
            each_seed = "".join(f"<td>{number(facts.values(model, n, figure)[i])}</td>" for n in facts.steps)
            body += f'<tr class="seed"><th>seed {seed}</th>{each_seed}</tr>'
    named = f"{title}, {unit}" if unit else title
    opened = " open" if figure == facts.main_figure else ""
    real = "" if floor is None else f" <span>real: {number(floor)}</span>"
    return (
        f"<details{opened}><summary>{escape(named)}{real}</summary>"
        f"<table><thead><tr><th>steps</th>{head}</tr></thead><tbody>{body}</tbody></table></details>"
    )


def _latent_table(facts: Facts) -> str:
    rows = "".join(
        f"<tr><th>{row['t']:g}</th><td>{row['correlation']:.2f}</td><td>{row['information']:.2f}</td>"
        f"<td>{-row['joint']:.1f}</td></tr>"
        for row in facts.results["latents"]
    )
    count = plural(int(facts.results["latents"][0]["num_images"]), "held-out image")
    is_masked = facts.diffusion == "masked"
    noised, start = ("masked", "every pixel is masked") if is_masked else ("noised", "all is noise")
    return (
        "<table><thead><tr><th>t</th><th>correlation</th><th>a latent about single pixels</th>"
        f"<th>{noised} pixels, bound</th></tr></thead><tbody>{rows}</tbody></table>"
        f'<p class="note">Nats an image, means over {count}; at t = 1 {start}. Correlation is the '
        "log-likelihood of the mixture above that of the product of its own marginals.</p>"
    )


def _training(facts: Facts) -> str:
    student = [line for line in facts.history if line.get("phase") == "student"]
    teacher = [line for line in facts.history if line.get("phase") == "teacher"]
    parts = sorted({name for line in student for name in line} - NOT_PARTS)
    drawn = []
    if len(student) > 1:
        drawn.append((charts.over_time(student, parts, "nats an image"), "The parts of the student's loss"))
        known = [name for name in DIAGNOSTICS if any(name in line for line in student)]
        drawn.append((charts.over_time(student, known, "nats an image, higher: more"), LEARNED))
    if len(teacher) > 1:
        svg = charts.over_time(teacher, ["nats_per_image"], "nats an image")
        drawn.append((svg, f"The teacher on its training batches: {facts.bounds_name}"))
    return "".join(
        f'<figure class="chart">{svg}<figcaption>{escape(text)}</figcaption></figure>' for svg, text in drawn
    )


def _bounds(facts: Facts) -> str:
    bounds, counts = facts.results["bounds"], facts.results["num_bounds"]
    gap = bounds["heldout"] - bounds["train"]
    return (
        f"The teacher's {escape(facts.bounds_name)}: <b>{bounds['train']:.1f}</b> on {counts['train']:,} training "
        f"images and <b>{bounds['heldout']:.1f}</b> on {counts['heldout']:,} held-out ones; the difference, {gap:.1f}, "
        "is what it learned by heart."
    )


def _definitions(rows: list[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows) + "</dl>"
