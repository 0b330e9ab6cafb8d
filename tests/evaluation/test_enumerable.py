"""Exact distances of small models, against the laws themselves and against samples."""

from __future__ import annotations

import pytest
import torch
from toys import LENGTH, STATES, pair, toy
from unets import by_formula

from di4c_ext import random
from di4c_ext.evaluation import enumerable
from di4c_ext.evaluation.enumerable import exact_distances, is_enumerable
from di4c_ext.generate import SamplingArguments, generate
from di4c_ext.metrics.exact import distance_to_teacher, index, of_clean, sampler_law, total_variation
from di4c_ext.models import CompactDenoiser, draw_latents
from di4c_ext.sampler import times
from di4c_ext.systems import process_of


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enumerable, "NUM_LATENTS", 3)
    monkeypatch.setattr(enumerable, "TEACHER_STEPS", 8)


def test_distances_are_those_of_the_laws() -> None:
    models = pair()
    process = process_of(models["teacher"].config)
    rows = exact_distances(models, [1, 2])
    assert [(row["num_steps"], row["teacher_steps"]) for row in rows] == [(1, 8), (2, 8)]
    for row in rows:
        told = {"num_steps": row["num_steps"], "teacher_steps": 8}
        wanted = distance_to_teacher(models["teacher"], models["teacher"], process, LENGTH, **told)
        assert row["teacher"] == pytest.approx(wanted) and 0 < row["student"] <= 1 and 0 < row["same_steps"] <= 1
    assert rows[0]["teacher"] > rows[1]["teacher"] > 0, "more steps, nearer to the goal"
    latents = draw_latents(random.keys(0, 1), 3, models["student"].config.latent_dim)[0]
    laws = [
        sampler_law(process, models[name], LENGTH, times(number), latents=own)
        for name, number, own in (("student", 2, latents), ("teacher", 8, None), ("teacher", 2, None))
    ]
    assert rows[1]["num_latents"] == 3 and rows[1]["student"] == pytest.approx(total_variation(laws[0], laws[1]))
    assert rows[1]["same_steps"] == pytest.approx(total_variation(laws[0], laws[2]))
    (alone,) = exact_distances({"teacher": models["teacher"]}, [12])
    assert alone["teacher_steps"] == 12 and alone["teacher"] == 0, "the most there are, where these are more"
    assert set(alone) == {"num_steps", "teacher_steps", "teacher"}


def test_a_new_student_is_its_teacher() -> None:
    teacher = toy()
    rows = exact_distances({"teacher": teacher, "student": CompactDenoiser.from_teacher(teacher)}, [1, 3])
    for row in rows:
        assert row["same_steps"] < 1e-6 and row["student"] == pytest.approx(row["teacher"], abs=1e-6)


def test_the_law_is_that_of_samples() -> None:
    teacher = toy()
    process = process_of(teacher.config)
    law = of_clean(process, sampler_law(process, teacher, LENGTH, times(2)), LENGTH)
    drawn = index(generate(teacher, 2, 20_000, seed=0, batch_size=20_000), STATES).bincount(minlength=STATES**LENGTH)
    assert total_variation(drawn / drawn.sum(), law) < 0.04


def test_what_is_too_large_or_sampled_otherwise_is_left_out() -> None:
    models = pair()
    assert is_enumerable(models["teacher"])
    for sampling in (
        SamplingArguments(temperature=0.5),
        SamplingArguments(top_p=0.5),
        SamplingArguments(sampler="first_hitting"),
        SamplingArguments(sampler="analytic"),
    ):
        assert not is_enumerable(models["teacher"], sampling) and exact_distances(models, [1], sampling) == []
    assert not is_enumerable(toy(length=6, image_shape=[2, 3])) and not is_enumerable(by_formula(num_channels=1))
    assert exact_distances({"student": models["student"]}, [1]) == []
    assert next(models["student"].parameters()).device == torch.device("cpu")
