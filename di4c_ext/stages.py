"""Training in stages, each one's student the next one's teacher: teacher -> SDTT -> Di4C -> Di4C^2 as one run.

    stages: [sdtt, di4c, di4c2]            # in a --config file, or --stages sdtt di4c di4c2
    stage_config: {sdtt: {max_steps: 10000, learning_rate: 3.0e-4}, di4c2: {max_steps: 20000}}
    sdtt_rounds: 3

sdtt   rounds of self-distillation through time (`sdtt`): product students of fewer and fewer steps
di4c   the mixture student of a product teacher (`loss`)
di4c2  a second round: the student of a mixture, from whose weights and latents it starts

Every stage trains by the run's settings and those that stage_config gives it on top, with an optimizer of its own. A
finished stage leaves its student in OUTPUT/stages/NAME; the last one's is the run's own and lies in OUTPUT.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from di4c_ext import checkpoints, non_finite, processes
from di4c_ext.arguments import Parser, RunArguments, UsageError, as_dict
from di4c_ext.config import DistillConfig
from di4c_ext.models import adapters
from di4c_ext.models.base import MixtureDenoiser
from di4c_ext.names import nearest
from di4c_ext.pretrain import Interrupted, stopped_message
from di4c_ext.process import Process
from di4c_ext.sdtt import SDTTObjective
from di4c_ext.systems import latents_of, load_model
from di4c_ext.trainer import Augment, DistillTrainer

FOLDER = "stages"  # in the output folder
KINDS = ("sdtt", "di4c", "di4c2")  # in the order they are for
# No stage's own: of the run, or of the one student that is made anew.
_RUNS = ("output_dir", "resume_from_checkpoint", "fsdp", "fsdp_config", "activation_checkpointing")
_STUDENTS = ("student_model_config", "lora_rank")


@dataclass
class StageArguments:
    """Which stages a student is trained in."""

    stages: list[str] = field(
        default_factory=lambda: ["di4c"], metadata={"help": "one after the other: sdtt, di4c, di4c2; default: di4c"}
    )
    stage_config: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'JSON: settings of stages, e.g. \'{"sdtt": {"max_steps": 100}}\''}
    )
    sdtt_rounds: int = field(default=1, metadata={"help": "rounds of stage sdtt"})
    sdtt_num_steps: int = field(default=2, metadata={"help": "steps of the teacher that the student does in one"})
    sdtt_step: float = field(default=1 / 1024, metadata={"help": "length of the first teacher's step"})
    sdtt_divergence: str = field(default="reverse_kl", metadata={"help": "reverse_kl, kl, tv or mse"})

    def __post_init__(self) -> None:
        self.stage_config = as_dict("stage_config", self.stage_config)
        shown = " ".join(self.stages)
        for kind in self.stages:
            if kind not in KINDS:
                known = ", ".join(KINDS)
                raise ValueError(f"--stages {shown}: {kind!r} must be one of {known}{nearest(kind, KINDS)}")
        if [kind for kind in KINDS if kind in self.stages] != self.stages:
            raise ValueError(f"--stages {shown}: each at most once, and in the order {' '.join(KINDS)}")
        if not {"di4c"} <= set(self.stages):
            raise ValueError(f"--stages {shown}: di4c must be among them, it makes the mixture that a run ends with")
        if self.sdtt_rounds < 1:
            raise ValueError(f"--sdtt_rounds {self.sdtt_rounds}: must be at least 1")
        for name, settings in self.stage_config.items():
            if name not in self.stages:
                raise ValueError(f"--stage_config: {name!r} is none of --stages {shown}{nearest(name, self.stages)}")
            if not isinstance(settings, Mapping):
                raise ValueError(f"--stage_config: {name!r} must be a mapping of settings, got {settings!r}")


@dataclass(frozen=True)
class Stage:
    """One training. objective: None for that of `args`, Di4C's."""

    name: str  # of its folder and of its lines in metrics.jsonl
    kind: str
    args: DistillConfig
    objective: SDTTObjective | None

    @property
    def folder(self) -> Path:
        return Path(str(self.args.output_dir))


def plan(told: StageArguments, config: DistillConfig) -> list[Stage]:
    """The trainings of a run of these settings, a round of sdtt each one of its own; the last has the run's folder.

    Raises ValueError for settings that a stage cannot have, or does not know.
    """
    rounds = told.sdtt_rounds
    every = [
        (f"{kind}-{number + 1}" if kind == "sdtt" and rounds > 1 else kind, kind, number)
        for kind in told.stages
        for number in range(rounds if kind == "sdtt" else 1)
    ]
    found = []
    for i, (name, kind, number) in enumerate(every):
        changes = _converted(type(config), as_dict("stage_config", told.stage_config).get(kind, {}), kind)
        if kind == "sdtt":  # what is Di4C's alone
            changes = {"base_learning_rate": None, "consistency_target": "student"} | changes
        if i < len(every) - 1:
            changes["output_dir"] = str(Path(str(config.output_dir)) / FOLDER / name)
        try:
            # Noise is a function of the seed and the step: stages should not share it.
            args = config.changed(**{"seed": config.seed + i} | changes)
            objective = _sdtt(told, args, number) if kind == "sdtt" else None
        except (ValueError, TypeError) as error:
            raise ValueError(f"stage {kind}: {error}") from error
        found.append(Stage(name, kind, args, objective))
    return found


def check(stages: Sequence[Stage], process: Process, *, from_mixture: bool = False) -> None:
    """Raises ValueError for a stage that this process or the first teacher, if a mixture, leaves without a meaning."""
    for stage in stages:
        if stage.kind == "sdtt" and (getattr(process, "mask_id", None) is None or from_mixture):
            why = "the teacher is a mixture" if from_mixture else f"{process!r} has no masks"
            raise ValueError(f"--stages sdtt: is for a product teacher of masked diffusion, {why}; leave it out")
        rank: int = getattr(stage.args, "lora_rank", 0)
        if stage.kind == "sdtt" and rank:
            raise ValueError(
                "--stages sdtt: trains all weights of a product student, which has no adapters, got --lora_rank "
                f"{rank}; leave one of both out"
            )
        if stage.kind == "di4c" and not from_mixture:
            continue
        if getattr(process, "guidance", 0.0):
            raise ValueError(f"stage {stage.kind}: its teacher cannot be guided; give guidance 0")
        if stage.kind == "sdtt":
            continue
        if stage.args.distillation_rows:
            settings = json.dumps({stage.kind: {"distillation_rows": 0}})
            raise ValueError(
                f"stage {stage.kind}: distillation_rows are for a product teacher, this one's is a mixture, got "
                f"{stage.args.distillation_rows}; give --stage_config '{settings}'"
            )


def train(
    stages: Sequence[Stage],
    teacher: MixtureDenoiser,
    *,
    new_student: Callable[[MixtureDenoiser], MixtureDenoiser],
    process_of: Callable[[Any], Process],
    train_dataset: Any,
    metrics_file: Path,
    options: RunArguments,
    again: str,
    augment: Augment | None = None,
    load: Callable[[Path], MixtureDenoiser] = load_model,
    save_beside: Callable[[Path], object] | None = None,
) -> MixtureDenoiser:
    """The last stage's student (its moving average), every stage trained, resumed or, where it is done, loaded.

    new_student: of a product teacher, with the run's settings. process_of: of a config. options: whether the run is
    resumed, or only a batch of its next stage computed again (--replay). again: the command that goes on. save_beside:
    what else a model's folder needs. Raises Interrupted.
    """
    for stage in stages:
        is_last = stage is stages[-1]
        resuming = options.resuming(stage.args)
        if resuming and not is_last and (stage.folder / checkpoints.WEIGHTS).is_file():
            teacher = load(stage.folder)
            processes.say(f"stage {stage.name}: done, from {stage.folder}")
            continue
        keep = stage.kind == "sdtt" or teacher.config.is_student
        student: Any = trainable_copy(teacher) if keep else new_student(teacher)
        has_teacher_inside = not keep and getattr(student.config, "lora", None) is not None
        trainer = DistillTrainer(
            student,
            teacher=student.teacher_denoiser() if has_teacher_inside else teacher,
            latents=latents_of(student.config),
            teacher_latents=latents_of(teacher.config),
            objective=stage.objective,
            augment=augment,
            process=process_of(student.config),
            args=stage.args,
            train_dataset=train_dataset,
            metrics_file=metrics_file,
            phase="student" if is_last else stage.name,
        )
        if options.replay is not None:
            if non_finite.phase_of(options.replay) != trainer.phase:
                raise ValueError(
                    f"--replay {options.replay}: is of {non_finite.phase_of(options.replay)!r}, the next stage of this "
                    f"run is {trainer.phase!r}; name the file of that one"
                )
            print(trainer.replay(Path(options.replay)))
            return student
        trainer.train(resume_from_checkpoint=options.checkpoint(stage.args, None if is_last else stage.folder))
        if trainer.interrupt.interrupted and trainer.state.global_step < trainer.state.max_steps:
            raise Interrupted(stopped_message("student" if is_last else stage.name, trainer.state, again))
        teacher = trainer.best_model().eval()
        stage.folder.mkdir(parents=True, exist_ok=True)
        processes.on_first(partial(_keep, teacher, stage.folder, save_beside, is_last))
    return teacher


def _keep(model: MixtureDenoiser, folder: Path, save_beside: Callable[[Path], object] | None, is_last: bool) -> None:
    """A finished stage's student into its folder, in place of the checkpoints of a stage that others follow."""
    if save_beside is not None:
        save_beside(folder)
    checkpoints.save_model(model, folder)
    if not is_last:
        checkpoints.keep_newest(folder, 0)


def trainable_copy(model: MixtureDenoiser) -> MixtureDenoiser:
    """A copy to train on: all its weights or, where it has adapters, these and the latent's path alone."""
    student: Any = copy.deepcopy(model)
    for parameter in student.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    if getattr(student.config, "lora", None) is not None:
        adapters.train_only_adapters(student.backbone)
    made: MixtureDenoiser = student
    return made


def _sdtt(told: StageArguments, args: DistillConfig, number: int) -> SDTTObjective:
    return SDTTObjective(
        num_steps=told.sdtt_num_steps,
        step=told.sdtt_step,
        divergence=told.sdtt_divergence,  # type: ignore[arg-type]  # checked there
        time_grid=args.time_grid,
        time_min=args.time_min,
    ).round(number)


def _converted(kind: type[DistillConfig], settings: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """A stage's settings as their flags would be read: in YAML 3e-4 is a word."""
    parser = Parser([kind])
    known = [name for name in parser.known() if name not in (*_RUNS, *_STUDENTS)]
    words = []
    for name, value in settings.items():
        if name not in known:
            raise UsageError(f"--stage_config: stage {stage} has no setting {name!r} of its own{nearest(name, known)}")
        words.append(f"--{name}={json.dumps(value) if isinstance(value, dict | bool) else value}")
    given = parser.parse_args(words)
    return {name: getattr(given, name) for name in settings}
