"""Who is sampled in an evaluation: teacher, student, and what is made of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from di4c_ext.evaluation.settings import EvaluationArguments
from di4c_ext.models.base import MixtureDenoiser
from di4c_ext.sampling import PLAIN, SamplingArguments, check_sampling


class Role(NamedTuple):
    """A model, the teacher that helps it, if one does, and how it is sampled."""

    model: MixtureDenoiser
    teacher: MixtureDenoiser | None
    options: SamplingArguments


def cast_of(models: Mapping[str, MixtureDenoiser], sampling: SamplingArguments = PLAIN) -> dict[str, Role]:
    """Roles by name. models: by the names "teacher" and "student", or one of them.

    With both there is a "hybrid" where sampling.hybrid asks for one, and a "guided" where sampling.guidance or
    teacher_guides does. A teacher's options leave out what teachers have not. ValueError where one of both is missing.
    """
    plain = replace(sampling, hybrid=0, guidance=None, teacher_guides=False)
    cast: dict[str, Role] = {}
    for name, model in models.items():
        cast[name] = Role(model, None, plain if model.config.is_student else replace(plain, last_latents=1))
    student, teacher = models.get("student"), models.get("teacher")
    if sampling.wants_teacher and (student is None or teacher is None):
        raise ValueError(f"{sampling.wanted}: needs a student and its teacher; name the teacher's folder by --teacher")
    if student is not None and sampling.hybrid:
        cast["hybrid"] = Role(student, teacher, replace(plain, hybrid=sampling.hybrid, last_latents=1))
    if student is not None and sampling.guidance is not None:
        cast["guided"] = Role(student, teacher, replace(plain, guidance=sampling.guidance))
    if student is not None and sampling.teacher_guides:
        cast["guided"] = Role(student, teacher, replace(plain, teacher_guides=True))
    return cast


def check_plan(
    args: EvaluationArguments,
    sampling: SamplingArguments,
    models: Mapping[str, MixtureDenoiser] | None = None,
    temperatures: Sequence[float] = (),
) -> None:
    """Raises ValueError where the teacher's evaluations of a hybrid are more than the fewest steps to be measured.

    models, temperatures: as `compare` takes them, trained or not; given, all that `compare` would refuse is refused.
    """
    fewest = min(args.eval_num_steps)
    if sampling.hybrid > fewest:
        raise ValueError(
            f"--hybrid {sampling.hybrid}: more evaluations of the teacher than the {fewest} of the smallest "
            f"--eval_num_steps; give at most {fewest}"
        )
    for temperature in (sampling.temperature, *temperatures):
        asked = replace(sampling, temperature=temperature)
        for model, teacher, options in cast_of(models, asked).values() if models else ():
            check_sampling(model, fewest, teacher=teacher, options=options)
