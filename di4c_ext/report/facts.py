"""The numbers of a run, and the sentences that follow from them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from di4c_ext import env
from di4c_ext.codes import ImageCodes
from di4c_ext.data import ImageTokens
from di4c_ext.text import TextTokens

# figure -> (title, unit); distances: lower is better
FIGURES = {
    "frechet_features": ("Fréchet distance, classifier features", ""),
    "frechet_features_heldout": ("Fréchet distance to the held-out images, classifier features", ""),
    "frechet_pixels": ("Fréchet distance, raw pixels", ""),
    "frechet_pixels_heldout": ("Fréchet distance to the held-out images, raw pixels", ""),
    "kid": ("Kernel distance (KID), classifier features", ""),
    "label_score": ("Inception-style score by the labels' own classifier", ""),
    "extractor_score": ("Inception-style score by the named feature extractor", ""),
    "precision_k": ("Precision: samples that lie among the data", ""),
    "recall_k": ("Recall: data that lie among the samples", ""),
    "density": ("Density of the data about the samples", ""),
    "coverage": ("Coverage: data with a sample near by", ""),
    "position_entropy": ("Entropy per position", "nats"),
    "unigram_entropy": ("Entropy of all pixels pooled", "nats"),
    "perplexity": ("Generative perplexity", ""),
    "mauve": ("MAUVE-style agreement with the data, judge's features", ""),
    "ngram_perplexity": ("Perplexity by the training text's n-grams", ""),
    "entropy": ("Entropy of a sample's own tokens", "nats"),
    "pooled_entropy": ("Entropy of the tokens of all samples", "nats"),
    "distinct_2": ("Share of different pairs of tokens", ""),
    "self_bleu": ("Self-BLEU, of a sample against the others", ""),
    "nelbo": ("Negative log-likelihood of what so many steps make, upper bound", "nats a token"),
}
LOWER_IS_BETTER = (  # what headlines speak of
    *("frechet_features", "frechet_pixels", "kid", "perplexity", "nelbo", "ngram_perplexity"),
)
HIGHER_IS_BETTER = (*("label_score", "extractor_score", "precision_k", "recall_k", "density", "coverage", "mauve"),)
MODELS = ("teacher", "student", "hybrid", "guided")  # in the order of tables
DIFFUSIONS = {
    "absorbing": "masked",
    "confidence": "masked",
    "gaussian": "discretised Gaussian",
    "uniform": "uniform",
}  # by --process
CLEARLY = 0.05  # share of a perplexity below which a gain is not spoken of: that of a few hundred samples scatters so
MATTERS = 0.1  # nats an image below which the latents are called unused


@dataclass
class Facts:
    """Everything the report says; `results` is what `di4c_ext.distill.evaluate` returns."""

    settings: dict[str, Any]
    results: dict[str, Any]
    history: list[dict[str, Any]]
    teacher_origin: str
    seconds: dict[str, float]
    images: ImageTokens | TextTokens
    num_parameters: int
    teacher_parameters: int
    codes: ImageCodes | None = None  # the images as the network takes them, where that is as codes

    @property
    def pictures(self) -> ImageTokens:
        """The images of a run about images."""
        if isinstance(self.images, TextTokens):
            raise TypeError(f"Facts: {self.images.name!r} is text, there are no pictures of it")
        return self.images

    @property
    def example(self) -> str:
        """What a sample is: "image", or of text "sequence"."""
        return "sequence" if isinstance(self.images, TextTokens) else "image"

    @property
    def an_example(self) -> str:
        return f"{'an' if self.example == 'image' else 'a'} {self.example}"

    @property
    def unit(self) -> str:
        """What the network draws position by position: "pixel", "code" or "token"."""
        if isinstance(self.images, TextTokens):
            return "token"
        return "pixel" if self.codes is None else "code"

    @property
    def kind(self) -> str:
        """The examples as the network takes them, in words."""
        if isinstance(self.images, TextTokens):
            return f"{self.images.length} tokens, each one of {self.images.num_states:,}"
        shape = " x ".join(map(str, self.pictures.shape))
        if self.codes is None:
            return f"{shape}, {self.images.num_states} states a pixel"
        return f"{shape} as {' x '.join(map(str, self.codes.shape))} codes, {self.codes.num_states} in the code-book"

    @property
    def diffusion(self) -> str:
        """The diffusion in words: "masked", "discretised Gaussian" or "uniform"."""
        return DIFFUSIONS[self.settings.get("process", "absorbing")]

    @property
    def sampler(self) -> str:
        """How the student was sampled."""
        return str(next(row["sampler"] for row in self.results["rows"] if row["model"] == "student"))

    @property
    def models(self) -> list[str]:
        """Who was sampled."""
        return [model for model in MODELS if any(row["model"] == model for row in self.results["rows"])]

    @property
    def bounds_name(self) -> str:
        """What `bounds` are, in nats an image, or a token."""
        return str(self.results.get("bounds_name", "likelihood bound in nats an image"))

    def bound(self, value: float) -> str:
        """A bound as it is printed: nats an image to a tenth, nats a token to a thousandth."""
        return f"{value:.3f}" if self.example == "sequence" else f"{value:.1f}"

    @property
    def steps(self) -> list[int]:
        return sorted({row["num_steps"] for row in self.results["rows"]})

    @property
    def seeds(self) -> list[int]:
        return sorted({row["seed"] for row in self.results["rows"]})

    @property
    def num_samples(self) -> int:
        return int(self.results["rows"][0]["num_samples"])

    @property
    def figures(self) -> list[str]:
        """The figures that could be measured on this data."""
        return [name for name in FIGURES if name in self.results["rows"][0]]

    @property
    def main_figure(self) -> str:
        """The distance the headline speaks of."""
        return next(name for name in (*self.figures, "position_entropy") if name in self.figures)

    def values(self, model: str, num_steps: int, figure: str) -> list[float]:
        """One value a seed, in the order of `seeds`."""
        rows = [r for r in self.results["rows"] if r["model"] == model and r["num_steps"] == num_steps]
        return [row[figure] for row in sorted(rows, key=lambda row: row["seed"])]

    def mean(self, model: str, num_steps: int, figure: str) -> float:
        values = self.values(model, num_steps, figure)
        return sum(values) / len(values)

    def environment(self) -> list[tuple[str, str]]:
        """Versions, device and kernels, without the machine's own variables."""
        return [(name, value) for name, value in env.facts() if name != "DI4C_CACHE"]


def number(value: float) -> str:
    """Three significant digits, no exponent for the sizes that occur."""
    return f"{value:#.3g}".rstrip(".") if abs(value) < 999.5 else f"{value:.0f}"


def better(figure: str) -> str:
    """Where a figure is to go, in words: distances to the floor, scores up to it, entropies to that of the data."""
    if figure.removesuffix("_heldout") in LOWER_IS_BETTER:
        return "lower is better"
    if figure in HIGHER_IS_BETTER:
        return "higher is better, as far as the dashed line"
    return "closest to the dashed line is best"


def public_name(dataset: str) -> str:
    """A data set as a card names it: a file or folder of this machine without those it lies in."""
    return Path(dataset).name if Path(dataset).is_absolute() or Path(dataset).exists() else dataset


def plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def cast(facts: Facts) -> str:
    """What the models beside teacher and student are; nothing where there are none."""
    told = []
    if "hybrid" in facts.models:
        last = plural(facts.settings["hybrid"], "evaluation")
        told.append(f"The hybrid is the student, whose last {last} the teacher takes over.")
    if "guided" in facts.models:
        told.append(f"Guided samples have the logits teacher + {facts.settings['guidance']:g} (student - teacher).")
    return " ".join(told)


def teacher_needs(facts: Facts, num_steps: int) -> str:
    """How many steps the teacher takes to reach what the student has after `num_steps`."""
    goal = facts.mean("student", num_steps, facts.main_figure)
    reached = [n for n in facts.steps if facts.mean("teacher", n, facts.main_figure) <= goal]
    if not reached:
        return f"not reached within {facts.steps[-1]}"
    return str(reached[0])


def headline(facts: Facts) -> str:
    """One sentence: what the fewest steps give, and when the teacher gets there."""
    if facts.main_figure not in LOWER_IS_BETTER:
        return "Teacher and student, sampled and compared"
    n = facts.steps[0]
    if facts.example == "sequence":
        return _text_headline(facts)
    student, teacher = (facts.mean(model, n, facts.main_figure) for model in ("student", "teacher"))
    first = f"In {plural(n, 'step')} the student stands {number(student)} from the data, its teacher {number(teacher)}"
    needed = teacher_needs(facts, n)
    if needed == str(n):
        return f"{first}: no gain at {plural(n, 'step')}"
    return f"{first}; the teacher " + (f"needs {needed} steps for that" if needed.isdigit() else "never gets there")


def _text_headline(facts: Facts) -> str:
    """Of the steps at which the student gains most on its teacher: both, and their entropies, without which a
    perplexity says little."""
    figure = facts.main_figure
    n = max(facts.steps, key=lambda n: facts.mean("teacher", n, figure) / facts.mean("student", n, figure))
    student, teacher = (facts.mean(model, n, figure) for model in ("student", "teacher"))
    if student > (1 - CLEARLY) * teacher:
        return "At no number of steps the student's text is clearly less perplexing than its teacher's"
    varied = ", ".join(number(facts.mean(model, n, "entropy")) for model in ("student", "teacher"))
    return (
        f"In {plural(n, 'step')} the student's text has a perplexity of {number(student)}, its teacher's "
        f"{number(teacher)} (entropies {varied} nats)"
    )


def latent_verdict(facts: Facts) -> str:
    """Whether the student uses its latents, with the number it rests on."""
    first = facts.results["latents"][0]
    gain = first["correlation"]
    told = (
        f"at the first step, with {plural(first['num_latents'], 'latent')}, the correlation between positions is worth "
        f"{gain:.2f} nats for each held-out {facts.example}, and a latent tells {first['information']:.2f} nats about "
        f"its {facts.unit}s"
    )
    if gain >= MATTERS:
        return f"The student uses its latents: {told}."
    return (
        f"The student hardly uses its latents: {told}. More latents (--num_latents), more steps (--max_steps) or a "
        "larger --data_weight help."
    )


def doubling(facts: Facts) -> list[tuple[int, float, float, int]]:
    """(k, student at k, teacher at 2k, seeds at which the student is at or below) where both were measured."""
    if facts.main_figure not in LOWER_IS_BETTER:
        return []
    found = []
    for k in facts.steps:
        if 2 * k in facts.steps:
            student, teacher = (
                facts.values(model, n, facts.main_figure) for model, n in (("student", k), ("teacher", 2 * k))
            )
            wins = sum(a <= b for a, b in zip(student, teacher, strict=True))
            found.append((k, sum(student) / len(student), sum(teacher) / len(teacher), wins))
    return found


def evaluation_json(facts: Facts) -> str:
    """All measured figures as JSON."""
    kept = {name: value for name, value in facts.results.items() if name != "grids"}
    return json.dumps({**kept, "seconds": facts.seconds}, indent=1) + "\n"


def summary(facts: Facts) -> str:
    """A table for the terminal: the headline distance, mean over seeds."""
    figure = facts.main_figure
    head = f"{'steps':<10}" + "".join(f"{n:>9}" for n in facts.steps)
    lines = [
        f"{model:<10}" + "".join(f"{number(facts.mean(model, n, figure)):>9}" for n in facts.steps)
        for model in facts.models
    ]
    floor = facts.results["floors"].get(figure)
    real = "real text" if facts.example == "sequence" else "real against real"
    title = f"{FIGURES[figure][0]} ({facts.num_samples} samples, mean of {plural(len(facts.seeds), 'seed')}"
    title += f", {real} {number(floor)})" if floor is not None else ")"
    if facts.example == "sequence":  # a perplexity without an entropy says little
        lines.append("entropy of a sample's own tokens, nats")
        for model in facts.models:
            lines.append(f"{model:<10}" + "".join(f"{number(facts.mean(model, n, 'entropy')):>9}" for n in facts.steps))
    return "\n".join(["", title, head, *lines, "", latent_verdict(facts)])
