"""Rows of an evaluation: which, in which order, and what they say beside the judge's figures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toys import LENGTH, CountingJudge, pair, toy
from unets import by_formula

from di4c_ext.evaluation.cast import check_plan
from di4c_ext.evaluation.compare import cell_of, compare, counted, precision_of
from di4c_ext.evaluation.settings import EvaluationArguments
from di4c_ext.generate import SamplingArguments, generate


def arguments(**more: Any) -> EvaluationArguments:
    return EvaluationArguments(**{"eval_num_steps": [1, 3], "eval_num_samples": 6, "eval_seeds": [0, 4]} | more)


def test_rows_in_turns_with_all_that_is_told_of_them() -> None:
    models, judge = pair(), CountingJudge()
    args = arguments(eval_num_bootstraps=20, eval_num_turns=2, eval_batch_size=4)
    found = list(compare(models, judge, args, 2))
    rows = [row for row, _ in found]
    assert [cell_of(row) for row in rows] == [
        (model, n, 1.0, seed) for n in (1, 3) for seed in (0, 4) for model in ("teacher", "student")
    ]
    for row, samples in found:
        drawn = generate(models[row["model"]], row["num_steps"], 6, seed=row["seed"])
        assert torch.equal(samples, drawn[:2]), "the first samples of those it stands on"
        assert row["zeros"] == pytest.approx(float((drawn == 0).float().mean()))
        assert row["zeros_low"] <= row["zeros"] <= row["zeros_high"]
        assert (row["sampler"], row["precision"], row["num_samples"], row["batch_size"]) == (
            "ancestral",
            "float32",
            6,
            4,
        )
        assert row["num_evaluations"] == row["num_steps"] and row["latency_1"] > 0
        assert row["latency"] == pytest.approx(row["seconds"] / 6, abs=1e-3)
        assert row["nelbo"] == 2 + (row["model"] == "student") + 1 / row["num_steps"]
    assert judge.bounded == [1, 1, 3, 3], "once for each model and number of steps, whatever the seeds"


def test_temperatures_and_what_is_known_already() -> None:
    models, judge = pair(), CountingJudge()
    args = arguments(eval_seeds=[0])
    rows = [row for row, _ in compare(models, judge, args, temperatures=[0.25, 1.0])]
    assert [row["temperature"] for row in rows] == [1, 1, 0.25, 0.25] * 2
    cold = generate(models["teacher"], 3, 6, seed=0, options=SamplingArguments(temperature=0.25))
    (row,) = (row for row in rows if cell_of(row) == ("teacher", 3, 0.25, 0))
    assert row["zeros"] == pytest.approx(float((cold == 0).float().mean())) and "nelbo" not in row
    assert "latency_1" not in row and "zeros_low" not in row, "neither turns nor bootstraps were asked for"
    known = [cell_of(row) for row in rows if row["model"] == "teacher"]
    left = [row for row, _ in compare(models, judge, args, temperatures=[0.25], known=known)]
    assert [row["model"] for row in left] == ["student"] * 4


@pytest.fixture(scope="module")
def pixels() -> dict[str, Any]:
    return {"teacher": by_formula(num_channels=1), "student": by_formula(num_channels=1, is_student=True)}


@pytest.mark.parametrize(
    ("options", "each"),
    [
        ({"hybrid": 1}, 2),
        ({"guidance": 1.5}, 4),
        ({"last_latents": 3}, 4),
    ],
)
def test_evaluations_of_pixel_models_are_counted(pixels: dict[str, Any], options: dict[str, Any], each: int) -> None:
    """Of both networks where both are asked, and every latent that is tried."""
    args = arguments(eval_num_steps=[2], eval_seeds=[0], eval_num_samples=2)
    rows = {row["model"]: row for row, _ in compare(pixels, CountingJudge(), args, 0, SamplingArguments(**options))}
    name = {"hybrid": "hybrid", "guidance": "guided"}.get(next(iter(options), ""), "student")
    assert rows[name]["num_evaluations"] == each and rows["teacher"]["num_evaluations"] == 2
    assert "nelbo" not in rows["student"], "is of ancestral samples"


@pytest.mark.parametrize(("options", "most"), [({"sampler": "first_hitting"}, LENGTH), ({"skip_idle": True}, LENGTH)])
def test_evaluations_of_masked_models_are_those_made(options: dict[str, Any], most: int) -> None:
    args = arguments(eval_num_steps=[50], eval_seeds=[0])
    ((row, _),) = compare({"teacher": toy()}, CountingJudge(), args, 0, SamplingArguments(**options))
    assert row["num_evaluations"] <= most
    assert row["num_evaluations"] == most or row["sampler"] == "ancestral"


def test_many_latents_count_as_many_evaluations() -> None:
    from di4c_ext.evaluation.cast import Role

    student = toy(is_student=True)
    x = torch.zeros(2, LENGTH, dtype=torch.int64)
    with counted(Role(student, None, SamplingArguments())) as calls:
        student(x, torch.ones(2), torch.zeros(2, 5, 4))
        student(x, torch.ones(2), latents=torch.zeros(2, 4))
        student(x[:, None].expand(2, 3, LENGTH), torch.ones(2), torch.zeros(2, 3, 4))
    student(x, torch.ones(2), torch.zeros(2, 4))  # nobody counts any more
    assert calls == [10, 2, 6]


def test_precision_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert precision_of(toy().bfloat16()) == "bfloat16"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert precision_of(toy()) == "float32, high products" and precision_of(toy().double()) == "float64"


def test_what_cannot_be_sampled_is_refused_before_anything_is() -> None:
    models = pair()
    for options, temperatures, message in (
        ({"hybrid": 1}, [], "is for the analytic sampler of pixel models"),
        ({"hybrid": 2}, [], "--hybrid 2: more evaluations of the teacher than the 1 of the smallest"),
        ({"randomize": "none"}, [], "is for image tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            next(
                compare(
                    models, CountingJudge(), arguments(), 0, SamplingArguments(**options), temperatures=temperatures
                )
            )
    pixels = {"teacher": by_formula(num_channels=1)}
    check_plan(arguments(), SamplingArguments(sampler="tau_leaping"), pixels)
    with pytest.raises(ValueError, match=r"--temperature 0.5: tau_leaping has none"):
        check_plan(arguments(), SamplingArguments(sampler="tau_leaping"), pixels, [0.5])
    with pytest.raises(ValueError, match="name the teacher's folder by --teacher"):
        check_plan(arguments(), SamplingArguments(guidance=2.0), {"student": models["student"]})
