"""Trains a product teacher on images, and keeps it for `di4c_ext.distill`.

    python -m di4c_ext.pretrain
    python -m di4c_ext.pretrain --dataset_name my_images/ --num_states 16 --image_size 8 --output_dir my_teacher
    python -m di4c_ext.pretrain --preset pixels_small --output_dir my_teacher

With absorbing diffusion it is the compact network, trained by its likelihood bound; with --process gaussian or uniform
the U-Net, trained by the cross-entropy of clean images given noised ones.

The teacher goes to --output_dir and to the cache (DI4C_CACHE, default ~/.cache/di4c_ext), under a name made of the
data, the settings and the versions it depends on; distill asks the cache before it trains one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from di4c_ext import checkpoints, data, random
from di4c_ext.arguments import DataArguments, RunArguments, as_yaml, parse, read_stored, run
from di4c_ext.augment import MIRROR, augment_images, flip_images
from di4c_ext.config import PretrainConfig
from di4c_ext.models.base import MixtureDenoiser
from di4c_ext.systems import process_of
from di4c_ext.teachers import bounds, bounds_name, cached_teacher, new_teacher, num_measured
from di4c_ext.trainer import Augment, PretrainTrainer

STORED = "pretrain_config.yaml"


class Interrupted(KeyboardInterrupt):
    """Training was stopped by ctrl-C and has saved a checkpoint."""


def train_teacher(
    train: data.ImageTokens,
    config: PretrainConfig,
    process: Mapping[str, Any],
    *,
    resume: str | None = None,
    again: str = "",
) -> MixtureDenoiser:
    """Trains a teacher into config.output_dir and the cache; returns the moving average, in evaluation mode.

    process: by name and constants. resume: a checkpoint folder. again: the command that goes on after ctrl-C, for the
    message of Interrupted.
    """
    model = new_teacher(train, config, process)
    trainer = PretrainTrainer(
        model,
        process=process_of(model.config),
        args=config,
        train_dataset=train,
        augment=augmentation(train, config.augment_share),
        time_min=config.time_min,
    )
    trainer.train(resume_from_checkpoint=resume)
    if trainer.interrupt.interrupted and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(stopped_message("teacher", trainer.state, again))
    teacher: MixtureDenoiser = trainer.best_model().eval()
    checkpoints.save_model(teacher, trainer.folder)
    files = [trainer.folder / name for name in (checkpoints.CONFIG, checkpoints.WEIGHTS, "metrics.jsonl")]
    checkpoints.keep_copy(files, cached_teacher(train, config, process))
    return teacher


def stopped_message(phase: str, state: Any, again: str) -> str:
    """What a run says when ctrl-C ended it."""
    return f"stopped after step {state.global_step} of {state.max_steps} ({phase}), all saved; go on with:\n  {again}"


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
        description="Train a product teacher on images.",
    )
    train, heldout = data.split(images.load(), images.heldout_fraction)
    process = images.process_settings()
    new_teacher(train, args, process)  # refuses bad settings before anything is written
    output = Path(args.output_dir)
    checkpoints.claim(output, STORED, resume=options.resuming(args), overwrite=options.overwrite_output_dir)
    checkpoints.write_text(output / STORED, as_yaml(settings))
    again = f"python -m di4c_ext.pretrain --resume --output_dir {output}"
    try:
        teacher = train_teacher(train, args, process, resume=options.checkpoint(args), again=again)
    except Interrupted as stop:
        print(stop)
        return 130
    found = bounds(teacher, train, heldout, args.time_min)
    counts = [num_measured(teacher.config, images) for images in (train, heldout)]
    print(
        f"teacher in {output}, and in the cache {cached_teacher(train, args, process)}\n"
        f"{bounds_name(teacher.config, args.time_min)}: {found['train']:.1f} on {counts[0]} training images, "
        f"{found['heldout']:.1f} on {counts[1]} held-out ones"
    )
    return 0


if __name__ == "__main__":
    run(main)
