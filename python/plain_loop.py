"""Di4C in a plain training loop: copy it and put your own networks in. Toy data: two tokens, always equal.

A product denoiser that draws both at once gets them equal half of the time; the mixture student learns to."""

import torch
from torch import nn

from di4c_ext import random
from di4c_ext.loss import Di4CObjective
from di4c_ext.process import AbsorbingProcess
from di4c_ext.sampler import sample_ancestral, times

B, D, S, C = 64, 2, 4, 2  # samples, positions, states, latent size
process = AbsorbingProcess(S)


def teacher(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Knows the rule: a masked token equals the other one; if that is masked as well, any state will do."""
    return 30.0 * nn.functional.one_hot(x_t.flip(1), S + 1)[..., :S].float()


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D * (S + 1) + C, 128), nn.SiLU(), nn.Linear(128, D * S))

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        x = nn.functional.one_hot(x_t, S + 1).flatten(-2).float()
        if latents.ndim > x.ndim:  # L latents on one x_t
            x = x[:, None].expand(*latents.shape[:2], -1)
        return self.net(torch.cat([x, latents], -1)).unflatten(-1, (D, S))


def latents(keys: torch.Tensor, num_latents: int = 1) -> torch.Tensor:
    return random.normal(keys, num_latents * C).float().view(len(keys), num_latents, C)


torch.manual_seed(0)
student, objective = Student(), Di4CObjective(num_latents=16, data=1.0, step_max=0.1)
optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
for step in range(600):
    x_0 = torch.randint(S, (B, 1)).expand(B, D)
    parts = objective(student, teacher, process, x_0, random.fold_in(random.keys(0, B), step), latents=latents)
    optimizer.zero_grad()
    parts["loss"].backward()
    optimizer.step()
    if step % 100 == 0:
        print(step, {name: round(value.item(), 3) for name, value in parts.items()})

keys = random.keys(1, 10_000)
for name, denoiser, mixture in (("teacher", teacher, None), ("student", student, lambda keys: latents(keys)[:, 0])):
    x = sample_ancestral(denoiser, process, process.prior((len(keys), D), keys), times(1), keys, latents=mixture)
    print(f"{name}: both tokens equal in {(x[:, 0] == x[:, 1]).float().mean():.3f} of one-step samples")
