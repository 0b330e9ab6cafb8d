"""Trains a masked-diffusion teacher on images, and keeps it for `di4c_ext.distill`.

    python -m di4c_ext.pretrain
    python -m di4c_ext.pretrain --dataset_name my_images/ --num_states 16 --image_size 8 --output_dir my_teacher

The teacher goes to --output_dir and to the cache (DI4C_CACHE, default ~/.cache/di4c_ext), under a name made of the
data, the settings and the versions it depends on; distill asks the cache before it trains one.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

import di4c_ext
from di4c_ext import checkpoints, data, random
from di4c_ext.arguments import DataArguments, RunArguments, as_yaml, nearest, parse, read_stored, run
from di4c_ext.augment import AUGMENTATION_DIM, MIRROR, augment_images, flip_images
from di4c_ext.config import KeyedConfig
from di4c_ext.metrics.likelihood import mean_likelihood_bound
from di4c_ext.models import CompactConfig, CompactDenoiser
from di4c_ext.process import AbsorbingProcess
from di4c_ext.trainer import Augment, PretrainTrainer

STORED = "pretrain_config.yaml"
# The settings a teacher's weights depend on, beside its data; `distill` has each of them with `teacher_` in front.
RECIPE = (
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "adam_beta2",
    "max_grad_norm",
    "ema_decay",
    "augment_share",
    "model_config",
    "seed",
)
_EXAMPLE = "'{\"dropout\": 0.1}'"


class Interrupted(KeyboardInterrupt):
    """Training was stopped by ctrl-C and has saved a checkpoint."""


@dataclass
class PretrainConfig(KeyedConfig):
    """Settings of the teacher's training."""

    output_dir: str = field(default="runs/teacher", metadata={"help": "folder of the teacher and its checkpoints"})
    max_steps: int = field(default=2000, metadata={"help": "optimizer steps"})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "images per step and device"})
    ema_decay: float = field(default=0.999, metadata={"help": "moving average of the weights; 0: none"})
    model_config: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "JSON: settings of models.CompactConfig, e.g. '{\"hidden_size\": 256}'"}
    )

    def __post_init__(self) -> None:
        self.model_config = as_dict("model_config", self.model_config)
        if self.max_steps < 1:
            raise ValueError(f"--max_steps {self.max_steps}: must be at least 1")
        super().__post_init__()


def as_dict(flag: str, value: Any) -> dict[str, Any]:
    """The mapping in a JSON flag or YAML key; raises ValueError for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"--{flag} {value!r}: not JSON ({error}); write e.g. {_EXAMPLE}") from error
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"--{flag} {value!r}: write a mapping, e.g. {_EXAMPLE}")
    return dict(value or {})


def check_names(flag: str, settings: dict[str, Any], takes: Any, fixed: Sequence[str] = ()) -> None:
    """Raises ValueError for a setting that `takes` (a callable) has no argument for, or that `fixed` decides."""
    known = [name for name in inspect.signature(takes).parameters if name not in ("self", "kwargs", *fixed)]
    for name in settings:
        if name in fixed:
            raise ValueError(f"--{flag}: {name!r} follows from other settings; leave it out")
        if name not in known:
            raise ValueError(f"--{flag}: unknown setting {name!r}{nearest(name, known)}; known: {', '.join(known)}")


def new_teacher(train: data.ImageTokens, config: PretrainConfig, schedule: str) -> CompactDenoiser:
    """An untrained teacher for these images; its weights are a function of config.seed."""
    settings = as_dict("model_config", config.model_config)
    fixed = ("num_states", "length", "mask_id", "augmentation_dim", "schedule", "is_student")
    check_names("model_config", settings, CompactConfig.__init__, (*fixed, "latent_dim", "latent_hidden_size"))
    set_seed(config.seed)
    return CompactDenoiser(
        CompactConfig(
            num_states=train.num_states,
            length=train.length,
            augmentation_dim=AUGMENTATION_DIM if config.augment_share else 0,
            schedule=schedule,
            image_shape=list(train.shape),
            **settings,
        )
    )


def cached_teacher(train: data.ImageTokens, config: PretrainConfig, schedule: str) -> Path:
    """Where the cache keeps the teacher of these images and settings, whether it is there or not."""
    recipe = {name: str(getattr(config, name)) for name in RECIPE}
    versions = f"di4c_ext {di4c_ext.__version__} torch {torch.__version__}"
    key = hashlib.sha256(f"{train.fingerprint()} {schedule} {json.dumps(recipe)} {versions}".encode()).hexdigest()
    return checkpoints.cache_folder() / f"teacher-{key[:16]}"


def train_teacher(
    train: data.ImageTokens, config: PretrainConfig, schedule: str, *, resume: str | None = None, again: str = ""
) -> CompactDenoiser:
    """Trains a teacher into config.output_dir and the cache; returns the moving average, in evaluation mode.

    resume: a checkpoint folder. again: the command that goes on after ctrl-C, for the message of Interrupted.
    """
    model = new_teacher(train, config, schedule)
    augment = augmentation(train, config.augment_share)
    trainer = PretrainTrainer(
        model,
        process=AbsorbingProcess(train.num_states, schedule),
        args=config,
        train_dataset=train,
        augment=augment,
    )
    trainer.train(resume_from_checkpoint=resume)
    if trainer.interrupt.interrupted and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(stopped_message("teacher", trainer.state, again))
    teacher: CompactDenoiser = trainer.best_model().eval()
    checkpoints.save_model(teacher, trainer.folder)
    files = [trainer.folder / name for name in (checkpoints.CONFIG, checkpoints.WEIGHTS, "metrics.jsonl")]
    checkpoints.keep_copy(files, cached_teacher(train, config, schedule))
    return teacher


def stopped_message(phase: str, state: Any, again: str) -> str:
    """What a run says when ctrl-C ended it."""
    return f"stopped after step {state.global_step} of {state.max_steps} ({phase}), all saved; go on with:\n  {again}"


def load_teacher(folder: Path, train: data.ImageTokens) -> CompactDenoiser:
    """A teacher from disk, checked against the data; raises ValueError naming what does not fit."""
    checkpoints.check_model(folder)
    teacher: CompactDenoiser = CompactDenoiser.from_pretrained(folder, is_student=False)
    config = teacher.config
    if config.num_states != train.num_states:
        raise ValueError(
            f"teacher {folder}: has S = {config.num_states} states, the data {train.name!r} has {train.num_states}; "
            "give the teacher of this data, or data of its states (--num_states)"
        )
    if config.length != train.length:
        raise ValueError(
            f"teacher {folder}: has D = {config.length} positions, an image of {train.name!r} has {train.length} "
            f"({' x '.join(map(str, train.shape))}); give the teacher of this data, or data of its size (--image_size)"
        )
    return teacher.eval()


def bounds(teacher: CompactDenoiser, train: data.ImageTokens, heldout: data.ImageTokens) -> dict[str, float]:
    """The likelihood bound in nats an image, on the training and on the held-out images."""
    process = AbsorbingProcess(train.num_states, teacher.config.schedule)
    found = {}
    for name, images in (("train", train), ("heldout", heldout)):
        keys = random.keys(0, len(images), device=teacher.device)
        x_0 = images.tokens.long().to(teacher.device)
        found[name] = mean_likelihood_bound(teacher, process, x_0, keys, draws=4 if name == "train" else 16)
    return found


def augmentation(train: data.ImageTokens, share: float) -> Augment | None:
    """What training does to images: mirrors some if the data says so, alters a `share` of them; None for neither."""
    if not share and not train.horizontal_flip:
        return None
    if share and len(train.shape) != 2:
        raise ValueError(f"--augment_share {share}: works on grey images, these have shape {train.shape}; give 0")
    flip = partial(flip_images, shape=train.shape, layout=train.layout)
    size = train.shape[0], train.shape[1]
    alter = partial(augment_images, shape=size, num_states=train.num_states, share=share)

    def augment(x_0: Tensor, keys: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        own = random.fold_in(keys, 1)
        if train.horizontal_flip:
            x_0 = flip(x_0, random.fold_in(own, MIRROR))
        if not share:
            return x_0, {}
        altered, amounts = alter(x_0, own)
        return altered, {"augmentation": amounts}

    return augment


def _from_preset(preset: dict[str, Any]) -> dict[str, Any]:
    """A distillation preset's teacher: its `teacher_` keys without the prefix, and the keys of the data."""
    shared = {name: preset[name] for name in DataArguments.__dataclass_fields__ if name in preset}
    own = {key.removeprefix("teacher_"): value for key, value in preset.items() if key.startswith("teacher_")}
    return shared | own


def main(argv: Sequence[str]) -> int:
    (images, args, options), settings = parse(
        "pretrain",
        [DataArguments, PretrainConfig, RunArguments],
        argv,
        default_preset="digits",
        translate=_from_preset,
        stored=lambda early: read_stored(Path(early.output_dir or PretrainConfig.output_dir) / STORED),
        description="Train a masked-diffusion teacher on images.",
    )
    train, heldout = data.split(images.load(), images.heldout_fraction)
    new_teacher(train, args, images.schedule)  # refuses bad settings before anything is written
    output = Path(args.output_dir)
    checkpoints.claim(output, STORED, resume=options.resuming(args), overwrite=options.overwrite_output_dir)
    checkpoints.write_text(output / STORED, as_yaml(settings))
    again = f"python -m di4c_ext.pretrain --resume --output_dir {output}"
    try:
        teacher = train_teacher(train, args, images.schedule, resume=options.checkpoint(args), again=again)
    except Interrupted as stop:
        print(stop)
        return 130
    found = bounds(teacher, train, heldout)
    print(
        f"teacher in {output}, and in the cache {cached_teacher(train, args, images.schedule)}\n"
        f"likelihood bound in nats an image: {found['train']:.1f} on {len(train)} training images, "
        f"{found['heldout']:.1f} on {len(heldout)} held-out ones"
    )
    return 0


if __name__ == "__main__":
    run(main)
