"""The flags of measuring, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from di4c_ext.arguments import UsageError, parse
from di4c_ext.evaluation.settings import EvaluationArguments, MeasuringArguments


def test_the_steps_have_two_names_where_nothing_else_is_done() -> None:
    for flag in ("--num_steps", "--eval_num_steps"):
        (args,), settings = parse("evaluate", [MeasuringArguments], [flag, "2", "5", "--eval_temperatures", "0.5", "2"])
        assert args.eval_num_steps == [2, 5] == settings["eval_num_steps"] and args.eval_temperatures == [0.5, 2.0]
    with pytest.raises(UsageError, match="unknown flag '--num_steps'; did you mean '--eval_num_steps'"):
        parse("distill", [EvaluationArguments], ["--num_steps", "2"])
    training, measuring = EvaluationArguments(), MeasuringArguments()
    for name in ("eval_num_bootstraps", "eval_num_turns", "eval_num_bounded"):
        assert getattr(training, name) == 0 < getattr(measuring, name), "a training's end is not held up"


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"eval_num_steps": [1, 0]}, "--eval_num_steps 0: must be at least 1"),
        ({"eval_num_steps": [2, 2]}, "--eval_num_steps 2 2: names one value twice"),
        ({"eval_seeds": [3, 1, 3]}, "--eval_seeds 3 1 3: names one value twice"),
        ({"eval_num_samples": 1}, "--eval_num_samples 1: must be at least 2"),
        ({"eval_batch_size": 0}, "--eval_batch_size 0: must be at least 1"),
        ({"eval_num_bootstraps": -1}, "--eval_num_bootstraps -1: must be at least 0"),
        ({"eval_num_bounded": -2}, "--eval_num_bounded -2: must be at least 0"),
        ({"eval_temperatures": [0.5, 0.0]}, "--eval_temperatures 0: each must be finite and above 0"),
        ({"eval_temperatures": [float("inf")]}, "--eval_temperatures inf: each must be finite"),
        ({"eval_temperatures": [2.0, 2.0]}, "--eval_temperatures 2.0 2.0: names one value twice"),
        ({"eval_num_latents": 1}, "--eval_num_latents 1: must be at least 2"),
    ],
)
def test_refusals(told: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MeasuringArguments(**told)
