"""Draws images from a saved teacher or student.

    python -m di4c_ext.sample --model runs/digits --num_steps 4 --num_samples 64 --seed 0
    python -m di4c_ext.sample --model runs/pixels --num_steps 10 --teacher runs/pixels/teacher --hybrid 2
    python -m di4c_ext.sample --model runs/tokens --num_steps 4 --labels 0 3 9 --class_guidance 2

Networks of image tokens are told of a class each, and their codes become pictures by the VQ model of the run; the grid
has a row for each class then, and beside the array `images` are `codes` and `labels`.

Writes a grid (.png, of the first 256) and the states (.npz, array `images`). Image i is a function of the model, its
options, the number of steps, the seed and i: not of the batch size, nor of how many are asked for.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from di4c_ext import checkpoints, pictures
from di4c_ext.arguments import UsageError, parse, run
from di4c_ext.codes import Decoder, vq_beside
from di4c_ext.data import Layout, as_images
from di4c_ext.evaluate import open_pair
from di4c_ext.generate import SamplingArguments, check_sampling, generate
from di4c_ext.systems import image_shape_of, layout_of, num_classes_of

SHOWN = 256  # images in the grid at most
ROW = 16  # images side by side in a grid by classes


@dataclass
class SampleArguments:
    """What to draw, and where to put it."""

    model: str = field(default="runs/digits", metadata={"help": "folder of a teacher or student"})
    teacher: str | None = field(
        default=None, metadata={"help": "folder of the student's teacher, for --hybrid, --guidance, --teacher_guides"}
    )
    num_steps: int = field(default=4, metadata={"help": "sampling steps, one call of the network each"})
    num_samples: int = field(default=64, metadata={"help": "images"})
    seed: int = field(default=0, metadata={"help": "same seed, same images"})
    batch_size: int = field(default=256, metadata={"help": "images at a time; changes none of them"})
    labels: list[int] | None = field(
        default=None, metadata={"help": "image tokens: classes that take turns; default: all"}
    )
    vq_model: str | None = field(
        default=None, metadata={"help": "image tokens: folder of the VQ model; default: that of the run"}
    )
    output: str | None = field(
        default=None, metadata={"help": "name without ending; default: samples/MODEL-STEPSsteps-seedSEED in --model"}
    )

    def __post_init__(self) -> None:
        for name in ("num_steps", "num_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")


def decoder_of(config: Any, args: SampleArguments) -> Decoder | None:
    """What makes pictures of a network's codes; None for one of pixels. ValueError for another VQ model's codes."""
    if config.model_type != "di4c_tokens":
        if args.vq_model is not None:
            raise UsageError(f"--vq_model {args.vq_model}: {args.model} is no network of codes; leave it out")
        return None
    vq: Any = vq_beside(args.model, args.vq_model)
    vq.check_denoiser(config)
    return Decoder(vq.to("cuda" if torch.cuda.is_available() else "cpu"))


def labels_of(config: Any, args: SampleArguments) -> Tensor | None:
    """The classes of the samples, those of --labels or all in turn; None for a network that takes none."""
    number = num_classes_of(config)
    if not number:
        if args.labels is not None:
            raise UsageError(f"--labels {args.labels}: {args.model} was trained without classes; leave them out")
        return None
    for label in args.labels or ():
        if not 0 <= label < number:
            raise UsageError(f"--labels {label}: the classes of {args.model} are 0..{number - 1}")
    turns = torch.tensor(args.labels or range(number))
    return turns[torch.arange(args.num_samples) % len(turns)]


def _save_picture(
    shown: Tensor, labels: Tensor | None, shape: tuple[int, ...], num_states: int, layout: Layout, file: Path
) -> None:
    """A square of images, or a row of them for each class."""
    scale = pictures.scale_for(shape)
    if labels is None:
        picture = pictures.grid(shown, shape, num_states, max(1, round(len(shown) ** 0.5)), layout)
        return pictures.save(picture, file, scale=scale)
    kinds = labels[: len(shown)]
    rows = [(f"class {label}", shown[kinds == label]) for label in kinds.unique().tolist()]
    picture = pictures.labelled_grid(rows, shape, num_states, columns=ROW, layout=layout, scale=scale)
    pictures.save(picture, file, scale=1)


def main(argv: Sequence[str]) -> int:
    (args, options), _ = parse(
        "sample",
        [SampleArguments, SamplingArguments],
        argv,
        description="Draw images from a saved teacher or student.",
    )
    if args.teacher is not None and not options.wants_teacher:
        raise UsageError(f"--teacher {args.teacher}: is for --hybrid or --guidance; give one of them, or leave it out")
    models = open_pair(args.model, args.teacher)
    kind, model = list(models.items())[-1]
    teacher = models["teacher"] if len(models) == 2 else None
    check_sampling(model, args.num_steps, teacher=teacher, options=options)
    config = model.config
    shape, layout, num_states = image_shape_of(config), layout_of(config), config.num_states
    decoder = decoder_of(config, args)
    if decoder is not None:
        shape, num_states = decoder.shape, decoder.num_states
    labels = labels_of(config, args)
    name = f"hybrid{options.hybrid}" if options.hybrid else kind
    if options.guidance is not None:
        name = f"guided{options.guidance:g}"
    start = time.perf_counter()
    tokens = generate(
        model,
        args.num_steps,
        args.num_samples,
        seed=args.seed,
        batch_size=args.batch_size,
        teacher=teacher,
        options=options,
        labels=labels,
    )
    codes = tokens
    if decoder is not None:
        tokens = decoder(codes)
    seconds = time.perf_counter() - start
    default = Path(args.model) / "samples" / f"{name}-{args.num_steps}steps-seed{args.seed}"
    stem = Path(args.output) if args.output is not None else default
    image_file, array_file = stem.with_name(stem.name + ".png"), stem.with_name(stem.name + ".npz")
    _save_picture(tokens[:SHOWN], labels, shape, num_states, layout, image_file)
    told: dict[str, Any] = {} if decoder is None else {"codes": codes.numpy()}
    told |= {} if labels is None else {"labels": labels.numpy()}
    with checkpoints.whole_file(array_file) as staging, open(staging, "wb") as handle:
        np.savez_compressed(
            handle,
            images=as_images(tokens, shape, layout).numpy().astype(np.uint8 if num_states <= 256 else np.int32),
            num_steps=args.num_steps,
            seed=args.seed,
            **told,
        )
    print(f"{len(tokens)} images in {args.num_steps} steps, {seconds:.2f} s ({name})\n{image_file}\n{array_file}")
    return 0


if __name__ == "__main__":
    run(main)
