"""A process by name and constants: what is made of them, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from di4c_ext.process import PROCESSES, process_from


def test_constants_reach_the_process() -> None:
    made: Any = process_from({"name": "gaussian", "rate_sigma": 3, "time_base": 0.3}, 32)
    assert (made.num_states, made.rate_sigma, made.q_sigma, made.time_base) == (32, 3.0, 512.0, 0.3)
    assert process_from({"name": "uniform", "schedule": "cosine"}, 5).schedule == "cosine"  # type: ignore[attr-defined]
    assert process_from({"name": "absorbing"}, 7).num_states == 7
    for name, kind in PROCESSES.items():
        assert type(process_from({"name": name}, 4)) is kind


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "gausian"}, "must be one of absorbing, gaussian, uniform, confidence, got 'gausian'"),
        ({"name": "confidence", "mask_id": 3}, "'mask_id' follows from other settings"),
        ({"name": "confidence", "gumbel": "4"}, "gumbel must be a number, got '4'"),
        ({}, "got None"),
        ({"name": "gaussian", "rate_sigm": 3}, "unknown setting 'rate_sigm'; did you mean 'rate_sigma'?"),
        ({"name": "gaussian", "schedule": "linear"}, "unknown setting 'schedule'"),
        ({"name": "gaussian", "num_states": 3}, "'num_states' follows from other settings"),
        ({"name": "gaussian", "rate_sigma": "3"}, "rate_sigma must be a number, got '3'"),
        ({"name": "gaussian", "q_sigma": True}, "q_sigma must be a number, got True"),
        ({"name": "gaussian", "time_base": -1}, "--here: GaussianProcess: time_base must be greater than 0"),
        ({"name": "uniform", "schedule": 3}, "schedule must be a name, got 3"),
        ({"name": "uniform", "schedule": "sine"}, "unknown schedule 'sine'"),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        process_from(settings, 8, "--here")
    assert message in str(error.value) and str(error.value).startswith("--here")
