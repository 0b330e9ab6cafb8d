"""report.html: one file, no external resources, readable in light and dark and on paper."""

from __future__ import annotations

from html import escape
from itertools import cycle, groupby
from pathlib import Path
from string import Template
from typing import Any

import torch

from di4c_ext import pictures
from di4c_ext.arguments import as_yaml
from di4c_ext.callbacks import TIMING
from di4c_ext.codes import classes_like
from di4c_ext.report import charts, text_page
from di4c_ext.report.card import protocol
from di4c_ext.report.facts import (
    FIGURES,
    LOWER_IS_BETTER,
    Facts,
    better,
    doubling,
    headline,
    latent_verdict,
    number,
    plural,
    teacher_needs,
)
from di4c_ext.report.side_by_side import picture, side_by_side

ASSETS = Path(__file__).parents[1] / "assets"
COLUMNS = 16  # of a grid without classes
DIAGNOSTICS = ("gain_data", "gain_consistency", "latent_information")
LEARNED = (
    "What the latents came to carry: the correlation gained at the data and at samples of the consistency target, and "
    "what a latent tells about single {unit}s"
)
NOT_PARTS = {"phase", "step", "seconds", "loss", "grad_norm", "learning_rate", "epoch", *DIAGNOSTICS, *TIMING}
# What the rounds of SDTT bring down, by --sdtt_divergence.
DIVERGENCES = {
    "reverse_kl": "reverse KL in nats",
    "kl": "KL in nats",
    "tv": "total variation",
    "mse": "squared error of logarithms",
}


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
    return picture(tokens, images, _columns(facts), text)


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
    return side_by_side(
        facts.models,
        facts.steps,
        lambda model, n: _image(grids[model, n], facts, f"{model}, {plural(n, 'step')}"),
        ("Real images", _image(_real(facts, shown), facts, "real images")),
    )


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
            log=distance and all(value > 0 for _, _, values in points for value in values),
        )
        caption = f"{escape(title)}: {better(figure)}"
        drawn.append(f'<figure class="chart">{svg}<figcaption>{caption}</figcaption></figure>')
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
    student, first, teacher = (
        [line for line in facts.history if line.get("phase") == phase] for phase in ("student", "di4c", "teacher")
    )
    drawn = _mixture(student, facts, "the student's")
    drawn += _mixture(first, facts, "the first round's")  # a stage of its own where a second one follows
    rounds = _joined([line for line in facts.history if "divergence" in line])
    if len(rounds) > 1:
        name = DIVERGENCES[facts.settings.get("sdtt_divergence", "reverse_kl")]
        count = plural(len({line["phase"] for line in rounds}), "round")
        svg = charts.over_time(rounds, ["divergence"], f"{name}, sum over {facts.an_example}")
        drawn.append((svg, f"SDTT, {count}: how far one step of a student lies from several of its teacher's"))
    if len(teacher) > 1:
        svg = charts.over_time(teacher, [f"nats_per_{facts.example}"], f"nats {facts.an_example}")
        drawn.append((svg, f"The teacher on its training batches: {facts.bounds_name}"))
    return "".join(
        f'<figure class="chart">{svg}<figcaption>{escape(text)}</figcaption></figure>' for svg, text in drawn
    )


def _mixture(lines: list[dict[str, Any]], facts: Facts, whose: str) -> list[tuple[str, str]]:
    """The charts of a Di4C training, each with its caption; none of one that was not logged twice."""
    if len(lines) < 2:
        return []
    parts = sorted({name for line in lines for name in line} - NOT_PARTS)
    known = [name for name in DIAGNOSTICS if any(name in line for line in lines)]
    unit = f"nats {facts.an_example}"
    drawn = [(charts.over_time(lines, parts, unit), f"The parts of {whose} loss")]
    if known:
        drawn.append((charts.over_time(lines, known, f"{unit}, higher: more"), LEARNED.format(unit=facts.unit)))
    return drawn


def _joined(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Trainings one after the other as one, whose steps go on being counted."""
    found: list[dict[str, Any]] = []
    for _, training in groupby(lines, key=lambda line: line["phase"]):
        before = found[-1]["step"] if found else 0
        found += [{**line, "step": before + line["step"]} for line in training]
    return found


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
