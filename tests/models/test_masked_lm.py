"""Any masked language model as teacher and student: families, the start, gradients, files, adapters, refusals."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import language
import pytest
import torch
from torch import Tensor

from di4c_ext import checkpoints, ops, random
from di4c_ext.loss import Di4CObjective
from di4c_ext.models import draw_latents
from di4c_ext.models.masked_lm import Di4CForMaskedLM
from di4c_ext.models.teacher import TeacherDescription, describe
from di4c_ext.process import AbsorbingProcess

B, L, C, D, S = 3, 4, 3, 12, language.S
MASK = language.SPECIAL["mask"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("teachers")
    return {family: language.save(family, root / family) for family in language.FAMILIES}


def options(family: str) -> dict[str, Any]:
    """What a user must say of a family beside its folder."""
    if family == "dream":
        return {"shift": True, "tokenizer": language.tokenizer()}
    return {"trust_remote_code": True} if family == "llada" else {}


def student_of(folder: Path, **more: Any) -> Di4CForMaskedLM:
    torch.manual_seed(1)
    settings = {"latent_dim": C, "latent_hidden_size": 8, **options(folder.name), **more}
    return Di4CForMaskedLM.from_teacher(folder, **settings)


@pytest.fixture
def x_t() -> Tensor:
    x = torch.randint(len(language.SPECIAL), S, (B, D), generator=torch.Generator().manual_seed(1))
    x[:, ::2] = MASK
    return x


@pytest.fixture
def latents() -> Tensor:
    return draw_latents(random.keys(3, B), L, C)


@pytest.fixture(params=language.FAMILIES)
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


def raw_logits(folder: Path, tokens: Tensor) -> Tensor:
    """What the model in the folder says, opened by transformers alone; its future is shown to a causal one."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

    opener = {"dream": AutoModelForCausalLM, "llada": AutoModel}.get(folder.name, AutoModelForMaskedLM)
    model = opener.from_pretrained(folder, trust_remote_code=folder.name == "llada").eval()
    seen = None if folder.name != "dream" else torch.ones(len(tokens), 1, tokens.shape[1], tokens.shape[1]).bool()
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=seen).logits


@torch.no_grad()
def test_the_teacher_says_what_the_model_says(folder: Path, x_t: Tensor) -> None:
    logits = Di4CForMaskedLM.as_teacher(folder, **options(folder.name))(x_t, None)
    wanted = raw_logits(folder, x_t)
    if folder.name == "dream":  # logits at d - 1 are of d
        assert torch.equal(logits[:, 1:, 5:], wanted[:, :-1, 5:]) and torch.equal(logits[:, 0, 5:], wanted[:, 0, 5:])
    else:
        assert torch.equal(logits[..., 5:], wanted[..., 5:])
    p = logits.softmax(-1)
    assert (p[..., [MASK, language.SPECIAL["pad"]]] == 0).all(), "never drawn"
    assert (p[..., 1:4] > 0).all(), "the ends of a block are predicted like any other token"


@torch.no_grad()
def test_student_starts_as_its_teacher_and_comes_back_from_disk(
    folder: Path, x_t: Tensor, latents: Tensor, tmp_path: Path
) -> None:
    teacher = Di4CForMaskedLM.as_teacher(folder, **options(folder.name))
    student = student_of(folder)
    assert not student.training and torch.equal(student(x_t, None, latents=latents[:, 0]), teacher(x_t, None))
    together, repeated = student(x_t, None, latents=latents), x_t[:, None].expand(B, L, D)
    assert together.shape == (B, L, D, S) and torch.equal(together, teacher(repeated, None))
    assert torch.equal(student(repeated, None, latents=latents), together)
    # A student that has learnt something: its latents matter, and it is the same after a round trip.
    language.stir(student)
    learnt = student(x_t, None, latents=latents)
    assert learnt[..., 5:].std(1).amin() > 0
    student.save_pretrained(tmp_path / "student")
    loaded = Di4CForMaskedLM.from_pretrained(
        tmp_path / "student", is_student=True, trust_remote_code=folder.name == "llada"
    )
    assert torch.equal(loaded(x_t, None, latents=latents), learnt)
    assert loaded.teacher == student.teacher == teacher.teacher
    attention = teacher.backbone.config._attn_implementation
    assert attention == ("eager" if folder.name == "llada" else "sdpa")
    assert student.backbone.config._attn_implementation == loaded.backbone.config._attn_implementation == attention


def test_gradient_reaches_the_projection_first_and_then_the_rest(folder: Path, x_t: Tensor, latents: Tensor) -> None:
    student = student_of(folder)
    before = student(x_t, None, latents=latents).detach()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        student(x_t, None, latents=latents).log_softmax(-1)[..., 7].mean().backward()
        assert student.latent_in.weight.grad is not None and student.latent_in.weight.grad.abs().max() > 0
        optimizer.step()
    assert all(parameter.grad.abs().max() > 0 for parameter in student.latent_embedding.parameters())
    assert (student(x_t, None, latents=latents).std(1) > before.std(1)).any()


def test_tied_weights_stay_tied(folders: dict[str, Path], x_t: Tensor, latents: Tensor, tmp_path: Path) -> None:
    for family in ("bert", "roberta", "modernbert"):
        student = student_of(folders[family])
        student.save_pretrained(tmp_path / family)
        for model in (student, copy.deepcopy(student), Di4CForMaskedLM.from_pretrained(tmp_path / family)):
            head = model.get_output_embeddings()
            assert head is not None and head.weight is model.get_input_embeddings().weight, family
        language.stir(student)
        checkpoints.load_state(student, tmp_path / family / checkpoints.WEIGHTS)  # as a resumed run does
        assert torch.equal(student(x_t, None, latents=latents), model(x_t, None, latents=latents)), family
        student(x_t, None, latents=latents).logsumexp(-1).sum().backward()
        assert student.get_output_embeddings().weight.grad is student.get_input_embeddings().weight.grad


@torch.no_grad()
def test_called_as_transformers_does(folders: dict[str, Path], x_t: Tensor, latents: Tensor, tmp_path: Path) -> None:
    from transformers import AutoModelForMaskedLM

    student = student_of(folders["bert"])
    language.stir(student)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert type(loaded) is Di4CForMaskedLM
    labels = torch.where(x_t == MASK, 9, -100)
    out = loaded(input_ids=x_t, labels=labels, latents=latents[:, 0])
    wanted = -out.logits.log_softmax(-1)[..., 9][x_t == MASK].mean()
    torch.testing.assert_close(out.loss, wanted)
    together = loaded(input_ids=x_t, labels=labels, latents=latents)
    each = [loaded(input_ids=x_t, labels=labels, latents=latents[:, i]).loss for i in range(L)]
    torch.testing.assert_close(together.loss, torch.stack(each).mean())


@torch.no_grad()
@pytest.mark.parametrize("family", language.FAMILIES)
def test_filled_up_positions_change_nothing(family: str, folders: dict[str, Path], x_t: Tensor) -> None:
    plain = Di4CForMaskedLM.as_teacher(folders[family], **options(family))
    wanted = plain(x_t[:, :7], None)
    seen = (torch.arange(D) < 7).long().expand(B, D)
    filled = torch.where(seen == 1, x_t, language.SPECIAL["pad"])
    torch.testing.assert_close(plain(filled, None, attention_mask=seen)[:, :7], wanted, rtol=1e-4, atol=1e-4)
    eights = Di4CForMaskedLM.as_teacher(folders[family], pad_to_multiple_of=8, **options(family))
    torch.testing.assert_close(eights(x_t[:, :7], None), wanted, rtol=1e-4, atol=1e-4)
    assert eights(x_t, None).shape == (B, D, S)


@torch.no_grad()
def test_a_model_that_looks_back_only_is_told_to_look_both_ways(folders: dict[str, Path], x_t: Tensor) -> None:
    teacher = Di4CForMaskedLM.as_teacher(folders["dream"], **options("dream"))
    other = x_t.clone()
    other[:, -1] = 60 - other[:, -1]
    assert not torch.equal(teacher(x_t, None)[:, 1], teacher(other, None)[:, 1])
    eager = Di4CForMaskedLM.as_teacher(folders["dream"], load={"attn_implementation": "eager"}, **options("dream"))
    torch.testing.assert_close(eager(x_t, None), teacher(x_t, None), rtol=1e-4, atol=1e-4)


def test_hidden_logits_are_the_logits(folder: Path, x_t: Tensor, latents: Tensor, tmp_path: Path) -> None:
    whole = student_of(folder)
    language.stir(whole)
    whole.save_pretrained(tmp_path)
    short = Di4CForMaskedLM.from_pretrained(tmp_path, trust_remote_code=folder.name == "llada")
    short.config.hidden_logits = True
    tokens = torch.randint(5, S, (B, L + 1, D), generator=torch.Generator().manual_seed(5))
    gradients = []
    for model in (whole, short):
        logits = model(x_t, None, latents=latents)
        assert isinstance(logits, ops.Hidden) == (model is short) and logits.shape == (B, L, D, S)
        joint, correlation = ops.mixture_log_prob(logits, tokens, (x_t == MASK).float())
        (joint + correlation).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None] + [joint.detach()])
    torch.testing.assert_close(*gradients, rtol=2e-3, atol=2e-3)


def test_the_objective_takes_teacher_and_student(folders: dict[str, Path], latents: Tensor) -> None:
    folder = folders["bert"]
    x_0 = torch.randint(5, S, (B, D), generator=torch.Generator().manual_seed(2))
    process = AbsorbingProcess(S, "linear", MASK)
    for hidden in (False, True):
        teacher = Di4CForMaskedLM.as_teacher(folder, hidden_logits=hidden)
        student = student_of(folder, hidden_logits=hidden)
        parts = Di4CObjective(num_latents=2)(
            student, teacher, process, x_0, random.keys(0, B), latents=lambda keys, n: draw_latents(keys, n, C)
        )
        assert abs(parts["marginal_data"]) < 1e-3 and abs(parts["gain_data"]) < 1e-3, "the student is its teacher"
        assert torch.isfinite(parts["loss"])
        parts["loss"].backward()
        assert student.latent_in.weight.grad.isfinite().all() and student.latent_in.weight.grad.abs().max() > 0


def test_adapters_and_latent_alone_are_trained(
    folders: dict[str, Path], x_t: Tensor, latents: Tensor, tmp_path
) -> None:
    pytest.importorskip("peft")
    for family in ("bert", "modernbert", "dream"):
        student = student_of(folders[family], lora={"r": 2, "lora_dropout": 0.5}).train()
        trained = {name for name, p in student.named_parameters() if p.requires_grad}
        assert trained and all("lora_" in name or student.is_latent_name(name) for name in trained)
        assert not any("lora_" in name for name, _ in student.latent_parameters())
        teacher = student.teacher_denoiser()
        with torch.no_grad():
            wanted = Di4CForMaskedLM.as_teacher(folders[family], **options(family))(x_t, None)
            student.eval()
            assert torch.equal(student(x_t, None, latents=latents[:, 0]), wanted), "adapters start as nothing"
            language.stir(student.latent_in)
            for name, parameter in student.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.1)
            assert not torch.allclose(student(x_t, None, latents=latents[:, 0])[..., 5:], wanted[..., 5:], atol=1e-2)
            assert torch.equal(teacher(x_t, None), wanted), "the teacher is what it was"
        # Asking the teacher between a forward and its backward leaves the gradients as they are.
        gradients = []
        for ask in (False, True):
            student.zero_grad()
            loss = student(x_t, None, latents=latents).log_softmax(-1)[..., 7].mean()
            if ask:
                with torch.no_grad():
                    teacher(x_t, None)
            loss.backward()
            gradients.append({name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None})
        assert set(gradients[0]) == trained and all(torch.equal(g, gradients[1][n]) for n, g in gradients[0].items())
        student.save_pretrained(tmp_path / family)
        loaded = Di4CForMaskedLM.from_pretrained(tmp_path / family)
        assert torch.equal(loaded(x_t, None, latents=latents), student(x_t, None, latents=latents))
        assert {name for name, p in loaded.named_parameters() if p.requires_grad} == trained
        assert torch.equal(loaded.teacher_denoiser()(x_t, None), wanted)


def test_the_teacher_of_adapters_is_asked_without_dropout(folders: dict[str, Path], x_t: Tensor) -> None:
    pytest.importorskip("peft")
    from di4c_ext.denoiser import inference

    student = student_of(folders["bert"], lora=True).train()  # BERT has dropout of 0.1
    teacher = student.teacher_denoiser()
    with inference(teacher, x_t.device):
        assert torch.equal(teacher(x_t, None), Di4CForMaskedLM.as_teacher(folders["bert"])(x_t, None))
    assert student.backbone.training


@torch.no_grad()
def test_a_saved_teacher_opens_as_one(folders: dict[str, Path], x_t: Tensor, latents: Tensor, tmp_path: Path) -> None:
    teacher = Di4CForMaskedLM.as_teacher(folders["bert"], hidden_logits=True, special_ids=(0, 7), schedule="cosine")
    teacher.save_pretrained(tmp_path)
    for given in (teacher, tmp_path, str(tmp_path)):
        student = Di4CForMaskedLM.from_teacher(given, latent_dim=C)
        assert student.config.hidden_logits and student.config.schedule == "cosine"
        assert student.teacher == teacher.teacher and teacher.teacher.special_ids == (0, 7)
        found, wanted = student(x_t, None, latents=latents[:, 0]), teacher(x_t, None)
        assert torch.equal(found.states, wanted.states) and torch.equal(found.bias, wanted.bias)
    whole = Di4CForMaskedLM.from_teacher(teacher, latent_dim=C, hidden_logits=False)
    assert isinstance(whole(x_t, None, latents=latents), Tensor) and teacher.config.hidden_logits
    assert whole.get_input_embeddings().weight is not teacher.get_input_embeddings().weight, "the teacher is copied"
    with pytest.raises(ValueError, match="this teacher has its description"):
        Di4CForMaskedLM.from_teacher(tmp_path, mask_id=5)


def test_description_of_what_models_tell(folders: dict[str, Path]) -> None:
    told = {name: Di4CForMaskedLM.as_teacher(f, **options(name)).teacher for name, f in folders.items()}
    assert told["roberta"].max_positions == 23 - language.SPECIAL["pad"], "positions begin after the padding's"
    assert {name: d.max_positions for name, d in told.items() if name != "roberta"} == dict.fromkeys(
        ("bert", "modernbert", "dream", "llada"), 24
    )
    assert {d.mask_id for d in told.values()} == {MASK} and {d.num_states for d in told.values()} == {S}
    assert [name for name, d in told.items() if d.causal] == ["dream"]
    assert [name for name, d in told.items() if d.remote_code] == ["llada"]
    model = Di4CForMaskedLM.as_teacher(folders["dream"], **options("dream")).backbone
    assert Di4CForMaskedLM.as_teacher(model, **options("dream")).teacher == told["dream"], "in memory as from a folder"
    model.config.model_type = "Dream"
    assert describe(model, language.tokenizer()).shift
    padded = TeacherDescription(num_states=64, mask_id=4, embeddings="e", num_tokens=61, special_ids=[0])
    assert padded.never_drawn() == [(0, 1), (4, 5), (61, 64)]
    assert TeacherDescription(num_states=27, mask_id=27, embeddings="e").never_drawn() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_id": 61}, "embeds the tokens 0..60 only"),
        ({"mask_id": 99}, "mask_id must lie in 0..num_states = 0..61, got 99"),
        ({"special_ids": (61,)}, "special_ids must lie below 61"),
        ({"num_tokens": 70}, "tokenizer knows 70 tokens, but the teacher embeds 61"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of must be an integer of at least 1, got 0"),
        ({"head": "nothing"}, "'nothing' names no embedding or linear map"),
        ({"masks": 4}, "masks is no field of TeacherDescription"),
        ({"auto_class": "AutoModelForVision"}, "auto_class must be one of"),
    ],
)
def test_descriptions_that_cannot_be(folders: dict[str, Path], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Di4CForMaskedLM.as_teacher(folders["bert"], **change)


def test_refusals_of_teachers(folders: dict[str, Path], tmp_path: Path) -> None:
    for opened in (Di4CForMaskedLM.as_teacher, Di4CForMaskedLM.from_teacher):
        with pytest.raises(ValueError, match=r"code of its own, which would run.*trust_remote_code=True"):
            opened(folders["llada"])
    student_of(folders["llada"]).save_pretrained(tmp_path / "remote")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        Di4CForMaskedLM.from_pretrained(tmp_path / "remote")
    student_of(folders["bert"]).save_pretrained(tmp_path / "student")
    for opened in (Di4CForMaskedLM.as_teacher, Di4CForMaskedLM.from_teacher):
        with pytest.raises(ValueError, match="holds a student, a teacher is wanted"):
            opened(tmp_path / "student")
    with pytest.raises(ValueError, match="got a student"):
        Di4CForMaskedLM.from_teacher(student_of(folders["bert"]))
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    (tmp_path / "student" / "config.json").write_text(json.dumps(config | {"is_student": False}))
    with pytest.raises(ValueError, match=r"these are the weights of a student"):
        Di4CForMaskedLM.from_pretrained(tmp_path / "student")
    Di4CForMaskedLM.as_teacher(folders["bert"]).backbone.bert.save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match=r"holds no weights for \['cls\.predictions.*new_head=True"):
        Di4CForMaskedLM.as_teacher(tmp_path / "encoder", mask_id=MASK)
    assert Di4CForMaskedLM.as_teacher(tmp_path / "encoder", mask_id=MASK, new_head=True).num_parameters() > 0
    with pytest.raises(ValueError, match="neither the teacher's config nor a tokenizer tells which token is the mask"):
        Di4CForMaskedLM.as_teacher(tmp_path / "encoder", new_head=True)
    teacher = Di4CForMaskedLM.as_teacher(folders["bert"]).backbone
    teacher.config.mask_token_id = 3
    with pytest.raises(ValueError, match="token 4 by the tokenizer and 3 by the teacher's config"):
        Di4CForMaskedLM.as_teacher(teacher, tokenizer=language.tokenizer())
    assert Di4CForMaskedLM.as_teacher(teacher, tokenizer=language.tokenizer(), mask_id=4).config.mask_id == 4
    with pytest.raises(TypeError, match="must be a model of transformers, got Linear"):
        Di4CForMaskedLM.as_teacher(torch.nn.Linear(2, 2))


def test_refusals_of_calls(folders: dict[str, Path], x_t: Tensor, latents: Tensor, monkeypatch) -> None:
    student = student_of(folders["bert"])
    for call, message in (
        (lambda: student(x_t, None), "a student needs latents"),
        (lambda: student(x_t.repeat(1, 3), None, latents=latents), "sequences of 36 tokens, but .* at most 24"),
        (lambda: student(x_t.float(), None, latents=latents), "tokens must be integers"),
        (lambda: student(latents=latents), "give x_t for logits or input_ids"),
        (lambda: student(x_t, None, latents, labels=x_t), "labels go with input_ids"),
        (
            lambda: student(x_t, None, latents, attention_mask=x_t[:, 1:]),
            r"attention_mask must be \(B, D\) = \(3, 12\)",
        ),
        (lambda: student.teacher_denoiser()(x_t, None), "as_teacher needs adapters"),
        (lambda: student_of(folders["bert"], lora={"rank": 2}), "lora: .*rank"),
        (lambda: student_of(folders["bert"], latent_law="cauchy"), "latent_law must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    monkeypatch.setitem(__import__("sys").modules, "peft", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"pip install 'di4c_ext\[lora\]'"):
        student_of(folders["bert"], lora=True)
