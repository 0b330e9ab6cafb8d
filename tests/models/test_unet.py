"""The pixel U-Net: shapes, the student that starts as its teacher, precision, checkpoints, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from unets import by_formula, noised

from di4c_ext import random
from di4c_ext.models import CompactDenoiser, UNetConfig, UNetDenoiser, draw_latents
from di4c_ext.ops import Logistic

B, L = 2, 3


@pytest.fixture
def t() -> Tensor:
    return torch.tensor([0.9, 0.03])


@pytest.fixture
def latents() -> Tensor:
    return draw_latents(random.keys(3, B), L, 1, law="uniform")


def close(got: Logistic, wanted: Logistic, atol: float = 1e-4) -> None:
    assert got.num_states == wanted.num_states
    torch.testing.assert_close(got.mean, wanted.mean, rtol=0, atol=atol)
    torch.testing.assert_close(got.log_scale, wanted.log_scale, rtol=0, atol=atol)


def same(got: Logistic, wanted: Logistic) -> bool:
    return torch.equal(got.mean, wanted.mean) and torch.equal(got.log_scale, wanted.log_scale)


def test_shapes(t, latents):
    teacher, student = by_formula(), by_formula(is_student=True)
    x_t = noised(B, teacher.config)
    each = x_t[:, None].expand(B, L, -1)
    with torch.no_grad():
        assert teacher(x_t, t).shape == (B, 192, 16)
        assert teacher(each, t).mean.shape == (B, L, 192)
        assert student(x_t, t, latents=latents[:, 0]).log_scale.shape == (B, 192)
        assert student(x_t, t, latents=latents).shape == (B, L, 192, 16)
        assert student(each, t, latents=latents).shape == (B, L, 192, 16)
        assert same(teacher(x_t, t, latents=latents), teacher(x_t, t)), "a teacher ignores latents"
        assert teacher(x_t[:0], t[:0]).shape == (0, 192, 16)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_states": 32, "num_channels": 1, "image_size": 28, "ch_mult": [1, 2]},
        {"num_channels": 1, "image_size": 14, "ch_mult": [1, 1, 2], "attention_scales": [1, 2]},
        {"num_channels": 2, "image_size": [5, 7], "ch_mult": [1, 2, 1], "attention_scales": []},
        {"num_res_blocks": 1, "ch_mult": [2], "attention_scales": [0], "latent_dim": 3},
    ],
)
@torch.no_grad()
def test_other_sizes(t, settings):
    model = by_formula(is_student=True, **settings)
    config = model.config
    channels, height, width = config.shape
    assert config.length == channels * height * width
    x_t = noised(B, config)
    said = model(x_t, t, draw_latents(random.keys(0, B), L, config.latent_dim, law=config.latent_law))
    assert said.shape == (B, L, config.length, config.num_states)
    assert said.mean.std() > 0.1 and said.mean.isfinite().all() and (said.mean.std(1) > 1e-4).any()


@torch.no_grad()
def test_positions_run_over_channels_then_rows_then_columns(t):
    """The answer follows x_t: nothing is transposed on the way in or out."""
    model = by_formula(num_channels=2, image_size=[4, 6], ch_mult=[1, 2])
    with torch.no_grad():
        model.net.output_modules[1].weight.zero_()
        model.net.output_modules[1].bias.zero_()
    x_t = noised(B, model.config)
    torch.testing.assert_close(model(x_t, t).mean, torch.tanh(2 * x_t / 15 - 1), rtol=0, atol=1e-6)


@torch.no_grad()
def test_latents_together_or_apart(t, latents):
    """Latents that share x_t, latents with a copy each, one latent at a time: the same to rounding."""
    student = by_formula(is_student=True)
    x_t = noised(B, student.config)
    together = student(x_t, t, latents=latents)
    assert together.mean.std(1).max() > 0.02, "the latent must matter here"
    close(student(x_t[:, None].expand(B, L, -1), t, latents=latents), together)
    for i in range(L):
        alone = student(x_t, t, latents=latents[:, i])
        close(alone, Logistic(together.mean[:, i], together.log_scale[:, i], 16))


@torch.no_grad()
def test_each_latent_its_own_x(t, latents):
    student = by_formula(is_student=True)
    x_t = noised(B * L, student.config)
    together = student(x_t.view(B, L, -1), t, latents=latents)
    rows = student(x_t, t.repeat_interleave(L), latents=latents.flatten(0, 1))
    close(Logistic(together.mean.flatten(0, 1), together.log_scale.flatten(0, 1), 16), rows)


@torch.no_grad()
def test_rows_do_not_depend_on_the_batch(t, latents):
    student = by_formula(is_student=True)
    x_t = noised(B, student.config)
    whole = student(x_t, t, latents=latents)
    one = student(x_t[1:], t[1:], latents=latents[1:])
    close(one, Logistic(whole.mean[1:], whole.log_scale[1:], 16))


@pytest.mark.parametrize("channels_last", [False, True])
@torch.no_grad()
def test_student_starts_as_its_teacher(t, latents, channels_last):
    teacher = by_formula()
    if channels_last:
        teacher.to(memory_format=torch.channels_last)
    student = UNetDenoiser.from_teacher(teacher).eval()
    assert student.config.is_student and student.config.latent_law == "uniform"
    x_t = noised(B, teacher.config)
    wanted = teacher(x_t, t)
    for i in range(L):
        assert same(student(x_t, t, latents=latents[:, i]), wanted)
    each = x_t[:, None].expand(B, L, -1)
    assert same(student(each, t, latents=latents), teacher(each, t))
    close(student(x_t, t, latents=latents), teacher(each, t))
    for weight in student.parameters():
        weight.add_(1.0)
    assert same(teacher(x_t, t), wanted), "the teacher is copied"


def test_gradient_reaches_the_latent_path_at_step_0_and_the_rest_after_it(t, latents):
    student = UNetDenoiser.from_teacher(by_formula(ch_mult=[1, 2])).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    x_t = noised(B, student.config)
    student(x_t, t, latents=latents).mean.square().sum().backward()
    entries = {name: p for name, p in student.latent_parameters() if ".dense1." in name}
    assert len(entries) == 24 and all(p.grad.abs().max() > 0 for p in entries.values())
    optimizer.step()
    optimizer.zero_grad()
    student(x_t, t, latents=latents).mean.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for _, p in student.latent_parameters())


def test_a_new_model_starts_as_published():
    torch.manual_seed(0)
    model = UNetDenoiser(UNetConfig(is_student=True, num_states=16, image_size=8, base_channels=16, ch_mult=[1, 2]))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert not module.bias.any(), name
            assert bool(module.weight.any()) != name.endswith("dense1"), name
    attention = model.net.middle_modules[1]
    assert 0.9 < attention.NIN_0.W.abs().max() / (3 * 0.1 / 32) ** 0.5 <= 1
    assert attention.NIN_3.W.abs().max() < 1e-5 and not attention.NIN_3.b.any()


@torch.no_grad()
def test_channels_last_and_bfloat16_are_close(t, latents):
    wanted_of = by_formula(is_student=True)
    x_t = noised(B, wanted_of.config)
    wanted = wanted_of(x_t, t, latents=latents)
    model = by_formula(is_student=True).to(memory_format=torch.channels_last)
    maps: list[Tensor] = []
    model.net.middle_modules[1].register_forward_hook(lambda module, args, out: maps.extend([*args, out]))
    close(model(x_t, t, latents=latents), wanted)
    # A map of one pixel is contiguous either way; the blocks before it must not have fallen back.
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)
    with torch.autocast("cpu", torch.bfloat16):
        said = model(x_t, t, latents=latents)
    assert said.mean.dtype == said.log_scale.dtype == torch.float32
    assert maps[-1].dtype == torch.bfloat16
    assert 0 < (said.mean - wanted.mean).abs().mean() < 0.02
    assert (said.log_scale - wanted.log_scale).abs().mean() < 0.05
    said = model.to(torch.bfloat16)(x_t, t, latents=latents)
    assert said.mean.dtype == torch.float32
    assert (said.mean - wanted.mean).abs().mean() < 0.03


def test_group_norms_and_attention_keep_their_precision(t, monkeypatch):
    """Whatever autocast asks for, neither is computed in half floats."""
    from torch.nn import functional

    seen: set[tuple[str, torch.dtype]] = set()
    for name in ("group_norm", "scaled_dot_product_attention"):
        real = getattr(functional, name)

        def spy(x: Tensor, *args: Any, real: Any = real, name: str = name, **kwargs: Any) -> Tensor:
            seen.update({(name, x.dtype), (name, real(x, *args, **kwargs).dtype)})
            return real(x, *args, **kwargs)

        monkeypatch.setattr(functional, name, spy)
    model = by_formula(ch_mult=[1, 2])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(noised(B, model.config), t)
    assert seen == {("group_norm", torch.float32), ("scaled_dot_product_attention", torch.float32)}


def test_checkpointing_saves_memory_and_changes_no_gradient(t, latents):
    def step(model: UNetDenoiser) -> tuple[list[Tensor], int]:
        kept = 0

        def pack(x: Tensor) -> Tensor:
            nonlocal kept
            kept += x.numel()
            return x

        torch.manual_seed(0)  # dropout
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            said = model(noised(B, model.config), t, latents=latents)
            (said.mean.square().sum() + said.log_scale.sum()).backward()
        return [p.grad for p in model.parameters()], kept

    plain, much = step(by_formula(is_student=True, dropout=0.5).train())
    model = by_formula(is_student=True, dropout=0.5).train()
    switch = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    switch()
    again, little = step(model)
    assert little < 0.5 * much
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_dropout_acts_in_training_only(t):
    model = by_formula(dropout=0.5, ch_mult=[1, 2])
    x_t = noised(B, model.config)
    with torch.no_grad():
        assert same(model(x_t, t), model(x_t, t))
        model.train()
        assert not same(model(x_t, t), model(x_t, t))
    assert UNetDenoiser.from_teacher(model, dropout=0.0).config.dropout == 0.0
    assert UNetDenoiser.from_teacher(model).config.dropout == 0.5


def test_round_trip(tmp_path: Path, t, latents):
    student = by_formula(is_student=True)
    student.save_pretrained(tmp_path)
    again = UNetDenoiser.from_pretrained(tmp_path, is_student=True)
    assert (tmp_path / "model.safetensors").is_file() and not again.training
    assert again.config.to_diff_dict() == student.config.to_diff_dict() | {"architectures": ["UNetDenoiser"]}
    x_t = noised(B, student.config)
    with torch.no_grad():
        assert same(again(x_t, t, latents=latents), student(x_t, t, latents=latents))


def test_from_teacher_folder(tmp_path: Path, t, latents):
    teacher = by_formula(ch_mult=[1, 2])
    teacher.save_pretrained(tmp_path / "teacher")
    student = UNetDenoiser.from_teacher(tmp_path / "teacher", latent_dim=2, latent_law="normal").eval()
    x_t = noised(B, teacher.config)
    with torch.no_grad():
        assert same(student(x_t, t, latents=latents[:, 0].expand(B, 2)), teacher(x_t, t))
    student.save_pretrained(tmp_path / "student")
    with pytest.raises(ValueError, match="holds a student, a teacher is wanted"):
        UNetDenoiser.from_teacher(tmp_path / "student")
    with pytest.raises(ValueError, match=r"holds a teacher, a student is wanted.*UNetDenoiser\.from_teacher"):
        UNetDenoiser.from_pretrained(tmp_path / "teacher", is_student=True)
    with pytest.raises(ValueError, match="got a student"):
        UNetDenoiser.from_teacher(student)
    config = UNetConfig.from_pretrained(tmp_path / "teacher", is_student=True)
    with pytest.raises(ValueError, match=r"net\.tlam_mix\.weight.*these are the weights of a teacher"):
        UNetDenoiser.from_pretrained(tmp_path / "teacher", config=config)
    with pytest.raises(ValueError, match=r"missing|does not fit"):
        CompactDenoiser.from_pretrained(tmp_path / "teacher")


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (None, "UNetDenoiser: a student needs latents"),
        (torch.zeros(B, 2), "latents must be"),
        (torch.zeros(B + 1, 1), "latents must be"),
        (torch.zeros(B), "latents must be"),
    ],
)
def test_latents_that_do_not_fit(t, latents, message):
    student = by_formula(is_student=True, ch_mult=[1, 2])
    with pytest.raises(ValueError, match=message):
        student(noised(B, student.config), t, latents=latents)


def test_inputs_that_do_not_fit(t):
    model = by_formula(ch_mult=[1], attention_scales=[])
    x_t = noised(B, model.config)
    with pytest.raises(ValueError, match=r"x_t must be .* D = 192, images of 3 x 8 x 8, got \(2, 191\)"):
        model(x_t[:, :-1], t)
    with pytest.raises(TypeError, match=r"x_t must be integers, levels 0\.\.15, got torch.float32"):
        model(x_t.float(), t)
    for wrong in (t[:1], t[0], 0.5):
        with pytest.raises(ValueError, match=r"t must be a tensor \(B,\) with B = 2, got"):
            model(x_t, wrong)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_states": 1}, "num_states"),
        ({"num_channels": 0}, "num_channels"),
        ({"image_size": [8, 8, 3]}, "image_size"),
        ({"image_size": -8}, "image_size"),
        ({"image_size": 4, "ch_mult": [1, 1, 1, 1]}, "cannot be halved 3 times"),
        ({"ch_mult": []}, "ch_mult"),
        ({"ch_mult": [1, 0.5]}, "ch_mult"),
        ({"attention_scales": [4]}, "attention_scales"),
        ({"time_embed_dim": 7}, "time_embed_dim"),
        ({"time_scale": 0.0}, "time_scale"),
        ({"latent_scale": float("inf")}, "latent_scale"),
        ({"dropout": 1.0}, "dropout"),
        ({"latent_dim": 0}, "latent_dim"),
        ({"latent_law": "gaussian"}, "latent_law"),
    ],
)
def test_config_is_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig(**settings)


@pytest.mark.parametrize("base_channels", [2, 18, 144])
def test_channels_that_do_not_fall_into_groups_are_refused(base_channels):
    with torch.device("meta"), pytest.raises(ValueError, match=r"feature maps do not fall into .* equal groups"):
        UNetDenoiser(UNetConfig(base_channels=base_channels, image_size=8))
