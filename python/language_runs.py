"""What the recipe language.py measures of a finished run, beside what the run measured itself."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from recipes import Measured
from torch import Tensor

from di4c_ext import random
from di4c_ext.arguments import DataArguments, read_yaml
from di4c_ext.denoiser import inference
from di4c_ext.evaluate import EvaluationArguments, compare
from di4c_ext.generate import SamplingArguments, generate, open_model
from di4c_ext.metrics.mixture_bound import FewSteps, few_step_bounds
from di4c_ext.sampler import sample_ancestral, times
from di4c_ext.systems import process_of
from di4c_ext.task import Judge
from di4c_ext.text_arguments import TextArguments
from di4c_ext.text_sources import cutter_of
from di4c_ext.text_task import TextTask

TEMPERATURES = (0.9, 1.1)  # of the teacher beside 1: lower than any student's entropy wants, and higher
MODELS = ("teacher", "student", "second")
APART = "apart"  # the student with every position drawn from its own law
ASIDE = 256  # samples at most of what the promise does not hang on: other steps, temperatures, positions apart
BOUNDED = 128  # held-out sequences on which the likelihood of few steps is bounded
SHOWN = 2  # samples of each model and number of steps that are printed


@dataclass(frozen=True)
class Run:
    """The folder of a finished run, its models opened, and the numbers of steps: all, and k of the promise."""

    output: Path
    steps: tuple[int, ...]
    promised: tuple[int, ...]

    @cached_property
    def models(self) -> dict[str, Any]:
        folders = (self.output / "teacher", self.output / "stages" / "di4c", self.output)
        return {name: open_model(folder) for name, folder in zip(MODELS, folders, strict=True)}

    @property
    def has_chain(self) -> bool:
        return bool(getattr(self.models["student"].config, "has_chain", False))

    @cached_property
    def settings(self) -> dict[str, Any]:
        return read_yaml(self.output / "distill_config.yaml")

    def told(self, kind: Any) -> Any:
        """The run's settings of this kind."""
        return kind(**{name: self.settings[name] for name in kind.__dataclass_fields__ if name in self.settings})

    @cached_property
    def task(self) -> TextTask:
        named = (str(self.output / "stages" / "di4c"), self.models["student"].config)
        return TextTask(self.told(DataArguments), self.told(TextArguments), model=named)


def measure(run: Run, measured: Measured) -> Measured:
    """What a run wrote, its student by the name of the second round, with the first round's rows and the teacher's at
    other temperatures; each is kept as soon as it is there."""
    kept = run.output / "more.jsonl"
    known = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()] if kept.is_file() else []
    have = {(row["model"], row["temperature"], row["num_steps"]) for row in known}
    twice = [2 * k for k in run.promised]
    todo = [("student", 1.0, run.steps), *(("teacher", t, twice) for t in TEMPERATURES)]
    if run.has_chain:
        todo.append((APART, 1.0, twice))
    todo = [(name, t, [n for n in steps if (name, t, n) not in have]) for name, t, steps in todo]
    with kept.open("a", encoding="utf-8") as file:
        for row in _more(run, [job for job in todo if job[2]]):
            file.write(json.dumps(row) + "\n")
            file.flush()
            known.append(row)
    names = {"teacher": "teacher", "student": "second"}
    rows = [{**row, "model": names[row["model"]], "temperature": 1.0} for row in measured["rows"]]
    return {**measured, "rows": rows + known, "told": bounds(run), "samples": samples(run)}


def _more(run: Run, todo: Sequence[tuple[str, float, Sequence[int]]]) -> Iterator[dict[str, Any]]:
    """Rows of the models of a run, by name, temperature and numbers of steps."""
    if not todo:
        return
    every: EvaluationArguments = run.told(EvaluationArguments)
    fewer = replace(every, eval_num_samples=min(ASIDE, every.eval_num_samples))
    fewer = replace(fewer, eval_num_judged=min(ASIDE, every.eval_num_judged))
    judges: dict[int, Judge] = {}
    for name, temperature, n in ((name, temperature, n) for name, temperature, steps in todo for n in steps):
        args = replace(every if name == "student" and n in run.promised else fewer, eval_num_steps=[n])
        if args.eval_num_samples not in judges:
            judges[args.eval_num_samples] = run.task.open_judge(args)
        judge = judges[args.eval_num_samples]
        if name == APART:
            row = {"model": APART, "temperature": temperature, "num_steps": n, "seed": 0}
            yield {**row, "num_samples": args.eval_num_samples, **judge.measure(_drawn_apart(run, n, args))}
            continue
        sampling = SamplingArguments(temperature=temperature)
        for row, _ in compare({name: run.models[name]}, judge, args, 0, sampling, run.task.drawing):
            yield {**row, "temperature": temperature}


def _drawn_apart(run: Run, num_steps: int, args: EvaluationArguments) -> Tensor:
    """Samples (N, D) of the student with each position drawn from its own law: what its chain knows is left out."""
    student = run.models["student"]
    process: Any = process_of(student.config)
    keys = random.keys(0, args.eval_num_samples)
    length = run.task.heldout.tokens.shape[1]

    def apart(x_t: Tensor, t: Tensor) -> Tensor:
        with inference(student, x_t.device):
            said: Tensor = student.log_marginals(x_t, t)
            return said

    return torch.cat(
        [
            sample_ancestral(apart, process, process.prior((len(own), length), own), times(num_steps), own)
            for own in keys.split(64)  # of the laws (64, D, S) of one chain's state three live at a time
        ]
    )


def bounds(run: Run) -> dict[str, dict[str, float]]:
    """Bounds of -log p of what few steps make, nats a held-out sequence, by model and number of steps.

    "apart" is the student whose positions are drawn from their own laws each: to the teacher it is what training on has
    brought, to the student what its chain knows of the positions together. Empty where the latent is no chain.
    """
    student, heldout = run.models["student"], run.task.heldout
    if not run.has_chain:
        return {}
    size = min(BOUNDED, len(heldout))
    x_0 = heldout.tokens[torch.arange(size) * len(heldout) // size].long()
    keys = random.keys(0, size)
    process: Any = process_of(student.config)
    found: dict[str, dict[str, float]] = {}
    for name in (MODELS[0], APART, *MODELS[1:]):
        denoiser: Any = student.log_marginals if name == APART else run.models[name]
        found[name] = {}
        for k in (k for k in run.steps if k <= max(run.promised)):
            steps = FewSteps(k) if name == APART else FewSteps.of(denoiser, k)
            found[name][str(k)] = float(few_step_bounds(denoiser, process, x_0, keys, steps).mean())
    return found


def samples(run: Run) -> dict[str, dict[str, list[str]]]:
    """The first samples that the figures stand on, drawn again: by model and number of steps."""
    cutter = cutter_of(run.output)
    found: dict[str, dict[str, list[str]]] = {}
    for name, model in run.models.items():
        drawn = {n: generate(model, n, SHOWN, seed=0).tolist() for n in run.steps}
        found[name] = {str(n): [cutter.decode(row) for row in rows] for n, rows in drawn.items()}
    return found
