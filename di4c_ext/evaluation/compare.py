"""One row of figures for each model, number of steps, temperature and seed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from tqdm.auto import tqdm

from di4c_ext.callbacks import LATENCY
from di4c_ext.evaluation.cast import Role, cast_of, check_plan
from di4c_ext.evaluation.settings import EvaluationArguments
from di4c_ext.generate import generate
from di4c_ext.models.base import MixtureDenoiser
from di4c_ext.sampling import SamplingArguments, sampler_of
from di4c_ext.task import Bounding, Drawing, Judge

TIMED = ("seconds", *LATENCY)  # of a row: what another run of the same does not repeat
_MOST_SECONDS = 2.0  # after which the latency of one sample is not taken again

Cell: TypeAlias = tuple[str, int, float, int]  # model, number of steps, temperature, seed


def cell_of(row: Mapping[str, Any]) -> Cell:
    """What a row is about."""
    return row["model"], row["num_steps"], row["temperature"], row["seed"]


def cells(
    models: Sequence[str], args: EvaluationArguments, temperature: float, temperatures: Sequence[float] = ()
) -> list[Cell]:
    """All cells in the order they are measured in: models take turns, so that a busy machine slows all of them."""
    every = [temperature, *(other for other in temperatures if other != temperature)]
    return [(m, n, t, seed) for n in args.eval_num_steps for t in every for seed in args.eval_seeds for m in models]


def compare(
    models: dict[str, MixtureDenoiser],
    judge: Judge,
    args: EvaluationArguments,
    keep: int = 0,
    sampling: SamplingArguments | None = None,
    drawing: Drawing | None = None,
    *,
    temperatures: Sequence[float] = (),
    known: Collection[Cell] = (),
) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """One row of figures for each cell, and the first `keep` samples it stands on.

    models: by the names "teacher" and "student", or one of them; see `cast_of` for what is sampled beside. drawing:
    what `generate` is told beside, and what is made of samples before they are measured. temperatures: others beside
    that of `sampling`. known: cells that are left out. Raises ValueError for options that fit no row, before anything
    is sampled.

    A row holds model, sampler, num_steps, temperature, seed, precision (in which the network computes), num_samples,
    num_evaluations (of a network, for each sample), the judge's figures with their intervals (<figure>_low, _high),
    and of time: seconds (of all the samples), batch_size, latency (seconds a sample in batches of this size), latency_1
    (seconds of one sample alone, the median of eval_num_turns).
    """
    sampling = sampling or SamplingArguments()
    check_plan(args, sampling, models, temperatures)
    names = list(cast_of(models, sampling))
    every = cells(names, args, sampling.temperature, temperatures)
    todo = [cell for cell in every if cell not in known]
    warm: set[str] = set()
    bounds: dict[tuple[str, int], dict[str, float]] = {}
    bar = tqdm(
        todo, desc="evaluation", unit="run", dynamic_ncols=True, initial=len(every) - len(todo), total=len(every)
    )
    for name, num_steps, temperature, seed in bar:
        role = cast_of(models, replace(sampling, temperature=temperature))[name]
        bar.set_postfix(model=name, steps=num_steps, seed=seed, refresh=False)
        draw = Draw(role, args.eval_batch_size, drawing)
        if name not in warm:
            draw(max(1, role.options.hybrid), min(args.eval_batch_size, args.eval_num_samples), seed)
            warm.add(name)
        with counted(role) as evaluations:
            samples, seconds = draw(num_steps, args.eval_num_samples, seed)
        found = judge.measure(samples, num_bootstraps=args.eval_num_bootstraps, seed=seed)
        if isinstance(judge, Bounding) and _is_plain(name, role, temperature):
            if (name, num_steps) not in bounds:  # they hang on no seed of sampling
                bounds[name, num_steps] = judge.of_model(role.model, num_steps, args.eval_num_bootstraps)
            found |= bounds[name, num_steps]
        row = {
            "model": name,
            "sampler": sampler_of(role.model, role.options),
            "num_steps": num_steps,
            "temperature": temperature,
            "seed": seed,
            "precision": precision_of(role.model),
            "num_samples": len(samples),
            "num_evaluations": _each(sum(evaluations), len(samples)),
            **found,
            "batch_size": min(args.eval_batch_size, len(samples)),
            "latency": seconds / len(samples),
        }
        if args.eval_num_turns:
            row["latency_1"] = _latency_of_one(draw, num_steps, seed, args.eval_num_turns)
        yield {**row, "seconds": round(seconds, 3)}, samples[:keep]


@dataclass(frozen=True)
class Draw:
    """draw(num_steps, num_samples, seed) -> the samples of a role, ready to be measured, and the seconds of sampling.

    A drawing's decoding is not counted.
    """

    role: Role
    batch_size: int
    drawing: Drawing | None = None

    def __call__(self, num_steps: int, num_samples: int, seed: int) -> tuple[Tensor, float]:
        model, teacher, options = self.role
        told = {} if self.drawing is None else self.drawing.told(model.config, num_samples)
        start = time.perf_counter()
        samples = generate(
            model,
            num_steps,
            num_samples,
            seed=seed,
            batch_size=self.batch_size,
            teacher=teacher,
            options=options,
            **told,
        )
        seconds = time.perf_counter() - start
        return samples if self.drawing is None else self.drawing.decode(samples), seconds


@contextmanager
def counted(role: Role) -> Iterator[list[int]]:
    """A list that takes, at each call of a role's networks, how many sequences they are evaluated on."""
    calls: list[int] = []

    def seen(network: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x_t = args[0]
        latents = kwargs.get("latents", args[2] if len(args) > 2 else None)
        lead = x_t if latents is None or latents.ndim <= x_t.ndim else latents
        calls.append(lead.shape[:-1].numel())

    networks = {id(network): network for network in (role.model, role.teacher) if network is not None}
    handles = [network.register_forward_pre_hook(seen, with_kwargs=True) for network in networks.values()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def precision_of(model: MixtureDenoiser) -> str:
    """In what a network computes: the dtype of its weights, and that of its products where torch rounds these."""
    kind, products = str(model.dtype).removeprefix("torch."), torch.get_float32_matmul_precision()
    return f"{kind}, {products} products" if kind == "float32" and products != "highest" else kind


def _is_plain(name: str, role: Role, temperature: float) -> bool:
    """Whether a row is of what a model's own ancestral steps make, of which there is a bound."""
    is_own = name in ("teacher", "student") and sampler_of(role.model, role.options) == "ancestral"
    return is_own and temperature == 1 and role.options.top_p == 1


def _each(total: int, number: int) -> float:
    return total // number if total % number == 0 else total / number


def _latency_of_one(draw: Draw, num_steps: int, seed: int, turns: int) -> float:
    """Median seconds of sampling one sample; fewer turns where that takes long."""
    draw(max(1, draw.role.options.hybrid), 1, seed)
    taken: list[float] = []
    while len(taken) < turns and sum(taken) < _MOST_SECONDS:
        taken.append(draw(num_steps, 1, seed)[1])
    return statistics.median(taken)
