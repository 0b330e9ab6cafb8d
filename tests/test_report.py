"""The sentences and charts of the report, on numbers chosen for them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from di4c_ext import codes, data, generate, pictures, report
from di4c_ext.report import charts
from di4c_ext.report.facts import Facts, doubling, headline, latent_verdict, number, teacher_needs

TEACHER = {1: (60.0, 64.0), 2: (40.0, 44.0), 4: (20.0, 22.0)}
STUDENT = {1: (21.0, 23.0), 2: (12.0, 20.5), 4: (9.0, 11.0)}


def _facts(
    student: dict[int, tuple[float, float]] = STUDENT,
    correlation: float = 2.5,
    images: data.ImageTokens | None = None,
    hybrid: dict[int, tuple[float, float]] | None = None,
    sampler: str = "ancestral",
    more: dict[str, Any] | None = None,
    as_codes: codes.ImageCodes | None = None,
) -> Facts:
    images = images or data.load("digits")
    rows: list[dict[str, Any]] = []
    models = {"teacher": TEACHER, "student": student} | ({} if hybrid is None else {"hybrid": hybrid})
    for model, table in models.items():
        for n, values in table.items():
            for seed, value in reversed(list(enumerate(values))):
                figures = {"frechet_features": value, "position_entropy": 1.5, "unigram_entropy": 2.0}
                row = {"model": model, "sampler": sampler, "num_steps": n, "seed": seed, "num_samples": 100}
                own = {"label_score": 5 + value / 10, "kid": value / 1000, "coverage": 0.5}
                rows.append({**row, **figures, **(own if sampler == "analytic" else {})})
    results = {
        "rows": rows,
        "grids": {(row["model"], row["num_steps"]): images.tokens[:4].long() for row in rows},
        "floors": {"frechet_features": 1.7, "position_entropy": 1.6, "unigram_entropy": 2.1},
        "sizes": {"all": 1797, "train": 1497, "heldout": 300},
        "accuracy": 0.97,
        "bounds": {"train": 72.0, "heldout": 85.0},
        "num_bounds": {"train": 1497, "heldout": 300},
        "latents": [
            {
                "t": 1.0,
                "num_latents": 8,
                "num_images": 100,
                "correlation": correlation,
                "information": 1.0,
                "joint": -90.0,
            }
        ],
    }
    history = [
        {
            "phase": phase,
            "step": step,
            "loss": 1.0,
            "nats_per_image": 90.0,
            "marginal_data": 0.5,
            "gain_data": 1.0 * step,
            "peak_memory_gib": 0.25,
        }
        for phase in ("teacher", "student")
        for step in (1, 2, 3)
    ]
    if sampler == "analytic":
        results["floors"]["label_score"] = 8.8
        results["bounds_name"] = "denoising cross-entropy in nats an image, mean over t in [0.01, 1]"
    settings = {"num_latents": 8, "output_dir": "out", "dataset_name": "<b>mine</b>"} | (more or {})
    return Facts(settings, results, history, "trained in this run", {"teacher": 90.0}, images, 1000, 900, as_codes)


def test_sentences_follow_from_the_numbers() -> None:
    facts = _facts()
    assert (
        headline(facts)
        == "In 1 step the student stands 22.0 from the data, its teacher 62.0; the teacher needs 4 steps for that"
    )
    assert [teacher_needs(facts, n) for n in facts.steps] == ["4", "not reached within 4", "not reached within 4"]
    assert doubling(facts) == [(1, 22.0, 42.0, 2), (2, 16.25, 21.0, 2)]
    worse = _facts({1: (61.0, 66.0), 2: (45.0, 30.0), 4: (30.0, 30.0)})
    assert headline(worse).endswith("no gain at 1 step")
    assert doubling(worse)[0][-1] == 0 and doubling(worse)[1][-1] == 0
    assert latent_verdict(facts).startswith("The student uses its latents: at the first step, with 8 latents, the")
    assert latent_verdict(_facts(correlation=0.01)).startswith("The student hardly uses its latents")


def test_page_and_card_say_the_same() -> None:
    facts = _facts()
    page, card = report.page(facts), report.model_card(facts)
    for text in (page, card):
        assert headline(facts) in text and "seeds 0, 1" in text and "72.0" in text and "85.0" in text
    assert "&lt;b&gt;mine" in page and "<b>mine" not in page  # settings are text, not markup
    assert "| student, seed 1 | 23.0 | 20.5 | 11.0 |" in card
    assert card.startswith("---\nlibrary_name: di4c_ext")
    assert report.page(facts) == page  # nothing in it depends on when it was written
    table = report.summary(facts)
    assert re.search(r"student +22\.0 +16\.2 +10\.0\n", table) and "real against real 1.70" in table


def test_training_is_drawn_stage_by_stage() -> None:
    """Rounds of SDTT on one axis whose steps go on, the first round of Di4C beside the second, and no timings."""
    facts = _facts(more={"sdtt_divergence": "tv"})
    plain = report.page(facts)
    assert plain.count("The parts of the student") == 1 and "SDTT" not in plain and "first round" not in plain
    assert "marginal data" in plain and "peak memory" not in plain
    for phase, name in (("sdtt-1", "divergence"), ("sdtt-2", "divergence"), ("di4c", "correlation_data")):
        same = {"phase": phase, "marginal_data": 2.0}
        facts.history += [{**same, "step": 100 * step, name: 9.0 / step} for step in (1, 2, 3)]
    staged = report.page(facts)
    assert "SDTT, 2 rounds: how far one step" in staged and "total variation, sum over an image" in staged
    assert "The parts of the first round" in staged and ">correlation data<" in staged
    drawing = staged[staged.index('aria-label="total variation') :]
    assert ">600<" in drawing[: drawing.index("</svg>")], "the second round's steps follow the first one's"


def test_charts_take_their_colours_from_the_page() -> None:
    points = [(model, n, list(v)) for model, t in (("teacher", TEACHER), ("student", STUDENT)) for n, v in t.items()]
    drawing = charts.against_steps(points, 1.7, "distance", "real", log=True)
    for name in ("--teacher", "--student", "--ink", "--muted", "--rule"):
        assert f"var({name})" in drawing
    assert not re.search(r"#0([1-9a-b])0\1", drawing)
    assert drawing.startswith('<svg role="img" aria-label="distance"') and "viewBox" in drawing
    lines = [{"step": step, "part": -1.0 * step, "other": 2.0} for step in (1, 2, 3)]
    assert "other" in charts.over_time(lines, ["part", "other"], "nats")


def test_grid_places_images_row_by_row() -> None:
    tokens = torch.arange(3).repeat_interleave(4).view(3, 4)
    pixels = pictures.grid(tokens, (2, 2), num_states=3, columns=2)
    assert pixels.shape == (7, 7)
    assert (pixels[1:3, 1:3] == 0).all() and (pixels[1:3, 4:6] == 128).all() and (pixels[4:6, 1:3] == 255).all()
    assert (pixels[4:6, 4:6] == pictures.FRAME).all()
    assert pictures.grid(torch.zeros(2, 12).long(), (2, 2, 3), num_states=3).shape == (4, 7, 3)
    with pytest.raises(ValueError, match="0 images"):
        pictures.grid(tokens[:0], (2, 2), num_states=3)


def test_number() -> None:
    assert [number(value) for value in (0.01234, 9.876, 50.0, 123.4, 12345.6)] == [
        "0.0123",
        "9.88",
        "50.0",
        "123",
        "12346",
    ]


def _pixels() -> Facts:
    rng = np.random.default_rng(0)
    images = data.from_arrays(rng.integers(0, 4, (8, 16, 18, 3)), rng.integers(0, 2, 8), num_states=4, layout="CHW")
    return _facts(
        images=images,
        hybrid={n: (a - 1, b - 1) for n, (a, b) in STUDENT.items()},
        sampler="analytic",
        more={"process": "gaussian", "hybrid": 1},
    )


def test_a_pixel_run_is_told_in_its_own_words() -> None:
    facts = _pixels()
    page, card, table = report.page(facts), report.model_card(facts), report.summary(facts)
    for text in (page, card):
        assert "discretised Gaussian diffusion" in text and "denoising cross-entropy" in text.lower()
        assert "The hybrid is the student, whose last 1 evaluation the teacher takes over." in text
        assert "posterior steps on an even grid from 1 to 0.01" in text and "the likeliest levels" in text
        assert "the 64 of a small classifier" in text and "real against real at this number" in text
        assert "look at 5,000 images of each side at most; neighbours: 3 for precision and recall, 5 for" in text
        told = re.sub(r'base64,[^"]+', "", text)
        assert not re.search(r"mask|ancestral|likelihood bound", told, re.IGNORECASE)
    assert "| hybrid, seed 1 | 22.0 | 19.5 | 10.0 |" in card and re.search(r"hybrid +21\.0 +15\.2 +9\.00\n", table)
    assert '), (16, 18, 3), "CHW")' in card and "open_model" in card
    assert "Inception-style score by the labels" in page and "own classifier" in page
    assert page.count('<h3 class="hybrid">') == 1 and page.count("<figure><img") == 3 * 3
    assert "repeat(3, 1fr)" in page and "var(--series-3)" in page
    grid = pictures.grid(facts.images.tokens[:4].long(), (16, 18, 3), 4, 16, "CHW")
    assert pictures.data_url(grid) in page


def test_a_run_on_codes_is_told_in_its_own_words() -> None:
    rng = np.random.default_rng(0)
    labels = np.array([2, 0, 0, 1, 2, 1, 0, 1, 2])
    images = data.from_arrays(rng.integers(0, 256, (9, 8, 8)), labels, num_states=256)
    tokens = torch.from_numpy(rng.integers(0, 12, (9, 16)))
    same = {"name": images.name, "example": images.example, "labels": images.labels}
    made = codes.ImageCodes(**same, tokens=tokens, shape=(4, 4), num_states=12, num_classes=3)
    facts = _facts(images=images, sampler="confidence", more={"process": "confidence"}, as_codes=made)
    page, card, table = report.page(facts), report.model_card(facts), report.summary(facts)
    for text in (page, card):
        assert "mages of 8 x 8 as 4 x 4 codes, 12 in the code-book" in text and "masked diffusion" in text
        assert "nats about its codes" in text
    assert "nats about its codes" in table and "Decoder(vq_beside(" in card
    assert "draws every code of a step independently" in page and "draws codes that agree" in page
    assert "a latent about single codes" in page and "masked codes, bound" in page and "every code is masked" in page
    assert "what a latent tells about single codes" in page
    assert not re.search("states a pixel|every pixel|single pixels|its pixels|masked pixels", page + card + table)
    # A column for each class: the first images of classes 0, 1 and 2, and the second of 0.
    real = pictures.grid(images.tokens[[1, 3, 0, 2]].long(), (8, 8), 256, columns=3)
    assert pictures.data_url(real) in page
    samples = pictures.grid(images.tokens[:4].long(), (8, 8), 256, columns=3)
    assert page.count(pictures.data_url(samples)) == 2 * 3, "both models at every number of steps"


def test_extras_are_not_told_of_where_there_are_none() -> None:
    text = report.page(_facts()) + report.model_card(_facts())
    assert "hybrid is" not in text and "Guided" not in text and 'class="hybrid"' not in text
    assert "masked diffusion" in text and "ancestral sampling" in text


def test_the_card_shows_code_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = _pixels()
    (code,) = re.findall(r"```python\n(.*?)```", report.model_card(facts), re.DOTALL)
    monkeypatch.setattr(generate, "open_model", lambda folder, is_student: ("student of", folder))
    monkeypatch.setattr(generate, "generate", lambda *args, **kwargs: facts.images.tokens)
    space: dict[str, Any] = {}
    exec(code, space)
    assert space["student"] == ("student of", "out") and space["images"].shape == (8, 16, 18, 3)
