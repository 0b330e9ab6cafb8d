"""The table of python/digits.py: what it promises and what it prints, from made-up figures."""

import pytest
from programs import program

digits = program("digits")

TEACHER = (50.0, 30.0, 15.0, 8.0, 4.0, 2.0)


def measured(student: tuple[float, ...]) -> dict:
    rows = [
        {"model": model, "num_steps": n, "seed": 0, "frechet_features": value, "frechet_pixels": value / 100}
        for model, values in (("teacher", TEACHER), ("student", student))
        for n, value in zip(digits.STEPS, values, strict=True)
    ]
    floors = {"frechet_features": 1.7, "frechet_pixels": 0.07}
    return {"rows": rows, "floors": floors, "bounds": {"train": 72.0, "heldout": 85.0}}


def test_promises_kept_at_the_boundary():
    assert all(digits.promises(measured((30.0, 15.0, 8.0, 7.2, 4.0, 9.0))).values())


@pytest.mark.parametrize("broken", range(5))
def test_each_promise_can_break_alone(broken):
    student = [30.0, 15.0, 8.0, 7.2, 4.0, 9.0]
    student[broken] += 0.01
    kept = list(digits.promises(measured(tuple(student))).values())
    assert kept == [n != broken for n in range(5)]


def test_report_names_seeds_means_and_failures():
    seeds = {0: measured((10.0, 8.0, 6.0, 4.0, 3.0, 2.0)), 1: measured((20.0, 8.0, 6.0, 8.0, 3.0, 2.0))}
    text = digits.report(seeds, 2000)
    assert "| 0 | student | 10.00 |" in text and "| mean | **student** | **15.00** |" in text
    assert "| 1 | student at 8 clearly below teacher at 8 | NO |" in text
    assert "halves of the real images: 1.70" in text
    assert text.count("| NO |") == 1
