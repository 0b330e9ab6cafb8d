"""Where teachers of text come from, what is asked before code of theirs runs, and when they give hidden states."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import dits
import language
import pytest
import torch

from di4c_ext import systems, text_teachers
from di4c_ext.arguments import DataArguments, parse
from di4c_ext.config import PretrainConfig
from di4c_ext.distill import StudentConfig, TeacherArguments, _without_vq
from di4c_ext.evaluate import EvaluationArguments
from di4c_ext.loss import Di4CObjective
from di4c_ext.models import Di4CForMaskedLM, DiTDenoiser
from di4c_ext.ops import Hidden
from di4c_ext.pretrain import _from_preset
from di4c_ext.task import Named
from di4c_ext.text_arguments import TextArguments
from di4c_ext.text_sources import Characters, Tokens
from di4c_ext.text_teachers import description_of, open_text_teacher


def test_code_of_a_model_runs_with_consent_alone(tmp_path: Path) -> None:
    folder = language.save("llada", tmp_path / "llada")
    with pytest.raises(ValueError, match="made of code of its own"):
        open_text_teacher(Named(str(folder)))
    teacher = open_text_teacher(Named(str(folder)), consent=True)
    assert isinstance(teacher, Di4CForMaskedLM)
    teacher.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"saved: this model is made of code of its own"):
        systems.load_model(tmp_path / "saved")
    again = systems.load_model(tmp_path / "saved", trust_remote_code=True)
    x = torch.full((1, 6), teacher.config.mask_id)
    assert torch.equal(again(x), teacher(x))


def test_many_classes_are_never_made_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dits.by_formula().save_pretrained(tmp_path / "dit")
    language.save("bert", tmp_path / "bert")
    x = torch.tensor([[3, 7, 3]])
    plain = {name: open_text_teacher(Named(str(tmp_path / name)))(x, None) for name in ("dit", "bert")}
    monkeypatch.setattr(text_teachers, "MANY_STATES", 20)
    for name, logits in plain.items():
        teacher = open_text_teacher(Named(str(tmp_path / name)))
        found = teacher(x, None)
        assert isinstance(logits, torch.Tensor) and isinstance(found, Hidden)
        torch.testing.assert_close(found.logits(), logits)
        student = type(teacher).from_teacher(teacher)
        assert isinstance(student(x, None, latents=torch.zeros(1, student.config.latent_dim)), Hidden)
        student.save_pretrained(tmp_path / "student")
        assert systems.load_model(tmp_path / "student").config.hidden_logits


def test_the_mask_may_be_the_tokenizers_own_or_one_more() -> None:
    words = Tokens(language.tokenizer())
    own = dits.by_formula(vocab_size=language.S, mask_id=language.SPECIAL["mask"])
    description_of(own.config, words).check_tokenizer("data", words.num_tokens, words.mask_id)
    letters = Characters()
    one_more = dits.by_formula(vocab_size=28)
    description_of(one_more.config, letters).check_tokenizer("data", letters.num_tokens, letters.mask_id)
    with pytest.raises(ValueError, match="token 4 is the mask of the data's tokenizer, but 60 is the teacher's"):
        other = dits.by_formula(vocab_size=language.S)
        description_of(other.config, words).check_tokenizer("data", 60, words.mask_id)


def test_images_are_no_teachers_of_text(tmp_path: Path) -> None:
    from di4c_ext.models import CompactConfig, CompactDenoiser

    CompactDenoiser(CompactConfig(hidden_size=8, num_blocks=1)).save_pretrained(tmp_path / "digits")
    with pytest.raises(ValueError, match="is a CompactDenoiser, of images; give one of text"):
        open_text_teacher(Named(str(tmp_path / "digits")))
    assert systems.modality_of(dits.by_formula().config) == "text" and DiTDenoiser is systems.MODELS["di4c_dit"]


@pytest.mark.parametrize("name", ["language", "language_small", "masked_lm"])
def test_presets_are_told_by_flags_of_both_commands(name: str) -> None:
    types = [DataArguments, TextArguments, TeacherArguments, StudentConfig, EvaluationArguments]
    told = {"argv": ["--preset", name, "--use_cpu", "true"], "default_preset": "digits"}
    (data, text, teacher, student, evaluation), settings = parse("distill", types, translate=_without_vq, **told)
    assert data.modality == "text" and settings["preset"] == name and len(evaluation.eval_num_steps) > 2
    if name == "language":
        assert student.objective() == Di4CObjective.preset("language")
        assert (text.tokenizer_name, text.block_size, text.streaming) == ("gpt2", 1024, True)
    kind = "masked-lm" if name == "masked_lm" else "teacher"
    types = [DataArguments, TextArguments, PretrainConfig]
    (_, text, config), _ = parse("pretrain", types, translate=partial(_from_preset, kind), **told)
    assert (config.max_steps, config.ema_decay) == (teacher.teacher_max_steps, teacher.teacher_ema_decay)
