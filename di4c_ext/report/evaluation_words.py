"""The sentences of an evaluation's report: what the figures stand on, and what follows from them."""

from __future__ import annotations

from typing import Any

from di4c_ext.report.evaluated import Evaluated
from di4c_ext.report.facts import MATTERS, number, plural


def lead(facts: Evaluated) -> str:
    """Which networks, and which data."""
    sizes = {name: f"{count:,}" for name, count in facts.parameters.items()}
    folders = facts.report["folders"]
    told = [f"the {name} in {folders[name]} ({count} parameters)" for name, count in sizes.items()]
    kind = "text" if facts.is_text else "images"
    first = " and ".join(told)
    return f"{first[0].upper()}{first[1:]}, against the {kind} of {facts.shown.name}."


def protocol(facts: Evaluated) -> str:
    """What the figures stand on: samples, seeds, samplers, precision, intervals, floors."""
    rows = facts.rows
    samplers = ", ".join(sorted({row["sampler"] for row in rows}))
    precisions = ", ".join(sorted({row["precision"] for row in rows}))
    what = "held-out blocks, at most all," if facts.is_text else "real images, at most half of them,"
    parts = [
        f"{rows[0]['num_samples']:,} samples for each figure and seed, seeds {', '.join(map(str, facts.seeds))}; "
        f"sampler {samplers}, temperature {facts.temperature:g}, network in {precisions}, batches of "
        f"{rows[0]['batch_size']:,}.",
        "Evaluations are counted for each sample, of every network that is asked; latency is the time of sampling "
        "divided by the number of samples.",
    ]
    bootstraps = facts.report["settings"].get("eval_num_bootstraps", 0)
    if any(name.endswith("_low") for row in rows for name in row):
        parts.append(
            f"Intervals: 95% of a bootstrap of {bootstraps} sets of as many samples drawn anew, means over the seeds "
            "of those of each; they tell how a figure scatters at this number of samples."
        )
    parts.append(
        f"The floor of a figure (dashed) is what as many {what} score. No figure says enough without the entropy "
        "below it: samples that are all alike may be close to the data and have little."
    )
    return " ".join(parts)


def overhead(row: dict[str, Any]) -> str:
    """What the latent costs in batches of one size, and whether that is within the goal."""
    low, high, goal = row["overhead_low"], row["overhead_high"], row["goal"]
    verdict = "within" if high <= goal else "above" if low > goal else "not told apart by this timing from"
    return (
        f"In batches of {row['batch_size']:,}, at {plural(row['num_steps'], 'step')}, the student takes "
        f"{milliseconds(row['student'])} a sample and its teacher {milliseconds(row['teacher'])}: "
        f"{row['overhead']:+.1%} ({low:+.1%} to {high:+.1%}, {plural(row['num_turns'], 'turn')} in one "
        f"process), {verdict} the goal of at most {goal:.0%}."
    )


def latents(facts: Evaluated) -> str:
    """What one step captures, and whether the latents are used."""
    one, first = facts.report["one_step"], facts.report["latents"][0]
    interval = ""
    if "total_correlation_low" in one:
        interval = f" ({number(one['total_correlation_low'])} to {number(one['total_correlation_high'])})"
    carry = "carry" if max(one["total_correlation"], first["correlation"]) >= MATTERS else "hardly carry"
    summed = f"Both are taken over {one['num_latents']} latents; over more, more may be seen."
    if one["is_exact"]:
        summed = f"The mixture's is known exactly, its marginals are taken over {one['num_latents']} latents."
    return (
        f"The student's latents {carry} correlation. In one step it makes samples whose positions owe one another "
        f"{number(one['total_correlation'])} nats{interval}: the log-likelihood of its mixture above that of the "
        f"product of its marginals, mean over {one['num_samples']} samples; a teacher's is 0. {summed} The law of a "
        f"position moves by {first['variation']:.3f} in total variation with the latent, of at most 1."
    )


def exact(facts: Evaluated) -> str:
    """How the exact distances were found."""
    first = facts.report["exact"][0]
    latents = first.get("num_latents")
    stand = "" if latents is None else f" {latents} draws of the latent stand for all of them."
    return (
        "This problem is so small that every sequence was written down: total variation between the laws of samples, "
        f"in float64, without sampling. The teacher's law in {first['teacher_steps']} steps is the goal.{stand}"
    )


def milliseconds(seconds: float) -> str:
    """A time of less than a second in its own unit."""
    return f"{number(seconds)} s" if seconds >= 1 else f"{number(1000 * seconds)} ms"
