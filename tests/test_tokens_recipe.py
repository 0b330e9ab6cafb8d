"""The recipe python/tokens.py: its command lines, promise, table and picture, and the whole of it in small."""

from __future__ import annotations

import inspect
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import VQ
from programs import program
from test_tokens_commands import NETWORK

from di4c_ext import arguments
from di4c_ext.distill import StudentConfig, TeacherArguments, _without_vq
from di4c_ext.evaluate import EvaluationArguments, check_plan
from di4c_ext.generate import SamplingArguments
from di4c_ext.metrics.features import classifier
from di4c_ext.models import TokenConfig, TokenDenoiser, VQConfig, VQModel

tokens = program("tokens")

TEACHER = {1: 300.0, 2: 200.0, 4: 100.0, 8: 50.0, 16: 30.0}
STUDENT = {1: 150.0, 2: 80.0, 4: 50.0, 8: 40.0, 16: 35.0}


def measured(student: dict[int, float] = STUDENT) -> dict[str, Any]:
    floors = {"frechet_features": 2.5, "label_score": 8.75, "frechet_pixels": 0.4}
    rows = [
        {"model": model, "num_steps": n, "seed": 0, "num_samples": 1000, **dict.fromkeys(floors, value)}
        for model, values in (("teacher", TEACHER), ("student", student))
        for n, value in values.items()
    ]
    return {
        "rows": rows,
        "floors": floors,
        "reconstructions": {name: 2 * value for name, value in floors.items()},
        "accuracy": 0.89,
        "bounds": {"train": 100.0, "heldout": 104.5},
        "bounds_name": "likelihood bound in nats an image",
        "seconds": {"teacher": 1200.0, "student": 900.0, "evaluation": 60.0},
    }


def test_promise_kept_at_the_boundary() -> None:
    assert list(tokens.promises(measured()).values()) == [True]
    assert list(tokens.promises(measured(STUDENT | {4: 50.1})).values()) == [False]


def test_report_says_what_was_measured(tmp_path: Path) -> None:
    for folder, seconds in (("vq", 420), ("seed-3/teacher", 1380)):
        (tmp_path / folder).mkdir(parents=True)
        lines = [{"phase": "any", "step": 1, "seconds": 5.0}, {"phase": "any", "step": 2, "seconds": seconds}]
        (tmp_path / folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    seeds = {0: measured(), 3: measured(STUDENT | {4: 60.0})}
    text = tokens.report(tokens.SCALES["small"], seeds, tmp_path)
    assert "an earlier one: VQ model 7.0, teacher of seed 3 23.0." in text
    assert "Minutes of training" not in tokens.report(tokens.SCALES["small"], seeds, tmp_path / "none")
    assert "features of a classifier; real images: 2.50, come back from their own codes: 5.00" in text
    assert "| 0 | student | 150.00 | 80.00 | 50.00 | 40.00 | 35.00 |" in text
    assert "| mean | **student** | **150.00** | **80.00** | **55.00** |" in text
    assert text.count("| NO |") == 1 and "| 3 | student at 4 <= teacher at 8 | NO |" in text
    assert "likelihood bound in nats an image" in text and "| 0 | 100.0 | 104.5 |" in text


def test_flags_are_split() -> None:
    flags = ["--dataset_name", "x.npz", "--vq_max_steps", "3", "--max_steps=5", "--use_cpu", "--vq_seed=7"]
    of_vq, others = tokens.split_flags(flags)
    assert of_vq == ["--dataset_name", "x.npz", "--max_steps", "3", "--use_cpu", "--seed=7"]
    assert others == ["--dataset_name", "x.npz", "--max_steps=5", "--use_cpu"]


def _settings(argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], dict[str, Any]]:
    """What di4c_ext.distill would make of the flags of the one seed that argv asks for."""
    monkeypatch.chdir(tmp_path)
    args, flags = tokens.parsed(argv)
    scale, (seed,) = tokens.SCALES[args.scale], args.seeds
    output = args.runs / f"seed-{seed}"
    types = [arguments.DataArguments, TeacherArguments, StudentConfig, EvaluationArguments, SamplingArguments]
    words = ["--output_dir", str(output), *tokens.flags_of(scale, seed, output, args, flags)]
    made, resolved = arguments.parse("distill", types, words, default_preset="digits", translate=_without_vq)
    check_plan(made[3], made[4])
    return made, resolved


def test_small_scale_as_distill_reads_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made, resolved = _settings(["--seeds", "4", "--max_steps", "7", "--use_cpu"], tmp_path, monkeypatch)
    images, teacher, student, evaluation, _ = made
    assert (images.dataset_name, images.process) == ("fashion_mnist", "confidence")
    assert images.vq_model == "runs/tokens-seeds/vq" and resolved["preset"] == "tokens_small"
    assert (teacher.teacher_seed, student.seed, student.max_steps) == (4, 4, 7)
    assert evaluation.eval_num_steps == [1, 2, 4, 8, 16]


def test_published_scale_as_distill_reads_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    argv = ["--scale", "paper", "--vq_model", "vqgan", "--eval_feature_extractor", "some/network", "--use_cpu"]
    made, _ = _settings([*argv, "--teacher_model_name_or_path", "maskgit"], tmp_path, monkeypatch)
    images, _, student, evaluation, sampling = made
    assert images.vq_model == "vqgan" and images.image_size == 256
    objective = student.objective()
    told = {name: getattr(objective, name) for name in ("num_latents", "distillation", "clean_positions", "step_share")}
    assert told == {"num_latents": 32, "distillation": 20.0, "clean_positions": True, "step_share": 1.0}
    assert objective == type(objective).preset("tokens"), "as published"
    assert evaluation.eval_num_samples == 50_000 and sampling.class_guidance == 6


def test_published_numbers_of_the_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    argv = ["--scale", "paper", "--vq_model", "vqgan", "--eval_feature_extractor", "some/network", "--use_cpu"]
    (images, teacher, student, evaluation, sampling), _ = _settings(argv, tmp_path, monkeypatch)
    assert images.process_settings() == {
        **{"name": "confidence", "schedule": "arccos", "gumbel": 4.5, "ramp_steps": 8, "clamp_ramp": False},
        "guidance": 0.0,
    }
    assert (student.learning_rate, student.adam_beta2, student.weight_decay) == (1e-5, 0.96, 1e-5)
    assert (student.base_learning_rate, student.label_dropout, student.ema_decay) == (None, 0.1, 0.0)
    assert (student.window, student.window_share, student.step_min, student.step_max) == (0.05, 0.05, 0.05, 0.05)
    assert (student.data_weight, student.data_law, student.student_model_config) == (0.1, "sigmoid", {})
    made = inspect.signature(TokenDenoiser.from_teacher).parameters
    assert (made["latent_form"].default, made["latent_dim"].default, made["latent_law"].default) == (
        *("token", 1),
        "uniform",
    )
    assert (teacher.teacher_learning_rate, teacher.teacher_max_steps) == (1e-4, 755_200)
    assert teacher.teacher_per_device_train_batch_size == 512
    assert evaluation.eval_num_steps == [4, 8] and evaluation.eval_feature_extractor == "some/network"
    assert (sampling.gumbel, sampling.randomize, sampling.temperature, sampling.teacher_guides) == (
        *(4.5, "linear", 1.0),
        False,
    )


def _stand_ins(folder: Path) -> list[Any]:
    """Flags that name images in colour, a VQ model, a teacher of its codes and a feature extractor, all tiny."""
    transformers = pytest.importorskip("transformers")
    rng = np.random.default_rng(0)
    np.savez(folder / "images.npz", images=rng.integers(0, 256, (40, 8, 8, 3)), labels=np.arange(40) % 4)
    torch.manual_seed(0)
    vq = VQModel(VQConfig(**VQ, image_size=8, num_channels=3))
    vq.save_pretrained(folder / "vqgan")
    told = {"num_codes": 12, "num_classes": 4, "grid": 4, "codebook": vq.fingerprint()}
    TokenDenoiser(TokenConfig(**NETWORK | told | {"mask_logit": True})).save_pretrained(folder / "maskgit")
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    transformers.ResNetForImageClassification(config).save_pretrained(folder / "resnet")
    looks = {"size": {"shortest_edge": 8}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (folder / "resnet" / "preprocessor_config.json").write_text(json.dumps(looks))
    return [
        *("--vq_model", folder / "vqgan", "--teacher_model_name_or_path", folder / "maskgit"),
        *("--eval_feature_extractor", folder / "resnet", "--dataset_name", folder / "images.npz"),
        *("--num_states", 256, "--image_size", 8, "--heldout_fraction", 0.2),
    ]


def test_the_published_scale_runs_on_stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every published setting reaches a program that takes it; only sizes and lengths are others."""
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("DI4C_CACHE", str(tmp_path / "cache"))
    argv = ["--scale", "paper", "--runs", tmp_path / "runs", "--results", tmp_path / "results", "--num_samples", 8]
    argv += ["--sampling_seeds", 0, "--max_steps", 1, "--use_cpu", "--disable_tqdm", "true", *_stand_ins(tmp_path)]
    assert tokens.main([str(word) for word in argv]) in (0, 1)
    assert (tmp_path / "results" / "tokens-paper.png").is_file()
    text = (tmp_path / "results" / "tokens-paper.md").read_text()
    assert "Preset `tokens`" in text and "score by the named feature extractor" in text and "| teacher |" in text
    student = TokenDenoiser.from_pretrained(tmp_path / "runs" / "seed-0")
    assert (student.config.latent_form, student.config.latent_dim, student.config.num_states) == ("token", 1, 13)


def test_published_scale_wants_its_models(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tokens.parsed(["--scale", "paper", "--vq_model", "vqgan"])
    assert "name a --vq_model, and the feature space by --eval_feature_extractor" in capsys.readouterr().err


def test_the_whole_recipe_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part runs and writes what it promises; nothing is learned, so what the method promises may fail."""
    plt = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setenv("DI4C_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("di4c_ext.metrics.judge.classifier", partial(classifier, steps=20))
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "images.npz", images=rng.integers(0, 256, (40, 8, 8)), labels=np.arange(40) % 4)
    argv = ["--runs", tmp_path / "runs", "--results", tmp_path / "results", "--num_samples", 8, "--seeds", 2]
    argv += ["--sampling_seeds", 0, "--dataset_name", tmp_path / "images.npz", "--num_states", 256, "--use_cpu"]
    argv += ["--disable_tqdm", "true", "--vq_max_steps", 2, "--vq_per_device_train_batch_size", 4]
    argv += ["--vq_model_config", json.dumps(VQ), "--teacher_max_steps", 2, "--max_steps", 2, "--num_latents", 2]
    argv += ["--teacher_per_device_train_batch_size", 4, "--per_device_train_batch_size", 2]
    argv += ["--teacher_model_config", json.dumps(NETWORK)]
    assert tokens.main([str(word) for word in argv]) in (0, 1)
    results = tmp_path / "results"
    assert sorted(file.name for file in results.iterdir()) == ["tokens.json", "tokens.md", "tokens.png"]
    assert "8 samples for each figure" in (results / "tokens.md").read_text()
    assert plt.imread(results / "tokens.png").shape[:2] == (770, 1430)
    assert (tmp_path / "runs" / "vq" / "samples" / "reconstructions.png").is_file()
