"""The chain's mixture: its sum by enumeration of all paths, the law of a drawn path, and the student that has one."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from dits import SMALL, by_formula, drawn, noised
from tiny import chi_square_z
from torch import Tensor

from di4c_ext import random
from di4c_ext.models import DiTConfig, DiTDenoiser
from di4c_ext.models.chain import Chain
from di4c_ext.models.latent import draw_latents
from di4c_ext.process import AbsorbingProcess
from di4c_ext.sampler import sample_ancestral, times

R = 3


def student(**settings: Any) -> DiTDenoiser:
    """A student in float64 over 5 of 4 tokens, whose chain's states differ and whose laws are not sharp."""
    torch.manual_seed(0)
    teacher = DiTDenoiser(DiTConfig(**SMALL | {"length": 5, "vocab_size": 5}))
    for weight in teacher.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    made: Any = DiTDenoiser.from_teacher(
        teacher, latent_form="chain", latent_states=R, latent_hidden_size=12, **settings
    )
    for weight in made.backbone.latent_chain.parameters():
        torch.nn.init.normal_(weight, std=0.8)
    head = made.backbone.output_layer.linear
    torch.nn.init.normal_(head.weight, std=0.05)  # or one token has all probability
    torch.nn.init.zeros_(head.bias)
    double: DiTDenoiser = made.double().eval()
    return double


def enumerated(model: Any, x_t: Tensor, x_s: Tensor) -> Tensor:
    """log sum_z p(z) prod_d p^d(x_s^d | z) over the positions that x_s tells, path by path."""
    h = model.backbone(x_t, torch.zeros(1), None, None)
    chain, head = model.backbone.latent_chain, model.backbone.output_layer.linear
    steps = chain.transitions(h)
    new = (x_t == model.config.mask_id) & (x_s != model.config.mask_id)
    total = torch.zeros(len(x_t), dtype=torch.float64)
    for z in itertools.product(range(R), repeat=x_t.shape[1]):
        states = chain.chosen(h, torch.tensor(z).expand(len(x_t), 1, -1))[:, 0]
        log_p = (states @ head.weight[:-1].T + head.bias[:-1]).log_softmax(-1)
        said = log_p.gather(-1, torch.where(new, x_s, 0)[..., None])[..., 0]
        path = steps[:, 0, 0, z[0]] + sum(steps[:, d, z[d - 1], z[d]] for d in range(1, len(z)))
        total = total + (path + (said * new).sum(1)).exp()
    return total.log()


def states(length: int = 5) -> tuple[Tensor, Tensor]:
    """x_t with some masks, x_s with some of them gone; the last row's step tells nothing."""
    mask = 4
    clean = torch.arange(3 * length).view(3, length) % 4
    x_t = torch.where(torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 0, 1]], dtype=torch.bool), mask, clean)
    x_s = torch.where(torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [0, 1, 1, 0, 1]], dtype=torch.bool), mask, clean)
    return x_t[:, :length], x_s[:, :length]


def test_likelihood_and_its_gradient_are_those_of_all_paths() -> None:
    model, (x_t, x_s) = student(), states()
    found = model(x_t, torch.ones(3), x_s=x_s)
    wanted = enumerated(model, x_t, x_s)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    assert abs(found[2].item()) <= 1e-12
    weights = list(model.parameters())
    for own, by_paths in zip(
        *(torch.autograd.grad(x.sum(), weights, allow_unused=True) for x in (found, wanted)), strict=True
    ):
        if by_paths is None:
            assert own is None
        else:
            torch.testing.assert_close(own, by_paths, rtol=1e-8, atol=1e-10)


def test_probabilities_of_all_sequences_add_up_to_one() -> None:
    model, length = student(), 3
    x_0 = torch.cartesian_prod(*[torch.arange(4)] * length)
    x_t = torch.full_like(x_0, 4)
    total = model(x_t, torch.ones(len(x_0)), x_s=x_0).logsumexp(0)
    assert total.item() == pytest.approx(0.0, abs=1e-12)


def test_steps_that_reveal_nothing_are_certain_and_have_a_gradient() -> None:
    model, (x_t, _) = student(), states()
    found = model(x_t, torch.ones(3), x_s=x_t)
    assert found.abs().max() < 1e-12
    found.sum().backward()
    assert all(weight.grad is not None for weight in model.parameters()), "processes wait for each other's gradients"


def test_marginals_are_sums_of_the_likelihood() -> None:
    model, length = student(), 3
    x_0 = torch.cartesian_prod(*[torch.arange(4)] * length)
    x_t = torch.full_like(x_0, 4)
    law = model(x_t, torch.ones(len(x_0)), x_s=x_0).exp()
    found = model.log_marginals(x_t[:1]).exp()[0]
    for d in range(length):
        wanted = torch.stack([law[x_0[:, d] == v].sum() for v in range(4)])
        torch.testing.assert_close(found[d], wanted, rtol=0, atol=1e-12)
    together = sum(found[d, x_0[:, d]].log() for d in range(length))
    assert (law * (law.log() - together)).sum() > 0.001, "positions that owe each other nothing would pass as well"


def test_mean_over_drawn_latents_is_the_likelihood() -> None:
    model, (x_t, x_s) = student(), states()
    number = 20_000
    latents = draw_latents(random.keys(0, 3), number, 5, law="uniform", independent=True).double()
    with torch.no_grad():
        log_p = model(x_t, torch.ones(3), latents).log_softmax(-1)
        exact = model(x_t, torch.ones(3), x_s=x_s).exp()
    new = (x_t == 4) & (x_s != 4)
    said = log_p.gather(-1, torch.where(new, x_s, 0)[:, None, :, None].expand(-1, number, -1, -1))[..., 0]
    p = (said * new[:, None]).sum(-1).exp()
    error = p.std(1) / math.sqrt(number)
    assert bool((error[:2] > 0).all()) and bool(((p.mean(1) - exact).abs() <= 4 * error + 1e-12).all())


def test_law_of_a_drawn_path_is_the_chains() -> None:
    torch.manual_seed(1)
    chain, h = Chain(8, R, 6).double(), torch.randn(1, 4, 8, dtype=torch.float64)
    torch.nn.init.normal_(chain.transition.weight, std=1.5)
    steps = chain.transitions(h)[0].exp()
    law = steps[0, 0]
    for d in range(1, 4):
        law = (law[..., None] * steps[d]).flatten()
        law = law.view(-1, R) if d < 3 else law
    latents = random.uniform(random.keys(2, 1), 30_000 * 4).view(1, 30_000, 4)
    z = chain.path(h, latents)[0]
    count = torch.bincount((z * torch.tensor([27, 9, 3, 1])).sum(-1), minlength=81)
    often = law * 30_000 > 5.5
    rest = torch.tensor([count[~often].sum()])
    assert (
        chi_square_z(torch.cat([count[often], rest]), torch.cat([law[often], law[~often].sum()[None]])) < 4
        and often.sum() > 20
    )


def test_latents_at_the_ends_of_the_unit_interval_are_paths_too() -> None:
    chain, h = Chain(8, R, 6), torch.randn(2, 4, 8)
    z = chain.path(h, torch.tensor([0.0, 1.0 - 2**-24, 1.0])[:, None].expand(2, 3, 4))
    assert bool((z[:, 0] == 0).all()) and bool((z[:, 1:] == R - 1).all())


def test_network_runs_once_for_all_latents() -> None:
    model, (x_t, _) = student(), states()
    rows: list[int] = []
    model.backbone.blocks[0].register_forward_hook(lambda module, told, made: rows.append(len(made)))
    latents = drawn(3, 7, 5).double()
    every = model(x_t, torch.ones(3), latents)
    assert rows == [3] and every.shape == (3, 7, 5, 4)
    for number in range(7):
        torch.testing.assert_close(model(x_t, torch.ones(3), latents[:, number]), every[:, number], rtol=0, atol=1e-12)
    own = model(x_t[:, None].expand(-1, 7, -1), torch.ones(3), latents)
    torch.testing.assert_close(own, every, rtol=0, atol=1e-12)


def test_positions_and_hidden_states_say_the_same() -> None:
    model, (x_t, _) = student(), states()
    latents, at = drawn(3, 2, 5).double(), torch.tensor([[0, 3], [4, 1], [2, 2]])
    every = model(x_t, torch.ones(3), latents)
    some = model(x_t, torch.ones(3), latents, positions=at)
    torch.testing.assert_close(some, every.gather(2, at[:, None, :, None].expand(-1, 2, -1, 4)), rtol=0, atol=1e-12)
    hidden = model(x_t, torch.ones(3), latents, return_hidden=True)
    torch.testing.assert_close(hidden.logits(), every, rtol=0, atol=1e-12)


def test_shorter_sequences_use_the_first_numbers() -> None:
    model = student()
    x_t = torch.full((2, 3), 4)
    latents = drawn(2, 4, 5).double()
    changed = latents.clone()
    changed[..., 3:] = 0.5
    assert torch.equal(model(x_t, torch.ones(2), latents), model(x_t, torch.ones(2), changed))


def test_sampler_makes_what_one_step_says() -> None:
    """Of two positions the joint law of one ancestral step is the exact one."""
    model, process, number = student(), AbsorbingProcess(4), 40_000
    x = torch.full((number, 2), 4)
    latents = partial(draw_latents, latent_dim=5, law="uniform")
    with torch.no_grad():
        made = sample_ancestral(
            model, process, x, times(1), random.keys(5, number), latents=lambda keys: latents(keys, 1)[:, 0].double()
        )
        pairs = torch.cartesian_prod(torch.arange(4), torch.arange(4))
        law = model(torch.full((16, 2), 4), torch.ones(16), x_s=pairs).exp()
    count = torch.bincount(made[:, 0] * 4 + made[:, 1], minlength=16)
    product = law.view(4, 4).sum(1)[:, None] * law.view(4, 4).sum(0)
    assert (product.flatten() - law).abs().sum() > 0.01  # there is something for a product to miss
    assert chi_square_z(count, law) < 4


def test_saved_and_opened_again(tmp_path: Any) -> None:
    model = student().float()
    model.save_pretrained(tmp_path)
    again = DiTDenoiser.from_pretrained(tmp_path, is_student=True)
    assert again.config.has_chain and again.config.latent_dim == 5
    for (name, own), (_, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(own, other), name
    assert {name.split(".")[1] for name, _ in again.latent_parameters()} == {"latent_chain"}


def test_a_new_one_is_near_its_teacher() -> None:
    teacher = by_formula()
    torch.manual_seed(0)
    made = DiTDenoiser.from_teacher(teacher, latent_form="chain").eval()
    x_t = noised(4, teacher.config)
    latents = draw_latents(random.keys(0, 4), 8, made.config.latent_dim, law="uniform")
    with torch.no_grad():
        p = made(x_t, torch.ones(4), latents).softmax(-1)
        known = teacher(x_t, torch.ones(4)).softmax(-1)[:, None]
    away = 0.5 * (p - known).abs().sum(-1)
    assert away.max() > 0 and away.mean() < 0.2


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"latent_dim": 3}, "latent_dim 3"),
        ({"latent_law": "normal"}, "'normal'"),
        ({"latent_states": 0}, "latent_states"),
    ],
)
def test_settings_that_no_chain_has_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        DiTDenoiser.from_teacher(by_formula(), latent_form="chain", **settings)


def test_likelihood_of_what_has_no_chain_is_refused() -> None:
    teacher = by_formula()
    x = noised(2, teacher.config)
    for model in (teacher, DiTDenoiser.from_teacher(teacher)):
        with pytest.raises(ValueError, match="latent_form 'chain'"):
            model(x, torch.ones(2), x_s=x)
    with pytest.raises(ValueError, match="log_marginals"):
        teacher.log_marginals(x)
    chain = DiTDenoiser.from_teacher(teacher, latent_form="chain")
    with pytest.raises(ValueError, match="x_s"):
        chain(x, torch.ones(2), x_s=x[:, :4])
