"""What the latent costs: the time of a student's sampling above its teacher's, taken in turns in one process."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from di4c_ext.evaluation.cast import cast_of
from di4c_ext.evaluation.compare import Draw
from di4c_ext.evaluation.settings import EvaluationArguments
from di4c_ext.metrics.bootstrap import LEVEL
from di4c_ext.models.base import MixtureDenoiser
from di4c_ext.sampling import PLAIN, SamplingArguments
from di4c_ext.task import Drawing

GOAL = 0.02  # share of the teacher's time that the latent is to cost at most


def latent_overhead(
    models: Mapping[str, MixtureDenoiser],
    args: EvaluationArguments,
    sampling: SamplingArguments = PLAIN,
    drawing: Drawing | None = None,
) -> list[dict[str, Any]]:
    """Rows for batches of args.eval_batch_size and of 1, both models at the fewest of args.eval_num_steps.

    models: "teacher" and "student". In each of args.eval_num_turns turns both sample one batch, in the other order
    every other turn, so that what slows a machine for a while slows both. A row holds num_steps, batch_size, num_turns,
    teacher and student (median seconds a sample), overhead (median over turns of student's time / teacher's - 1) and
    its interval overhead_low, overhead_high, and goal. No rows without both models, or without turns.
    """
    if args.eval_num_turns < 1 or not {"teacher", "student"} <= set(models):
        return []
    cast = cast_of({name: models[name] for name in ("teacher", "student")}, sampling)
    num_steps = min(args.eval_num_steps)
    rows = []
    for batch_size in sorted({min(args.eval_batch_size, args.eval_num_samples), 1}, reverse=True):
        draws = {name: Draw(cast[name], batch_size, drawing) for name in ("teacher", "student")}
        for draw in draws.values():
            draw(num_steps, batch_size, 0)  # memory is found, kernels are chosen
        taken: dict[str, list[float]] = {name: [] for name in draws}
        for turn in range(args.eval_num_turns):
            for name in sorted(draws, reverse=bool(turn % 2)):
                taken[name].append(draws[name](num_steps, batch_size, turn)[1] / batch_size)
        rows.append(
            {
                "num_steps": num_steps,
                "batch_size": batch_size,
                "num_turns": args.eval_num_turns,
                **{name: statistics.median(seconds) for name, seconds in taken.items()},
                **_overhead([mine / its - 1 for mine, its in zip(taken["student"], taken["teacher"], strict=True)]),
                "goal": GOAL,
            }
        )
    return rows


def _overhead(shares: Sequence[float]) -> dict[str, float]:
    low, high = median_interval(shares)
    return {"overhead": statistics.median(shares), "overhead_low": low, "overhead_high": high}


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The two of the values between which the median of their law lies with 95% at least, whatever that law is.

    As many lie below it as heads fall in so many throws of a coin. Fewer than 6 values cannot say so much: the least
    and the largest then.
    """
    ordered, n = sorted(values), len(values)
    below, out = 0.5**n, 0
    while below <= (1 - LEVEL) / 2 and 2 * (out + 1) < n:
        out += 1
        below += math.comb(n, out) * 0.5**n
    out = max(out - 1, 0)
    return ordered[out], ordered[n - 1 - out]
