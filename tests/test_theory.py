"""The paper's theorems, by enumeration: what python/theory.py shows, as assertions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import program

theory = program("theory")
PROBLEMS = theory.problems()


@pytest.mark.parametrize("problem", PROBLEMS, ids=[problem.name for problem in PROBLEMS])
def test_the_teacher_reaches_the_data_as_one_over_n(problem: Any) -> None:
    curve = theory.convergence(problem, (1, 32, 64, 128))
    assert curve[1] > 0.2
    assert curve[32] / curve[64] == pytest.approx(2, rel=0.03) and curve[64] / curve[128] == pytest.approx(2, rel=0.03)
    assert all(n * distance > 0.2 for n, distance in curve.items())  # and no faster: the rate is tight


@pytest.mark.parametrize("num_steps", [1, 2, 5])
@pytest.mark.parametrize("problem", PROBLEMS[::2], ids=[problem.name for problem in PROBLEMS[::2]])
def test_bounds_hold_for_any_student(problem: Any, num_steps: int) -> None:
    """Students that nobody trained, from near the teacher to far from anything."""
    loosest = 0.0
    for seed in range(3):
        student = theory.Student(problem, num_steps, seed)
        with torch.no_grad():
            student.table.add_(seed * torch.randn(student.table.shape, generator=torch.Generator().manual_seed(seed)))
        found = theory.measure(problem, student)
        assert len(found.consistency) == num_steps - 1 and min(found.consistency, default=1) > 0
        assert 0 < found.distance <= found.bound <= found.bound_trained
        assert 0 < found.distance_data <= found.bound_data
        loosest = max(loosest, found.bound / found.distance)
    assert loosest < 10  # it says something


def test_a_student_that_is_its_teacher_has_no_distillation_loss() -> None:
    """At N = 1 all there is of the bound is L_distil, and a student equal to its teacher has none."""
    problem = PROBLEMS[2]
    student = theory.Student(problem, 1)
    with torch.no_grad():
        student.table.copy_(problem.teacher.table.expand_as(student.table))
    found = theory.measure(problem, student)
    assert found.consistency == [] and found.bound < 1e-3 and found.distance < 1e-6 and found.bound_trained < 1e-3


def test_training_brings_the_distance_down_with_its_bound(tmp_path: Path) -> None:
    problem = PROBLEMS[0]
    students = theory.trained(problem, max_steps=90)
    first, *_, last = students.values()
    assert last.distance < 0.1 < 0.3 < first.distance == pytest.approx(first.teacher_distance, abs=0.05)
    assert last.bound < 0.3 * first.bound
    curves = {problem.name: theory.convergence(problem, theory.STEPS)}
    kept = theory.promises(curves[problem.name], students)
    assert len(kept) == 5 and all(kept.values()), kept
    text = theory.report(curves, {problem.name: students})
    assert f"| {problem.name} | 90 | {last.distance:.4f} | {last.bound:.4f} |" in text and "| NO |" not in text
    theory.picture(curves, {problem.name: students}, tmp_path / "theory.png")
    assert (tmp_path / "theory.png").stat().st_size > 10_000


def test_a_broken_promise_is_seen() -> None:
    good = theory.Measured(0.01, 0.4, 0.2, 0.001, 0.002, [0.001], 0.5)
    assert all(theory.promises({64: 0.01, 128: 0.005}, {0: good}).values())
    for changed in ({"distance": 0.2}, {"distance_data": 0.6}, {"distillation_trained": 0.0005}):
        bad = theory.Measured(**{**vars(good), **changed})
        assert not all(theory.promises({64: 0.01, 128: 0.005}, {0: bad}).values())
    assert not all(theory.promises({64: 0.01, 128: 0.006}, {0: good}).values())
    assert good.bound == pytest.approx(2 * math.sqrt(0.001 / 2)) and good.bound_data == 0.5
