"""Distils a product teacher into a few-step mixture student, samples both and writes a report.

    python -m di4c_ext.distill
    python -m di4c_ext.distill --num_latents 32 --output_dir my_run
    python -m di4c_ext.distill --preset pixels --dataset_name cifar-10-batches-py --teacher_model_name_or_path teacher
    python -m di4c_ext.distill --resume --output_dir my_run

The default run takes the built-in digits and trains their teacher, unless the cache has it (`di4c_ext.pretrain`).
Into --output_dir go report.html, metrics.jsonl, samples/, distill_config.yaml, README.md, the student as
model.safetensors and config.json, which `systems.load_model` opens, and its teacher in teacher/.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import set_seed

from di4c_ext import checkpoints, data, pictures
from di4c_ext.arguments import DataArguments, RunArguments, as_dict, as_yaml, parse, read_stored, run
from di4c_ext.callbacks import append_metrics, read_metrics
from di4c_ext.codes import VQ_FOLDER
from di4c_ext.config import TIME_MIN, DistillConfig, PretrainConfig
from di4c_ext.evaluate import (
    EvaluationArguments,
    RealImages,
    check_plan,
    codes_at_best,
    compare,
    latent_use,
    open_judge,
    real_images,
)
from di4c_ext.generate import SamplingArguments
from di4c_ext.models.base import MixtureDenoiser
from di4c_ext.names import check_names
from di4c_ext.pretrain import Interrupted, augmentation, load_tokens, stopped_message, train_teacher
from di4c_ext.process import Process
from di4c_ext.systems import latents_of, num_classes_of, process_of
from di4c_ext.teachers import (
    CODES_RECIPE,
    LEVELS_RECIPE,
    RECIPE,
    bounds,
    bounds_name,
    cached_teacher,
    load_teacher,
    network_of,
    new_teacher,
    num_measured,
)
from di4c_ext.trainer import DistillTrainer
from di4c_ext.vq import save_vq

STORED = "distill_config.yaml"
SHOWN = 64  # images in a grid


@dataclass
class TeacherArguments:
    """A teacher to load, or the settings of its training (as in `di4c_ext.pretrain`, with `teacher_` in front)."""

    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "folder of a teacher; default: the cache, else it is trained"}
    )
    teacher_max_steps: int = field(default=2000, metadata={"help": "optimizer steps"})
    teacher_per_device_train_batch_size: int = field(default=64, metadata={"help": "images per step and device"})
    teacher_gradient_accumulation_steps: int = field(default=1, metadata={"help": "batches per optimizer step"})
    teacher_learning_rate: float = field(default=1e-3, metadata={"help": "peak learning rate"})
    teacher_lr_scheduler_type: str = field(default="cosine", metadata={"help": "as lr_scheduler_type"})
    teacher_lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "JSON, as lr_scheduler_kwargs"}
    )
    teacher_warmup_steps: float = field(default=0, metadata={"help": "steps of warm-up; below 1: a share of all"})
    teacher_weight_decay: float = field(default=0.0, metadata={"help": "weight decay"})
    teacher_adam_beta2: float = field(default=0.999, metadata={"help": "second beta of AdamW"})
    teacher_max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm"})
    teacher_ema_decay: float = field(default=0.999, metadata={"help": "moving average of the weights; 0: none"})
    teacher_augment_share: float = field(default=0.0, metadata={"help": "share of the images altered"})
    teacher_label_dropout: float = field(default=0.1, metadata={"help": "share of the images whose class is not told"})
    teacher_time_min: float = field(default=TIME_MIN, metadata={"help": "gaussian and uniform: no time lies below"})
    teacher_model_config: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "JSON: settings of models.CompactConfig, or of UNetConfig"}
    )
    teacher_seed: int = field(default=0, metadata={"help": "seed of the teacher's weights and training"})

    def config(self, student: DistillConfig) -> PretrainConfig:
        """The teacher's own training settings; device and precision are the student's."""
        recipe = {name: getattr(self, f"teacher_{name}") for name in (*RECIPE, *LEVELS_RECIPE, *CODES_RECIPE)}
        both = ("use_cpu", "bf16", "fp16", "disable_tqdm", "report_to", "channels_last")
        shared = {name: getattr(student, name) for name in both}
        return PretrainConfig(output_dir=str(Path(str(student.output_dir)) / "teacher"), **recipe, **shared)


@dataclass
class StudentConfig(DistillConfig):
    """DistillConfig with what only the command needs."""

    max_steps: int = field(default=1000, metadata={"help": "optimizer steps"})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "images per step and device"})
    ema_decay: float = field(default=0.99, metadata={"help": "moving average of the weights; 0: none"})
    student_model_config: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "JSON: latent_dim, dropout and what else from_teacher takes"}
    )

    def __post_init__(self) -> None:
        self.student_model_config = as_dict("student_model_config", self.student_model_config)
        if self.max_steps < 1:
            raise ValueError(f"--max_steps {self.max_steps}: must be at least 1")
        super().__post_init__()


def _without_vq(preset: dict[str, Any]) -> dict[str, Any]:
    """A preset without what is said of the VQ model's training, which is another command's."""
    return {key: value for key, value in preset.items() if not key.startswith("vq_")}


class Run:
    """One run: its images, settings and folder, and the seconds each phase took."""

    def __init__(self, argv: Sequence[str]) -> None:
        made, self.settings = parse(
            "distill",
            [DataArguments, TeacherArguments, StudentConfig, EvaluationArguments, SamplingArguments, RunArguments],
            argv,
            default_preset="digits",
            translate=_without_vq,
            stored=lambda early: read_stored(Path(early.output_dir or StudentConfig.output_dir) / STORED),
            description="Distil a product teacher into a few-step mixture student.",
        )
        self.images, self.teacher_args, self.args, self.evaluation, self.sampling, self.options = made
        self.output = Path(str(self.args.output_dir))
        self.metrics = self.output / "metrics.jsonl"
        self.again = f"python -m di4c_ext.distill --resume --output_dir {self.output}"
        self.process = self.images.process_settings()
        self.network = network_of(self.process)
        settings = as_dict("student_model_config", self.args.student_model_config)
        check_names("--student_model_config", settings, self.network.from_teacher, ("cls", "teacher"))
        kept = self.output / VQ_FOLDER
        loaded = load_tokens(self.images, kept if kept.is_dir() and self.resuming else None)
        self.train, self.heldout = data.split(loaded.tokens, self.images.heldout_fraction)
        self.vq = loaded.vq
        self.real: RealImages | None = None
        if loaded.vq is not None:
            self.real = real_images(loaded.pixels, self.images.heldout_fraction, loaded.vq)
        self.seconds: dict[str, float] = {}

    @property
    def resuming(self) -> bool:
        return self.options.resuming(self.args)

    @property
    def pictures(self) -> tuple[data.ImageTokens, data.ImageTokens]:
        """Training and held-out images in pixels, whatever the network works on."""
        return (self.train, self.heldout) if self.real is None else (self.real.train, self.real.heldout)

    def process_of(self, config: Any) -> Process:
        """The process of a model of this config, with what this run says of a teacher's steps."""
        told = {key: value for key, value in self.process.items() if key not in ("name", "schedule")}
        return process_of(config, told if self.process["name"] == "confidence" else None)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 1)


def get_teacher(job: Run, config: PretrainConfig) -> tuple[MixtureDenoiser, str, Path]:
    """The teacher, where it came from in words, and its folder; one not named by the user is kept in the output."""
    named = job.teacher_args.teacher_model_name_or_path
    if named is not None:
        return load_teacher(Path(named), job.train, job.process), f"loaded from {named}", Path(named)
    working = Path(str(config.output_dir))
    if job.options.resuming(job.args) and (working / checkpoints.WEIGHTS).is_file():
        return load_teacher(working, job.train, job.process), "of the run that was resumed", working
    cached = cached_teacher(job.train, config, job.process)
    if (cached / checkpoints.WEIGHTS).is_file():
        teacher = load_teacher(cached, job.train, job.process)
        print(f"teacher: from the cache, {cached}")
        with checkpoints.whole_folder(working) as folder:
            shutil.copytree(cached, folder, dirs_exist_ok=True)
        return teacher, "from the cache", working
    resume = job.options.checkpoint(config, working) if job.options.resuming(job.args) else None
    working.mkdir(exist_ok=True)
    teacher = train_teacher(job.train, config, job.process, resume=resume, again=job.again)
    checkpoints.keep_newest(working, 0)
    return teacher, "trained in this run", working


def new_student(job: Run, teacher: MixtureDenoiser) -> MixtureDenoiser:
    """An untrained student of this teacher; ValueError for settings it cannot have."""
    set_seed(job.args.seed)
    settings = as_dict("student_model_config", job.args.student_model_config)
    try:
        student = job.network.from_teacher(teacher, **settings)  # type: ignore[arg-type]  # load_teacher saw to it
    except TypeError as error:  # a setting of the wrong kind
        raise ValueError(f"--student_model_config {json.dumps(settings)}: {error}") from error
    if job.args.augment_share and not getattr(teacher.config, "augmentation_dim", 0):
        raise ValueError(
            f"--augment_share {job.args.augment_share:g}: this teacher was trained without augmentation and cannot be "
            "told of it; give 0, or train the teacher with --teacher_augment_share"
        )
    return student


def train_student(job: Run, teacher: MixtureDenoiser) -> MixtureDenoiser:
    """The student (its moving average), trained or resumed, and saved into the output folder."""
    student = new_student(job, teacher)
    latents = latents_of(student.config)
    assert latents is not None  # a student
    trainer = DistillTrainer(
        student,
        teacher=teacher,
        latents=latents,
        augment=augmentation(job.train, job.args.augment_share),
        process=job.process_of(student.config),
        args=job.args,
        train_dataset=job.train,
        metrics_file=job.metrics,
    )
    trainer.train(resume_from_checkpoint=job.options.checkpoint(job.args))
    if trainer.interrupt.interrupted and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(stopped_message("student", trainer.state, job.again))
    best: MixtureDenoiser = trainer.best_model().eval()
    checkpoints.save_model(best, job.output)
    return best


def evaluate(job: Run, teacher: MixtureDenoiser, student: MixtureDenoiser) -> dict[str, Any]:
    """All figures of the report; each also becomes a line of metrics.jsonl, and the first seed's images a PNG."""
    student.to(job.args.device)
    teacher.to(job.args.device)
    shown = job.pictures[0]
    judge = open_judge(*job.pictures, job.evaluation)
    kept = [line for line in read_metrics(job.metrics) if line.get("phase") != "evaluation"]
    checkpoints.write_text(job.metrics, "".join(json.dumps(line) + "\n" for line in kept))
    rows: list[dict[str, Any]] = []
    grids: dict[tuple[str, int], Tensor] = {}
    models = {"teacher": teacher, "student": student}
    for row, samples in compare(models, judge, job.evaluation, SHOWN, job.sampling, job.real):
        rows.append(row)
        append_metrics(job.metrics, {"phase": "evaluation", **row})
        if row["seed"] == job.evaluation.eval_seeds[0]:
            grids[row["model"], row["num_steps"]] = samples
            picture = pictures.grid(samples, shown.shape, shown.num_states, _columns(student.config), shown.layout)
            file = job.output / "samples" / f"{row['model']}-{row['num_steps']:03d}steps.png"
            pictures.save(picture, file, scale=pictures.scale_for(shown.shape))
    results: dict[str, Any] = {} if job.real is None else {"reconstructions": codes_at_best(job.real, job.train, judge)}
    return results | {
        "rows": rows,
        "grids": grids,
        "floors": judge.floors,
        "sizes": judge.sizes,
        "accuracy": judge.accuracy,
        "bounds": bounds(teacher, job.train, job.heldout, job.teacher_args.teacher_time_min),
        "num_bounds": {
            name: num_measured(teacher.config, images)
            for name, images in (("train", job.train), ("heldout", job.heldout))
        },
        "bounds_name": bounds_name(teacher.config, job.teacher_args.teacher_time_min),
        "latents": latent_use(student, job.heldout, job.args.num_latents),
    }


def _columns(config: Any) -> int:
    """Of a grid of samples: one for each class, where these come in turn and are not too many, else 8."""
    return num_classes_of(config) if 1 < num_classes_of(config) <= 16 else 8


def check(job: Run, config: PretrainConfig) -> None:
    """Refuses bad settings before anything is written, on an untrained teacher or the one that was named."""
    named = job.teacher_args.teacher_model_name_or_path
    teacher: MixtureDenoiser
    if named is None:
        teacher = new_teacher(job.train, config, job.process)
    else:
        teacher = load_teacher(Path(named), job.train, job.process)
    check_plan(job.evaluation, job.sampling, {"teacher": teacher, "student": new_student(job, teacher)})


def main(argv: Sequence[str]) -> int:
    from di4c_ext import report

    job = Run(argv)
    config = job.teacher_args.config(job.args)
    check(job, config)
    checkpoints.claim(
        job.output, STORED, resume=job.options.resuming(job.args), overwrite=job.options.overwrite_output_dir
    )
    checkpoints.write_text(job.output / STORED, as_yaml(job.settings))
    if job.vq is not None:
        save_vq(job.vq, job.output / VQ_FOLDER)
    try:
        with job.phase("teacher"):
            teacher, origin, teacher_folder = get_teacher(job, config)
        with job.phase("student"):
            student = train_student(job, teacher)
        with job.phase("evaluation"):
            results = evaluate(job, teacher, student)
    except Interrupted as stop:
        print(stop)
        return 130
    except KeyboardInterrupt:
        print(f"\nstopped; go on with:\n  {job.again}")
        return 130
    history = [{**line, "phase": "teacher"} for line in read_metrics(teacher_folder / "metrics.jsonl")]
    facts = report.Facts(
        settings=job.settings,
        results=results,
        history=history + read_metrics(job.metrics),
        teacher_origin=origin,
        seconds=job.seconds,
        images=job.pictures[0],
        num_parameters=student.num_parameters(),
        teacher_parameters=teacher.num_parameters(),
    )
    checkpoints.write_text(job.output / "evaluation.json", report.evaluation_json(facts))
    checkpoints.write_text(job.output / "README.md", report.model_card(facts))
    checkpoints.write_text(job.output / "report.html", report.page(facts))
    print(report.summary(facts))
    print(f"report: {(job.output / 'report.html').resolve()}")
    return 0


if __name__ == "__main__":
    run(main)
