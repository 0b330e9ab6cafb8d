"""What the recipes share: a run of di4c_ext.distill for each seed, and what is made of the figures it wrote."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIGURE = "frechet_features"
FIGURES = {
    FIGURE: "Fréchet distance, features of a classifier",
    "label_score": "Inception-style score by the labels' own classifier",
    "extractor_score": "Inception-style score by the named feature extractor",
    "frechet_pixels": "Fréchet distance, raw pixels",
}
RESULTS = Path(__file__).parent / "results"
COLOURS = {"teacher": "#b5651d", "student": "#1f5fbf", "hybrid": "#2b8a78"}

Measured = dict[str, Any]  # what a run wrote as evaluation.json
Seeds = dict[int, Measured]


@dataclass(frozen=True)
class Scale:
    """A setting of a recipe: the preset it trains by, and how it measures."""

    name: str
    preset: str
    steps: tuple[int, ...]  # network evaluations
    shown: tuple[int, ...]  # those whose samples are in the picture
    num_samples: int
    hybrid: int = 0  # the teacher's last evaluations in a hybrid


def parser(
    description: str | None, name: str, scales: Mapping[str, Scale], sampling_seeds: Sequence[int], seed_costs: str
) -> argparse.ArgumentParser:
    """The flags that recipes with scales share."""
    flags = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--scale", choices=list(scales), default="small")
    flags.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of training")
    flags.add_argument("--sampling_seeds", type=int, nargs="+", default=list(sampling_seeds), help=seed_costs)
    flags.add_argument("--num_samples", type=int, help="samples per figure; default: 1,000, or 50,000")
    flags.add_argument("--eval_feature_extractor", metavar="NAME", help="as of di4c_ext.evaluate: a network, by name")
    flags.add_argument("--runs", type=Path, help=f"folder of the runs, one a seed; default: runs/{name}[-paper]-seeds")
    flags.add_argument("--results", type=Path, default=RESULTS, help="folder of the table and the picture")
    return flags


def parsed(
    flags: argparse.ArgumentParser, scales: Mapping[str, Scale], argv: Sequence[str], **published: str
) -> tuple[argparse.Namespace, list[str]]:
    """A recipe's own flags, and those for di4c_ext.distill. published: what the published scale wants, in words."""
    args, others = flags.parse_known_args(argv)
    if args.scale == "paper" and any(getattr(args, name) is None for name in published):
        flags.error(f"--scale paper: name {', and '.join(published.values())}")
    args.runs = args.runs or Path(f"runs/{scales[args.scale].name}-seeds")
    return args, others


def run_flags(scale: Scale, seed: int, output: Path, args: argparse.Namespace) -> list[str]:
    """What di4c_ext.distill is told of one seed by every such recipe; a run that `output` holds is gone on with."""
    argv = ["--preset", scale.preset, "--seed", str(seed), "--teacher_seed", str(seed)]
    argv += ["--eval_num_steps", *map(str, scale.steps), "--eval_seeds", *map(str, args.sampling_seeds)]
    argv += ["--eval_num_samples", str(args.num_samples or scale.num_samples)]
    if args.eval_feature_extractor is not None:
        argv += ["--eval_feature_extractor", args.eval_feature_extractor]
    return [*argv, *resumed(output / "distill_config.yaml")]


def resumed(stored: Path) -> list[str]:
    """The flag that goes on with the run whose settings lie there, if one does."""
    return ["--resume"] if stored.is_file() else []


def run(
    scale: Scale,
    args: argparse.Namespace,
    flags_of: Callable[[int, Path], Sequence[str]],
    report: Callable[[Scale, Seeds], str],
    picture: Callable[[Scale, Seeds, Path, Path], None],
    promises: Callable[[Measured], dict[str, bool]],
) -> int:
    """Every seed's run, and what is written of them; the exit code. flags_of: (seed, its output) -> flags."""
    folders = {seed: args.runs / f"seed-{seed}" for seed in sorted(args.seeds)}
    seeds = {seed: train_and_measure(seed, output, flags_of(seed, output)) for seed, output in folders.items()}
    text = report(scale, seeds)
    save(scale.name, text, seeds, args.results)
    picture(scale, seeds, folders[min(seeds)] / "samples", args.results / f"{scale.name}.png")
    print(text)
    return 0 if all(all(promises(measured).values()) for measured in seeds.values()) else 1


def train_and_measure(seed: int, output: Path, flags: Sequence[str]) -> Measured:
    """One run of di4c_ext.distill into `output`, and the figures it wrote."""
    from di4c_ext import distill

    if distill.main(["--output_dir", str(output), *flags]) != 0:
        raise SystemExit(f"seed {seed}: stopped before its end; run again")
    measured: Measured = json.loads((output / "evaluation.json").read_text(encoding="utf-8"))
    return measured


def distances(measured: Measured, model: str, figure: str = FIGURE) -> dict[int, float]:
    """Steps -> a figure of one training seed's model, the mean over its sampling seeds."""
    found: dict[int, list[float]] = {}
    for row in measured["rows"]:
        if row["model"] == model:
            found.setdefault(row["num_steps"], []).append(row[figure])
    return {n: mean(values) for n, values in found.items()}


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def table(seeds: Seeds, models: Sequence[str], steps: Sequence[int], figure: str) -> list[str]:
    """Markdown rows: each seed's models, then the means."""
    lines = ["| seed | model | " + " | ".join(map(str, steps)) + " |", "|---" * (len(steps) + 2) + "|"]
    found = {(seed, model): distances(seeds[seed], model, figure) for seed in seeds for model in models}
    for (seed, model), row in found.items():
        lines.append(f"| {seed} | {model} | " + " | ".join(f"{row[n]:.2f}" for n in steps) + " |")
    if len(seeds) > 1:
        for model in models:
            means = [mean([found[seed, model][n] for seed in seeds]) for n in steps]
            lines.append(f"| mean | **{model}** | " + " | ".join(f"**{value:.2f}**" for value in means) + " |")
    return lines


def counted(scale: Scale, measured: Measured) -> str:
    """How many samples a figure stands on, and of how many sampling seeds it is the mean."""
    rows = measured["rows"]
    drawn = len({row["seed"] for row in rows})
    means = f", means of {drawn} sampling seeds" if drawn > 1 else ""
    return f"Preset `{scale.preset}`. {rows[0]['num_samples']:,} samples for each figure{means}"


def figures(
    seeds: Seeds, models: Sequence[str], steps: Sequence[int], real: Callable[[Measured, str], str]
) -> list[str]:
    """A table of every figure that was measured; real: what real images score, in words."""
    lines = []
    first = next(iter(seeds.values()))
    for figure, name in FIGURES.items():
        if figure in first["floors"]:
            lines += [f"{name}; {real(first, figure)}", "", *table(seeds, models, steps, figure), ""]
    return lines


def closing(seeds: Seeds, promises: Callable[[Measured], dict[str, bool]]) -> list[str]:
    """The classifier's worth, the promises, what the teachers know, and how long all took."""
    first, lines = next(iter(seeds.values())), []
    if first["accuracy"] is not None:
        right = f"is right on {first['accuracy']:.1%} of the held-out ones"
        lines += [f"The classifier, trained on the labels of the training images, {right}.", ""]
    lines += [*kept_table(seeds, promises), "", *bounds_table(seeds), ""]
    lines += [f"Of the teacher: {first['bounds_name']}, on training and held-out images.", ""]
    for seed, measured in seeds.items():
        spent = ", ".join(f"{phase} {seconds / 60:.1f}" for phase, seconds in measured["seconds"].items())
        lines.append(f"Minutes of seed {seed}: {spent}.")
    return lines


def kept_table(seeds: Seeds, promises: Callable[[Measured], dict[str, bool]]) -> list[str]:
    """Markdown rows: what each seed promised, and whether it kept it."""
    lines = ["| seed | promise | kept |", "|---|---|---|"]
    for seed, measured in seeds.items():
        lines += [f"| {seed} | {words} | {'yes' if kept else 'NO'} |" for words, kept in promises(measured).items()]
    return lines


def bounds_table(seeds: Seeds) -> list[str]:
    """Markdown rows: what each seed's teacher knows of training and of held-out images."""
    names = list(next(iter(seeds.values()))["bounds"])
    lines = ["| seed | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for seed, measured in seeds.items():
        lines.append(f"| {seed} | " + " | ".join(f"{value:.1f}" for value in measured["bounds"].values()) + " |")
    return lines


def curves(ax: Any, seeds: Seeds, models: Sequence[str], steps: Sequence[int], ticks: Sequence[float]) -> None:
    """The distance of every model against the number of steps, with every seed's values and the floor."""
    for model in models:
        colour = COLOURS[model]
        rows = [distances(measured, model) for measured in seeds.values()]
        style = "--" if model == "hybrid" else "-"  # it may lie on the student's
        ax.plot(steps, [mean([row[n] for row in rows]) for n in steps], style, color=colour, lw=2, label=model)
        for row in rows:
            ax.plot(steps, [row[n] for n in steps], "o", color=colour, ms=4, alpha=0.6)
    ax.axhline(next(iter(seeds.values()))["floors"][FIGURE], color="gray", ls=":", lw=1, label="real against real")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(steps, [str(n) for n in steps])
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.set(xlabel="sampling steps", ylabel="Fréchet distance, classifier features")
    ax.legend(frameon=False)


def ticks(seeds: Seeds, models: Sequence[str], steps: Sequence[int]) -> list[float]:
    """1, 2 and 5 times powers of ten, from about the lowest value to about the highest."""
    values = [distances(measured, model)[n] for measured in seeds.values() for model in models for n in steps]
    floors = [measured["floors"][FIGURE] for measured in seeds.values()]
    low, high = min([*values, *floors]), max(values)
    return [m * 10.0**e for e in range(-6, 7) for m in (1, 2, 5) if 0.8 * low <= m * 10.0**e <= 1.2 * high]


def samples_panel(panel: Any, folder: Path, steps: Sequence[int], part: float = 1.0) -> None:
    """Teacher above student at few steps; `folder` holds a run's PNGs, of which the first `part` of each side shows."""
    from matplotlib import pyplot as plt

    axes = panel.subplots(2, len(steps))
    for i, model in enumerate(("teacher", "student")):
        for n, ax in zip(steps, axes[i], strict=True):
            pixels = plt.imread(folder / f"{model}-{n:03d}steps.png")
            height, width = (round(side * part) for side in pixels.shape[:2])
            ax.imshow(pixels[:height, :width], cmap="gray", interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            if i == 0:
                ax.set_title(f"{n} step{'s' if n > 1 else ''}")
        axes[i, 0].set_ylabel(model, color=COLOURS[model], fontsize=13, fontweight="bold")


def save(name: str, text: str, seeds: Seeds, results: Path) -> None:
    """Writes NAME.md and NAME.json."""
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{name}.md").write_text(text, encoding="utf-8")
    (results / f"{name}.json").write_text(json.dumps(seeds, indent=1) + "\n", encoding="utf-8")
