"""What the paper's theorems promise, held against laws that are written down: no samples, no estimates, float64.

    python python/theory.py

1. A product teacher whose marginals are exact reaches the data as 1/N: N times the total variation between the law of
   its N steps and the data's tends to a constant (Theorem 1).
2. A student of one step is as near to N steps of its teacher as its losses say (Theorem 2). With r_n the law of the
   teacher's trajectory at t_n = n/N, started from masks,

       TV(teacher's N steps, student's one) <= ( L_distil^(1/2) + sum_{n=1}^{N-1} L_consis,n^(1/2) ) / 2^(1/2)

       L_distil   = E_{x ~ r_1} KL( teacher_{0|t_1}(. | x) || student_{0|t_1}(. | x) )
       L_consis,n = E_{x ~ r_{n+1}} KL( student_{0|t_n} o teacher_{t_n|t_{n+1}} (. | x) || student_{0|t_{n+1}}(. | x) )

   What is trained is L_distil's bound, the mean over latents of such divergences, so the right side with it in
   L_distil's place holds as well. And the third loss bounds the way to the data: its excess over the data's entropy is
   a divergence, so TV(data, student's one step) <= ( (L_data - H) / 2 )^(1/2), L_data = E -log student_{0|1}(x_0).

Three problems: two equal tokens, the case in which no product teacher is faster than 1/N; a chain of four bits, nine in
ten of which are as the one before; and a law of three positions without any order. The students are tables, one to each
of 16 latents and four times, trained by `Di4CObjective`. Into python/results/ go theory.png, theory.md and theory.json;
exit code 1 where a promise is broken.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from di4c_ext import ops, random
from di4c_ext.loss import Di4CObjective
from di4c_ext.metrics.exact import (
    ExactTeacher,
    index,
    of_clean,
    sampler_law,
    sequences,
    total_variation,
    transition,
)
from di4c_ext.process import AbsorbingProcess
from di4c_ext.sampler import times

RESULTS = Path(__file__).parent / "results"
STEPS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # N of the teacher's convergence
TEACHER_STEPS = 4  # N of the theorem that students are held against
NUM_LATENTS, BATCH, MAX_STEPS = 16, 64, 800
COLOURS = {"two equal tokens": "#b5651d", "chain of four": "#1f5fbf", "no order": "#2b8a78"}


@dataclass(frozen=True)
class Problem:
    """A data law (S^D,) over sequences of D tokens of S states, masked linearly."""

    name: str
    num_states: int
    length: int
    law: Tensor

    @property
    def process(self) -> AbsorbingProcess:
        return AbsorbingProcess(self.num_states)

    @property
    def teacher(self) -> ExactTeacher:
        return ExactTeacher(self.law, self.num_states, self.length)


def problems() -> list[Problem]:
    """The three of the picture."""
    equal = torch.tensor([0.5, 0.0, 0.0, 0.5], dtype=torch.float64)
    chain = torch.where(sequences(2, 4).diff(dim=1) == 0, 0.9, 0.1).double().prod(1) / 2
    raw = torch.rand(27, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    laws = ((2, 2, equal), (2, 4, chain), (3, 3, raw / raw.sum()))
    return [Problem(name, *rest) for name, rest in zip(COLOURS, laws, strict=True)]


def convergence(problem: Problem, steps: tuple[int, ...] = STEPS) -> dict[int, float]:
    """N -> total variation between the teacher's N-step law and the data."""
    process, teacher = problem.process, problem.teacher
    found = {}
    for n in steps:
        law = sampler_law(process, teacher, problem.length, times(n))
        found[n] = total_variation(of_clean(process, law, problem.length), problem.law)
    return found


class Student(nn.Module):
    """A mixture over 16 latents with a free table for each and for each of the times t_1, ..., t_N."""

    def __init__(self, problem: Problem, num_steps: int, seed: int = 0) -> None:
        super().__init__()
        start = problem.teacher.table.clamp(min=-6).float()
        shape = (num_steps, NUM_LATENTS, *start.shape)
        self.table = nn.Parameter(start + 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
        self.num_steps, self.num_states = num_steps, problem.num_states

    def forward(self, x_t: Tensor, t: Tensor, latents: Tensor) -> Tensor:
        """x_t (B, [L,] D), t (B,), latents (B, [L,] 1), which are numbers of latents -> logits (B, [L,] D, S)."""
        which, place = latents[..., 0].long(), index(x_t, self.num_states + 1)
        n = (t * self.num_steps).round().long() - 1
        if which.ndim > 1:
            n = n[:, None].expand_as(which)
            place = place if place.ndim > 1 else place[:, None].expand_as(which)
        # At t = 0, where nothing is open, it is asked for targets that count for nothing.
        return self.table[n.clamp(min=0), which, place]


@dataclass(frozen=True)
class Measured:
    """A student against its teacher and the data; losses in nats, as the module's text has them."""

    distance: float  # TV to the law of the teacher's N steps
    teacher_distance: float  # that of the teacher's own one step
    distance_data: float  # TV to the data
    distillation: float
    distillation_trained: float  # the mean over latents, which is at least as large
    consistency: list[float]  # n = 1, ..., N - 1
    data: float  # L_data - H, the divergence of the student's one step from the data

    @property
    def bound(self) -> float:
        return _bound(self.distillation, self.consistency)

    @property
    def bound_trained(self) -> float:
        return _bound(self.distillation_trained, self.consistency)

    @property
    def bound_data(self) -> float:
        return math.sqrt(self.data / 2)


def _bound(distillation: float, consistency: list[float]) -> float:
    return sum(math.sqrt(max(value, 0.0) / 2) for value in (distillation, *consistency))


def measure(problem: Problem, student: Student) -> Measured:
    """All of it, exactly."""
    num_steps = student.num_steps
    process, teacher, length = problem.process, problem.teacher, problem.length
    grid = times(num_steps).flip(0).tolist()  # t_0 = 0, ..., t_N = 1
    every = _all_latents(torch.zeros(1), NUM_LATENTS)[0]
    in_one = [transition(process, student, length, t, 0.0, latents=every) for t in grid[1:]]
    single = [transition(process, student, length, grid[1], 0.0, latents=one[None]) for one in every]
    steps = [transition(process, teacher, length, t, s) for s, t in pairwise(grid)]
    reached = [torch.zeros(len(steps[0]), dtype=torch.float64)]
    reached[0][-1] = 1  # all masks are the last of the sequences
    for step in reversed(steps):
        reached.insert(0, reached[0] @ step)
    student_law = in_one[-1][-1]
    on_clean = of_clean(process, student_law, length)
    return Measured(
        distance=total_variation(student_law, reached[0]),
        teacher_distance=total_variation(transition(process, teacher, length, 1.0, 0.0)[-1], reached[0]),
        distance_data=total_variation(on_clean, problem.law),
        distillation=_mean_kl(reached[1], steps[0], in_one[0]),
        distillation_trained=sum(_mean_kl(reached[1], steps[0], each) for each in single) / len(single),
        consistency=[_mean_kl(reached[n + 1], steps[n] @ in_one[n - 1], in_one[n]) for n in range(1, num_steps)],
        data=float(_kl(problem.law, on_clean)),
    )


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of the last dimension."""
    return torch.where(p > 0, p * (p.log() - q.log()), 0.0).sum(-1)


def _mean_kl(weight: Tensor, p: Tensor, q: Tensor) -> float:
    return float((weight * torch.where(weight > 0, _kl(p, q), 0.0)).sum())


def trained(problem: Problem, max_steps: int = MAX_STEPS, num_steps: int = TEACHER_STEPS) -> dict[int, Measured]:
    """A student measured on the way: optimizer step -> figures.

    The objective's times are the theorem's: L_distil at t_1, L_consis from t_{n+1} to t_n, the data's terms left out.
    """
    process, teacher = problem.process, problem.teacher
    student = Student(problem, num_steps)
    objective = Di4CObjective(
        num_latents=NUM_LATENTS,
        data=0.0,
        data_marginal=0.0,
        window=1 / num_steps,
        window_share=1 / num_steps,
        full_noise_share=1 / num_steps,
        time_grid=num_steps,
        step_min=1 / num_steps,
        step_max=1 / num_steps,
        step_share=1.0,
        diagnostics=False,
    )
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max_steps)
    root = random.keys(0, BATCH)
    chances = problem.law.log().float().expand(BATCH, 1, -1)
    clean = sequences(problem.num_states, problem.length)
    found = {}
    for step in range(max_steps + 1):
        if step in (0, max_steps) or (step >= 8 and math.log2(step) % 0.5 < math.log2(1 + 1 / step)):
            found[step] = measure(problem, student)
        keys = random.fold_in(root, step)
        drawn: Any = ops.sample_categorical(chances, random.fold_in(keys, 99))
        parts = objective(student, teacher, process, clean[drawn[:, 0]], keys, latents=_all_latents)
        optimizer.zero_grad()
        parts["loss"].backward()
        optimizer.step()
        schedule.step()
    return found


def _all_latents(keys: Tensor, count: int) -> Tensor:
    """Every latent once: the mixture itself, not a draw of it."""
    return torch.arange(count, dtype=torch.float32)[None, :, None].expand(len(keys), -1, 1)


def promises(curve: dict[int, float], students: dict[int, Measured]) -> dict[str, bool]:
    """What the theorems say of one problem, in words, and whether it is so."""
    last = list(students.values())[-1]
    tail = [n * distance for n, distance in curve.items() if n >= 64]
    return {
        "N TV(teacher's N steps, data) is constant to 3 % from N = 64": max(tail) <= 1.03 * min(tail),
        "TV(student, teacher) <= bound of L_distil and L_consis, always": all(
            m.distance <= m.bound for m in students.values()
        ),
        "that bound <= the one of what is trained": all(m.bound <= m.bound_trained for m in students.values()),
        "TV(student, data) <= bound of L_data, always": all(m.distance_data <= m.bound_data for m in students.values()),
        "trained, it is a fifth as far from them as the teacher's one step, or nearer": last.distance
        <= 0.2 * last.teacher_distance,
    }


def report(curves: dict[str, dict[int, float]], students: dict[str, dict[int, Measured]]) -> str:
    """The results as Markdown."""
    lines = ["# Theory: the theorems on problems that can be enumerated", ""]
    lines += ["Total variation between the law of the teacher's N steps and the data, times N:", ""]
    lines += ["| problem | " + " | ".join(map(str, STEPS)) + " |", "|---" * (len(STEPS) + 1) + "|"]
    for name, curve in curves.items():
        lines.append(f"| {name} | " + " | ".join(f"{n * distance:.4f}" for n, distance in curve.items()) + " |")
    lines += ["", f"A student's one step, against its teacher's {TEACHER_STEPS} and the data, while it is trained:", ""]
    columns = ("steps trained", "to the teacher", "bound", "bound as trained", "to the data", "bound of L_data")
    lines += [f"| problem | {' | '.join(columns)} |", "|---" + "|--:" * len(columns) + "|"]
    for name, found in students.items():
        for step in (min(found), *(step for step in found if step in (128, 512)), max(found)):
            m = found[step]
            lines.append(
                f"| {name} | {step} | {m.distance:.4f} | {m.bound:.4f} | {m.bound_trained:.4f} | "
                f"{m.distance_data:.4f} | {m.bound_data:.4f} |"
            )
    lines += ["", "The teacher's own one step lies this far from them: "]
    lines[-1] += ", ".join(f"{name} {found[0].teacher_distance:.4f}" for name, found in students.items()) + "."
    lines += ["", "| problem | promise | kept |", "|---|---|---|"]
    for name in curves:
        kept = promises(curves[name], students[name])
        lines += [f"| {name} | {words} | {'yes' if is_kept else 'NO'} |" for words, is_kept in kept.items()]
    lines += ["", "Made by `python python/theory.py`, in a minute on one core."]
    return "\n".join(lines) + "\n"


def picture(curves: dict[str, dict[int, float]], students: dict[str, dict[int, Measured]], file: Path) -> None:
    """The teacher's way to the data, and every student below its bound."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    left, right = axes
    for name, curve in curves.items():
        left.plot(list(curve), list(curve.values()), "o-", color=COLOURS[name], ms=4, label=name)
    last = {name: curve[STEPS[-1]] * STEPS[-1] for name, curve in curves.items()}
    for constant in last.values():
        left.plot(STEPS, [constant / n for n in STEPS], ":", color="gray", lw=1, zorder=0)
    left.plot([], [], ":", color="gray", label="constant / N")
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.set_xticks(STEPS, [str(n) for n in STEPS])
    left.set(xlabel="N, steps of the teacher", ylabel="total variation to the data")
    left.set_title("1. The teacher reaches the data as 1/N")
    left.legend(frameon=False)
    for name, found in students.items():
        at = [step + 1 for step in found]
        right.plot(at, [m.distance for m in found.values()], "o-", color=COLOURS[name], ms=4, label=name)
        right.plot(at, [m.bound for m in found.values()], "--", color=COLOURS[name])
    right.plot([], [], "--", color="gray", label="its bound")
    right.set_xscale("log")
    right.set_yscale("log")
    far = f"total variation to {TEACHER_STEPS} steps of the teacher"
    right.set(xlabel="1 + optimizer steps of the student", ylabel=far)
    right.set_title("2. The student's one step lies below its bound")
    right.legend(frameon=False)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_steps", type=int, default=MAX_STEPS, help="optimizer steps of each student")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the picture and the table")
    args = parser.parse_args()
    curves = {problem.name: convergence(problem) for problem in problems()}
    students = {problem.name: trained(problem, args.max_steps) for problem in problems()}
    text = report(curves, students)
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "theory.md").write_text(text, encoding="utf-8")
    figures = {
        name: {
            "teacher": curves[name],
            "student": {
                step: asdict(m) | {"bound": m.bound, "bound_trained": m.bound_trained, "bound_data": m.bound_data}
                for step, m in students[name].items()
            },
        }
        for name in curves
    }
    (args.results / "theory.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    picture(curves, students, args.results / "theory.png")
    print(text)
    return 0 if all(all(promises(curves[name], students[name]).values()) for name in curves) else 1


if __name__ == "__main__":
    sys.exit(main())
