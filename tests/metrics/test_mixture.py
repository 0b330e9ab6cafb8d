"""What the latents carry, on mixtures whose figures are known."""

from __future__ import annotations

import math
from typing import Any

import dits
import pytest
import torch
from torch import Tensor

from di4c_ext import ops, random
from di4c_ext.metrics import mixture
from di4c_ext.metrics.mixture import correlation_gain, mixture_figures, total_correlation
from di4c_ext.process import AbsorbingProcess

D = 4


def _latents(keys: Tensor, count: int) -> Tensor:
    return torch.arange(count).float()[None, :, None].expand(len(keys), count, 1)


def test_product_model_carries_nothing() -> None:
    def product(x_t: Tensor, t: Tensor, latents: Tensor) -> Tensor:
        return torch.tensor([0.3, -1.0]).expand(len(x_t), latents.shape[1], D, 2)

    found = correlation_gain(
        product, AbsorbingProcess(2), torch.zeros(5, D).long(), random.keys(0, 5), _latents, num_latents=3
    )
    assert found["correlation"] == pytest.approx(0, abs=1e-6)
    assert found["information"] == pytest.approx(0, abs=1e-6)


def test_two_certain_components() -> None:
    """Latent 0 says all zeros, latent 1 all ones: the joint is ln 2, the marginals would pay D ln 2."""

    def copies(x_t: Tensor, t: Tensor, latents: Tensor) -> Tensor:
        sign = (2 * latents - 1)[..., None] * torch.tensor([-40.0, 40.0])  # (B, L, 1, 2)
        return sign.expand(-1, -1, D, 2)

    x_0 = torch.tensor([[0] * D, [1] * D])
    found = correlation_gain(copies, AbsorbingProcess(2), x_0, random.keys(0, 2), _latents, num_latents=2)
    assert found["joint"] == pytest.approx(-math.log(2), rel=1e-5)
    assert found["correlation"] == pytest.approx((D - 1) * math.log(2), rel=1e-5)
    assert found["information"] == pytest.approx(D * math.log(2), rel=1e-5)


def test_variation_is_that_of_the_law_of_a_position() -> None:
    """Laws (p, 1 - p) of latent 0 and (1 - p, p) of latent 1, all positions open: |2p - 1| / 2 from their mean."""
    p = 0.9

    def two(x_t: Tensor, t: Tensor, latents: Tensor) -> Tensor:
        law = torch.stack([torch.where(latents == 0, p, 1 - p), torch.where(latents == 0, 1 - p, p)], -1)
        return law.log().expand(-1, -1, D, 2)

    found = mixture_figures(
        two, AbsorbingProcess(2), torch.zeros(3, D).long(), random.keys(0, 3), _latents, num_latents=2
    )
    assert {name: values.shape for name, values in found.items()} == {name: (3,) for name in found}
    assert found["variation"].tolist() == pytest.approx([0.5 * (2 * p - 1) * 2 / 2] * 3, rel=1e-5)


def test_only_open_positions_count() -> None:
    """Where one of four positions is open, the mean variation is that of this one alone."""

    def one(x_t: Tensor, t: Tensor, latents: Tensor) -> Tensor:
        certain = (2 * latents - 1)[..., None] * torch.tensor([-40.0, 40.0])
        return torch.cat([certain, torch.zeros(*certain.shape[:2], D - 1, 2)], 2)

    process = AbsorbingProcess(2)
    keys = random.keys(0, 200)
    x_0 = torch.zeros(200, D).long()
    found = mixture_figures(one, process, x_0, keys, _latents, num_latents=2, t=0.3)
    is_open = process.corrupt(x_0, 0.3, keys) == process.mask_id
    wanted = torch.where(is_open[:, 0], 0.5 / is_open.sum(1).clamp(min=1), 0.0)
    assert found["variation"].tolist() == pytest.approx(wanted.tolist(), abs=1e-6) and 0 < wanted.count_nonzero() < 200


def test_total_correlation_of_copies() -> None:
    """A fair coin for all D positions: log 1/2 for the sample, D log 1/2 for its marginals."""

    def copies(x_t: Tensor, t: Tensor, latents: Tensor) -> Tensor:
        certain = (2 * latents - 1)[..., None] * torch.tensor([-40.0, 40.0])  # (B, [L,] 1, 2)
        return certain.expand(*latents.shape[:-1], D, 2)

    seen: list[tuple[int, ...]] = []

    def coins(keys: Tensor, count: int) -> Tensor:
        seen.append((len(keys), count))
        if count == 1:  # what is drawn
            return random.uniform(keys, 1)[..., None].round().float()
        return _latents(keys, count)

    found = total_correlation(copies, AbsorbingProcess(2), D, random.keys(0, 5), coins, num_latents=2, batch_size=3)
    assert found.tolist() == pytest.approx([(D - 1) * math.log(2)] * 5, rel=1e-5) and found.dtype == torch.float64
    assert seen == [(3, 1), (3, 2), (2, 1), (2, 2)]


def test_total_correlation_is_held_by_latents_of_its_own() -> None:
    """A mixture of 2^8 certain components, of which 4 are asked: the drawn one is among them only by chance."""

    def certain(x_t: Tensor, t: Tensor, latents: Tensor) -> Tensor:
        bits = (latents * 256).floor().long() >> torch.arange(8) & 1  # (..., 8)
        return torch.nn.functional.one_hot(bits, 2) * 20.0

    def draw(keys: Tensor, count: int) -> Tensor:
        return random.uniform(keys, count)[..., None].float()

    found = total_correlation(certain, AbsorbingProcess(2), 8, random.keys(0, 60), draw, num_latents=4)
    assert float(found.mean()) < -1, "were the drawn latent among the four, this would be above 0"


@pytest.mark.parametrize("kind", ["tensor", "hidden", "logistic"])
def test_pieces_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever form the logits have, and however few of them are made at a time."""
    length, count = 6, 3
    weight = random.normal(random.keys(1, 5), 7).float()
    states = random.normal(random.keys(2, 4), count * length * 7).float().view(4, count, length, 7)

    def student(x_t: Tensor, t: Tensor, latents: Tensor) -> Any:
        some = states[: len(x_t)]
        if kind == "logistic":
            return ops.Logistic(some[..., 0], some[..., 1] - 1, 5)
        hidden = ops.Hidden(some, weight, torch.zeros(5))
        return hidden if kind == "hidden" else hidden.logits()

    told = (student, AbsorbingProcess(5), torch.ones(4, length).long(), random.keys(0, 4), _latents)
    whole = mixture_figures(*told, num_latents=count)
    for most in (1, 400, 3000):
        monkeypatch.setattr(mixture, "_MOST_BYTES", most)
        again = mixture_figures(*told, num_latents=count)
        assert {name: values.tolist() for name, values in again.items()} == {
            name: pytest.approx(values.tolist(), rel=1e-6) for name, values in whole.items()
        }
    assert float(whole["variation"].min()) > 0


def test_a_student_that_knows_its_sum_is_asked() -> None:
    """The chain's joint is that of very many latents, whatever the few that the marginals are taken over."""
    from di4c_ext.models import DiTDenoiser
    from di4c_ext.systems import latents_of, process_of

    teacher = dits.by_formula(length=3)
    student = DiTDenoiser.from_teacher(teacher, latent_form="chain", latent_states=3, latent_hidden_size=16).eval()
    with torch.no_grad():
        for i, (_, weight) in enumerate(student.latent_parameters()):
            weight.copy_(torch.sin(1.3 * i + torch.arange(weight.numel())).view(weight.shape) * 0.2)
    assert mixture.is_exact(student) and not mixture.is_exact(teacher)
    x_0 = torch.arange(6).view(2, 3)
    process, latents = process_of(student.config), latents_of(student.config)
    assert latents is not None
    told = (student, process, x_0, random.keys(0, 2), latents)
    few, many = (mixture_figures(*told, num_latents=number) for number in (2, 4000))
    assert torch.equal(few["joint"], many["joint"])
    masks = torch.full_like(x_0, int(process.mask_id))  # type: ignore[attr-defined]
    logits = student(masks, torch.ones(2), latents(random.keys(3, 2), 4000))
    drawn, correlation = ops.mixture_log_prob(logits, x_0[:, None])
    assert few["joint"].tolist() == pytest.approx(drawn[:, 0].tolist(), abs=0.05)
    assert many["correlation"].tolist() == pytest.approx(correlation[:, 0].tolist(), abs=0.05)
    carried = total_correlation(student, process, 3, random.keys(0, 300), latents, num_latents=64)
    assert 0 < float(carried.mean()) < 3
