"""What the latent costs, on times that are known."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest
import torch
from toys import pair

from di4c_ext.evaluation import latency
from di4c_ext.evaluation.latency import latent_overhead, median_interval
from di4c_ext.evaluation.settings import MeasuringArguments


def arguments(**more: Any) -> MeasuringArguments:
    return MeasuringArguments(**{"eval_num_steps": [4, 2], "eval_num_samples": 8, "eval_batch_size": 5} | more)


def test_overhead_is_taken_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that grows slower and slower does so for both; the first calls, which warm it up, do not count."""
    calls: list[tuple[str, int, int]] = []
    tick = count()

    class Draw:
        def __init__(self, role: Any, batch_size: int, drawing: Any) -> None:
            self.name = "student" if role.model.config.is_student else "teacher"

        def __call__(self, num_steps: int, num_samples: int, seed: int) -> tuple[None, float]:
            calls.append((self.name, num_steps, num_samples))
            if len(calls) in (1, 2):
                return None, 1e6
            slow = 1 + 0.001 * (next(tick) // 2)
            return None, slow * num_samples * (1.01 if self.name == "student" else 1.0)

    monkeypatch.setattr(latency, "Draw", Draw)
    rows = latent_overhead(pair(), arguments(eval_num_turns=9))
    assert [(row["batch_size"], row["num_steps"], row["num_turns"]) for row in rows] == [(5, 2, 9), (1, 2, 9)]
    assert [name for name, *_ in calls[2:8]] == ["student", "teacher", "teacher", "student", "student", "teacher"]
    assert set(calls[:20]) == {("student", 2, 5), ("teacher", 2, 5)}
    for row in rows:
        assert row["overhead_low"] <= row["overhead"] <= row["overhead_high"]
        assert row["overhead"] == pytest.approx(0.01) and row["goal"] == 0.02
        assert row["student"] / row["teacher"] == pytest.approx(1.01) and 1 <= row["teacher"] < 1.1


def test_overhead_of_real_models() -> None:
    (row, one) = latent_overhead(pair(), arguments(eval_num_turns=2, eval_num_samples=4))
    assert (row["batch_size"], one["batch_size"]) == (4, 1) and 0 < row["teacher"] < one["teacher"]
    assert row["overhead"] > -1 and len(latent_overhead(pair(), arguments(eval_num_turns=1, eval_batch_size=1))) == 1


def test_nothing_is_said_without_both_or_without_turns() -> None:
    assert latent_overhead({"student": pair()["student"]}, arguments()) == []
    assert latent_overhead(pair(), arguments(eval_num_turns=0)) == []


@pytest.mark.parametrize("n", [6, 7, 10, 20, 33])
def test_the_interval_of_a_median_is_that_of_the_binomial_law(n: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    low, high = median_interval([float(i) for i in range(n)])
    assert low + high == n - 1
    assert 1 - 2 * stats.binom.cdf(low, n, 0.5) >= 0.95 > 1 - 2 * stats.binom.cdf(low + 1, n, 0.5) or low + 1 >= high
    # `low` values lie below the lower end: P(at most `low` of n below the median) is what is left out on a side.


def test_few_values_give_their_ends() -> None:
    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0) and median_interval([4.0]) == (4.0, 4.0)
    generator = torch.Generator().manual_seed(0)
    held = 0
    for values in torch.randn(300, 12, generator=generator).exp():
        low, high = median_interval(values.tolist())
        held += low <= 1 <= high  # the median of the log-normal law
    assert held / 300 >= 0.93
