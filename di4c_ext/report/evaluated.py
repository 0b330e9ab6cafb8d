"""The numbers of an evaluation: one model or two, by steps, temperature and seed."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from di4c_ext import env
from di4c_ext.data import ImageTokens
from di4c_ext.metrics.frontier import Point, at_equal_entropy, perplexity_at
from di4c_ext.report.facts import FIGURES, LOWER_IS_BETTER, MODELS, number, plural
from di4c_ext.text import TextTokens

ENTROPIES = 3  # at which two lines are compared
_OF_TIME = ("latency", "latency_1", "seconds")
_BESIDE = ("num_steps", "temperature", "seed", "num_samples", "num_evaluations", "batch_size", *_OF_TIME)


class Value(NamedTuple):
    """A figure: the mean over seeds, of its intervals' ends as well where it has any, and each seed's."""

    mean: float
    low: float | None
    high: float | None
    each: list[float]

    def __str__(self) -> str:
        return number(self.mean)

    @property
    def interval(self) -> str:
        """The interval in words, "" where there is none."""
        return "" if self.low is None or self.high is None else f"{number(self.low)} to {number(self.high)}"


@dataclass
class Evaluated:
    """Everything the report of an evaluation says.

    report: what `evaluate.measure` returns, with the settings and the models' folders. samples: by model and number of
    steps, those shown. shown: the real data. parameters: of each model's network. temperature: that of all figures but
    the comparison at equal entropy.
    """

    report: dict[str, Any]
    samples: dict[tuple[str, int], Tensor]
    shown: ImageTokens | TextTokens
    parameters: dict[str, int]
    temperature: float = 1.0

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows, by steps, temperature, model and seed."""
        return sorted(
            self.report["rows"],
            key=lambda row: (row["num_steps"], row["temperature"], MODELS.index(row["model"]), row["seed"]),
        )

    @property
    def is_text(self) -> bool:
        return isinstance(self.shown, TextTokens)

    @property
    def models(self) -> list[str]:
        """Who was sampled, in the order of tables."""
        return [model for model in MODELS if any(row["model"] == model for row in self.rows)]

    @property
    def steps(self) -> list[int]:
        return sorted({row["num_steps"] for row in self.rows})

    @property
    def seeds(self) -> list[int]:
        return sorted({row["seed"] for row in self.rows})

    @property
    def temperatures(self) -> list[float]:
        return sorted({row["temperature"] for row in self.rows})

    @property
    def figures(self) -> list[str]:
        """The judge's figures, those with a title first and in its order."""
        found = dict.fromkeys(
            name for row in self.rows for name, value in row.items() if isinstance(value, int | float)
        )
        ends = {f"{name}_{end}" for name in found for end in ("low", "high")}
        own = [name for name in found if name not in ends and name not in _BESIDE]
        return [*(name for name in FIGURES if name in own), *(name for name in own if name not in FIGURES)]

    @property
    def diversity(self) -> str:
        """The entropy that stands beside every other figure."""
        return "entropy" if "entropy" in self.figures else "position_entropy"

    @property
    def main_figure(self) -> str:
        """What headlines and the comparison at equal entropy are about: a distance or a perplexity."""
        return next((name for name in self.figures if name in LOWER_IS_BETTER), self.diversity)

    @property
    def floors(self) -> dict[str, float]:
        floors: dict[str, float] = self.report["floors"]
        return floors

    def value(self, model: str, num_steps: int, figure: str, temperature: float | None = None) -> Value | None:
        """A figure of a model at a number of steps, None where it was not measured."""
        at = self.temperature if temperature is None else temperature
        rows = [
            row
            for row in self.rows
            if (row["model"], row["num_steps"], row["temperature"]) == (model, num_steps, at) and figure in row
        ]
        if not rows:
            return None
        low, high = ([row[f"{figure}_{end}"] for row in rows if f"{figure}_{end}" in row] for end in ("low", "high"))
        is_whole = len(low) == len(high) == len(rows)
        each = [row[figure] for row in rows]
        return Value(_mean(each), _mean(low) if is_whole else None, _mean(high) if is_whole else None, each)

    def measured(self, model: str, num_steps: int, figure: str) -> Value:
        """`value` where there is one for certain: of a cell of which there are rows."""
        found = self.value(model, num_steps, figure)
        if found is None:
            raise ValueError(f"Evaluated: no {figure} of the {model} at {plural(num_steps, 'step')}")
        return found

    def steps_of(self, model: str) -> list[int]:
        """Numbers of steps at which a model was measured at the evaluation's own temperature."""
        return [n for n in self.steps if self.value(model, n, "num_evaluations") is not None]

    def line(self, model: str, num_steps: int) -> list[Point]:
        """A model at every temperature: (entropy, main figure)."""
        found = []
        for temperature in self.temperatures:
            entropy = self.value(model, num_steps, self.diversity, temperature)
            quality = self.value(model, num_steps, self.main_figure, temperature)
            if entropy is not None and quality is not None:
                found.append(Point(entropy.mean, quality.mean))
        return found

    def matched(self) -> list[dict[str, Any]]:
        """Student and teacher at equal entropy: rows for k steps of the student against k and 2k of the teacher.

        A row holds student_steps, teacher_steps, entropy, student, teacher, is_own. First, is_own, the student at the
        evaluation's own temperature, the teacher None where its line does not reach that entropy; then, where both were
        measured at several temperatures, some entropies that both lines reach.
        """
        found: list[dict[str, Any]] = []
        if not {"teacher", "student"} <= set(self.models) or self.main_figure == self.diversity:
            return found
        for k in self.steps:
            own = self.value("student", k, self.diversity)
            for n in (k, 2 * k):
                line, other = self.line("student", k), self.line("teacher", n)
                if own is None or len(other) < 2 or any(point.perplexity <= 0 for point in (*line, *other)):
                    continue
                about = {"student_steps": k, "teacher_steps": n}
                quality = self.measured("student", k, self.main_figure).mean
                held = perplexity_at(own.mean, other)
                found.append({**about, "entropy": own.mean, "student": quality, "teacher": held, "is_own": True})
                for entropy, student, teacher in at_equal_entropy(line, other, ENTROPIES) if len(line) > 1 else ():
                    both = {"entropy": entropy, "student": student, "teacher": teacher}
                    found.append({**about, **both, "is_own": False})
        return found


def title(figure: str) -> str:
    """A figure's name with its unit."""
    name, unit = FIGURES.get(figure, (figure.replace("_", " "), ""))
    return f"{name} ({unit})" if unit else name


def short(figure: str) -> str:
    """A figure's name as it fits beside an axis."""
    return re.split(r"[,:(]| by | of ", FIGURES.get(figure, (figure.replace("_", " "),))[0])[0].strip()


def evaluated_json(facts: Evaluated) -> str:
    """All that was measured as JSON."""
    told = {**facts.report, "rows": facts.rows, "parameters": facts.parameters, "matched": facts.matched()}
    return json.dumps({**told, "environment": dict(environment())}, indent=1) + "\n"


def environment() -> list[tuple[str, str]]:
    """Versions, device and kernels, without the machine's own variables."""
    return [(name, value) for name, value in env.facts() if name != "DI4C_CACHE"]


def headline(facts: Evaluated) -> str:
    """One sentence: both at the number of steps at which the student gains most, or the one there is."""
    figure, models = facts.main_figure, facts.models
    if {"teacher", "student"} <= set(models):
        both = [n for n in facts.steps_of("student") if n in facts.steps_of("teacher")]
        n = max(both, key=lambda n: _gain(facts, n)) if both else facts.steps[0]
        told = {model: facts.value(model, n, figure) for model in ("student", "teacher")}
    else:
        n = facts.steps[-1]
        told = {models[0]: facts.value(models[0], n, figure)}
    values = ", ".join(f"{model} {_with_interval(value)}" for model, value in told.items() if value is not None)
    floor = facts.floors.get(figure)
    real = "" if floor is None else f"; real {'text' if facts.is_text else 'images'} {number(floor)}"
    return f"{title(figure)} in {plural(n, 'step')}: {values}{real}"


def table(facts: Evaluated) -> str:
    """For the terminal: the main figure and the entropy, by model and steps."""
    lines = []
    for figure in dict.fromkeys((facts.main_figure, facts.diversity)):
        floor = facts.floors.get(figure)
        lines += ["", title(figure) + ("" if floor is None else f"; real {number(floor)}")]
        lines.append(f"{'steps':<10}" + "".join(f"{n:>9}" for n in facts.steps))
        for model in facts.models:
            values = [facts.value(model, n, figure) for n in facts.steps]
            lines.append(f"{model:<10}" + "".join(f"{'' if value is None else str(value):>9}" for value in values))
    return "\n".join(lines)


def _gain(facts: Evaluated, n: int) -> float:
    """By how much the student at n steps is below its teacher, as a share of it."""
    student, teacher = (facts.measured(model, n, facts.main_figure).mean for model in ("student", "teacher"))
    return (teacher - student) / abs(teacher) if teacher else 0.0


def _with_interval(value: Value) -> str:
    return f"{value} ({value.interval})" if value.interval else str(value)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
