"""The pixel U-Net beside the published one: names, sizes and numbers."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor
from unets import by_formula, noised, shared

from di4c_ext.models import UNetConfig, UNetDenoiser

PARAMETERS = {False: 35_749_766, True: 39_066_630}
TENSORS = {False: 328, True: 384}


@cache
def published(is_student: bool) -> dict[str, Tensor]:
    """The weights of the published size, without numbers."""
    with torch.device("meta"):
        return dict(UNetDenoiser(UNetConfig(is_student=is_student)).named_parameters())


@pytest.mark.parametrize("is_student", [False, True])
def test_published_size(is_student):
    weights = published(is_student)
    assert (len(weights), sum(w.numel() for w in weights.values())) == (TENSORS[is_student], PARAMETERS[is_student])
    assert weights["net.temb_modules.0.weight"].shape == (512, 128)
    assert weights["net.upsampling_modules.12.nin.W"].shape == (384, 256)
    assert weights["net.output_modules.1.weight"].shape == (6, 128, 3, 3)
    if is_student:
        assert weights["net.h_t_lam_mix.weight"].shape == (128, 512)
        assert sum(name.endswith("dense1.weight") for name in weights) == 22
        added = {name for name in weights if UNetDenoiser.is_latent_name(name)}
        assert added == set(weights) - set(published(False))


@pytest.mark.parametrize("is_student", [False, True])
def test_published_names_shapes_and_order(is_student):
    lines = shared(f"reference/keys/pixels_{'student' if is_student else 'teacher'}.txt").read_text().splitlines()
    wanted = [line.removesuffix(" float32") for line in lines if not line.startswith("#")]
    assert [f"{name} {tuple(weight.shape)}" for name, weight in published(is_student).items()] == wanted


def fixture() -> tuple[UNetDenoiser, UNetDenoiser, dict[str, Tensor]]:
    found = torch.load(shared("fixtures/pixels.pt"), weights_only=True)
    told, shape = found["config"], found["data"]["shape"]
    models = []
    for state, is_student in (("teacher_state", False), ("student_state", True)):
        config = UNetConfig(
            num_states=found["data"]["S"],
            num_channels=shape[0],
            image_size=shape[1],
            base_channels=told["ch"],
            ch_mult=told["ch_mult"],
            num_res_blocks=told["num_res_blocks"],
            attention_scales=[told["scale_count_to_put_attn"]],
            time_embed_dim=told["time_embed_dim"],
            time_scale=told["time_scale_factor"],
            is_student=is_student,
        )
        model = UNetDenoiser(config).eval()
        assert list(model.state_dict()) == list(found[state])
        model.load_state_dict(found[state])
        models.append(model)
    return models[0], models[1], found["draws_and_terms"]


@torch.no_grad()
def test_the_published_implementation_says_the_same():
    teacher, student, draws = fixture()
    images, each = draws["x_t"].shape[0], draws["lams"].shape[0] // draws["x_t"].shape[0]
    lead = (images, each)
    said = {
        "p0t_teacher": teacher(draws["x_t"], draws["ts"]),
        "p0mint_teacher": teacher(draws["x_mint"], draws["mints"]),
        "log_p0t_student_lam": student(draws["x_t"], draws["ts"], latents=draws["lams"].view(*lead, 1)),
        "log_p0mint_student_lam": student(draws["x_mint"], draws["mints"], latents=draws["mlams"]),
        "p0u_student_lam": student(draws["x_u"].view(*lead, -1), draws["us"], latents=draws["lams_u"].view(*lead, 1)),
    }
    for name, logistic in said.items():
        got = logistic.logits().log_softmax(-1).reshape(draws[name].shape)
        wanted = draws[name] if name.startswith("log") else draws[name].log()
        # Below it the published head loses what it says to cancellation: its floor is 1e-6, a float's step 6e-8.
        likely = wanted > -4.6
        assert likely.float().mean() > 0.3
        torch.testing.assert_close(got[likely], wanted[likely], rtol=0, atol=1e-5 * wanted.abs().max().item())
        torch.testing.assert_close(got.exp(), wanted.exp(), rtol=0, atol=5e-6)


# Mean and log-scale of positions 0, 63, 64, 130, 191; weights, noise and times by formula. The network that says this
# agrees with the published one on the weights of pixels.pt.
PLACES = [0, 63, 64, 130, 191]
TEACHER = (
    [[-0.356766, 0.516041, -0.513381, 0.802940, 0.367284], [-0.213435, 0.299081, -0.684176, 0.557813, 0.464048]],
    [[-0.442281, -0.512345, -0.187753, -0.159104, -0.008073], [-0.119214, -0.610549, -0.196897, -0.273258, -0.245535]],
)
STUDENT = (  # latents 0.25 and 0.75 of the first image, 0 and 1 of the second
    [
        [[-0.569037, -0.104328, -0.609318, 0.587902, 0.359772], [-0.577310, -0.134748, -0.637480, 0.464853, 0.331504]],
        [[-0.520854, -0.067043, -0.669495, 0.511580, 0.313455], [-0.631659, -0.147496, -0.607390, 0.537156, 0.328740]],
    ],
    [
        [[0.269208, -0.344792, 0.032319, 0.171729, -0.002492], [0.359863, -0.309749, 0.120585, 0.446607, -0.070970]],
        [[0.460645, -0.254988, 0.046264, 0.345109, -0.047781], [0.334694, -0.282077, 0.077228, 0.405725, -0.094961]],
    ],
)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 2e-6), (torch.float32, 1e-4)])
@torch.no_grad()
def test_literal_numbers(dtype, atol):
    t = torch.tensor([0.9, 0.03])
    latents = torch.tensor([[[0.25], [0.75]], [[0.0], [1.0]]], dtype=torch.float64)
    for is_student, wanted in ((False, TEACHER), (True, STUDENT)):
        model = by_formula(is_student=is_student).to(dtype)
        said = model(noised(2, model.config), t, latents if is_student else None)
        for got, numbers in zip((said.mean, said.log_scale), wanted, strict=True):
            assert got.dtype == dtype
            expected = torch.tensor(numbers, dtype=dtype)
            torch.testing.assert_close(got[..., PLACES], expected, rtol=0, atol=atol)
