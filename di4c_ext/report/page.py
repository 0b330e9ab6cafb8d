"""report.html: one file, no external resources, readable in light and dark and on paper."""

from __future__ import annotations

from html import escape
from itertools import cycle
from pathlib import Path
from string import Template
from typing import Any

import torch

from di4c_ext import pictures
from di4c_ext.arguments import as_yaml
from di4c_ext.codes import classes_like
from di4c_ext.report import charts, text_page
from di4c_ext.report.card import protocol
from di4c_ext.report.facts import (
    FIGURES,
    LOWER_IS_BETTER,
    Facts,
    doubling,
    headline,
    latent_verdict,
    number,
    plural,
    teacher_needs,
)

ASSETS = Path(__file__).parents[1] / "assets"
COLUMNS = 16  # of a grid without classes
DIAGNOSTICS = ("gain_data", "gain_consistency", "latent_information")
LEARNED = (
    "What the latents came to carry: the correlation gained at the data and at samples of the consistency target, and "
    "what a latent tells about single {unit}s"
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
        samples=text_page.samples(facts) if facts.example == "sequence" else _samples(facts),
        quality=_quality(facts) + (text_page.frontier(facts) if facts.example == "sequence" else ""),
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
    latents = facts.results["latents"][0]["num_latents"]
    return escape(
        f"{facts.images.name}: {facts.example}s of {facts.kind}, {facts.diffusion} diffusion. The teacher "
        f"({facts.teacher_parameters:,} parameters, {facts.teacher_origin}) draws every {facts.unit} "
        "of a step independently; "
        f"the student ({facts.num_parameters:,}) is a mixture over a latent, trained with {plural(latents, 'latent')} "
        f"{facts.an_example}, and draws {facts.unit}s that agree with one another."
    )


def _cards(facts: Facts) -> str:
    figure = facts.main_figure
    cards = []
    for n in facts.steps[:4]:
        student, teacher = (facts.mean(model, n, figure) for model in ("student", "teacher"))
        cards.append(
            f'<div class="card"><div class="steps">{plural(n, "step")}</div>'
            f'<div class="big">{number(student)}</div>'
            f'<div class="small">{_varied(facts, n)}teacher at {plural(n, "step")}: {number(teacher)}<br>'
            f"teacher's steps to get there: {teacher_needs(facts, n)}</div></div>"
        )
    return "".join(cards)


def _varied(facts: Facts, n: int) -> str:
    """Of text, the entropies that a perplexity is to be read beside."""
    if facts.example == "image":
        return ""
    student, teacher = (number(facts.mean(model, n, "entropy")) for model in ("student", "teacher"))
    return f"entropy {student}, the teacher's {teacher}<br>"


def _image(tokens: torch.Tensor, facts: Facts, text: str) -> str:
    images: Any = facts.images  # no text, of which nothing is drawn
    pixels = pictures.grid(tokens, images.shape, images.num_states, _columns(facts), images.layout)
    height, width = pixels.shape[:2]
    source = pictures.data_url(pixels)
    return f'<img src="{source}" width="{width * 4}" height="{height * 4}" alt="{escape(text)}">'


def _columns(facts: Facts) -> int:
    """A column for each class where the samples are told their classes."""
    return pictures.columns_for(0 if facts.codes is None else facts.codes.num_classes, COLUMNS)


def _real(facts: Facts, number: int) -> torch.Tensor:
    """The first real images; where samples are told their classes, the first of the same classes."""
    images: Any = facts.images
    wanted = None if facts.codes is None else classes_like(facts.codes, facts.num_samples)
    if wanted is None or images.labels is None:
        first: torch.Tensor = images.tokens[:number].long()
        return first
    labels = wanted[:number].tolist()
    of_class = {label: cycle((images.labels == label).nonzero()[:, 0].tolist()) for label in set(labels)}
    chosen: torch.Tensor = images.tokens[torch.tensor([next(of_class[label]) for label in labels])].long()
    return chosen


def _samples(facts: Facts) -> str:
    grids = facts.results["grids"]
    shown = max(len(grid) for grid in grids.values())
    real = _image(_real(facts, shown), facts, "real images")
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
        distance = figure in LOWER_IS_BETTER
        real = "real text" if facts.example == "sequence" else "real against real" if distance else "real images"
        svg = charts.against_steps(
            points,
            facts.results["floors"].get(figure),
            title + (f" ({unit})" if unit else ""),
            real,
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
    unlike = " Their entropies differ, which a perplexity hangs on." if facts.example == "sequence" else ""
    return (
        "<h3>Half the steps</h3>"
        f"<p>The student after k steps beside its teacher after k and after 2k; means over seeds.{unlike}</p>"
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
    count = plural(int(facts.results["latents"][0]["num_images"]), f"held-out {facts.example}")
    is_masked = facts.diffusion == "masked"
    noised, start = ("masked", f"every {facts.unit} is masked") if is_masked else ("noised", "all is noise")
    return (
        f"<table><thead><tr><th>t</th><th>correlation</th><th>a latent about single {facts.unit}s</th>"
        f"<th>{noised} {facts.unit}s, bound</th></tr></thead><tbody>{rows}</tbody></table>"
        f'<p class="note">Nats {facts.an_example}, means over {count}; at t = 1 {start}. Correlation is the '
        "log-likelihood of the mixture above that of the product of its own marginals.</p>"
    )


def _training(facts: Facts) -> str:
    student = [line for line in facts.history if line.get("phase") == "student"]
    teacher = [line for line in facts.history if line.get("phase") == "teacher"]
    parts = sorted({name for line in student for name in line} - NOT_PARTS)
    drawn = []
    if len(student) > 1:
        drawn.append((charts.over_time(student, parts, f"nats {facts.an_example}"), "The parts of the student's loss"))
        known = [name for name in DIAGNOSTICS if any(name in line for line in student)]
        learned = LEARNED.format(unit=facts.unit)
        drawn.append((charts.over_time(student, known, f"nats {facts.an_example}, higher: more"), learned))
    if len(teacher) > 1:
        svg = charts.over_time(teacher, [f"nats_per_{facts.example}"], f"nats {facts.an_example}")
        drawn.append((svg, f"The teacher on its training batches: {facts.bounds_name}"))
    return "".join(
        f'<figure class="chart">{svg}<figcaption>{escape(text)}</figcaption></figure>' for svg, text in drawn
    )


def _bounds(facts: Facts) -> str:
    bounds, counts = facts.results["bounds"], facts.results["num_bounds"]
    if not bounds:
        return "The teacher is a mixture itself; its likelihood has no bound that is cheap to take."
    train, heldout, gap = map(facts.bound, (bounds["train"], bounds["heldout"], bounds["heldout"] - bounds["train"]))
    return (
        f"The teacher's {escape(facts.bounds_name)}: <b>{train}</b> on {counts['train']:,} training "
        f"{facts.example}s and <b>{heldout}</b> on {counts['heldout']:,} held-out ones; the difference, {gap}, "
        "is what it learned by heart."
    )


def _definitions(rows: list[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows) + "</dl>"
