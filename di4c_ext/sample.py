"""Draws images from a saved teacher or student.

    python -m di4c_ext.sample --model runs/digits --num_steps 4 --num_samples 64 --seed 0
    python -m di4c_ext.sample --model runs/pixels --num_steps 10 --teacher runs/pixels/teacher --hybrid 2

Writes a grid (.png, of the first 256) and the states (.npz, array `images`). Image i is a function of the model, its
options, the number of steps, the seed and i: not of the batch size, nor of how many are asked for.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from di4c_ext import checkpoints, pictures
from di4c_ext.arguments import UsageError, parse, run
from di4c_ext.data import as_images
from di4c_ext.evaluate import open_pair
from di4c_ext.generate import SamplingArguments, check_sampling, generate
from di4c_ext.systems import image_shape_of, layout_of

SHOWN = 256  # images in the grid at most


@dataclass
class SampleArguments:
    """What to draw, and where to put it."""

    model: str = field(default="runs/digits", metadata={"help": "folder of a teacher or student"})
    teacher: str | None = field(
        default=None, metadata={"help": "folder of the student's teacher, for --hybrid and --guidance"}
    )
    num_steps: int = field(default=4, metadata={"help": "sampling steps, one call of the network each"})
    num_samples: int = field(default=64, metadata={"help": "images"})
    seed: int = field(default=0, metadata={"help": "same seed, same images"})
    batch_size: int = field(default=256, metadata={"help": "images at a time; changes none of them"})
    output: str | None = field(
        default=None, metadata={"help": "name without ending; default: samples/MODEL-STEPSsteps-seedSEED in --model"}
    )

    def __post_init__(self) -> None:
        for name in ("num_steps", "num_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")


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
    shape, layout = image_shape_of(config), layout_of(config)
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
    )
    seconds = time.perf_counter() - start
    default = Path(args.model) / "samples" / f"{name}-{args.num_steps}steps-seed{args.seed}"
    stem = Path(args.output) if args.output is not None else default
    image_file, array_file = stem.with_name(stem.name + ".png"), stem.with_name(stem.name + ".npz")
    shown = tokens[:SHOWN]
    picture = pictures.grid(shown, shape, config.num_states, max(1, round(len(shown) ** 0.5)), layout)
    pictures.save(picture, image_file, scale=pictures.scale_for(shape))
    with checkpoints.whole_file(array_file) as staging, open(staging, "wb") as handle:
        np.savez_compressed(
            handle,
            images=as_images(tokens, shape, layout).numpy().astype(np.uint8 if config.num_states <= 256 else np.int32),
            num_steps=args.num_steps,
            seed=args.seed,
        )
    print(f"{len(tokens)} images in {args.num_steps} steps, {seconds:.2f} s ({name})\n{image_file}\n{array_file}")
    return 0


if __name__ == "__main__":
    run(main)
