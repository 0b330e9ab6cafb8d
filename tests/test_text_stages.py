"""Text in stages by the command: the published chain, a second round of adapters, and a model that begins at random."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import language
import pytest
import torch
from commands import DIT, as_words

from di4c_ext import distill, pretrain, sample
from di4c_ext.callbacks import read_metrics
from di4c_ext.generate import open_model
from di4c_ext.models import Di4CForMaskedLM, DiTDenoiser
from di4c_ext.text_sources import told_beside

QUICK = {"use_cpu": "true", "disable_tqdm": "true", "logging_steps": 1, "per_device_train_batch_size": 4}
MEASURED = {"eval_num_steps": 2, "eval_num_samples": 4, "eval_seeds": 0}
ALL = ["sdtt", "di4c", "di4c2"]


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The flags of a text of words, which the tokenizer of `language` knows."""
    monkeypatch.setenv("DI4C_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "words.txt"
    file.write_text("\n\n".join(" ".join(language.WORDS[i : i + 12] * 2) for i in range(30)))
    told = {"modality": "text", "dataset_name": file, "separator": "\\n\\n", "heldout_fraction": 0.3}
    return told | {"block_size": 10} | QUICK


def test_the_published_chain_on_text(words: dict[str, Any], tmp_path: Path) -> None:
    output = tmp_path / "run"
    told = {"preset": "masked_lm"} | words | MEASURED | {"tokenizer_name": "characters"}  # which names no network
    told |= {"output_dir": output, "stages": ALL, "sdtt_step": 0.05}
    told |= {"teacher_max_steps": 2, "max_steps": 3, "num_latents": 3, "num_targets": 2, "teacher_model_config": DIT}
    told |= {"student_model_config": {"latent_form": "added", "latent_dim": 2, "latent_hidden_size": 8}}
    told |= {"stage_config": {"sdtt": {"max_steps": 2}, "di4c2": {"max_steps": 2}}, "sdtt_rounds": 2}
    assert distill.main(as_words(told)) == 0
    models = {name: open_model(output / "stages" / name) for name in ("sdtt-1", "sdtt-2", "di4c")}
    assert [type(model) for model in models.values()] == [DiTDenoiser] * 3
    assert [model.config.is_student for model in models.values()] == [False, False, True]
    last, first = open_model(output).state_dict(), models["di4c"].state_dict()
    assert last.keys() == first.keys() and any(not torch.equal(last[name], first[name]) for name in first)
    assert told_beside(output / "stages" / "sdtt-2") == told_beside(output)
    lines = read_metrics(output / "metrics.jsonl")
    phases = [line["phase"] for line in lines if line["phase"] != "evaluation"]
    assert phases == ["sdtt-1"] * 2 + ["sdtt-2"] * 2 + ["di4c"] * 3 + ["student"] * 2
    assert all("divergence" in line for line in lines[:4]) and "marginal_data" in lines[-3]
    assert {line["model"] for line in lines if line["phase"] == "evaluation"} == {"teacher", "student"}
    assert sample.main(as_words({"model": output / "stages" / "di4c", "num_steps": 1, "num_samples": 2})) == 0


def test_a_second_round_of_adapters_moves_adapters_alone(words: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    teacher, output = language.save("bert", tmp_path / "bert"), tmp_path / "run"
    told = words | MEASURED | {"teacher_model_name_or_path": teacher, "output_dir": output, "stages": ALL[1:]}
    told |= {"lora_rank": 2, "max_steps": 2, "num_latents": 2, "num_targets": 2, "learning_rate": 0.01}
    told |= {"student_model_config": {"latent_dim": 2, "latent_hidden_size": 8}}
    assert distill.main(as_words(told)) == 0
    first, last = open_model(output / "stages" / "di4c"), open_model(output)
    assert isinstance(last, Di4CForMaskedLM) and first.config.lora == last.config.lora and last.config.lora["r"] == 2
    x = torch.full((2, 10), language.SPECIAL["mask"])
    alone = Di4CForMaskedLM.as_teacher(teacher)(x, None)
    for model in (first, last):
        assert torch.equal(model.teacher_denoiser()(x, None), alone), "adapters off, each is the teacher"
    before, after = first.state_dict(), last.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("lora_" in name or "latent_" in name for name in moved)
    assert any("lora_" in name for name in moved)


def test_stages_that_have_no_adapters_are_refused(
    words: dict[str, Any], tmp_path: Path, refused: Callable[..., str]
) -> None:
    told = words | {"teacher_model_name_or_path": language.save("bert", tmp_path / "bert"), "stages": ALL}
    told |= {"output_dir": tmp_path / "run"}
    message = refused(distill.main, *as_words(told | {"lora_rank": 2}))
    assert "--stages sdtt: trains all weights" in message and "got --lora_rank 2; leave one of both out" in message
    message = refused(distill.main, *as_words(told | {"stage_config": {"di4c": {"lora_rank": 2}}}))
    assert "stage di4c has no setting 'lora_rank' of its own" in message
    assert not (tmp_path / "run").exists()


def test_a_masked_lm_begins_at_random(
    words: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    output = tmp_path / "teacher"
    told = words | {"kind": "masked-lm", "config_name": "bert", "config_overrides": sizes, "output_dir": output}
    told |= {"tokenizer_name": "characters", "max_steps": 60, "learning_rate": 0.01, "warmup_steps": 0}
    assert pretrain.main(as_words(told)) == 0
    teacher = open_model(output)
    assert isinstance(teacher, Di4CForMaskedLM) and teacher.config.backbone_config.hidden_size == 16
    assert (teacher.config.mask_id, told_beside(output)["tokenizer_name"]) == (27, "characters")
    losses = [line["loss"] for line in read_metrics(output / "metrics.jsonl")]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10]), "it learns"
    assert "likelihood bound in nats a token" in capsys.readouterr().out

    more = words | MEASURED | {"teacher_model_name_or_path": output, "output_dir": tmp_path / "run", "max_steps": 1}
    more |= {"num_latents": 2, "num_targets": 2, "student_model_config": {"latent_dim": 2, "latent_hidden_size": 8}}
    assert distill.main(as_words(more)) == 0
    prompt = {"model": tmp_path / "run", "num_steps": 2, "num_samples": 2, "prompt": "the"}
    assert sample.main(as_words(prompt)) == 0
    rows = (tmp_path / "run" / "samples" / "student-2steps-seed0.jsonl").read_text().splitlines()
    assert all(json.loads(row)["text"].startswith("the") and max(json.loads(row)["tokens"]) < 27 for row in rows)


def test_what_a_new_masked_lm_lacks_is_told(
    words: dict[str, Any], tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    told = words | {"output_dir": tmp_path / "out", "kind": "masked-lm"}
    bert = {"config_name": "bert", "tokenizer_name": "characters"}
    for more, message in (
        ({}, "or the config of a new one by --config_name, one of the two"),
        (bert | {"model_name_or_path": "some"}, "one of the two"),
        (bert | {"kind": "teacher"}, "--config_name bert: is for --kind masked-lm, this is teacher"),
        ({"model_name_or_path": "some", "config_overrides": {"a": 1}}, "--config_overrides: is for --config_name"),
        (bert | {"config_overrides": {"hidden_sizes": 1}}, "bert has no setting 'hidden_sizes'; did you mean"),
        ({"config_name": "bert"}, "--config_name bert is a family, which has none; give characters"),
        (bert | {"config_name": "bertie"}, "no config that opens"),
        (bert | {"block_size": 600}, "sequences of 600 tokens, but this teacher takes at most 512"),
    ):
        assert message in refused(pretrain.main, *as_words(told | more)), more
        assert not (tmp_path / "out").exists()
