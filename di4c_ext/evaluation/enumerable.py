"""The exact distance of a student to its teacher, where the problem is so small that every sequence can be written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from di4c_ext import random
from di4c_ext.metrics.exact import num_all_states, sampler_law, total_variation
from di4c_ext.models.base import MixtureDenoiser
from di4c_ext.process import AbsorbingProcess
from di4c_ext.sampler import times
from di4c_ext.sampling import PLAIN, SamplingArguments, sampler_of
from di4c_ext.systems import latents_of, process_of

MOST_SEQUENCES = 1024  # of all states, masks among them: a step's matrix takes 8 MiB, and a second of 64 latents
TEACHER_STEPS = 64  # at least, of the law that others are held against
NUM_LATENTS = 64  # draws that stand for all latents of a student


def is_enumerable(model: MixtureDenoiser, sampling: SamplingArguments = PLAIN) -> bool:
    """Whether the law of this model's samples can be written down: few sequences, masks, plain ancestral steps."""
    process, length = process_of(model.config), model.config.length
    if not isinstance(process, AbsorbingProcess) or length is None:
        return False
    is_plain = sampler_of(model, sampling) == "ancestral" and sampling.temperature == 1 and sampling.top_p == 1
    return is_plain and num_all_states(process) ** length <= MOST_SEQUENCES


def exact_distances(
    models: Mapping[str, MixtureDenoiser], num_steps: Sequence[int], sampling: SamplingArguments = PLAIN
) -> list[dict[str, Any]]:
    """Total variation between the laws of k steps and the teacher's of many, a row for each k of num_steps.

    models: "teacher" and perhaps "student". A row holds num_steps, teacher_steps, teacher (its k-step law against its
    own of teacher_steps), and of a student num_latents (draws of the latent that stand for all, the same at every
    step), student (its k-step law against the teacher's of teacher_steps) and same_steps (against the teacher's of k).
    No rows where the problem is too large to enumerate, or there is no teacher.
    """
    if "teacher" not in models or not all(is_enumerable(model, sampling) for model in models.values()):
        return []
    many = max(TEACHER_STEPS, *num_steps)
    laws = {name: _laws(model, [*num_steps, *([many] if name == "teacher" else [])]) for name, model in models.items()}
    goal = laws["teacher"][many]
    rows = []
    for k in num_steps:
        row: dict[str, Any] = {"num_steps": k, "teacher_steps": many}
        row["teacher"] = total_variation(laws["teacher"][k], goal)
        if "student" in laws:
            row["num_latents"] = NUM_LATENTS
            row["student"] = total_variation(laws["student"][k], goal)
            row["same_steps"] = total_variation(laws["student"][k], laws["teacher"][k])
        rows.append(row)
    return rows


def _laws(model: MixtureDenoiser, num_steps: Sequence[int]) -> dict[int, Any]:
    """The law of the samples of each number of steps."""
    process, source = process_of(model.config), latents_of(model.config)
    latents = None if source is None else source(random.keys(0, 1), NUM_LATENTS)[0]
    with _on_cpu(model):
        return {k: sampler_law(process, model, model.config.length, times(k), latents=latents) for k in set(num_steps)}


@contextmanager
def _on_cpu(model: Any) -> Iterator[None]:
    """The model in the machine's own memory, where laws are added up in float64."""
    device = model.device
    model.to("cpu")
    try:
        yield
    finally:
        model.to(device)
