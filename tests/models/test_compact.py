"""The compact denoiser: shapes, the student that starts as its teacher, checkpoints, errors."""

from pathlib import Path

import pytest
import torch

from di4c_ext import random
from di4c_ext.models import CompactConfig, CompactDenoiser, draw_latents

B, L, C, D, S = 5, 4, 3, 12, 6


def made(**settings) -> CompactDenoiser:
    """A denoiser whose every parameter is away from its start, so that no branch is silent by accident."""
    torch.manual_seed(0)
    config = {"num_states": S, "length": D, "hidden_size": 32, "num_blocks": 2} | settings
    model = CompactDenoiser(CompactConfig(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def student_of(teacher: CompactDenoiser) -> CompactDenoiser:
    return CompactDenoiser.from_teacher(teacher, latent_dim=C, latent_hidden_size=16).eval()


@pytest.fixture
def x_t() -> torch.Tensor:
    return torch.randint(S + 1, (B, D), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def t() -> torch.Tensor:
    return torch.linspace(0.1, 1.0, B)


@pytest.fixture
def latents() -> torch.Tensor:
    return draw_latents(random.keys(3, B), L, C)


def test_shapes(x_t, t, latents):
    teacher = made()
    student = student_of(teacher)
    assert teacher(x_t, t).shape == (B, D, S)
    assert student(x_t, t, latents=latents[:, 0]).shape == (B, D, S)
    assert student(x_t, t, latents=latents).shape == (B, L, D, S)
    assert student(x_t[:, None].expand(B, L, D), t, latents=latents).shape == (B, L, D, S)


def test_teacher_ignores_latents(x_t, t, latents):
    teacher = made()
    assert torch.equal(teacher(x_t, t, latents=latents), teacher(x_t, t))


@pytest.mark.parametrize("ordinal", [True, False])
@pytest.mark.parametrize("mask_id", [None, 2])
def test_student_starts_as_its_teacher(x_t, t, latents, ordinal, mask_id):
    teacher = made(ordinal=ordinal, mask_id=mask_id, augmentation_dim=2)
    x_t = x_t.clamp(max=teacher.config.num_inputs - 1)
    student = student_of(teacher)
    wanted = teacher(x_t, t)
    assert torch.equal(student(x_t, t, latents=latents[:, 0]), wanted)
    # A matrix product of B * L rows may round unlike one of B rows; within it every latent gives the same bits.
    for x in (x_t, x_t[:, None].expand(B, L, D)):
        logits = student(x, t, latents=latents)
        torch.testing.assert_close(logits, wanted[:, None].expand_as(logits), rtol=1e-5, atol=1e-5)
    rows = teacher(x_t[:, None].expand(B, L, D).reshape(B * L, D), t).view(B, L, D, S)
    assert torch.equal(student(x_t[:, None].expand(B, L, D), t, latents=latents), rows)


def test_student_copies_its_teacher(x_t, t, latents):
    teacher = made()
    before = teacher(x_t, t)
    student = student_of(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    assert torch.equal(teacher(x_t, t), before)


def test_gradient_reaches_the_latent_path_at_step_0_and_the_rest_after_it(x_t, t, latents):
    student = student_of(made()).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    # The latent is silent at first: its projections learn at once, its embedding from the second step on.
    student(x_t, t, latents=latents).log_softmax(-1)[..., 0].sum().backward()
    assert all(layer.weight.grad.abs().max() > 0 for layer in student.latent_in)
    optimizer.step()
    student(x_t, t, latents=latents).log_softmax(-1)[..., 0].sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in student.latent_embedding.parameters())


def test_shared_work_gives_the_same_logits(x_t, t, latents):
    student = made(is_student=True, latent_dim=C, latent_hidden_size=16)
    together = student(x_t, t, latents=latents)
    apart = torch.stack([student(x_t, t, latents=latents[:, i]) for i in range(L)], 1)
    assert (together.std(1) > 1e-3).any(), "the latent must matter here"
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    repeated = student(x_t[:, None].expand(B, L, D), t, latents=latents)
    torch.testing.assert_close(together, repeated, rtol=1e-4, atol=1e-5)


def test_the_gate_follows_the_share_of_masked_positions(t, latents):
    """Without masks the latent is silent, the more of them the louder it is; a gate of 0 lets it speak always."""
    gated = made(is_student=True, latent_dim=C, latent_gate=1.0)
    spread = []
    for masked in (0, D // 2, D):
        x_t = torch.zeros(B, D, dtype=torch.int64)
        x_t[:, :masked] = S
        spread.append(gated(x_t, t, latents=latents).std(1).mean().item())
    assert spread[0] < 1e-6 < 1e-3 < spread[1] < spread[2]
    always = made(is_student=True, latent_dim=C, latent_gate=0.0)
    assert always(torch.zeros(B, D, dtype=torch.int64), t, latents=latents).std(1).mean() > 1e-3


def test_latent_parameters_are_those_the_teacher_lacks():
    teacher = made()
    student = student_of(teacher)
    names = {name for name, _ in student.latent_parameters()}
    assert names == set(dict(student.named_parameters())) - set(dict(teacher.named_parameters()))
    assert not list(teacher.latent_parameters())


def test_augmentation_of_zero_is_none(x_t, t):
    teacher = made(augmentation_dim=2)
    assert torch.equal(teacher(x_t, t, augmentation=torch.zeros(B, 2)), teacher(x_t, t))
    assert not torch.allclose(teacher(x_t, t, augmentation=torch.ones(B, 2)), teacher(x_t, t))


def test_round_trip(tmp_path: Path, x_t, t, latents):
    student = made(is_student=True, latent_dim=C, latent_hidden_size=16)
    student.save_pretrained(tmp_path)
    again = CompactDenoiser.from_pretrained(tmp_path, is_student=True)
    assert (tmp_path / "model.safetensors").is_file()
    assert not again.training
    assert torch.equal(again(x_t, t, latents=latents), student(x_t, t, latents=latents))


def test_from_teacher_folder(tmp_path: Path, x_t, t, latents):
    teacher = made()
    teacher.save_pretrained(tmp_path)
    student = CompactDenoiser.from_teacher(tmp_path, latent_dim=C).eval()
    assert torch.equal(student(x_t, t, latents=latents[:, 0]), teacher(x_t, t))


@pytest.mark.parametrize("is_student", [True, False])
def test_the_wrong_kind_of_checkpoint_is_refused(tmp_path: Path, is_student):
    model = made(is_student=is_student, latent_dim=C)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"holds a {'student' if is_student else 'teacher'}"):
        CompactDenoiser.from_pretrained(tmp_path, is_student=not is_student)
    config = CompactConfig.from_pretrained(tmp_path)
    config.is_student = not is_student
    with pytest.raises(ValueError, match=r"latent_in\.0\.weight.*these are the weights of a"):
        CompactDenoiser.from_pretrained(tmp_path, config=config)
    if is_student:
        with pytest.raises(ValueError, match="is wanted"):
            CompactDenoiser.from_teacher(tmp_path)
        with pytest.raises(ValueError, match="got a student"):
            CompactDenoiser.from_teacher(model)


def test_missing_unexpected_and_misshapen_tensors_are_named(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    made().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    state["stray.weight"] = torch.zeros(2)
    del state["head.bias"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing \['head.bias'\], unexpected \['stray.weight'\]"):
        CompactDenoiser.from_pretrained(tmp_path)
    wider = CompactConfig.from_pretrained(tmp_path)
    wider.hidden_size = 48
    with pytest.raises(ValueError, match="does not fit its config"):
        CompactDenoiser.from_pretrained(tmp_path, config=wider)


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (None, "a student needs latents"),
        (torch.zeros(B, C + 1), "latents must be"),
        (torch.zeros(B + 1, C), "latents must be"),
        (torch.zeros(C), "latents must be"),
    ],
)
def test_latents_that_do_not_fit(x_t, t, latents, message):
    with pytest.raises(ValueError, match=message):
        student_of(made())(x_t, t, latents=latents)


def test_each_latent_its_own_x_wants_as_many_of_both(x_t, t, latents):
    with pytest.raises(ValueError, match="latents must be"):
        student_of(made())(x_t[:, None].expand(B, L + 1, D), t, latents=latents)
    with pytest.raises(ValueError, match="latents must be"):
        student_of(made())(x_t[:, None].expand(B, L, D), t, latents=latents[:, 0])


def test_inputs_that_do_not_fit(x_t, t):
    with pytest.raises(ValueError, match="x_t must be"):
        made()(x_t[:, :-1], t)
    with pytest.raises(ValueError, match="augmentation_dim is 0"):
        made()(x_t, t, augmentation=torch.zeros(B, 2))
    with pytest.raises(ValueError, match="augmentation must be"):
        made(augmentation_dim=2)(x_t, t, augmentation=torch.zeros(B, 3))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"num_states": 0}, "num_states"),
        ({"length": -1}, "length"),
        ({"latent_dim": 0}, "latent_dim"),
        ({"hidden_size": 1.5}, "hidden_size"),
        ({"num_blocks": 0}, "num_blocks"),
        ({"mask_id": 18}, "mask_id"),
        ({"dropout": 1.0}, "dropout"),
        ({"augmentation_dim": -1}, "augmentation_dim"),
        ({"latent_gate": -0.5}, "latent_gate"),
    ],
)
def test_config_is_checked(settings, name):
    with pytest.raises(ValueError, match=name):
        CompactConfig(**settings)


def test_no_mask_state_is_a_level(x_t):
    """The mask's code says nothing of the order of levels, wherever the mask lies."""
    for mask_id in (S, 2):
        model = made(mask_id=mask_id)
        assert (model.features[mask_id] != 0).sum() == 1
