"""The pixel system: a discretised Gaussian teacher, its few-step student, and both together, by number of steps.

    python python/pixels.py                  # Fashion-MNIST in 32 levels, within an hour on two CPU cores
    python python/pixels.py --scale paper --dataset_name cifar-10-batches-py --eval_feature_extractor NAME
                                             # the published setting: CIFAR-10, 50,000 samples, days on a GPU

Each seed trains a teacher and its student with `di4c_ext.distill` (its preset `pixels_small`, or `pixels`) and samples
the teacher, the student and their hybrid, whose last evaluations are the teacher's, at several numbers of network
evaluations. A run that was stopped is gone on with. Flags it does not know go to di4c_ext.distill; a published teacher,
converted by `di4c_ext.convert`, is named by --teacher_model_name_or_path. The published scale measures distances in a
feature space that you name, an image classifier of transformers, since a small one says little about CIFAR-10.

Into python/results/ go the table (pixels.md), every figure (pixels.json) and a picture (pixels.png: samples of the
first seed, curves of all); the published scale writes pixels-paper.*. Exit code 1 if a seed misses what the method
promises: the student at 10 evaluations below the teacher at 10 by a tenth, and at most a tenth above it at 20.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import recipes
from recipes import Measured, Scale, Seeds

MODELS = ("teacher", "student", "hybrid")
# Small: 75 evaluations of 1,000 images for each of three models are 7.5 minutes at 500 images a second.
SCALES = {
    "small": Scale("pixels", "pixels_small", (5, 10, 20, 40), (5, 10, 20), 1000, hybrid=2),
    "paper": Scale("pixels-paper", "pixels", (10, 20, 40), (10, 20, 40), 50_000, hybrid=5),
}


def flags_of(scale: Scale, seed: int, output: Path, args: argparse.Namespace, flags: Sequence[str]) -> list[str]:
    """The flags of one seed's run; a run that `output` holds is gone on with."""
    return [*recipes.run_flags(scale, seed, output, args), "--hybrid", str(scale.hybrid), *flags]


def promises(measured: Measured) -> dict[str, bool]:
    """What the student must do, in words, and whether this seed's does."""
    teacher, student = (recipes.distances(measured, model) for model in ("teacher", "student"))
    return {
        "student at 10 <= 0.9 x teacher at 10": student[10] <= 0.9 * teacher[10],
        "student at 10 <= 1.1 x teacher at 20": student[10] <= 1.1 * teacher[20],
    }


def report(scale: Scale, seeds: Seeds) -> str:
    """The results as Markdown."""
    lines = [
        "# Pixels: teacher, student and hybrid by number of network evaluations",
        "",
        f"{recipes.counted(scale, next(iter(seeds.values())))}. In the hybrid the last {scale.hybrid} evaluations are "
        "the teacher's. Distances of finite samples depend on their number, so the real images' values beside each "
        "table are those of as many real images, against all the others.",
        "",
        *recipes.figures(seeds, MODELS, scale.steps, lambda run, figure: f"real images: {run['floors'][figure]:.2f}"),
        *recipes.closing(seeds, promises),
    ]
    return "\n".join(lines) + "\n"


def picture(scale: Scale, seeds: Seeds, samples: Path, file: Path) -> None:
    """Samples of teacher and student beside the three curves; `samples` is a run's folder of PNGs."""
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(13, 5.2), layout="constrained")
    panels: Any = figure.subfigures(1, 2, width_ratios=(1.75, 1.25))
    recipes.samples_panel(panels[0], samples, scale.shown, part=0.5)
    recipes.curves(panels[1].subplots(), seeds, MODELS, scale.steps, recipes.ticks(seeds, MODELS, scale.steps))
    figure.savefig(file, dpi=110)
    plt.close(figure)


def parsed(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """This program's own flags, and those for di4c_ext.distill."""
    parser = recipes.parser(__doc__, "pixels", SCALES, [0], "each adds 7 minutes at scale small")
    features = "the feature space by --eval_feature_extractor, a folder or name"
    return recipes.parsed(parser, SCALES, argv, eval_feature_extractor=features)


def main(argv: Sequence[str]) -> int:
    args, flags = parsed(argv)
    scale = SCALES[args.scale]
    return recipes.run(
        scale, args, lambda seed, output: flags_of(scale, seed, output, args, flags), report, picture, promises
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
