"""The main result on the built-in digits: teachers and students of several seeds, measured side by side.

    python python/digits.py --seeds 0 1 2
    python python/digits.py --seeds 0 --max_steps 100        # flags it does not know go to di4c_ext.distill

Each seed trains its own teacher and student with `di4c_ext.distill` (its preset `digits`) and draws 2,000 samples of
each at 1, 2, 4, 8, 16 and 64 steps. Into python/results/ go the table (digits.md), every figure (digits.json) and a
picture (digits.png: the first seed's samples, all seeds' curves). Exit code 1 if a seed misses what the method
promises: the student at 1, 2 and 4 steps at or below the teacher at twice as many, clearly below it (by a tenth) at 8,
at or below it at 16.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

STEPS = (1, 2, 4, 8, 16, 64)
FIGURE = "frechet_features"
RESULTS = Path(__file__).parent / "results"


def train_and_measure(seed: int, folder: Path, samples: int, flags: list[str]) -> dict[str, Any]:
    """One run of di4c_ext.distill, and the figures it wrote."""
    from di4c_ext import distill

    output = folder / f"seed-{seed}"
    argv = ["--seed", str(seed), "--teacher_seed", str(seed), "--output_dir", str(output), "--overwrite_output_dir"]
    argv += ["--eval_seeds", str(seed), "--eval_num_samples", str(samples), "--eval_num_steps", *map(str, STEPS)]
    if distill.main([*argv, *flags]) != 0:
        raise SystemExit(f"seed {seed}: stopped before its end; run again")
    measured: dict[str, Any] = json.loads((output / "evaluation.json").read_text(encoding="utf-8"))
    return measured


def distances(measured: dict[str, Any], model: str, figure: str = FIGURE) -> dict[int, float]:
    """Steps -> a figure of one seed's teacher or student."""
    return {row["num_steps"]: row[figure] for row in measured["rows"] if row["model"] == model}


def promises(measured: dict[str, Any]) -> dict[str, bool]:
    """What the student must do, in words, and whether this seed's does."""
    teacher, student = distances(measured, "teacher"), distances(measured, "student")
    kept = {f"student at {n} <= teacher at {2 * n}": student[n] <= teacher[2 * n] for n in (1, 2, 4)}
    kept["student at 8 clearly below teacher at 8"] = student[8] <= 0.9 * teacher[8]
    kept["student at 16 <= teacher at 16"] = student[16] <= teacher[16]
    return kept


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def table(seeds: dict[int, dict[str, Any]], figure: str) -> list[str]:
    """Markdown rows: each seed's teacher and student, then the means."""
    lines = ["| seed | model | " + " | ".join(map(str, STEPS)) + " |", "|---" * (len(STEPS) + 2) + "|"]
    found = {(seed, model): distances(seeds[seed], model, figure) for seed in seeds for model in ("teacher", "student")}
    for (seed, model), row in found.items():
        lines.append(f"| {seed} | {model} | " + " | ".join(f"{row[n]:.2f}" for n in STEPS) + " |")
    for model in ("teacher", "student"):
        means = [mean([found[seed, model][n] for seed in seeds]) for n in STEPS]
        lines.append(f"| mean | **{model}** | " + " | ".join(f"**{value:.2f}**" for value in means) + " |")
    return lines


def report(seeds: dict[int, dict[str, Any]], samples: int) -> str:
    """The results as Markdown."""
    first = next(iter(seeds.values()))
    lines = ["# Digits: teacher and student by number of steps", ""]
    for figure, name in ((FIGURE, "features of a small classifier"), ("frechet_pixels", "raw pixels")):
        floor = first["floors"][figure]
        lines += [f"Fréchet distance, {name}; {samples} samples; halves of the real images: {floor:.2f}", ""]
        lines += [*table(seeds, figure), ""]
    lines += ["| seed | promise | kept |", "|---|---|---|"]
    for seed, measured in seeds.items():
        lines += [f"| {seed} | {words} | {'yes' if kept else 'NO'} |" for words, kept in promises(measured).items()]
    lines += ["", "| seed | " + " | ".join(first["bounds"]) + " |", "|---" * (len(first["bounds"]) + 1) + "|"]
    for seed, measured in seeds.items():
        lines.append(f"| {seed} | " + " | ".join(f"{value:.1f}" for value in measured["bounds"].values()) + " |")
    lines += ["", "Likelihood bounds of the teacher in nats an image, on training and held-out images."]
    return "\n".join(lines) + "\n"


def picture(seeds: dict[int, dict[str, Any]], samples: Path, file: Path) -> None:
    """Samples at few steps, teacher above student, beside both curves; `samples` is a run's folder of PNGs."""
    from matplotlib import pyplot as plt

    shown = (1, 2, 4, 8)
    colours = {"teacher": "#b5651d", "student": "#1f5fbf"}
    figure = plt.figure(figsize=(12, 4.3), layout="constrained")
    panels: Any = figure.subfigures(1, 2, width_ratios=(2, 1.25))
    axes = panels[0].subplots(2, len(shown))
    for i, model in enumerate(colours):
        for n, ax in zip(shown, axes[i], strict=True):
            ax.imshow(plt.imread(samples / f"{model}-{n:03d}steps.png"), cmap="gray", interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            if i == 0:
                ax.set_title(f"{n} step{'s' if n > 1 else ''}")
        axes[i, 0].set_ylabel(model, color=colours[model], fontsize=13, fontweight="bold")
    ax = panels[1].subplots()
    for model, colour in colours.items():
        rows = [distances(measured, model) for measured in seeds.values()]
        ax.plot(STEPS, [mean([row[n] for row in rows]) for n in STEPS], color=colour, lw=2, label=model)
        for row in rows:
            ax.plot(STEPS, [row[n] for n in STEPS], "o", color=colour, ms=4, alpha=0.6)
    ax.axhline(next(iter(seeds.values()))["floors"][FIGURE], color="gray", ls="--", lw=1, label="real against real")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(STEPS, [str(n) for n in STEPS])
    ax.set_yticks([2, 5, 10, 20, 50], ["2", "5", "10", "20", "50"])
    ax.minorticks_off()
    ax.set(xlabel="sampling steps", ylabel="Fréchet distance, classifier features")
    ax.legend(frameon=False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_samples", type=int, default=2000, help="samples per figure")
    parser.add_argument("--runs", type=Path, default=Path("runs/digits-seeds"), help="folder of the runs, one a seed")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of digits.md and digits.json")
    args, flags = parser.parse_known_args()
    seeds = {seed: train_and_measure(seed, args.runs, args.num_samples, flags) for seed in args.seeds}
    seeds = dict(sorted(seeds.items()))
    text = report(seeds, args.num_samples)
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "digits.md").write_text(text, encoding="utf-8")
    (args.results / "digits.json").write_text(json.dumps(seeds, indent=1) + "\n", encoding="utf-8")
    picture(seeds, args.runs / f"seed-{min(seeds)}" / "samples", args.results / "digits.png")
    print(text)
    return 0 if all(all(promises(measured).values()) for measured in seeds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
