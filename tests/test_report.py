"""The sentences and charts of the report, on numbers chosen for them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from di4c_ext import data, pictures, report
from di4c_ext.report import charts
from di4c_ext.report.facts import Facts, doubling, headline, latent_verdict, number, teacher_needs

TEACHER = {1: (60.0, 64.0), 2: (40.0, 44.0), 4: (20.0, 22.0)}
STUDENT = {1: (21.0, 23.0), 2: (12.0, 20.5), 4: (9.0, 11.0)}


def _facts(student: dict[int, tuple[float, float]] = STUDENT, correlation: float = 2.5) -> Facts:
    images = data.load("digits")
    rows: list[dict[str, Any]] = []
    for model, table in (("teacher", TEACHER), ("student", student)):
        for n, values in table.items():
            for seed, value in reversed(list(enumerate(values))):
                figures = {"frechet_features": value, "position_entropy": 1.5, "unigram_entropy": 2.0}
                rows.append({"model": model, "num_steps": n, "seed": seed, "num_samples": 100, **figures})
    results = {
        "rows": rows,
        "grids": {(row["model"], row["num_steps"]): images.tokens[:4].long() for row in rows},
        "floors": {"frechet_features": 1.7, "position_entropy": 1.6, "unigram_entropy": 2.1},
        "sizes": {"all": 1797, "train": 1497, "heldout": 300},
        "accuracy": 0.97,
        "bounds": {"train": 72.0, "heldout": 85.0},
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
        }
        for phase in ("teacher", "student")
        for step in (1, 2, 3)
    ]
    settings = {"num_latents": 8, "output_dir": "out", "dataset_name": "<b>mine</b>"}
    return Facts(settings, results, history, "trained in this run", {"teacher": 90.0}, images, 1000, 900)


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
