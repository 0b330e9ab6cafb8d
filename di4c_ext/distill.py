"""Distils a product teacher into a few-step mixture student, samples both and writes a report.

    python -m di4c_ext.distill
    python -m di4c_ext.distill --num_latents 32 --output_dir my_run
    python -m di4c_ext.distill --preset pixels --dataset_name cifar-10-batches-py --teacher_model_name_or_path teacher
    python -m di4c_ext.distill --preset language_small --output_dir my_run
    python -m di4c_ext.distill --preset language --teacher_model_name_or_path kuleshov-group/mdlm-owt
    python -m di4c_ext.distill --stages sdtt di4c di4c2 --sdtt_rounds 3
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
from functools import partial
from pathlib import Path
from typing import Any

from transformers import set_seed

from di4c_ext import checkpoints, non_finite, processes, stages
from di4c_ext.arguments import DataArguments, RunArguments, as_dict, as_yaml, parse, read_stored, run, told_early
from di4c_ext.callbacks import append_metrics, read_metrics
from di4c_ext.codes import ImageCodes
from di4c_ext.config import TIME_MIN, DistillConfig, PretrainConfig
from di4c_ext.evaluate import EvaluationArguments, check_plan, compare, latent_use
from di4c_ext.generate import SamplingArguments
from di4c_ext.models.base import MixtureDenoiser
from di4c_ext.pretrain import Interrupted, teacher_trainer, train_teacher
from di4c_ext.process import Process
from di4c_ext.task import Named, Task, open_task
from di4c_ext.teachers import CODES_RECIPE, LEVELS_RECIPE, RECIPE
from di4c_ext.text_arguments import TextArguments
from di4c_ext.text_sources import has_cutter
from di4c_ext.text_teachers import is_masked_lm

STORED = "distill_config.yaml"
SHOWN = 64  # samples in a grid


@dataclass
class TeacherArguments:
    """A teacher to load, or the settings of its training (as in `di4c_ext.pretrain`, with `teacher_` in front)."""

    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "folder of a teacher, of text also a published file or a hub name; default: the cache, else it is "
            "trained"
        },
    )
    teacher_revision: str | None = field(
        default=None, metadata={"help": "text: revision of the teacher's repository of the hub"}
    )
    second_round: bool = field(
        default=False, metadata={"help": "text: the teacher may be a student, which the new student begins as"}
    )
    teacher_max_steps: int = field(default=2000, metadata={"help": "optimizer steps"})
    teacher_per_device_train_batch_size: int = field(default=64, metadata={"help": "examples per step and device"})
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
        default=None, metadata={"help": "JSON: settings of models.CompactConfig, UNetConfig, DiTConfig"}
    )
    teacher_seed: int = field(default=0, metadata={"help": "seed of the teacher's weights and training"})

    @property
    def named(self) -> Named | None:
        """The teacher that is named, None where the cache is asked, or it is trained."""
        source = self.teacher_model_name_or_path
        if source is not None:
            return Named(source, self.teacher_revision, self.second_round)
        if self.second_round or self.teacher_revision is not None:
            raise ValueError(
                "--second_round and --teacher_revision are of a teacher that is named: --teacher_model_name_or_path"
            )
        return None

    def config(self, student: DistillConfig) -> PretrainConfig:
        """The teacher's own training settings; device and precision are the student's."""
        recipe = {name: getattr(self, f"teacher_{name}") for name in (*RECIPE, *LEVELS_RECIPE, *CODES_RECIPE)}
        both = ("use_cpu", "bf16", "fp16", "disable_tqdm", "report_to", "channels_last")
        more = ("non_finite", "torch_compile", "torch_compile_backend", "torch_compile_mode")
        shared = {name: getattr(student, name) for name in (*both, *more)}
        config = PretrainConfig(output_dir=str(Path(str(student.output_dir)) / "teacher"), **recipe, **shared)
        config.shard, config.reshard = student.shard, student.reshard
        config.checkpoint_blocks = student.checkpoint_blocks
        return config


@dataclass
class StudentConfig(DistillConfig):
    """DistillConfig with what only the command needs."""

    max_steps: int = field(default=1000, metadata={"help": "optimizer steps"})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "examples per step and device"})
    ema_decay: float = field(default=0.99, metadata={"help": "moving average of the weights; 0: none"})
    student_model_config: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "JSON: latent_dim, dropout and what else from_teacher takes"}
    )
    lora_rank: int = field(
        default=0, metadata={"help": "masked language models: train adapters of this rank and the latent alone; 0: all"}
    )

    def __post_init__(self) -> None:
        self.student_model_config = as_dict("student_model_config", self.student_model_config)
        if self.max_steps < 1:
            raise ValueError(f"--max_steps {self.max_steps}: must be at least 1")
        if self.lora_rank < 0:
            raise ValueError(f"--lora_rank {self.lora_rank}: must be at least 0, e.g. 8")
        super().__post_init__()


def _without_vq(preset: dict[str, Any], teacher: str | None = None) -> dict[str, Any]:
    """A preset without what is said of the VQ model's training, which is another command's.

    teacher: the one that is named. One that has a tokenizer beside it has that, and the length it was trained on, in
    place of the preset's.
    """
    own = ("tokenizer_name", "block_size") if teacher is not None and has_cutter(teacher) else ()
    return {key: value for key, value in preset.items() if not key.startswith("vq_") and key not in own}


class Run:
    """One run: its task (the data, the networks, the judge), settings and folder, and the seconds each phase took."""

    def __init__(self, argv: Sequence[str]) -> None:
        names = ("modality", "teacher_model_name_or_path")
        early = told_early(argv, names, StudentConfig.output_dir, STORED)
        named = early.get("teacher_model_name_or_path")
        of_text = "masked_lm" if named is not None and is_masked_lm(named) else "language_small"
        made, self.settings = parse(
            "distill",
            [
                *(DataArguments, TextArguments, TeacherArguments, StudentConfig, stages.StageArguments),
                *(EvaluationArguments, SamplingArguments, RunArguments),
            ],
            argv,
            default_preset=of_text if early.get("modality") == "text" else "digits",
            translate=partial(_without_vq, teacher=named),
            stored=lambda early: read_stored(Path(early.output_dir or StudentConfig.output_dir) / STORED),
            description="Distil a product teacher into a few-step mixture student.",
        )
        images, text, self.teacher_args, self.args, staged, self.evaluation, self.sampling, self.options = made
        self.output = Path(str(self.args.output_dir))
        self.metrics = self.output / "metrics.jsonl"
        self.again = f"python -m di4c_ext.distill --resume --output_dir {self.output}"
        opened = partial(open_task, images, text, named=self.teacher_args.named, seed=self.args.seed)
        self.task: Task = processes.first_alone(partial(opened, kept=self.output if self.resuming else None))
        self.stages = stages.plan(staged, self.args)
        self.seconds: dict[str, float] = {}

    @property
    def resuming(self) -> bool:
        return self.options.resuming(self.args)

    @property
    def train(self) -> Any:
        """The training data, as the network takes them."""
        return self.task.train

    def process_of(self, config: Any) -> Process:
        """The process of a model of this config, with what this run says of a teacher's steps."""
        return self.task.process_of(config)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 1)


def get_teacher(job: Run, config: PretrainConfig) -> tuple[MixtureDenoiser, str, Path]:
    """The teacher, where it came from in words, and its folder; one not named by the user is kept in the output."""
    named = job.teacher_args.teacher_model_name_or_path
    if named is not None:
        return job.task.load_teacher(named), f"loaded from {named}", Path(named)
    working = Path(str(config.output_dir))
    origin = processes.on_first(lambda: _teacher_at_hand(job, working, job.task.cached_teacher(config)))
    if origin:
        return job.task.load_teacher(str(working)), origin, working
    resume = job.options.checkpoint(config, working) if job.resuming else None
    teacher = train_teacher(job.task, config, resume=resume, again=job.again)
    processes.on_first(lambda: checkpoints.keep_newest(working, 0))
    return teacher, "trained in this run", working


def _teacher_at_hand(job: Run, working: Path, cached: Path | None) -> str:
    """Where the teacher in `working` comes from, which may be the cache; "" where it is yet to be trained."""
    if job.resuming and (working / checkpoints.WEIGHTS).is_file():
        return "of the run that was resumed"
    if cached is None or not (cached / checkpoints.WEIGHTS).is_file():
        working.mkdir(exist_ok=True)
        return ""
    job.task.load_teacher(str(cached))  # refuses one that is damaged, by its name
    print(f"teacher: from the cache, {cached}")
    with checkpoints.whole_folder(working) as folder:
        shutil.copytree(cached, folder, dirs_exist_ok=True)
    return "from the cache"


def new_student(job: Run, teacher: MixtureDenoiser) -> MixtureDenoiser:
    """An untrained student of this teacher; ValueError for settings it cannot have."""
    set_seed(job.args.seed)
    settings = as_dict("student_model_config", job.args.student_model_config)
    if job.args.lora_rank:
        settings["lora"] = {"r": job.args.lora_rank, "lora_alpha": 2 * job.args.lora_rank}
    try:
        student = job.task.new_student(teacher, settings)
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
    return stages.train(
        job.stages,
        teacher,
        new_student=lambda teacher: new_student(job, teacher),
        process_of=job.process_of,
        train_dataset=job.train,
        augment=job.task.augment(job.args.augment_share),
        metrics_file=job.metrics,
        options=job.options,
        again=job.again,
        save_beside=job.task.save_with_model,
    )


def evaluate(job: Run, teacher: MixtureDenoiser, student: MixtureDenoiser) -> dict[str, Any]:
    """All figures of the report; each also becomes a line of metrics.jsonl, and the first seed's samples a file."""
    student.to(job.args.device)
    teacher.to(job.args.device)
    judge = job.task.open_judge(job.evaluation)
    kept = [line for line in read_metrics(job.metrics) if line.get("phase") != "evaluation"]
    checkpoints.write_text(job.metrics, "".join(json.dumps(line) + "\n" for line in kept))
    rows: list[dict[str, Any]] = []
    shown: dict[tuple[str, int], Any] = {}
    models = {"teacher": teacher, "student": student}
    for row, samples in compare(models, judge, job.evaluation, SHOWN, job.sampling, job.task.drawing):
        rows.append(row)
        append_metrics(job.metrics, {"phase": "evaluation", **row})
        if row["seed"] == job.evaluation.eval_seeds[0]:
            stem = job.output / "samples" / f"{row['model']}-{row['num_steps']:03d}steps"
            shown[row["model"], row["num_steps"]] = job.task.save_samples(samples, student.config, stem)
    return {
        "rows": rows,
        "grids": shown,
        "floors": judge.floors,
        "sizes": judge.sizes,
        **job.task.about(judge),
        **job.task.bounds(teacher, job.teacher_args.teacher_time_min),
        "latents": latent_use(student, job.task.heldout, job.args.num_latents),
    }


def check(job: Run, config: PretrainConfig) -> None:
    """Refuses bad settings before anything is written, on an untrained teacher or the one that was named."""
    named = job.teacher_args.teacher_model_name_or_path
    teacher = job.task.new_teacher(config) if named is None else job.task.load_teacher(named)
    student = new_student(job, teacher)
    for stage in job.stages:
        if stage.args.by_few_steps and not getattr(student.config, "has_chain", False):
            raise ValueError(
                f"--few_step_counts {stage.args.few_step_counts}: is for a student of the diffusion transformer whose "
                'latent is a chain; give --student_model_config \'{"latent_form": "chain"}\', or --few_step_counts 0'
            )
    check_plan(job.evaluation, job.sampling, {"teacher": teacher, "student": student})
    stages.check(job.stages, job.process_of(teacher.config), from_mixture=teacher.config.is_student)


def _replay(job: Run, config: PretrainConfig, file: Path) -> int:
    """--replay: the loss of a batch that was kept, again; nothing is written."""
    if non_finite.phase_of(file) == "teacher":
        print(teacher_trainer(job.task, config).replay(file))
        return 0
    named = job.teacher_args.teacher_model_name_or_path or str(Path(str(config.output_dir)))
    train_student(job, job.task.load_teacher(named))
    return 0


def _claim(job: Run) -> None:
    checkpoints.claim(job.output, STORED, resume=job.resuming, overwrite=job.options.overwrite_output_dir)
    checkpoints.write_text(job.output / STORED, as_yaml(job.settings))
    job.task.save_once(job.output)


def main(argv: Sequence[str]) -> int:
    from di4c_ext import report

    job = Run(argv)
    config = job.teacher_args.config(job.args)
    if job.options.replay is not None:
        return _replay(job, config, Path(job.options.replay))
    check(job, config)
    processes.on_first(lambda: _claim(job))
    try:
        with job.phase("teacher"):
            teacher, origin, teacher_folder = get_teacher(job, config)
        with job.phase("student"):
            student = train_student(job, teacher)
        if not processes.is_first():
            return 0  # one measures and reports
        with job.phase("evaluation"):
            results = evaluate(job, teacher, student)
    except Interrupted as stop:
        processes.say(stop)
        return 130
    except KeyboardInterrupt:
        processes.say(f"\nstopped; go on with:\n  {job.again}")
        return 130
    history = [{**line, "phase": "teacher"} for line in read_metrics(teacher_folder / "metrics.jsonl")]
    facts = report.Facts(
        settings=job.settings,
        results=results,
        history=history + read_metrics(job.metrics),
        teacher_origin=origin,
        seconds=job.seconds,
        images=job.task.shown,
        num_parameters=student.num_parameters(),
        teacher_parameters=teacher.num_parameters(),
        codes=job.train if isinstance(job.train, ImageCodes) else None,
    )
    checkpoints.write_text(job.output / "evaluation.json", report.evaluation_json(facts))
    checkpoints.write_text(job.output / "README.md", report.model_card(facts))
    checkpoints.write_text(job.output / "report.html", report.page(facts))
    print(report.summary(facts))
    print(f"report: {(job.output / 'report.html').resolve()}")
    return 0


if __name__ == "__main__":
    run(main)
