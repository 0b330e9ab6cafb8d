"""The image-token system: a VQ model, a teacher of its codes by class, its few-step student, by number of steps.

    python python/tokens.py                  # Fashion-MNIST in 7 x 7 codes, within an hour on two CPU cores
    python python/tokens.py --scale paper --vq_model VQGAN --teacher_model_name_or_path MASKGIT \\
        --eval_feature_extractor NAME        # the published setting: ImageNet 256, 50,000 samples, days on a GPU

First a VQ model is trained (`di4c_ext.pretrain --kind vq`), once for all seeds, unless one is named. Then each seed
trains a teacher and its student with `di4c_ext.distill` (its preset `tokens_small`, or `tokens`) and samples both at
several numbers of steps, every class as often as among the images. A run that was stopped is gone on with. Flags it
does not know go to di4c_ext.distill, those that begin with --vq_ to the VQ model's training.

Into python/results/ go the table (tokens.md), every figure (tokens.json) and a picture (tokens.png: class grids of the
first seed, a column for each class, and the curves of all); the published scale writes tokens-paper.*. Exit code 1 if a
seed misses what the method promises: the student at 4 steps at or below the teacher at 8.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import recipes
from recipes import Measured, Scale, Seeds

MODELS = ("teacher", "student")
SHARED = (  # flags of both trainings
    *("--dataset_name", "--dataset_config", "--dataset_train_split", "--num_states", "--image_size", "--grayscale"),
    *("--heldout_fraction", "--use_cpu", "--disable_tqdm"),
)

SCALES = {
    "small": Scale("tokens", "tokens_small", (1, 2, 4, 8, 16), (1, 2, 4, 8, 16), 1000),
    "paper": Scale("tokens-paper", "tokens", (4, 8), (4, 8), 50_000),
}


def split_flags(flags: Sequence[str]) -> tuple[list[str], list[str]]:
    """The flags of the VQ model's training and those of distill: --vq_NAME is the former's, images are both's."""
    groups: list[list[str]] = []
    for word in flags:
        if word.startswith("--") or not groups:
            groups.append([])
        groups[-1].append(word)
    of_vq, others = [], []
    for name, *values in groups:
        if name.startswith("--vq_"):
            of_vq += ["--" + name.removeprefix("--vq_"), *values]
            continue
        others += [name, *values]
        if name.split("=")[0] in SHARED:
            of_vq += [name, *values]
    return of_vq, others


def vq_flags(scale: Scale, output: Path, flags: Sequence[str]) -> list[str]:
    """The flags of the VQ model's training; one that `output` holds is gone on with."""
    argv = ["--preset", scale.preset, "--kind", "vq", "--output_dir", str(output)]
    return [*argv, *recipes.resumed(output / "pretrain_config.yaml"), *split_flags(flags)[0]]


def flags_of(scale: Scale, seed: int, output: Path, args: argparse.Namespace, flags: Sequence[str]) -> list[str]:
    """The flags of one seed's run; a run that `output` holds is gone on with."""
    vq_model = args.vq_model or args.runs / "vq"
    return [*recipes.run_flags(scale, seed, output, args), "--vq_model", str(vq_model), *split_flags(flags)[1]]


def train_vq(scale: Scale, output: Path, flags: Sequence[str]) -> None:
    """The VQ model into `output`, unless it is there."""
    from di4c_ext import pretrain

    if (output / "model.safetensors").is_file():
        return
    if pretrain.main(vq_flags(scale, output, flags)) != 0:
        raise SystemExit("VQ model: stopped before its end; run again")


def promises(measured: Measured) -> dict[str, bool]:
    """What the student must do, in words, and whether this seed's does."""
    teacher, student = (recipes.distances(measured, model) for model in MODELS)
    return {"student at 4 <= teacher at 8": student[4] <= teacher[8]}


def report(scale: Scale, seeds: Seeds, runs: Path) -> str:
    """The results as Markdown; `runs` is the folder of the runs."""
    lines = [
        "# Image tokens: teacher and student by number of sampling steps",
        "",
        f"{recipes.counted(scale, next(iter(seeds.values())))}, classes as often as among the images, codes decoded to "
        "pixels. Distances of finite samples depend on their number, so the real images' values beside each table are "
        "those of as many real images, against all the others.",
        "",
        *recipes.figures(seeds, MODELS, scale.steps, _real),
        *recipes.closing(seeds, promises),
        *_trainings(seeds, runs),
    ]
    return "\n".join(lines) + "\n"


def _trainings(seeds: Seeds, runs: Path) -> list[str]:
    """What every training took, which a run that goes on with another may find done."""
    from di4c_ext.callbacks import read_metrics

    found = {"VQ model": read_metrics(runs / "vq" / "metrics.jsonl")}
    for seed in seeds:
        folder = runs / f"seed-{seed}"
        found[f"teacher of seed {seed}"] = read_metrics(folder / "teacher" / "metrics.jsonl")
        lines = read_metrics(folder / "metrics.jsonl")
        found[f"student of seed {seed}"] = [line for line in lines if line["phase"] == "student"]
    told = ", ".join(f"{name} {lines[-1]['seconds'] / 60:.1f}" for name, lines in found.items() if lines)
    return ["", f"Minutes of training, in this run or an earlier one: {told}."] if told else []


def _real(run: Measured, figure: str) -> str:
    best = run["reconstructions"][figure]
    return f"real images: {run['floors'][figure]:.2f}, come back from their own codes: {best:.2f}"


def picture(scale: Scale, seeds: Seeds, samples: Path, file: Path) -> None:
    """Class grids of teacher and student beside the two curves; `samples` is a run's folder of PNGs."""
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(13, 1.4 * len(scale.shown)), layout="constrained")
    panels: Any = figure.subfigures(1, 2, width_ratios=(2.2, 1.0))
    _class_grids(panels[0], samples, scale.shown)
    recipes.curves(panels[1].subplots(), seeds, MODELS, scale.steps, recipes.ticks(seeds, MODELS, scale.steps))
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _class_grids(panel: Any, folder: Path, steps: Sequence[int]) -> None:
    """A row for each number of steps, the upper half of the teacher's grid beside that of the student's."""
    from matplotlib import pyplot as plt

    axes = panel.subplots(len(steps), len(MODELS), squeeze=False)
    for n, row in zip(steps, axes, strict=True):
        for model, ax in zip(MODELS, row, strict=True):
            pixels = plt.imread(folder / f"{model}-{n:03d}steps.png")
            ax.imshow(pixels[: -(-len(pixels) // 2)], cmap="gray", interpolation="nearest", aspect="equal")
            ax.set(xticks=[], yticks=[])
        row[0].set_ylabel(f"{n} step{'s' if n > 1 else ''}")
    for model, ax in zip(MODELS, axes[0], strict=True):
        ax.set_title(model, color=recipes.COLOURS[model], fontweight="bold")


def parsed(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """This program's own flags, and those for di4c_ext.distill."""
    parser = recipes.parser(__doc__, "tokens", SCALES, [0, 1, 2], "seeds of sampling")
    parser.add_argument("--vq_model", type=Path, help="folder of a VQ model; default: RUNS/vq, which is trained first")
    features = "the feature space by --eval_feature_extractor"
    return recipes.parsed(parser, SCALES, argv, vq_model="a --vq_model", eval_feature_extractor=features)


def main(argv: Sequence[str]) -> int:
    args, flags = parsed(argv)
    scale = SCALES[args.scale]
    if args.vq_model is None:
        train_vq(scale, args.runs / "vq", flags)
    return recipes.run(
        scale,
        args,
        lambda seed, output: flags_of(scale, seed, output, args, flags),
        lambda scale, seeds: report(scale, seeds, args.runs),
        picture,
        promises,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
