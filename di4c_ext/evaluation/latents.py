"""What a student's latents carry: on held-out examples at several times, and on what it makes in one step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from di4c_ext import random
from di4c_ext.metrics.bootstrap import bootstrap_figures
from di4c_ext.metrics.mixture import is_exact, mixture_figures, total_correlation
from di4c_ext.models.base import MixtureDenoiser
from di4c_ext.systems import latents_of, process_of
from di4c_ext.teachers import conditions_of

LATENT_EXAMPLES = 100  # held-out images, or blocks of text, on which the student's latents are measured
ONE_STEP_SAMPLES = 400  # whose positions' debts to one another are measured
TIMES = (1.0, 0.75, 0.5, 0.25)  # 1 is where sampling begins, with nothing known
_MOST_LOGITS = 2**26  # numbers that a forward of measuring makes at once


def latent_use(
    student: MixtureDenoiser, heldout: Any, num_latents: int, num_bootstraps: int = 0
) -> list[dict[str, float]]:
    """The means of `mixture_figures` over held-out examples, a row for each time; with num_bootstraps also their
    intervals. is_exact: whether the joint is the sum over all latents. ValueError for a teacher, which has none."""
    told = _told("latent_use", student, heldout, num_latents, min(LATENT_EXAMPLES, len(heldout)))
    process, x_0 = process_of(student.config), heldout.tokens[:LATENT_EXAMPLES].long().to(student.device)
    rows = []
    for t in TIMES:
        found = mixture_figures(student, process, x_0, t=t, **told)
        about = {"t": t, "num_latents": num_latents, "num_images": len(x_0), "is_exact": is_exact(student)}
        rows.append({**about, **_means(found, num_bootstraps)})
    return rows


def one_step(student: MixtureDenoiser, heldout: Any, num_latents: int, num_bootstraps: int = 0) -> dict[str, float]:
    """The mean of `metrics.mixture.total_correlation` over samples of one step, of the heldout's length and classes;
    with num_bootstraps also its interval. ValueError for a teacher."""
    told = _told("one_step", student, heldout, num_latents, ONE_STEP_SAMPLES)
    found = total_correlation(student, process_of(student.config), heldout.tokens.shape[1], **told)
    means = _means({"total_correlation": found}, num_bootstraps)
    return {"num_latents": num_latents, "num_samples": len(found), "is_exact": is_exact(student), **means}


def _told(op: str, student: MixtureDenoiser, heldout: Any, num_latents: int, number: int) -> dict[str, Any]:
    """What both measures are told beside the examples: for `number` samples, with the classes of held-out ones."""
    latents = latents_of(student.config)
    if latents is None:
        raise ValueError(f"{op}: a teacher has no latents; give its student")
    per_sample = num_latents * heldout.tokens.shape[1] * student.config.num_states
    some = heldout.subset(torch.arange(number) % len(heldout))
    return {
        "keys": random.keys(0, number, device=student.device),
        "latents": latents,
        "num_latents": num_latents,
        "batch_size": max(1, min(32, _MOST_LOGITS // per_sample)),
        "conditions": conditions_of(student.config, some, student.device),
    }


def _means(found: dict[str, Tensor], num_bootstraps: int) -> dict[str, float]:
    """Means over examples, and the intervals of these."""
    means = {name: float(values.mean()) for name, values in found.items()}
    if not num_bootstraps:
        return means
    size = len(next(iter(found.values())))
    return means | bootstrap_figures(
        lambda chosen: {name: float(values[chosen].mean()) for name, values in found.items()}, size, num_bootstraps
    )
