"""The objective on hidden states and a head, under masked diffusion: the loss of whole logits, which are never made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from di4c_ext import ops, random
from di4c_ext.loss import Di4CObjective, LossParts
from di4c_ext.metrics.likelihood import likelihood_bound
from di4c_ext.ops import Hidden, hidden_op, pieces, sample_hidden_op
from di4c_ext.process import AbsorbingProcess

B, D, S, WIDTH, L, K = 3, 19, 23, 5, 4, 3
SETTINGS: dict[str, Any] = {"num_latents": L, "num_targets": K, "window": 0.3, "step_max": 0.3, "step_min": 0.2}
# Both sides of the window, and every position masked at t = 1.
TIMES = torch.tensor([0.25, 0.6, 1.0], dtype=torch.float64)


class Network(nn.Module):
    """denoiser(x_t, t, latents) -> Hidden, or the same logits as a tensor."""

    def __init__(self, whole: bool, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.whole = whole
        self.embedding = nn.Parameter(torch.randn(S + 1, WIDTH, generator=g).to(dtype))
        self.moved = nn.Parameter(torch.randn(WIDTH, generator=g).to(dtype))
        self.weight = nn.Parameter(torch.randn(S, WIDTH, generator=g).to(dtype))
        self.bias = nn.Parameter(torch.randn(S, generator=g).to(dtype))

    def forward(self, x_t: Tensor, t: Tensor, latents: Tensor | None = None) -> Tensor | Hidden:
        states = self.embedding[x_t].cumsum(-2) / D**0.5
        if latents is not None:
            told = latents[..., None, :1].to(states) * self.moved
            states = (states[:, None] if told.ndim > states.ndim else states) + told
        hidden = Hidden(torch.tanh(states), self.weight, self.bias)
        return hidden.logits() if self.whole else hidden


def latents(keys: Tensor, n: int) -> Tensor:
    return random.uniform(keys, n)[..., None]


def run(
    whole: bool, mask_id: int = S, dtype: torch.dtype = torch.float64, mixture: bool = False, **settings: Any
) -> tuple[LossParts, list[Tensor]]:
    """Loss and the gradients of the student's weights."""
    student, teacher = Network(whole, dtype=dtype), Network(whole, seed=1, dtype=dtype)
    process = AbsorbingProcess(S, "log_linear", mask_id)
    x_0 = torch.arange(B * D).view(B, D).pow(2).mul(5) % (S if mask_id == S else mask_id)
    told = {"teacher_latents": latents} if mixture else {}
    objective = Di4CObjective(**SETTINGS | settings)
    parts = objective(
        student, teacher, process, x_0, random.keys(3, B), latents=latents, times=(TIMES, TIMES / 2), **told
    )
    parts["loss"].backward()
    return parts, [p.grad for p in student.parameters() if p.grad is not None]


def assert_same(found: Any, expected: Any, rtol: float) -> None:
    for name, value in expected[0].per_sample.items():
        torch.testing.assert_close(found[0].per_sample[name], value, rtol=rtol, atol=rtol)
    assert len(found[1]) == len(expected[1]) == 4
    for a, b in zip(found[1], expected[1], strict=True):
        assert (a - b).norm() <= rtol * b.norm() and b.norm() > 0


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("mixture", [False, True], ids=["product teacher", "mixture teacher"])
@pytest.mark.parametrize("mask_id", [S, S - 1])
def test_the_loss_of_whole_logits(mask_id: int, mixture: bool, fused: bool) -> None:
    found, expected = (run(whole, mask_id, mixture=mixture, fused=fused) for whole in (False, True))
    assert_same(found, expected, 1e-9)
    assert all(value.abs().max() > 0 for value in expected[0].per_sample.values())


@pytest.mark.parametrize("mixture", [False, True], ids=["product teacher", "mixture teacher"])
def test_the_loss_of_whole_logits_by_the_kernels(mixture: bool) -> None:
    found, expected = (run(whole, dtype=torch.float32, mixture=mixture) for whole in (False, True))
    assert_same(found, expected, 2e-5)


@pytest.mark.parametrize("mixture", [False, True], ids=["product teacher", "mixture teacher"])
@pytest.mark.parametrize("size", [1, 3])
def test_a_few_latents_at_a_time(size: int, mixture: bool) -> None:
    whole = run(False, mixture=mixture)
    assert_same(run(False, latent_micro_batch=size, mixture=mixture), whole, 1e-10)


def test_a_batch_is_its_samples() -> None:
    """Also where one of them has every position masked and another few."""
    objective, process = Di4CObjective(**SETTINGS), AbsorbingProcess(S)
    student, teacher = (Network(False, seed=seed, dtype=torch.float32) for seed in (0, 1))
    x_0, keys = torch.arange(B * D).view(B, D) % S, random.keys(5, B)

    def parts(rows: slice) -> dict[str, Tensor]:
        times = TIMES[rows], TIMES[rows] / 2
        found = objective(student, teacher, process, x_0[rows], keys[rows], latents=latents, times=times)
        return found.per_sample

    whole = parts(slice(None))
    for b in range(B):
        for name, value in parts(slice(b, b + 1)).items():
            torch.testing.assert_close(value, whole[name][b : b + 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mixture", [False, True], ids=["product teacher", "mixture teacher"])
def test_logits_of_masked_positions_alone_are_made(monkeypatch: pytest.MonkeyPatch, mixture: bool) -> None:
    """Never whole; the teacher's step of those that are unmasked, the targets' of those that stay masked."""
    made: dict[str, int] = {"loss": 0, "draws": 0}
    logits_of, product = pieces.logits_of, torch.addmm

    def counted(source: Any, piece: Any, *places: Any) -> Any:
        made["loss"] += 0 if source is None else piece.size * source.shape[1]
        return logits_of(source, piece, *places)

    def addmm(bias: Tensor, a: Tensor, b: Tensor, **options: Any) -> Tensor:
        made["draws"] += len(a)
        return product(bias, a, b, **options)

    def refuse(self: Hidden) -> Tensor:
        raise AssertionError("logits made whole")

    unmasked, kept = [], []

    class Watched(AbsorbingProcess):
        def step(self, x_t: Tensor, *args: Any, **more: Any) -> Tensor:
            x_u = super().step(x_t, *args, **more)
            drawn = x_u.view(B, -1, D)
            unmasked.append(((x_t == S)[:, None] & (drawn != S)).any(1).sum().item())
            kept.append((drawn == S).sum().item())
            return x_u

    student, teacher = (Network(False, seed=seed, dtype=torch.float32) for seed in (0, 1))
    process, keys = Watched(S), random.keys(3, B)
    x_0 = torch.arange(B * D).view(B, D) % S
    masked = (process.corrupt(x_0, TIMES, random.fold_in(keys, 1)) == S).sum(1)
    told = {"teacher_latents": latents} if mixture else {}
    monkeypatch.setattr(Hidden, "logits", refuse)
    monkeypatch.setattr(pieces, "logits_of", counted)
    monkeypatch.setattr(sample_hidden_op.torch, "addmm", addmm)
    with torch.no_grad():
        objective = Di4CObjective(**SETTINGS, diagnostics=False)
        objective(student, teacher, process, x_0, keys, latents=latents, times=(TIMES, TIMES / 2), **told)
    in_the_loss = made["draws"] - (sum(unmasked) + sum(kept))  # its products are counted as well, piece by piece
    outside = int(masked[TIMES > 0.3].sum())
    exact = (L + (K if mixture else 1)) * int(masked.sum()) + K * outside
    assert 0 < masked[0] < D and made["loss"] >= exact
    # Samples of one piece are filled up to the longest of them.
    assert made["loss"] <= (L + (K if mixture else 1)) * (int(masked[0]) + 2 * D) + K * 2 * D
    assert in_the_loss == made["loss"]
    assert hidden_op.pieces is pieces and ops.native.available("cpu")


def test_the_likelihood_bound() -> None:
    process, keys = AbsorbingProcess(S), random.keys(0, B)
    x_0 = torch.arange(B * D).view(B, D) % S
    found = []
    for whole in (False, True):
        network = Network(whole)
        bound = likelihood_bound(network, process, x_0, keys)
        found.append([bound, *torch.autograd.grad(bound.sum(), [network.embedding, network.weight, network.bias])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
