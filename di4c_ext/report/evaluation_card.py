"""README.md of an evaluation: the table of figures by model and evaluations, and what it stands on."""

from __future__ import annotations

from di4c_ext.report import evaluation_words
from di4c_ext.report.evaluated import Evaluated, headline, title
from di4c_ext.report.evaluation_words import milliseconds
from di4c_ext.report.facts import number


def card(facts: Evaluated) -> str:
    """Markdown."""
    parts = [f"# {headline(facts)}", evaluation_words.lead(facts), _table(facts), evaluation_words.protocol(facts)]
    parts += [evaluation_words.overhead(row) for row in facts.report["overhead"]]
    if facts.report["latents"]:
        parts.append(evaluation_words.latents(facts))
    if facts.report["exact"]:
        parts += [evaluation_words.exact(facts), _exact(facts)]
    matched = [row for row in facts.matched() if row["is_own"]]
    if matched:
        head = "| student's steps | teacher's steps | entropy | student | teacher |\n|--:|--:|--:|--:|--:|\n"
        rows = (
            f"| {row['student_steps']} | {row['teacher_steps']} | {row['entropy']:.3f} | {number(row['student'])} | "
            f"{'outside' if row['teacher'] is None else number(row['teacher'])} |"
            for row in matched
        )
        parts.append(f"At equal entropy, {title(facts.main_figure)}:\n\n{head}" + "\n".join(rows))
    return "\n\n".join(parts) + "\n"


def _table(facts: Evaluated) -> str:
    """A row for each model and number of steps; the entropy first, as every other figure is to be read beside it."""
    first = facts.diversity
    figures = [first, *(name for name in facts.figures if name != first and not name.endswith("_heldout"))]
    head = ["model", "steps", "evaluations", "a sample in batches", "alone", *map(title, figures)]
    lines = [f"| {' | '.join(head)} |", "|---" + "|--:" * (len(head) - 1) + "|"]
    real = [number(facts.floors[name]) if name in facts.floors else "" for name in figures]
    lines.append(f"| real | | | | | {' | '.join(real)} |")
    for model in facts.models:
        for n in facts.steps_of(model):
            alone = facts.value(model, n, "latency_1")
            cells = [model, str(n), f"{facts.measured(model, n, 'num_evaluations').mean:g}"]
            cells += [milliseconds(facts.measured(model, n, "latency").mean)]
            cells += ["" if alone is None else milliseconds(alone.mean)]
            for name in figures:
                value = facts.value(model, n, name)
                interval = "" if value is None or not value.interval else f" ({value.interval})"
                cells.append("" if value is None else f"{value}{interval}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _exact(facts: Evaluated) -> str:
    names = [name for name in ("teacher", "student", "same_steps") if name in facts.report["exact"][0]]
    words = {"same_steps": "student to the teacher of as many steps"}
    lines = [f"| steps | {' | '.join(words.get(name, f'{name} to the goal') for name in names)} |"]
    lines.append("|--:" * (len(names) + 1) + "|")
    for row in facts.report["exact"]:
        lines.append(f"| {row['num_steps']} | " + " | ".join(f"{row[name]:.4f}" for name in names) + " |")
    return "\n".join(lines)
