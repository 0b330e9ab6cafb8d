"""Samples a teacher and its student at several numbers of steps and measures both.

    python -m di4c_ext.evaluate --model runs/digits --eval_num_steps 1 2 4
    python -m di4c_ext.evaluate --model runs/mine --teacher runs/mine/teacher --hybrid 2 --dataset_name fashion_mnist

Every figure is measured per seed on the same number of samples, and stands beside what as many real images score
("floor"). References are all real images, and the held-out ones alone.
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

from di4c_ext import checkpoints, data, random
from di4c_ext.arguments import DataArguments, UsageError, parse, run
from di4c_ext.codes import Decoder, check_images, classes_like, vq_beside
from di4c_ext.generate import SamplingArguments, check_fit, check_sampling, generate, open_model, sampler_of
from di4c_ext.metrics.judge import Judge
from di4c_ext.metrics.mixture import correlation_gain
from di4c_ext.models import VQModel
from di4c_ext.models.base import MixtureDenoiser, role
from di4c_ext.systems import latents_of, layout_of, num_classes_of, process_of
from di4c_ext.teachers import conditions_of

LATENT_IMAGES = 100  # held-out images on which the student's latents are measured


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

    def __post_init__(self) -> None:
        for steps in self.eval_num_steps:
            if steps < 1:
                raise ValueError(f"--eval_num_steps {steps}: must be at least 1")
        if self.eval_num_samples < 2:
            raise ValueError(f"--eval_num_samples {self.eval_num_samples}: must be at least 2, better 1000")
        if self.eval_batch_size < 1:
            raise ValueError(f"--eval_batch_size {self.eval_batch_size}: must be at least 1")
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


def open_judge(train: data.ImageTokens, heldout: data.ImageTokens, args: EvaluationArguments) -> Judge:
    """The judge of these images, its floors at the number of samples of `args`, its classifier from the cache."""
    return Judge(train, heldout, checkpoints.cache_folder(), args.eval_num_samples, args.eval_feature_extractor)


def compare(
    models: dict[str, MixtureDenoiser],
    judge: Judge,
    args: EvaluationArguments,
    keep: int = 0,
    sampling: SamplingArguments | None = None,
    real: RealImages | None = None,
) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """One row of figures for each (model, number of steps, seed), and the first `keep` samples it stands on.

    models: by the names "teacher" and "student", or one of them. With both there are rows of a "hybrid" where
    sampling.hybrid asks for one, and of "guided" samples where sampling.guidance does. Of the other options a teacher's
    rows leave out what teachers have not. real: for networks of image tokens, whose samples it turns into pixels and
    which are told of its classes in their proportions. Raises ValueError for options that fit no row, before anything
    is sampled.
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
            labels=None if real is None else real.labels(model.config, args.eval_num_samples),
        )
        seconds = time.perf_counter() - start
        if real is not None:
            samples = real.decode(samples)
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


@dataclass(frozen=True)
class RealImages:
    """The pixels behind a data set of codes: training and held-out images, and what makes pixels of codes."""

    train: data.ImageTokens
    heldout: data.ImageTokens
    decode: Decoder

    def labels(self, config: Any, n: int) -> Tensor | None:
        """Classes of n samples in the proportions of the images, for a network of this config."""
        return classes_like(self.train, n) if num_classes_of(config) else None


def real_images(images: data.ImageTokens, heldout_fraction: float, vq: VQModel) -> RealImages:
    """The images cut as their codes are; ValueError where the VQ model is not for them."""
    check_images(images, vq.config, "--vq_model")
    train, heldout = data.split(images, heldout_fraction)
    return RealImages(train, heldout, Decoder(vq, images.num_states))


def codes_at_best(real: RealImages, codes: data.ImageTokens, judge: Judge) -> dict[str, float]:
    """The figures of images that come back from their own codes, as many as the floors are taken at."""
    evenly = torch.arange(judge.floor_size) * len(codes) // judge.floor_size
    return judge.measure(real.decode(codes.tokens[evenly].long()))


def latent_use(student: MixtureDenoiser, heldout: data.ImageTokens, num_latents: int) -> list[dict[str, float]]:
    """`correlation_gain` on held-out images at some times; 1 is where sampling begins, with nothing known."""
    process = process_of(student.config)
    latents = latents_of(student.config)
    if latents is None:
        raise ValueError("latent_use: a teacher has no latents; give its student")
    x_0 = heldout.tokens[:LATENT_IMAGES].long().to(student.device)
    keys = random.keys(0, len(x_0), device=student.device)
    some = heldout.subset(torch.arange(len(x_0)))
    told = conditions_of(student.config, some, student.device)
    return [
        {
            "t": t,
            "num_latents": num_latents,
            "num_images": len(x_0),
            **correlation_gain(student, process, x_0, keys, latents, num_latents=num_latents, t=t, conditions=told),
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


def open_pair(model: str, teacher: str | None) -> dict[str, MixtureDenoiser]:
    """The model by its role, and its teacher before it where that is named; ValueError where they do not fit."""
    opened = open_model(model)
    pair = {role(opened.config.is_student): opened}
    if teacher is None:
        return pair
    if not opened.config.is_student:
        raise UsageError(f"--teacher {teacher}: --model {model} is a teacher itself; leave --teacher out")
    above = open_model(teacher, is_student=False)
    check_fit(opened, above)
    return {"teacher": above, **pair}


def main(argv: Sequence[str]) -> int:
    (model_args, images, args, sampling), _ = parse(
        "evaluate",
        [ModelArguments, DataArguments, EvaluationArguments, SamplingArguments],
        argv,
        description="Measure a teacher or a student against real images.",
    )
    check_plan(args, sampling)
    models = open_pair(model_args.model, model_args.teacher)
    check_plan(args, sampling, models)
    model = list(models.values())[-1]
    is_tokens = model.config.model_type == "di4c_tokens"
    if not is_tokens and images.num_states is None and data.BUILT_IN.get(images.dataset_name) is None:
        images.num_states = model.config.num_states
    loaded = images.load(layout=layout_of(model.config))
    if is_tokens:
        vq: Any = vq_beside(model_args.model, images.vq_model)
        vq.check_denoiser(model.config)
        real = real_images(loaded, images.heldout_fraction, vq.to(model.device))
        _report(models, open_judge(real.train, real.heldout, args), args, sampling, model_args.output_file, real)
        return 0
    if images.vq_model is not None:
        raise UsageError(f"--vq_model {images.vq_model}: {model_args.model} is no network of codes; leave it out")
    train, heldout = data.split(loaded, images.heldout_fraction)
    if (model.config.num_states, model.config.length) != (train.num_states, train.length):
        raise UsageError(
            f"--model {model_args.model}: has S = {model.config.num_states}, D = {model.config.length}; the images of "
            f"{train.name!r} have S = {train.num_states}, D = {train.length}; name the data it was trained on"
        )
    _report(models, open_judge(train, heldout, args), args, sampling, model_args.output_file)
    return 0


def _report(
    models: dict[str, MixtureDenoiser],
    judge: Judge,
    args: EvaluationArguments,
    sampling: SamplingArguments,
    file: str | None,
    real: RealImages | None = None,
) -> None:
    """Prints the rows as JSON lines, and writes them."""
    rows = [row for row, _ in compare(models, judge, args, sampling=sampling, real=real)]
    text = "".join(json.dumps(row) + "\n" for row in [{"floors": judge.floors, "sizes": judge.sizes}, *rows])
    print(text, end="")
    if file is not None:
        checkpoints.write_text(Path(file), text)


if __name__ == "__main__":
    run(main)
