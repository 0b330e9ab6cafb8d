"""One training step of the published pixel system at its full setting, and the memory that takes.

    python benchmarks/pixels_step.py                                         B = 8, L = 16, four latents at a time
    python benchmarks/pixels_step.py --batch 1 --micro_batch 2 --threads 1   a small one, to see that it runs

The U-Nets are the published ones, 35,749,766 weights in the teacher and 39,066,630 in the student, on images of
3 x 32 x 32 with 256 levels; `Di4CObjective.preset("pixels")` with the latents in micro-batches, gradient clipping, Adam
and a moving average. Adam's state and the average are there before the step begins, as in every step of a training but
the first. Random weights and images: they change neither time nor memory.

Prints a row of results/pixels.md: on a CPU the peak resident size of this whole process, Python and torch included; on
a GPU the peak that torch allocated. Exit code 1 where the peak is not under LIMIT. Minutes on a CPU.
"""

from __future__ import annotations

import argparse
import resource
import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from di4c_ext import random
from di4c_ext.callbacks import EmaCallback
from di4c_ext.loss import Di4CObjective
from di4c_ext.models import UNetConfig, UNetDenoiser
from di4c_ext.models.latent import draw_latents
from di4c_ext.process import GaussianProcess

LIMIT = 12 * 2**30


class Training:
    """The networks and everything a trainer keeps beside them."""

    def __init__(self, config: UNetConfig, device: torch.device, **settings: Any) -> None:
        torch.manual_seed(0)
        self.teacher = UNetDenoiser(config).to(device).eval().requires_grad_(False)
        self.student = UNetDenoiser.from_teacher(self.teacher).requires_grad_(True).train()
        self.process = GaussianProcess(config.num_states)
        self.objective = Di4CObjective.preset("pixels", **settings)
        self.latents = partial(draw_latents, latent_dim=1, law="uniform", independent=True)
        self.average = EmaCallback(self.student, 0.9999)
        self.optimizer = torch.optim.Adam(self.student.parameters(), lr=2e-4, fused=True)
        for parameter in self.student.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()  # makes its state; a gradient of zero moves nothing
        self.optimizer.zero_grad()

    def step(self, x_0: Tensor, keys: Tensor) -> float:
        """One whole step on x_0 (B, D); the loss."""
        loss = self.objective(self.student, self.teacher, self.process, x_0, keys, latents=self.latents)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.on_step_end(None, SimpleNamespace(global_step=1), None, model=self.student)  # type: ignore[arg-type]
        return loss.item()


def peak(device: torch.device) -> int:
    """Bytes: of the whole process, or what torch allocated on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="B, images")
    parser.add_argument("--latents", type=int, default=16, help="L, latents, targets and distillation rows of an image")
    parser.add_argument("--micro_batch", type=int, default=4, help="latents of an image whose activations live at once")
    parser.add_argument("--threads", type=int, default=None, help="of torch on a CPU; default: as it comes")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = UNetConfig()
    training = Training(
        config,
        device,
        num_latents=arguments.latents,
        distillation_rows=arguments.latents,
        latent_micro_batch=arguments.micro_batch,
    )
    weights = [sum(p.numel() for p in model.parameters()) for model in (training.teacher, training.student)]
    x_0 = torch.randint(0, config.num_states, (arguments.batch, config.length)).to(device)
    before, start = peak(device), time.perf_counter()
    loss = training.step(x_0, random.keys(0, arguments.batch, device))
    seconds, found = time.perf_counter() - start, peak(device)
    print(f"teacher {weights[0]:,} and student {weights[1]:,} weights; loss {loss:.4f}")
    print("| device | B | L | latents at a time | seconds | before the step, GiB | peak, GiB |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    sizes = f"{arguments.batch} | {arguments.latents} | {arguments.micro_batch}"
    print(f"| {name} | {sizes} | {seconds:.0f} | {before / 2**30:.2f} | {found / 2**30:.2f} |", flush=True)
    raise SystemExit(found >= LIMIT)


if __name__ == "__main__":
    main()
