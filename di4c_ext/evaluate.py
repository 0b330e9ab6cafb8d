"""Samples a teacher and its student at several numbers of steps and measures both.

    python -m di4c_ext.evaluate --model runs/digits --eval_num_steps 1 2 4
    python -m di4c_ext.evaluate --model runs/mine --teacher runs/mine/teacher --hybrid 2 --dataset_name fashion_mnist
    python -m di4c_ext.evaluate --model runs/text --teacher runs/text/teacher --dataset_name sotu

Every figure is measured per seed on the same number of samples, and stands beside what as many real images or blocks of
text score ("floor"). References are all real ones, and the held-out ones alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from di4c_ext import checkpoints, random
from di4c_ext.arguments import DataArguments, UsageError, parse, run
from di4c_ext.generate import SamplingArguments, check_fit, check_sampling, generate, open_model, sampler_of
from di4c_ext.metrics.mixture import correlation_gain
from di4c_ext.models.base import MixtureDenoiser, role
from di4c_ext.systems import latents_of, modality_of, process_of
from di4c_ext.task import Drawing, Judge
from di4c_ext.teachers import conditions_of
from di4c_ext.text_arguments import TextArguments

LATENT_EXAMPLES = 100  # held-out images, or blocks of text, on which the student's latents are measured
_MOST_LOGITS = 2**26  # numbers that a forward of measuring makes at once


@dataclass
class EvaluationArguments:
    """How samples are measured after training."""

    eval_num_steps: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8, 16, 64], metadata={"help": "sampling steps to measure"}
    )
    eval_num_samples: int = field(default=1000, metadata={"help": "samples per figure"})
    eval_seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "sampling seeds, all reported"})
    eval_batch_size: int = field(default=500, metadata={"help": "samples at a time; changes no figure"})
    eval_feature_extractor: str | None = field(
        default=None,
        metadata={"help": "feature space: an image classifier of transformers; default: one of the images' own labels"},
    )
    eval_causal_lm: str | None = field(
        default=None,
        metadata={"help": "text: the causal model whose perplexity is measured: smollm2, a folder, file or hub name"},
    )
    eval_num_judged: int = field(default=128, metadata={"help": "text: samples that this model reads"})
    eval_dtype: str = field(default="float32", metadata={"help": "text: what it computes in, float32 or bfloat16"})

    def __post_init__(self) -> None:
        for steps in self.eval_num_steps:
            if steps < 1:
                raise ValueError(f"--eval_num_steps {steps}: must be at least 1")
        if self.eval_num_samples < 2:
            raise ValueError(f"--eval_num_samples {self.eval_num_samples}: must be at least 2, better 1000")
        for name in ("eval_batch_size", "eval_num_judged"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("eval_num_steps", "eval_seeds"):
            if len(set(getattr(self, name))) != len(getattr(self, name)):
                raise ValueError(f"--{name} {getattr(self, name)}: names one value twice")


def check_plan(
    args: EvaluationArguments, sampling: SamplingArguments, models: dict[str, MixtureDenoiser] | None = None
) -> None:
    """Raises ValueError where the teacher's evaluations of a hybrid are more than the fewest steps to be measured.

    models: as `compare` takes them, trained or not; given, all that `compare` would refuse is refused.
    """
    fewest = min(args.eval_num_steps)
    if sampling.hybrid > fewest:
        raise ValueError(
            f"--hybrid {sampling.hybrid}: more evaluations of the teacher than the {fewest} of the smallest "
            f"--eval_num_steps; give at most {fewest}"
        )
    for model, teacher, options in _cast(models, sampling).values() if models else ():
        check_sampling(model, fewest, teacher=teacher, options=options)


def compare(
    models: dict[str, MixtureDenoiser],
    judge: Judge,
    args: EvaluationArguments,
    keep: int = 0,
    sampling: SamplingArguments | None = None,
    drawing: Drawing | None = None,
) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """One row of figures for each (model, number of steps, seed), and the first `keep` samples it stands on.

    models: by the names "teacher" and "student", or one of them. With both there are rows of a "hybrid" where
    sampling.hybrid asks for one, and of "guided" samples where sampling.guidance does. Of the other options a teacher's
    rows leave out what teachers have not. drawing: what `generate` is told beside, and what is made of samples before
    they are measured. Raises ValueError for options that fit no row, before anything is sampled.
    """
    sampling = sampling or SamplingArguments()
    check_plan(args, sampling, models)
    cast = _cast(models, sampling)
    todo = [(name, n, seed) for n in args.eval_num_steps for name in cast for seed in args.eval_seeds]
    bar = tqdm(todo, desc="evaluation", unit="run", dynamic_ncols=True)
    for name, num_steps, seed in bar:
        model, teacher, options = cast[name]
        bar.set_postfix(model=name, steps=num_steps, seed=seed, refresh=False)
        start = time.perf_counter()
        samples = generate(
            model,
            num_steps,
            args.eval_num_samples,
            seed=seed,
            batch_size=args.eval_batch_size,
            teacher=teacher,
            options=options,
            **({} if drawing is None else drawing.told(model.config, args.eval_num_samples)),
        )
        seconds = time.perf_counter() - start
        if drawing is not None:
            samples = drawing.decode(samples)
        row = {"model": name, "sampler": sampler_of(model, options), "num_steps": num_steps, "seed": seed}
        figures = judge.measure(samples)
        yield {**row, "num_samples": len(samples), **figures, "seconds": round(seconds, 3)}, samples[:keep]


Role = tuple[MixtureDenoiser, MixtureDenoiser | None, SamplingArguments]


def _cast(models: dict[str, MixtureDenoiser], sampling: SamplingArguments) -> dict[str, Role]:
    """Who is sampled, with which teacher and options."""
    plain = replace(sampling, hybrid=0, guidance=None, teacher_guides=False)
    cast: dict[str, Role] = {}
    for name, model in models.items():
        cast[name] = (model, None, plain if model.config.is_student else replace(plain, last_latents=1))
    student, teacher = models.get("student"), models.get("teacher")
    if sampling.wants_teacher and (student is None or teacher is None):
        raise ValueError(f"{sampling.wanted}: needs a student and its teacher; name the teacher's folder by --teacher")
    if student is not None and sampling.hybrid:
        cast["hybrid"] = (student, teacher, replace(plain, hybrid=sampling.hybrid, last_latents=1))
    if student is not None and sampling.guidance is not None:
        cast["guided"] = (student, teacher, replace(plain, guidance=sampling.guidance))
    if student is not None and sampling.teacher_guides:
        cast["guided"] = (student, teacher, replace(plain, teacher_guides=True))
    return cast


def latent_use(student: MixtureDenoiser, heldout: Any, num_latents: int) -> list[dict[str, float]]:
    """`correlation_gain` on held-out examples at some times; 1 is where sampling begins, with nothing known."""
    process = process_of(student.config)
    latents = latents_of(student.config)
    if latents is None:
        raise ValueError("latent_use: a teacher has no latents; give its student")
    x_0 = heldout.tokens[:LATENT_EXAMPLES].long().to(student.device)
    keys = random.keys(0, len(x_0), device=student.device)
    some = heldout.subset(torch.arange(len(x_0)))
    told = conditions_of(student.config, some, student.device)
    at_once = max(1, min(32, _MOST_LOGITS // (num_latents * x_0.shape[1] * student.config.num_states)))
    return [
        {
            "t": t,
            "num_latents": num_latents,
            "num_images": len(x_0),
            **correlation_gain(
                student, process, x_0, keys, latents, num_latents=num_latents, t=t, batch_size=at_once, conditions=told
            ),
        }
        for t in (1.0, 0.75, 0.5, 0.25)
    ]


@dataclass
class ModelArguments:
    """Which model is measured."""

    model: str = field(default="runs/digits", metadata={"help": "folder of a teacher or student"})
    teacher: str | None = field(
        default=None, metadata={"help": "folder of the student's teacher: measured too, and for --hybrid, --guidance"}
    )
    output_file: str | None = field(default=None, metadata={"help": "write the rows here as JSON lines too"})


def open_pair(model: str, teacher: str | None, trust_remote_code: bool = False) -> dict[str, MixtureDenoiser]:
    """The model by its role, and its teacher before it where that is named; ValueError where they do not fit."""
    opened = open_model(model, trust_remote_code=trust_remote_code)
    pair = {role(opened.config.is_student): opened}
    if teacher is None:
        return pair
    if not opened.config.is_student:
        raise UsageError(f"--teacher {teacher}: --model {model} is a teacher itself; leave --teacher out")
    above = open_model(teacher, is_student=False, trust_remote_code=trust_remote_code)
    check_fit(opened, above)
    return {"teacher": above, **pair}


def main(argv: Sequence[str]) -> int:
    (model_args, images, text, args, sampling), _ = parse(
        "evaluate",
        [ModelArguments, DataArguments, TextArguments, EvaluationArguments, SamplingArguments],
        argv,
        description="Measure a teacher or a student against real images or text.",
    )
    check_plan(args, sampling)
    models = open_pair(model_args.model, model_args.teacher, text.trust_remote_code)
    check_plan(args, sampling, models)
    config = list(models.values())[-1].config
    judge: Judge
    drawing: Drawing | None
    if modality_of(config) == "text":
        from di4c_ext.text_task import judged

        judge, drawing = judged(model_args.model, config, images, text, args)
    else:
        from di4c_ext.image_task import judged as judged_images

        text.refuse()
        judge, drawing = judged_images(model_args.model, config, images, args)
    _report(models, judge, args, sampling, model_args.output_file, drawing)
    return 0


def _report(
    models: dict[str, MixtureDenoiser],
    judge: Judge,
    args: EvaluationArguments,
    sampling: SamplingArguments,
    file: str | None,
    drawing: Drawing | None,
) -> None:
    """Prints the rows as JSON lines, and writes them."""
    rows = [row for row, _ in compare(models, judge, args, sampling=sampling, drawing=drawing)]
    text = "".join(json.dumps(row) + "\n" for row in [{"floors": judge.floors, "sizes": judge.sizes}, *rows])
    print(text, end="")
    if file is not None:
        checkpoints.write_text(Path(file), text)


if __name__ == "__main__":
    run(main)
