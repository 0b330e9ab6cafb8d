"""Samples a teacher and its student at several numbers of steps, measures both and writes a report.

    python -m di4c_ext.evaluate --model runs/digits --num_steps 1 2 4
    python -m di4c_ext.evaluate --model runs/mine --teacher runs/mine/teacher --hybrid 2 --dataset_name fashion_mnist
    python -m di4c_ext.evaluate --model runs/text --teacher runs/text/teacher --eval_temperatures 0.9 1.1

Every figure is measured per seed on the same number of samples, has a bootstrap interval, and stands beside what as
many real images or blocks of text score ("floor"). References are all real ones, and the held-out ones alone.

Into --output_dir (default: the model's folder `evaluation`) go report.html, README.md, evaluation.json and, as they are
measured, rows.jsonl and samples/. The same command goes on where it was stopped, and one that asks for more steps,
seeds or temperatures measures these alone. The rows are printed as JSON lines.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from di4c_ext import checkpoints, env, manifest
from di4c_ext.arguments import DataArguments, UsageError, parse, run
from di4c_ext.evaluation.cast import check_plan
from di4c_ext.evaluation.compare import compare
from di4c_ext.evaluation.enumerable import exact_distances
from di4c_ext.evaluation.latency import latent_overhead
from di4c_ext.evaluation.latents import latent_use, one_step
from di4c_ext.evaluation.settings import EvaluationArguments, MeasuringArguments
from di4c_ext.evaluation.store import Store
from di4c_ext.generate import SamplingArguments, check_fit, open_model
from di4c_ext.models.base import MixtureDenoiser, role
from di4c_ext.systems import modality_of
from di4c_ext.task import Measuring
from di4c_ext.text_arguments import TextArguments

__all__ = ["EvaluationArguments", "MeasuringArguments", "check_plan", "compare", "latent_use", "open_pair"]

SHOWN = 64  # samples of each model and number of steps that are kept
# What an evaluation may ask for more of, or write elsewhere, and still go on with the rows it has.
_FREE = (
    *("model", "teacher", "output_dir", "output_file", "overwrite_output_dir", "eval_num_steps", "eval_seeds"),
    *("eval_temperatures", "eval_num_latents", "eval_num_turns"),
)


@dataclass
class ModelArguments:
    """Which model is measured, and where the report goes."""

    model: str = field(default="runs/digits", metadata={"help": "folder of a teacher or student"})
    teacher: str | None = field(
        default=None, metadata={"help": "folder of the student's teacher: measured too, and for --hybrid, --guidance"}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "folder of the report; default: the model's, in it `evaluation`"}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "delete the evaluation in --output_dir first; else it is gone on with"}
    )
    output_file: str | None = field(default=None, metadata={"help": "write the rows here as JSON lines too"})


def open_pair(model: str, teacher: str | None, trust_remote_code: bool = False) -> dict[str, MixtureDenoiser]:
    """The model by its role, and its teacher before it where that is named; ValueError where they do not fit."""
    opened = open_model(model, trust_remote_code=trust_remote_code)
    pair = {role(opened.config.is_student): opened}
    if teacher is None:
        return pair
    if not opened.config.is_student:
        raise UsageError(f"--teacher {teacher}: --model {model} is a teacher itself; leave --teacher out")
    above = open_model(teacher, is_student=False, trust_remote_code=trust_remote_code)
    check_fit(opened, above)
    return {"teacher": above, **pair}


def main(argv: Sequence[str]) -> int:
    (named, images, text, args, sampling), settings = parse(
        "evaluate",
        [ModelArguments, DataArguments, TextArguments, MeasuringArguments, SamplingArguments],
        argv,
        description="Measure a teacher or a student against real images or text.",
    )
    check_plan(args, sampling)
    models = open_pair(named.model, named.teacher, text.trust_remote_code)
    check_plan(args, sampling, models, args.eval_temperatures)
    config = list(models.values())[-1].config
    if modality_of(config) == "text":
        from di4c_ext.text_task import judged

        measuring = judged(named.model, config, images, text, args)
    else:
        from di4c_ext.image_task import judged as judged_images

        text.refuse()
        measuring = judged_images(named.model, config, images, args, text.trust_remote_code)
    folders = {name: named.model for name in models} | ({} if named.teacher is None else {"teacher": named.teacher})
    store = Store(
        Path(named.output_dir or Path(named.model) / "evaluation"),
        {name: manifest.digest(Path(folder) / checkpoints.WEIGHTS)[:16] for name, folder in folders.items()},
        _identity(models, measuring, settings),
        temperature=sampling.temperature,
        seed=args.eval_seeds[0],
        overwrite=named.overwrite_output_dir,
    )
    try:
        report = measure(models, measuring, args, sampling, store)
    except KeyboardInterrupt:
        print(f"\nstopped; what is measured lies in {store.folder}, the same command goes on", file=sys.stderr)
        return 130
    _write(store, {**report, "settings": settings, "folders": folders}, models, measuring, named.output_file)
    return 0


def measure(
    models: dict[str, MixtureDenoiser],
    measuring: Measuring,
    args: MeasuringArguments,
    sampling: SamplingArguments,
    store: Store,
) -> dict[str, Any]:
    """All that is measured, by name; rows as soon as they are there into the store."""
    start = time.perf_counter()
    judge, drawing, heldout, _ = measuring
    more = {"temperatures": args.eval_temperatures, "known": store.known}
    for row, samples in compare(models, judge, args, SHOWN, sampling, drawing, **more):  # type: ignore[arg-type]
        store.add(row, samples)
    student, latents, one = models.get("student"), [], None
    if student is not None:
        asked = args.eval_num_latents, args.eval_num_bootstraps
        latents, one = latent_use(student, heldout, *asked), one_step(student, heldout, *asked)
    return {
        "rows": store.rows,
        "floors": judge.floors,
        "sizes": judge.sizes,
        "judge": getattr(judge, "settings", {}),
        "latents": latents,
        "one_step": one,
        "overhead": latent_overhead(models, args, sampling, drawing),
        "exact": exact_distances(models, args.eval_num_steps, sampling),
        "seconds": round(time.perf_counter() - start, 1),
    }


def _identity(models: dict[str, MixtureDenoiser], measuring: Measuring, settings: dict[str, Any]) -> dict[str, Any]:
    """What rows hang on beside the models: data, machine, and the settings but those that only ask for more rows."""
    facts = dict(env.facts())
    is_gpu = next(iter(models.values())).device.type == "cuda"
    told = {f"--{name}": value for name, value in sorted(settings.items()) if name not in _FREE}
    data = measuring.shown.fingerprint()[:16]
    return {"data": data, "machine": facts["GPU 0" if is_gpu else "processor"], **told}


def _write(
    store: Store,
    report: dict[str, Any],
    models: dict[str, MixtureDenoiser],
    measuring: Measuring,
    file: str | None,
) -> None:
    """The report's files, and the rows on the screen."""
    from di4c_ext.report import evaluation_card, evaluation_page
    from di4c_ext.report.evaluated import Evaluated, evaluated_json, table

    facts = Evaluated(
        report=report,
        samples=store.samples(),
        shown=measuring.shown,
        parameters={name: model.num_parameters() for name, model in models.items()},
        temperature=store.temperature,
    )
    checkpoints.write_text(store.folder / "evaluation.json", evaluated_json(facts))
    checkpoints.write_text(store.folder / "README.md", evaluation_card.card(facts))
    checkpoints.write_text(store.folder / "report.html", evaluation_page.page(facts))
    lines = [{"floors": measuring.judge.floors, "sizes": measuring.judge.sizes}, *facts.rows]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    print(text, end="")
    if file is not None:
        checkpoints.write_text(Path(file), text)
    print(f"{table(facts)}\nreport: {(store.folder / 'report.html').resolve()}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
