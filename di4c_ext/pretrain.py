"""Trains a product teacher on images, and keeps it for `di4c_ext.distill`.

    python -m di4c_ext.pretrain
    python -m di4c_ext.pretrain --dataset_name my_images/ --num_states 16 --image_size 8 --output_dir my_teacher
    python -m di4c_ext.pretrain --preset pixels_small --output_dir my_teacher
    python -m di4c_ext.pretrain --preset tokens_small --kind vq --output_dir my_vq
    python -m di4c_ext.pretrain --preset tokens_small --vq_model my_vq --output_dir my_teacher

With absorbing diffusion it is the compact network, trained by its likelihood bound; with --process gaussian or uniform
the U-Net, trained by the cross-entropy of clean images given noised ones; with
--process confidence the transformer of image tokens, by the likelihood bound of the codes that a VQ model makes of the
images. --kind vq trains such a VQ model, --kind codes only makes and keeps the codes, which else is done on first use.

The teacher goes to --output_dir and to the cache (DI4C_CACHE, default ~/.cache/di4c_ext), under a name made of the
data, the settings and the versions it depends on; distill asks the cache before it trains one.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from di4c_ext import checkpoints, data, random
from di4c_ext.arguments import DataArguments, RunArguments, as_yaml, parse, read_stored, read_yaml, run
from di4c_ext.augment import MIRROR, augment_images, flip_images
from di4c_ext.codes import VQ_FOLDER, codes_of, open_vq, usage
from di4c_ext.config import PretrainConfig
from di4c_ext.models import VQModel
from di4c_ext.models.base import MixtureDenoiser
from di4c_ext.systems import process_of
from di4c_ext.teachers import bounds, bounds_name, cached_teacher, new_teacher, num_measured
from di4c_ext.trainer import Augment, PretrainTrainer
from di4c_ext.vq import VQArguments, VQTrainer, new_vq, reconstructions, save_vq

STORED = "pretrain_config.yaml"
KINDS = ("teacher", "vq", "codes")


@dataclass
class KindArguments:
    """What is trained, or made."""

    kind: str = field(default="teacher", metadata={"help": "teacher, vq (an autoencoder to codes), or codes"})

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"--kind {self.kind!r}: must be one of {', '.join(KINDS)}")


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


def _from_preset(kind: str, preset: dict[str, Any]) -> dict[str, Any]:
    """A distillation preset's teacher: its `teacher_` keys without the prefix, and the keys of the data; or its VQ
    model, by `vq_` in the place of `teacher_`."""
    shared = {name: preset[name] for name in DataArguments.__dataclass_fields__ if name in preset}
    prefix = "vq_" if kind == "vq" else "teacher_"
    own = {key.removeprefix(prefix): value for key, value in preset.items() if key.startswith(prefix)}
    return shared | own


def _kind(argv: Sequence[str]) -> str:
    """The --kind that flags, a --config file or the run to resume name: which keys of a preset are meant."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--kind", "--config", "--output_dir"):
        early.add_argument(name)
    early.add_argument("--resume", "--resume_from_checkpoint", nargs="?", const="true")
    given, _ = early.parse_known_args(list(argv))
    told: list[Any] = [given.kind]
    if given.config is not None:
        told.append(read_yaml(Path(given.config)).get("kind"))
    if given.resume not in (None, "false", "False"):
        told.append(read_stored(Path(given.output_dir or PretrainConfig.output_dir) / STORED).get("kind"))
    return next((str(kind) for kind in told if kind is not None), "teacher")


@dataclass(frozen=True)
class Loaded:
    """The images in pixels, as the process's network takes them, and the VQ model that made codes of them, if any."""

    pixels: data.ImageTokens
    tokens: data.ImageTokens
    vq: VQModel | None = None


def load_tokens(images: DataArguments, vq_model: Path | None = None) -> Loaded:
    """The images that the arguments name, and their codes where the process is one of codes.

    vq_model: a folder in place of the one that the arguments name. Codes are made on first use and kept in the cache.
    """
    loaded, named = images.load(), vq_model or images.vq_model
    if images.process != "confidence":
        if named is not None:
            raise ValueError(f"--vq_model {named}: is for --process confidence, this is {images.process}; leave it out")
        return Loaded(loaded, loaded)
    if named is None:
        raise ValueError(
            "--process confidence: works on the codes of a VQ model; train one by "
            "`python -m di4c_ext.pretrain --kind vq` and name its folder by --vq_model"
        )
    vq: Any = open_vq(named)
    vq = vq.to("cuda" if torch.cuda.is_available() else "cpu")
    return Loaded(loaded, codes_of(loaded, vq, checkpoints.cache_folder()), vq)


def make_codes(images: DataArguments) -> int:
    """--kind codes: the images' codes into the cache."""
    images.process, images.process_config = "confidence", {}
    made = load_tokens(images).tokens
    found = usage(made.tokens, made.num_states)
    print(
        f"{len(made)} images of {made.name!r} as {' x '.join(map(str, made.shape))} codes, in the cache "
        f"{checkpoints.cache_folder()}\n{found['codes_used']:.0f} of {made.num_states} codes used, "
        f"perplexity {found['perplexity']:.1f}"
    )
    return 0


def train_autoencoder(
    images: DataArguments, args: PretrainConfig, vq: VQArguments, options: RunArguments, settings: dict[str, Any]
) -> int:
    """--kind vq: a VQ model into --output_dir, with a picture of held-out images and what their codes give back."""
    train, heldout = data.split(images.load(), images.heldout_fraction)
    new_vq(train, args)  # refuses bad settings before anything is written
    output = Path(str(args.output_dir))
    checkpoints.claim(output, STORED, resume=options.resuming(args), overwrite=options.overwrite_output_dir)
    checkpoints.write_text(output / STORED, as_yaml(settings))
    trainer = VQTrainer(new_vq(train, args), images=train, vq=vq, augment=augmentation(train, 0.0), args=args)
    trainer.train(resume_from_checkpoint=options.checkpoint(args))
    if trainer.interrupt.interrupted and trainer.state.global_step < trainer.state.max_steps:
        print(stopped_message("vq", trainer.state, f"python -m di4c_ext.pretrain --resume --output_dir {output}"))
        return 130
    model: Any = trainer.best_model().eval()
    checkpoints.save_model(model, output)
    file = output / "samples" / "reconstructions.png"
    found = reconstructions(model, heldout, file)
    print(
        f"VQ model in {output}: images of {' x '.join(map(str, train.shape))} as "
        f"{' x '.join(map(str, model.config.grid))} codes\n{file}\n"
        f"held-out images come back within {found['error']:.4f} of the range of a pixel, "
        f"{found['codes_used']:.0f} of {model.config.num_codes} codes used, perplexity {found['perplexity']:.1f}"
    )
    return 0


def main(argv: Sequence[str]) -> int:
    (images, args, kind, vq, options), settings = parse(
        "pretrain",
        [DataArguments, PretrainConfig, KindArguments, VQArguments, RunArguments],
        argv,
        default_preset="digits",
        translate=partial(_from_preset, _kind(argv)),
        stored=lambda early: read_stored(Path(early.output_dir or PretrainConfig.output_dir) / STORED),
        description="Train a product teacher on images, or a VQ autoencoder that makes codes of them.",
    )
    if kind.kind == "codes":
        return make_codes(images)
    if kind.kind == "vq":
        return train_autoencoder(images, args, vq, options, settings)
    loaded = load_tokens(images)
    train, heldout = data.split(loaded.tokens, images.heldout_fraction)
    process = images.process_settings()
    new_teacher(train, args, process)  # refuses bad settings before anything is written
    output = Path(args.output_dir)
    checkpoints.claim(output, STORED, resume=options.resuming(args), overwrite=options.overwrite_output_dir)
    checkpoints.write_text(output / STORED, as_yaml(settings))
    if loaded.vq is not None:
        save_vq(loaded.vq, output / VQ_FOLDER)
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
