"""The language network: how time and latents enter, what is computed where, and what is refused."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from dits import SMALL, by_formula, drawn, noised

from di4c_ext import ops, random, systems
from di4c_ext.loss import Di4CObjective
from di4c_ext.models import DiTConfig, DiTDenoiser, draw_latents
from di4c_ext.models.dit_blocks import Rotary, turned

STUDENTS = [{"is_student": True}, {"is_student": True, "latent_form": "added", "latent_dim": 2}]
FORMS = pytest.mark.parametrize("settings", STUDENTS, ids=["token", "added"])
T = torch.tensor([0.9, 0.2])


def said(model, x_t, rows=2, latents=3, **kwargs):
    given = drawn(rows, latents, model.config.latent_dim) if model.config.is_student else None
    with torch.no_grad():
        return model(x_t, T[:rows], given, **kwargs)


def test_rotations_depend_on_the_distance_alone():
    rotary = Rotary(8)
    cos, sin = rotary(20, False, torch.device("cpu"))
    q, k = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores = turned(q.expand(20, 8), cos, sin) @ turned(k.expand(20, 8), cos, sin).T
    for distance in (-13, 0, 1, 7):
        each = scores.diagonal(distance)
        torch.testing.assert_close(each, each[:1].expand_as(each))
    assert scores[0, 0].item() == pytest.approx((q @ k).item())
    assert scores.diagonal(1)[0] != scores.diagonal(-1)[0]


def test_rotations_turn_the_first_half_with_the_second():
    cos, sin = Rotary(4)(3, True, torch.device("cpu"))
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    pairs = torch.complex(x[:2], x[2:])
    for place, angle in ((0, 0.0), (2, 2.0), (3, 0.0)):  # the last row is the latent's, which stays as it is
        rates = torch.tensor([1.0, 0.01], dtype=torch.float64)
        wanted = pairs * torch.polar(torch.ones(2, dtype=torch.float64), angle * rates)
        torch.testing.assert_close(turned(x, cos[place], sin[place]), torch.cat([wanted.real, wanted.imag]))


def test_half_floats_keep_their_angles():
    """Positions of long sequences: from rounded frequencies they would be off by radians."""
    model = by_formula().bfloat16()
    assert model.backbone.rotary_emb.inv_freq.dtype == torch.bfloat16
    cos, _ = model.backbone.rotary_emb(1024, False, torch.device("cpu"))
    assert cos[1000, 1].item() == pytest.approx(torch.tensor(1000 * 10000**-0.25).double().cos().item(), abs=1e-4)


def test_time_is_shown_only_where_asked_for():
    """adaLN made once, of one row, is what every row would be told at noise level 0."""
    plain, timed = by_formula().double(), by_formula(time_conditioning=True).double()
    x = noised(2, plain.config)
    with torch.no_grad():
        assert torch.equal(plain(x), plain(x, T)) and torch.equal(plain(x), plain(x, "any"))
        torch.testing.assert_close(timed(x, torch.zeros(2)), plain(x))
        assert not torch.allclose(timed(x, T), plain(x), atol=1e-2)
        torch.testing.assert_close(timed(x, T)[1:], timed(x[1:], T[1:]))
    calls = []
    for block in plain.backbone.blocks:
        block.adaLN_modulation.register_forward_hook(lambda _, given, out: calls.append(tuple(out.shape)))
    said(plain, x)
    assert calls == [(1, 6 * 16)] * 2


@FORMS
def test_latents_and_rows_go_together(settings):
    model = by_formula(**settings).double()
    x = noised(6, model.config).view(2, 3, -1)
    z = drawn(2, 3, model.config.latent_dim)
    with torch.no_grad():
        whole = model(x, T, z)
        alone = [[model(x[b, i][None], T[b : b + 1], z[b, i][None]) for i in range(3)] for b in range(2)]
        shared = model(x[:, 0], T, z)
    torch.testing.assert_close(whole, torch.stack([torch.cat(rows) for rows in alone]))
    torch.testing.assert_close(shared[:, 0], whole[:, 0])
    assert (shared[:, 0] - shared[:, 1]).abs().max() > 1e-2


@FORMS
def test_time_and_latents_go_together(settings):
    model = by_formula(**settings, time_conditioning=True).double()
    x = noised(2, model.config)
    z = drawn(2, 3, model.config.latent_dim)
    with torch.no_grad():
        torch.testing.assert_close(model(x, T, z)[1:], model(x[1:], T[1:], z[1:]))


@pytest.mark.parametrize("settings", [{}, *STUDENTS], ids=["teacher", "token", "added"])
def test_hidden_equals_logits(settings):
    model = by_formula(**settings)
    x = noised(2, model.config)
    logits, hidden = said(model, x), said(model, x, return_hidden=True)
    assert isinstance(hidden, ops.Hidden) and hidden.shape == logits.shape
    assert torch.equal(hidden.logits(), logits)
    # A view of the parameter, no copy of it.
    assert hidden.weight.data_ptr() == model.backbone.output_layer.linear.weight.data_ptr()


@pytest.mark.parametrize("settings", [{}, *STUDENTS], ids=["teacher", "token", "added"])
def test_the_head_where_it_is_wanted(settings):
    model = by_formula(**settings)
    x = noised(2, model.config)
    places = torch.tensor([[4, 0, 4], [11, 2, 3]])
    whole, some = said(model, x), said(model, x, positions=places)
    index = places.view(2, *[1] * (whole.ndim - 3), 3, 1).expand(*whole.shape[:-2], 3, whole.shape[-1])
    torch.testing.assert_close(some, whole.gather(-2, index), rtol=1e-5, atol=1e-5)
    hidden = said(model, x, positions=places, return_hidden=True)
    assert torch.equal(hidden.logits(), some)


def test_a_mask_inside_the_vocabulary_is_never_said():
    model = by_formula(mask_id=4)
    config = model.config
    assert (config.num_states, by_formula().config.num_states) == (21, 20)
    x = noised(2, config)
    logits = said(model, x)
    assert logits.isfinite().all() and (logits.softmax(-1)[..., 4] == 0).all()
    hidden = said(model.half(), x, return_hidden=True)  # -1e6 is beyond half floats
    assert hidden.bias.isfinite().all() and (hidden.logits().float().softmax(-1)[..., 4] == 0).all()


def test_shorter_sequences():
    model = by_formula()
    x = noised(2, model.config)[:, :5]
    assert said(model, x).shape == (2, 5, 20)


@pytest.mark.parametrize(("latent_dim", "rotary"), [(1, False), (3, False), (3, True)])
def test_an_added_latent_starts_as_the_teacher(latent_dim, rotary):
    teacher = by_formula()
    student = DiTDenoiser.from_teacher(
        teacher, latent_form="added", latent_dim=latent_dim, latent_hidden_size=12, latent_rotary=rotary
    )
    x = noised(2, teacher.config)
    wanted = said(teacher, x[:, None].expand(2, 3, -1))  # as many rows: matrix products round by their shape
    assert torch.equal(said(student.eval(), x), wanted)
    assert student.config.is_student and not teacher.config.is_student
    hears = sum(weight.abs().sum() for name, weight in student.latent_parameters() if "latent_projection" in name)
    assert hears > 0


def test_a_latent_token_does_not_start_as_the_teacher():
    teacher = by_formula()
    student = DiTDenoiser.from_teacher(teacher, dropout=0.0).eval()
    x = noised(2, teacher.config)
    assert (said(student, x) - said(teacher, x)[:, None]).abs().max() > 1e-3
    assert student.config.latent_form == "token" and student.config.dropout == 0
    names = {name for name, _ in student.latent_parameters()}
    assert names == {f"backbone.latent_projection.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")}


def test_what_an_added_latent_adds_falls_with_the_masks():
    model = by_formula(**STUDENTS[1])
    x = noised(2, model.config)
    clean = torch.where(x == model.config.mask_id, 1, x)
    out = said(model, clean)
    assert torch.equal(out[:, 0], out[:, 1])
    free = by_formula(**STUDENTS[1], latent_gate=0.0)
    assert not torch.allclose(said(free, clean)[:, 0], said(free, clean)[:, 1], atol=1e-2)


def test_where_all_is_masked_a_turned_latent_tells_positions_apart():
    """Rotations act between positions: with the same vector everywhere they leave no trace of where it stands."""
    alike, apart = (by_formula(**STUDENTS[1], latent_rotary=rotary) for rotary in (False, True))
    masks = torch.full((2, 12), alike.config.mask_id)
    plain, turning = said(alike, masks), said(apart, masks)
    torch.testing.assert_close(plain, plain[:, :, :1].expand_as(plain), rtol=1e-5, atol=1e-5)
    assert (turning - turning[:, :, :1])[:, :, 1:].abs().amax((0, 1, 3)).min() > 0.05
    assert (turning[:, :, 0] - plain[:, :, 0]).abs().max() > 0.05  # which places differ is heard everywhere


def test_a_new_network_says_nothing():
    model = DiTDenoiser(DiTConfig(**SMALL))
    assert (said(model.eval(), noised(2, model.config)) == 0).all()
    table = model.backbone.vocab_embed.embedding
    assert table.abs().max() <= 0.25 and table.std().item() == pytest.approx(0.25 / 3**0.5, rel=0.1)


@FORMS
def test_saved_and_opened(settings, tmp_path):
    model = by_formula(**settings)
    model.save_pretrained(tmp_path / "student")
    again = systems.load_model(tmp_path / "student", is_student=True)
    assert list(again.state_dict()) == list(model.state_dict())
    x = noised(2, model.config)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    torch.testing.assert_close(said(again, x), said(model, x), rtol=1e-5, atol=2e-5)  # a file's weights lie unaligned
    with pytest.raises(ValueError, match="holds a student, a teacher is wanted"):
        DiTDenoiser.from_pretrained(tmp_path / "student", is_student=False)
    config = DiTConfig(**SMALL | {"is_student": False})
    with pytest.raises(ValueError, match=r"weights of a student, config.is_student must be true"):
        DiTDenoiser.from_pretrained(tmp_path / "student", config=config)
    process = systems.process_of(again.config)
    assert (process.num_states, process.mask_id, process.schedule) == (20, 20, "log_linear")
    latents = systems.latents_of(again.config)
    assert latents(random.keys(0, 2), 4).shape == (2, 4, model.config.latent_dim)


def test_recomputed_blocks_give_the_same_gradient():
    x = noised(2, by_formula().config)
    grads = []
    for again in (False, True):
        model = by_formula(is_student=True, dropout=0.2).train()
        if again:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        torch.manual_seed(3)
        model(x, T, drawn(2, 3)).logsumexp(-1).sum().backward()
        grads.append([weight.grad for weight in model.parameters()])
        assert all(grad is not None for grad in grads[-1])
    torch.testing.assert_close(grads[0], grads[1])


def test_autocast():
    model = by_formula()
    x = noised(2, model.config)
    exact = said(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, hidden = said(model, x), said(model, x, return_hidden=True)
    assert logits.dtype == hidden.dtype == hidden.weight.dtype == torch.bfloat16
    assert torch.equal(hidden.logits(), logits)
    torch.testing.assert_close(logits.float(), exact, rtol=0.05, atol=0.3)


@pytest.mark.parametrize("settings", STUDENTS, ids=["token", "added"])
def test_the_objective_on_hidden_states(settings):
    """Logits of the student are never made whole, and neither value nor gradient can tell."""
    teacher, student = by_formula(), by_formula(**settings)
    process = systems.process_of(student.config)
    objective = Di4CObjective(num_latents=3)
    x_0 = noised(2, teacher.config).clamp(max=19)
    latents = partial(draw_latents, latent_dim=student.config.latent_dim, law="uniform")
    found = []
    for hidden in (False, True):
        student.zero_grad()
        denoiser = partial(student, return_hidden=hidden)
        parts = objective(
            denoiser, partial(teacher, return_hidden=hidden), process, x_0, random.keys(1, 2), latents=latents
        )
        parts["loss"].backward()
        found.append((parts.per_sample, {name: weight.grad for name, weight in student.named_parameters()}))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    assert found[0][1]["backbone.output_layer.linear.weight"][-1].abs().max() == 0  # the mask's row


def test_refused_inputs():
    teacher, student = by_formula(), by_formula(is_student=True)
    x = noised(2, teacher.config)
    with pytest.raises(ValueError, match=r"D from 1 to 12, the model's length, got \(2, 13\)"):
        teacher(torch.cat([x, x[:, :1]], 1))
    with pytest.raises(ValueError, match=r"x_t must be \(B, D\) or \(B, L, D\).*got \(12,\)"):
        teacher(x[0])
    with pytest.raises(TypeError, match=r"x_t must be int64, got torch.int32"):
        teacher(x.int())
    for wrong in (21, -1):
        with pytest.raises(ValueError, match=f"tokens 0..19 and the mask 20, got {wrong}; use the tokenizer"):
            teacher(torch.full_like(x, wrong))
    with pytest.raises(ValueError, match="a student needs latents"):
        student(x, T)
    with pytest.raises(ValueError, match=r"latents must be .*C = 1"):
        student(x, T, torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"t must be a tensor \(B,\) with B = 2, got None"):
        by_formula(time_conditioning=True)(x)
    with pytest.raises(ValueError, match=r"positions must be \(B, P\) int64 with B = 2, got \(3,\)"):
        teacher(x, positions=torch.arange(3))
    with pytest.raises(ValueError, match="got a student; give the teacher"):
        DiTDenoiser.from_teacher(student)


class Tokenizer:
    def __init__(self, size, mask_token_id=None):
        self.size, self.mask_token_id = size, mask_token_id

    def __len__(self):
        return self.size


def test_a_tokenizer_that_is_not_the_networks():
    config = by_formula().config
    config.check_tokenizer(Tokenizer(20))
    config.check_tokenizer(Tokenizer(21, 20))
    with pytest.raises(ValueError, match="it has 19 ids, the network has 20 tokens and the mask 20"):
        config.check_tokenizer(Tokenizer(19))
    with pytest.raises(ValueError, match="its mask is id 4, that of the network is 20"):
        config.check_tokenizer(Tokenizer(21, 4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_id": 21}, r"mask_id must lie in 0\.\.20"),
        ({"hidden_size": 18}, "multiple of 2 \\* num_heads"),
        ({"num_layers": 0}, "num_layers must be an integer of at least 1, got 0"),
        ({"vocab_size": 1}, "vocab_size must be an integer of at least 2"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
        ({"schedule": "log-linear"}, "did you mean 'log_linear'"),
        ({"schedule": "cosine", "time_conditioning": True}, "only log_linear keeps finite"),
        ({"latent_dim": 2}, "Set latent_form 'added' for more"),
        ({"latent_form": "add"}, "latent_form must be one of token, added"),
        ({"latent_rotary": True}, "latent_rotary turns what a latent adds to positions, got latent_form 'token'"),
        ({"latent_scale": 0.0}, "latent_scale must be finite and > 0"),
        ({"latent_gate": -1.0}, "latent_gate must be finite and >= 0"),
        ({"latent_embed_dim": 5}, "latent_embed_dim must be even"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        DiTConfig(**SMALL | settings)
