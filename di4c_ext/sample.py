"""Draws images from a saved teacher or student.

    python -m di4c_ext.sample --model runs/digits --num_steps 4 --num_samples 64 --seed 0

Writes a grid (.png) and the states (.npz, array `images`). Image i is a function of the model, the number of steps,
the seed and i: not of the batch size, nor of how many are asked for.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from di4c_ext import checkpoints, pictures
from di4c_ext.arguments import parse, run
from di4c_ext.evaluate import generate, open_model


@dataclass
class SampleArguments:
    """What to draw, and where to put it."""

    model: str = field(default="runs/digits", metadata={"help": "folder of a teacher or student"})
    num_steps: int = field(default=4, metadata={"help": "sampling steps, one call of the network each"})
    num_samples: int = field(default=64, metadata={"help": "images"})
    seed: int = field(default=0, metadata={"help": "same seed, same images"})
    batch_size: int = field(default=256, metadata={"help": "images at a time; changes none of them"})
    temperature: float = field(default=1.0, metadata={"help": "below 1: likelier states, 0: the likeliest"})
    output: str | None = field(
        default=None, metadata={"help": "name without ending; default: samples/MODEL-STEPSsteps-seedSEED in --model"}
    )

    def __post_init__(self) -> None:
        for name in ("num_steps", "num_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"--temperature {self.temperature}: must be finite and >= 0; 1 leaves the model alone")


def main(argv: Sequence[str]) -> int:
    (args,), _ = parse("sample", [SampleArguments], argv, description="Draw images from a saved teacher or student.")
    model = open_model(args.model)
    config = model.config
    shape = tuple(getattr(config, "image_shape", None) or (1, config.length))
    kind = "student" if config.is_student else "teacher"
    start = time.perf_counter()
    tokens = generate(
        model,
        args.num_steps,
        args.num_samples,
        seed=args.seed,
        batch_size=args.batch_size,
        temperature=args.temperature,
    )
    seconds = time.perf_counter() - start
    default = Path(args.model) / "samples" / f"{kind}-{args.num_steps}steps-seed{args.seed}"
    stem = Path(args.output) if args.output is not None else default
    image_file, array_file = stem.with_name(stem.name + ".png"), stem.with_name(stem.name + ".npz")
    columns = max(1, round(args.num_samples**0.5))
    pictures.save(pictures.grid(tokens, shape, config.num_states, columns), image_file)
    with checkpoints.whole_file(array_file) as staging, open(staging, "wb") as handle:
        np.savez_compressed(
            handle,
            images=tokens.numpy().reshape(-1, *shape).astype(np.uint8 if config.num_states <= 256 else np.int32),
            num_steps=args.num_steps,
            seed=args.seed,
        )
    print(f"{len(tokens)} images in {args.num_steps} steps, {seconds:.2f} s ({kind})\n{image_file}\n{array_file}")
    return 0


if __name__ == "__main__":
    run(main)
