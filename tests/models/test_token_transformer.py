"""The image-token transformer: shapes, classes, the two forms of the latent, precision, memory, checkpoints, errors."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from token_models import SMALL, codes, tokens_by_formula
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from di4c_ext import random
from di4c_ext.models import CompactDenoiser, TokenConfig, TokenDenoiser, UNetDenoiser, draw_latents
from di4c_ext.models.token_blocks import PackedAttention
from di4c_ext.sampler import sample_ancestral
from di4c_ext.systems import latents_of, load_model, process_of

B, L, D, S = 3, 4, 12, 13
FORMS = ["token", "added"]


@pytest.fixture
def labels() -> Tensor:
    return torch.tensor([2, 0, 1])


@pytest.fixture
def latents() -> Tensor:
    return draw_latents(random.keys(3, B), L, 1, law="uniform")


def student_of(form: str, **settings) -> TokenDenoiser:
    return tokens_by_formula(is_student=True, latent_form=form, **settings)


def close(got: Tensor, wanted: Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=atol)


@torch.no_grad()
def test_shapes(labels, latents):
    teacher = tokens_by_formula()
    x_t = codes(B, teacher.config)
    each = x_t[:, None].expand(B, L, D)
    said = teacher(x_t, torch.ones(B), labels=labels)
    assert said.shape == (B, D, S) and said.std() > 0.5
    assert teacher(each, labels=labels).shape == (B, L, D, S)
    assert torch.equal(teacher(x_t, latents=latents, labels=labels), said), "a teacher ignores latents"
    assert torch.equal(teacher(x_t.int(), None, labels=labels.int()), said)
    assert teacher(x_t[:0], labels=labels[:0]).shape == (0, D, S)
    for form in FORMS:
        student = student_of(form)
        assert student(x_t, latents=latents[:, 0], labels=labels).shape == (B, D, S)
        assert student(x_t, latents=latents, labels=labels).shape == (B, L, D, S)
        assert student(each, latents=latents, labels=labels).shape == (B, L, D, S)


@torch.no_grad()
def test_labels_are_kept_or_dropped(labels):
    model = tokens_by_formula()
    x_t = codes(B, model.config)
    said = model(x_t, labels=labels)
    assert torch.equal(model(x_t, labels=labels, drop_label=None), said), "None keeps"
    assert torch.equal(model(x_t, labels=labels, drop_label=False), said)
    assert (model(x_t, labels=labels.roll(1)) - said).abs().amax((1, 2)).min() > 1e-3, "every label matters"
    none = model(x_t, drop_label=True)
    assert (none - said).abs().amax((1, 2)).min() > 1e-3
    assert torch.equal(model(x_t, labels=labels, drop_label=True), none)
    drop = torch.tensor([True, False, True])
    close(model(x_t, labels=labels, drop_label=drop), torch.where(drop[:, None, None], none, said))


@torch.no_grad()
def test_no_classes(latents):
    model = student_of("token", num_classes=0)
    x_t = codes(B, model.config)
    assert model.net.tok_emb.weight.shape == (14, 16)
    assert model(x_t, latents=latents).shape == (B, L, D, S)
    with pytest.raises(ValueError, match=r"labels given, but config\.num_classes is 0"):
        model(x_t, latents=latents, labels=torch.zeros(B, dtype=torch.int64))


@torch.no_grad()
def test_without_the_logit_of_the_mask(labels):
    whole = tokens_by_formula()
    codes_alone = tokens_by_formula(mask_logit=False)
    x_t = codes(B, whole.config)
    said = codes_alone(x_t, labels=labels)
    assert codes_alone.config.num_states == 12 and codes_alone.config.mask_id == 12
    close(said, whole(x_t, labels=labels)[..., :12])


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_latents_together_or_apart(labels, latents, form):
    student = student_of(form)
    x_t = codes(B, student.config)
    together = student(x_t, latents=latents, labels=labels)
    assert together.std(1).amax((1, 2)).min() > 0.02, "the latent must matter here"
    close(student(x_t[:, None].expand(B, L, D), latents=latents, labels=labels), together)
    for i in range(L):
        close(student(x_t, latents=latents[:, i], labels=labels), together[:, i])


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_each_latent_its_own_x(labels, latents, form):
    student = student_of(form)
    x_t = codes(B * L, student.config)
    together = student(x_t.view(B, L, D), latents=latents, labels=labels)
    rows = student(x_t, latents=latents.flatten(0, 1), labels=labels.repeat_interleave(L))
    close(together.flatten(0, 1), rows)
    one = student(x_t.view(B, L, D)[1:2], latents=latents[1:2], labels=labels[1:2])
    close(one, together[1:2])


@torch.no_grad()
def test_added_student_starts_as_its_teacher_and_the_token_form_does_not(labels, latents):
    teacher = tokens_by_formula()
    x_t = codes(B, teacher.config)
    wanted = teacher(x_t, labels=labels)
    student = TokenDenoiser.from_teacher(teacher, latent_form="added").eval()
    for i in range(L):
        assert torch.equal(student(x_t, latents=latents[:, i], labels=labels), wanted)
    each = x_t[:, None].expand(B, L, D)
    assert torch.equal(student(each, latents=latents, labels=labels), teacher(each, labels=labels))
    several = TokenDenoiser.from_teacher(teacher, latent_form="added", latent_dim=3, latent_law="normal").eval()
    assert torch.equal(several(x_t, latents=latents[:, 0].expand(B, 3), labels=labels), wanted)
    published = TokenDenoiser.from_teacher(teacher).eval()
    assert published.config.latent_form == "token"
    assert (published(x_t, latents=latents[:, 0], labels=labels) - wanted).abs().max() > 1e-3
    for weight in student.parameters():
        weight.add_(1.0)
    assert torch.equal(teacher(x_t, labels=labels), wanted), "the teacher is copied"


@torch.no_grad()
def test_the_gate_of_an_added_latent(labels, latents):
    clean = codes(B, TokenConfig(**SMALL)) % 12
    half, full = clean.clone(), torch.full_like(clean, 12)
    half[:, ::2] = 12
    spread = {}
    for gate in (0.0, 1.0):
        student = student_of("added", latent_gate=gate)
        for name, x_t in (("clean", clean), ("half", half), ("full", full)):
            spread[gate, name] = student(x_t, latents=latents, labels=labels).std(1).max()
    assert spread[1.0, "clean"] < 1e-5 < spread[0.0, "clean"], "where nothing is masked nothing is told"
    assert spread[1.0, "half"] > 1e-3 and spread[1.0, "full"] == spread[0.0, "full"]


def test_gradient_reaches_an_added_latent_at_step_0_and_the_rest_of_its_path_after_it(labels, latents):
    student = TokenDenoiser.from_teacher(tokens_by_formula(), latent_form="added").train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    x_t = codes(B, student.config)
    student(x_t, latents=latents, labels=labels).square().sum().backward()
    entries = {name: p for name, p in student.latent_parameters() if ".latent_in." in name}
    assert len(entries) == 4 and all(p.grad.abs().max() > 0 for p in entries.values())
    optimizer.step()
    optimizer.zero_grad()
    student(x_t, latents=latents, labels=labels).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for _, p in student.latent_parameters())
    assert len(dict(student.latent_parameters())) == 8


def test_a_new_model_starts_as_published():
    torch.manual_seed(0)
    config = TokenConfig(**SMALL | {"num_codes": 300, "hidden_size": 64}, is_student=True, latent_form="added")
    model = TokenDenoiser(config)
    assert 0.97 < model.net.tok_emb.weight.std() < 1.03 and not model.net.bias.any()
    assert 0.015 < model.net.pos_emb.std() < 0.025
    for name, module in model.named_modules():
        if isinstance(module, PackedAttention):
            assert not module.in_proj_bias.any() and not module.out_proj.bias.any(), name
            assert 0.9 < module.in_proj_weight.abs().max() / (6 / (4 * 64)) ** 0.5 <= 1, name
    assert not any(p.any() for layer in model.net.latent_in for p in layer.parameters())
    config.embedding_std = 0.1
    assert 0.097 < TokenDenoiser(config).net.tok_emb.weight.std() < 0.103


@torch.no_grad()
def test_attention_is_that_of_torch():
    torch.manual_seed(0)
    own, theirs = PackedAttention(24, 3, 0.1).eval(), torch.nn.MultiheadAttention(24, 3, batch_first=True)
    theirs.load_state_dict(own.state_dict())
    x = torch.randn(2, 7, 24)
    close(own(x), theirs(x, x, x)[0], atol=1e-6)


@torch.no_grad()
def test_attention_of_bfloat16_is_computed_in_float32_on_a_cpu():
    torch.manual_seed(0)
    attention, x = PackedAttention(24, 3, 0.0).eval(), torch.randn(2, 5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y = attention(x)
    low = {name: weight.bfloat16() for name, weight in attention.named_parameters()}
    packed = functional.linear(x.bfloat16(), low["in_proj_weight"], low["in_proj_bias"])
    q, k, v = packed.float().view(2, 5, 3, 3, 8).transpose(1, 3).unbind(2)
    told = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).bfloat16()
    expected = functional.linear(told, low["out_proj.weight"], low["out_proj.bias"])
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    by_itself = functional.scaled_dot_product_attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert not torch.equal(told, by_itself.transpose(1, 2).flatten(2)), "in bfloat16 it would be another"


class Made(TorchDispatchMode):
    """Collects the shapes of all tensors that operators make."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, Tensor):
                self.shapes.add(tuple(value.shape))
        return out


@pytest.mark.parametrize("form", FORMS)
def test_neither_attention_probabilities_nor_columns_of_classes_are_made(labels, latents, form):
    student = student_of(form, attention_dropout=0.0).train()
    tokens = 14 if form == "token" else 13  # 12 codes, the class, and the latent where it is a token
    with Made() as made:
        student(codes(B, student.config), latents=latents, labels=labels).square().sum().backward()
    assert (B * L, D, S) in made.shapes, "the logits are seen"
    assert not [shape for shape in made.shapes if shape[-2:] == (tokens, tokens)]
    assert not [shape for shape in made.shapes if len(shape) > 2 and shape[-1] == 17], "17 rows of the embedding"


def test_what_the_latents_share_is_computed_once(labels, latents):
    rows = {}
    for form in FORMS:
        student = student_of(form)
        seen: list[int] = []

        def note(module: Any, args: Any, out: Tensor, seen: list[int] = seen) -> None:
            seen.append(len(out))

        for module in (
            student.net.first_layer[6],
            *(half for block in student.net.transformer.layers for half in block),
        ):
            module.register_forward_hook(note)
        with torch.no_grad():
            student(codes(B, student.config), latents=latents, labels=labels)
        rows[form] = seen
    # First layer (of a latent's token apart), then attention and MLP of each block.
    assert rows == {"token": [B, B * L] + [B * L] * 4, "added": [B, B] + [B * L] * 3}


@torch.no_grad()
def test_bfloat16_is_close(labels, latents):
    for form in FORMS:
        model = student_of(form)
        x_t = codes(B, model.config)
        wanted = model(x_t, latents=latents, labels=labels)
        with torch.autocast("cpu", torch.bfloat16):
            said = model(x_t, latents=latents, labels=labels)
        assert said.dtype == torch.float32, "the published network's logits are float32 under autocast"
        assert 0 < (said - wanted).abs().mean() < 0.05
        said = model.to(torch.bfloat16)(x_t, latents=latents, labels=labels)
        assert said.dtype == torch.bfloat16 and 0 < (said - wanted).abs().mean() < 0.1


def test_checkpointing_saves_memory_and_changes_no_gradient(labels, latents):
    def step(model: TokenDenoiser) -> tuple[list[Tensor], int]:
        kept = 0

        def pack(x: Tensor) -> Tensor:
            nonlocal kept
            kept += x.numel()
            return x

        torch.manual_seed(0)  # dropout
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(codes(B, model.config), latents=latents, labels=labels).square().sum().backward()
        return [p.grad for p in model.parameters()], kept

    plain, much = step(student_of("added", num_layers=4).train())
    model = student_of("added", num_layers=4).train()
    switch = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    switch()
    again, little = step(model)
    assert little < 0.5 * much
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_dropout_acts_in_training_only(labels):
    x_t = codes(B, TokenConfig(**SMALL))
    for name in ("dropout", "attention_dropout"):
        model = tokens_by_formula(**{"dropout": 0.0, "attention_dropout": 0.0, name: 0.5})
        with torch.no_grad():
            assert torch.equal(model(x_t, labels=labels), model(x_t, labels=labels))
            model.train()
            assert not torch.equal(model(x_t, labels=labels), model(x_t, labels=labels)), name
    student = TokenDenoiser.from_teacher(model, dropout=0.0)
    assert student.config.dropout == student.config.attention_dropout == 0.0
    assert TokenDenoiser.from_teacher(model).config.attention_dropout == 0.5


def test_sampling_through_the_commands_own_parts(labels):
    student = student_of("token", mask_logit=False)
    process, draw, keys = process_of(student.config), latents_of(student.config), random.keys(0, B)
    assert draw is not None and process.mask_id == 12 and process.schedule == "arccos"
    x = process.prior((B, D), keys)
    denoiser = partial(student, labels=labels)
    x_0 = sample_ancestral(denoiser, process, x, [1.0, 0.5, 0.0], keys, latents=lambda key: draw(key, 1)[:, 0])
    assert x_0.shape == (B, D) and int(x_0.min()) >= 0 and int(x_0.max()) < 12


@pytest.mark.parametrize("form", FORMS)
def test_round_trip(tmp_path: Path, labels, latents, form):
    student = student_of(form, codebook="0123456789abcdef")
    student.save_pretrained(tmp_path)
    again = load_model(tmp_path, is_student=True)
    assert isinstance(again, TokenDenoiser) and not again.training
    assert again.config.to_diff_dict() == student.config.to_diff_dict() | {"architectures": ["TokenDenoiser"]}
    x_t = codes(B, student.config)
    with torch.no_grad():
        assert torch.equal(again(x_t, latents=latents, labels=labels), student(x_t, latents=latents, labels=labels))


def test_from_teacher_folder(tmp_path: Path):
    teacher = tokens_by_formula()
    teacher.save_pretrained(tmp_path / "teacher")
    student = TokenDenoiser.from_teacher(tmp_path / "teacher", latent_form="added", latent_gate=0.5, latent_scale=10.0)
    assert (student.config.latent_gate, student.config.latent_scale, student.config.num_heads) == (0.5, 10.0, 2)
    student.save_pretrained(tmp_path / "student")
    with pytest.raises(ValueError, match="holds a student, a teacher is wanted"):
        TokenDenoiser.from_teacher(tmp_path / "student")
    with pytest.raises(ValueError, match=r"holds a teacher, a student is wanted.*TokenDenoiser\.from_teacher"):
        TokenDenoiser.from_pretrained(tmp_path / "teacher", is_student=True)
    with pytest.raises(ValueError, match="got a student"):
        TokenDenoiser.from_teacher(student)
    config = TokenConfig.from_pretrained(tmp_path / "teacher", is_student=True)
    with pytest.raises(ValueError, match=r"latent_projection\.0\.weight.*these are the weights of a teacher"):
        TokenDenoiser.from_pretrained(tmp_path / "teacher", config=config)
    for other in (CompactDenoiser, UNetDenoiser):
        with pytest.raises(ValueError, match=r"missing|does not fit"):
            other.from_pretrained(tmp_path / "teacher")
