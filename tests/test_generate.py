"""Sampling a model by its config: which sampler runs, on how many evaluations, and what is refused in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from unets import SMALL, by_formula

from di4c_ext import random, sampler
from di4c_ext.generate import SamplingArguments, check_sampling, generate, sampler_of
from di4c_ext.models import CompactConfig, CompactDenoiser, UNetConfig, UNetDenoiser, draw_latents
from di4c_ext.process import AbsorbingProcess, GaussianProcess, UniformProcess

GREY = {"num_channels": 1}
UNIFORM = GREY | {"process": {"name": "uniform"}}


@pytest.fixture(scope="module")
def teacher() -> UNetDenoiser:
    return by_formula(**GREY)


@pytest.fixture(scope="module")
def student() -> UNetDenoiser:
    return by_formula(**GREY, is_student=True)


@pytest.fixture(scope="module")
def masked() -> CompactDenoiser:
    torch.manual_seed(0)
    config = CompactConfig(num_states=5, length=9, hidden_size=16, num_blocks=1, is_student=True, latent_dim=3)
    return CompactDenoiser(config).eval()


def evaluations(model: torch.nn.Module) -> list[int]:
    """Counts the calls of a network, by the number of samples in each."""
    calls: list[int] = []
    model.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    return calls


def one_latent(config: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda keys: draw_latents(keys, 1, config.latent_dim, law=getattr(config, "latent_law", "normal"))[:, 0]


def test_masked_models_are_sampled_as_ever(masked: CompactDenoiser) -> None:
    process, keys = AbsorbingProcess(5), random.keys(3, 7)
    x = process.prior((7, 9), keys)
    expected = sampler.sample_ancestral(
        masked, process, x, sampler.times(4), keys, latents=one_latent(masked.config), temperature=0.7
    )
    found = generate(masked, 4, 7, seed=3, batch_size=2, options=SamplingArguments(temperature=0.7))
    assert sampler_of(masked) == "ancestral" and torch.equal(found, expected)


def test_masked_models_can_be_guided(masked: CompactDenoiser) -> None:
    torch.manual_seed(1)
    teacher = CompactDenoiser(CompactConfig(num_states=5, length=9, hidden_size=16, num_blocks=1)).eval()
    process, keys = AbsorbingProcess(5), random.keys(0, 6)
    both = sampler.GuidedDenoiser(masked, teacher, 2.0)
    x, latents = process.prior((6, 9), keys), one_latent(masked.config)
    expected = sampler.sample_ancestral(both, process, x, sampler.times(3), keys, latents=latents)
    options = SamplingArguments(guidance=2.0)
    assert torch.equal(generate(masked, 3, 6, seed=0, batch_size=4, teacher=teacher, options=options), expected)


def test_long_sampling_shows_a_bar(
    teacher: UNetDenoiser, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(teacher, 2, 3, seed=0)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("di4c_ext.generate.SILENT", 0)
    generate(teacher, 2, 3, seed=0, batch_size=2)
    assert "sampling:   0%|          | 0/4" in capsys.readouterr().err  # two batches of two evaluations


@pytest.mark.parametrize("options", [{}, {"final": "draw"}, {"last_latents": 3}, {"temperature": 0.5}])
@pytest.mark.parametrize("num_steps", [1, 4])
def test_pixel_models_take_the_analytic_sampler(student: UNetDenoiser, num_steps: int, options: dict[str, Any]) -> None:
    process, keys = GaussianProcess(16), random.keys(3, 5)
    x = process.prior((5, 64), keys)
    grid = sampler.analytic_times(num_steps)
    expected = sampler.sample_analytic(student, process, x, grid, keys, latents=one_latent(student.config), **options)
    found = generate(student, num_steps, 5, seed=3, batch_size=2, options=SamplingArguments(**options))
    assert sampler_of(student) == "analytic" and torch.equal(found, expected)


def test_hybrid_guidance_and_leaps_are_the_samplers(student: UNetDenoiser, teacher: UNetDenoiser) -> None:
    process, keys, grid = GaussianProcess(16), random.keys(1, 4), sampler.analytic_times(5)
    x, latents = process.prior((4, 64), keys), one_latent(student.config)
    hybrid = sampler.sample_hybrid(student, teacher, process, x, grid, keys, latents=latents, teacher_evaluations=2)
    found = generate(student, 5, 4, seed=1, batch_size=3, teacher=teacher, options=SamplingArguments(hybrid=2))
    assert torch.equal(found, hybrid)
    both = sampler.GuidedDenoiser(student, teacher, 1.5)
    guided = sampler.sample_analytic(both, process, x, grid, keys, latents=latents)
    found = generate(student, 5, 4, seed=1, batch_size=3, teacher=teacher, options=SamplingArguments(guidance=1.5))
    assert torch.equal(found, guided) and not torch.equal(found, hybrid)
    leaps = sampler.sample_tau_leaping(teacher, process, x, grid, keys)
    found = generate(teacher, 5, 4, seed=1, batch_size=3, options=SamplingArguments(sampler="tau_leaping"))
    assert torch.equal(found, leaps)


def test_steps_are_evaluations_of_the_network() -> None:
    student, teacher = by_formula(**GREY, is_student=True), by_formula(**GREY)
    mine, theirs = evaluations(student), evaluations(teacher)
    for options, expected in (
        ({}, (6, 0)),
        ({"sampler": "ancestral"}, (6, 0)),
        ({"last_latents": 3}, (8, 0)),
        ({"hybrid": 2}, (4, 2)),
        ({"hybrid": 6}, (0, 6)),
        ({"guidance": 2.0}, (6, 6)),
    ):
        arguments = SamplingArguments(**options)
        generate(student, 6, 2, seed=0, teacher=teacher if arguments.wants_teacher else None, options=arguments)
        assert (len(mine), len(theirs)) == expected, options
        mine.clear(), theirs.clear()
    generate(teacher, 6, 2, seed=0, options=SamplingArguments(sampler="tau_leaping"))
    assert len(theirs) == 6


@pytest.mark.parametrize("num_steps", [1, 3])
def test_a_sample_is_its_own(student: UNetDenoiser, num_steps: int) -> None:
    """The batch size and the number of samples change none of them; the seed and the number of steps change all."""
    whole = generate(student, num_steps, 6, seed=0)
    assert torch.equal(generate(student, num_steps, 4, seed=0, batch_size=3), whole[:4])
    assert whole.shape == (6, 64) and int(whole.min()) >= 0 and int(whole.max()) < 16
    for other in (generate(student, num_steps, 6, seed=1), generate(student, num_steps + 1, 6, seed=0)):
        assert bool((other != whole).any(1).all())


def test_uniform_diffusion() -> None:
    model = by_formula(**UNIFORM, is_student=True)
    process, keys = UniformProcess(16), random.keys(0, 3)
    x = process.prior((3, 64), keys)
    expected = sampler.sample_analytic(
        model, process, x, sampler.analytic_times(3), keys, latents=one_latent(model.config)
    )
    assert torch.equal(generate(model, 3, 3, seed=0), expected)


def test_a_u_net_on_a_cpu_samples_in_channels_last(teacher: UNetDenoiser) -> None:
    model = UNetDenoiser(UNetConfig(**SMALL)).eval()
    generate(model, 1, 1, seed=0)
    weight = model.net.downsampling_modules[0].conv0.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"sampler": "euler"}, "--sampler 'euler': must be one of auto, ancestral, analytic, tau_leaping"),
    ({"temperature": float("nan")}, "--temperature nan: must be finite"),
    ({"temperature": -1.0}, "--temperature -1.0: must be finite"),
    ({"final": "mean"}, "--final 'mean': must be one of argmax, draw"),
    ({"last_latents": 0}, "--last_latents 0: must be at least 1"),
    ({"hybrid": -1}, "--hybrid -1: must be at least 0"),
    ({"guidance": float("inf")}, "--guidance inf: must be finite"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_options_that_nothing_has(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as told:
        SamplingArguments(**options)
    assert str(told.value).startswith(message)


def test_options_that_do_not_fit(student: UNetDenoiser, teacher: UNetDenoiser, masked: CompactDenoiser) -> None:
    none: Any = None
    uniform = by_formula(**UNIFORM)
    for model, other, options, message in (
        (student, none, {"hybrid": 2}, "--hybrid 2: needs the teacher; name its folder by --teacher"),
        (student, none, {"guidance": 1.5}, "--guidance 1.5: needs the teacher"),
        (teacher, none, {"hybrid": 2}, "--hybrid 2: wants a student beside its teacher, the model is a teacher"),
        (student, teacher, {"hybrid": 5}, "--hybrid 5: more evaluations of the teacher than the 4 there are"),
        (student, teacher, {"hybrid": 1, "guidance": 2.0}, "give one of them"),
        (
            student,
            teacher,
            {"hybrid": 1, "last_latents": 2},
            "not for a hybrid, whose last evaluation is the teacher's",
        ),
        (student, teacher, {"hybrid": 1, "sampler": "ancestral"}, "--hybrid 1: is for the analytic sampler"),
        (teacher, none, {"last_latents": 2}, "--last_latents 2: a teacher has no latents"),
        (student, none, {"last_latents": 2, "sampler": "ancestral"}, "is for the analytic sampler, not for ancestral"),
        (masked, none, {"sampler": "tau_leaping"}, "--sampler tau_leaping: this model is masked"),
        (masked, none, {"sampler": "analytic", "last_latents": 2}, "--last_latents 2: is for pixel models"),
        (student, none, {"sampler": "first_hitting"}, "--sampler first_hitting: is for masked models"),
        (student, none, {"skip_idle": True}, "--skip_idle: is for the ancestral sampler of masked models"),
        (teacher, none, {"sampler": "tau_leaping", "top_p": 0.9}, "--top_p 0.9: tau_leaping has none"),
        (masked, none, {"final": "draw"}, "--final draw: is for the analytic sampler, not for ancestral"),
        (student, none, {"sampler": "tau_leaping"}, "is for teachers of GaussianProcess, this is a student of Gau"),
        (uniform, none, {"sampler": "tau_leaping"}, "is for teachers of GaussianProcess, this is a teacher of Uniform"),
        (teacher, none, {"sampler": "tau_leaping", "temperature": 0.5}, "--temperature 0.5: tau_leaping has none"),
    ):
        with pytest.raises(ValueError) as told:
            check_sampling(model, 4, teacher=other, options=SamplingArguments(**options))
        assert message in str(told.value), options
        with pytest.raises(ValueError):
            generate(model, 4, 2, seed=0, teacher=other, options=SamplingArguments(**options))
    for numbers in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            generate(teacher, numbers[0], numbers[1], seed=0, batch_size=numbers[2])


def test_teachers_that_do_not_fit(student: UNetDenoiser, teacher: UNetDenoiser, masked: CompactDenoiser) -> None:
    for other, message in (
        (by_formula(**GREY | {"num_states": 8}), "has S = 8, D = 64, the student S = 16, D = 64"),
        (by_formula(), "has S = 16, D = 192, the student S = 16, D = 64"),
        (by_formula(**UNIFORM), "was trained for UniformProcess"),
        (by_formula(**GREY, process={"name": "gaussian", "rate_sigma": 3}), "rate_sigma=3.0"),
        (student, "got a student as the model and a student as its teacher"),
    ):
        with pytest.raises(ValueError, match="--teacher: ") as told:
            check_sampling(student, 4, teacher=other, options=SamplingArguments(hybrid=1))
        assert message in str(told.value)
