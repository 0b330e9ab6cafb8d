"""The recipe python/pixels.py: its command lines, promises, table and picture, from made-up figures."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from programs import program

from di4c_ext import arguments, pictures
from di4c_ext.distill import StudentConfig, TeacherArguments
from di4c_ext.evaluate import EvaluationArguments, check_plan
from di4c_ext.generate import SamplingArguments
from di4c_ext.metrics.features import classifier

pixels = program("pixels")

TEACHER = {5: 200.0, 10: 100.0, 20: 50.0, 40: 30.0}
STUDENT = {5: 80.0, 10: 50.0, 20: 40.0, 40: 35.0}
HYBRID = {5: 90.0, 10: 48.0, 20: 36.0, 40: 30.0}


def measured(student: dict[int, float] = STUDENT, seeds: tuple[int, ...] = (0,)) -> dict[str, Any]:
    rows = [
        {
            "model": model,
            "num_steps": n,
            "seed": seed,
            "num_samples": 1000,
            "frechet_features": value + seed,
            "label_score": 5.0,
            "frechet_pixels": value / 100,
        }
        for model, values in (("teacher", TEACHER), ("student", student), ("hybrid", HYBRID))
        for n, value in values.items()
        for seed in seeds
    ]
    return {
        "rows": rows,
        "floors": {"frechet_features": 2.5, "label_score": 8.75, "frechet_pixels": 0.4},
        "accuracy": 0.89,
        "bounds": {"train": 1390.0, "heldout": 1401.5},
        "bounds_name": "denoising cross-entropy in nats an image",
        "seconds": {"teacher": 1200.0, "student": 1330.0, "evaluation": 600.0},
    }


def test_promises_kept_at_the_boundary() -> None:
    assert list(pixels.promises(measured(STUDENT | {10: 55.0})).values()) == [True, True]
    assert list(pixels.promises(measured(STUDENT | {10: 55.1})).values()) == [True, False]
    assert list(pixels.promises(measured(STUDENT | {10: 90.1})).values()) == [False, False]


def test_report_says_what_was_measured() -> None:
    scale = pixels.SCALES["small"]
    text = pixels.report(scale, {0: measured(seeds=(0, 1)), 3: measured(STUDENT | {10: 95.0})})
    assert "1,000 samples for each figure, means of 2 sampling seeds" in text
    assert "| 0 | hybrid | 90.50 | 48.50 | 36.50 | 30.50 |" in text  # the mean over sampling seeds
    assert "| mean | **student** | **80.25** | **72.75** |" in text
    assert "features of a classifier; real images: 2.50" in text and "own classifier; real images: 8.75" in text
    assert "| 3 | student at 10 <= 0.9 x teacher at 10 | NO |" in text and text.count("| NO |") == 2
    assert "is right on 89.0%" in text and "| 0 | 1390.0 | 1401.5 |" in text
    assert "Minutes of seed 0: teacher 20.0, student 22.2, evaluation 10.0." in text
    assert "mask" not in text


def test_picture_of_a_run(tmp_path: Path) -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    rng = np.random.default_rng(0)
    for model in ("teacher", "student"):
        for n in (5, 10, 20):
            pictures.save(rng.integers(0, 255, (233, 233), dtype=np.uint8), tmp_path / f"{model}-{n:03d}steps.png", 1)
    file = tmp_path / "pixels.png"
    pixels.picture(pixels.SCALES["small"], {0: measured()}, tmp_path, file)
    assert plt.imread(file).shape[:2] == (572, 1430)
    assert pixels.recipes.ticks({0: measured()}, pixels.MODELS, (5, 10, 20, 40)) == [2, 5, 10, 20, 50, 100, 200]


def _settings(argv: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[list[Any], dict[str, Any]]:
    """What di4c_ext.distill would make of the flags of the one seed that argv asks for."""
    monkeypatch.chdir(tmp_path)
    args, flags = pixels.parsed(argv)
    scale, (seed,) = pixels.SCALES[args.scale], args.seeds
    output = args.runs / f"seed-{seed}"
    types = [arguments.DataArguments, TeacherArguments, StudentConfig, EvaluationArguments, SamplingArguments]
    words = ["--output_dir", str(output), *pixels.flags_of(scale, seed, output, args, flags)]
    made, resolved = arguments.parse("distill", [*types, arguments.RunArguments], words, default_preset="digits")
    check_plan(made[3], made[4])
    return made, resolved


def test_small_scale_as_distill_reads_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made, resolved = _settings(["--seeds", "4", "--max_steps", "7", "--use_cpu"], monkeypatch, tmp_path)
    images, teacher, student, evaluation, sampling, options = made
    assert (images.dataset_name, images.num_states, images.process) == ("fashion_mnist", 32, "gaussian")
    assert (teacher.teacher_seed, student.seed, student.max_steps) == (4, 4, 7)
    assert evaluation.eval_num_steps == [5, 10, 20, 40] and evaluation.eval_num_samples == 1000
    assert evaluation.eval_seeds == [0] and sampling.hybrid == 2 and not options.resume
    assert resolved["preset"] == "pixels_small" and resolved["output_dir"] == "runs/pixels-seeds/seed-4"


def test_published_scale_as_distill_reads_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    argv = ["--scale", "paper", "--dataset_name", "cifar-10-batches-py", "--eval_feature_extractor", "some/network"]
    argv += ["--teacher_model_name_or_path", "published", "--use_cpu"]
    made, resolved = _settings(argv, monkeypatch, tmp_path)
    images, teacher, student, evaluation, sampling, _ = made
    assert (images.dataset_name, images.process, images.num_states) == ("cifar-10-batches-py", "gaussian", None)
    assert teacher.teacher_model_name_or_path == "published" and student.num_latents == 16
    assert evaluation.eval_num_steps == [10, 20, 40] and evaluation.eval_num_samples == 50_000
    assert evaluation.eval_feature_extractor == "some/network" and sampling.hybrid == 5
    assert resolved["preset"] == "pixels"


def test_published_scale_wants_a_feature_space(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pixels.parsed(["--scale", "paper"])
    assert "name the feature space by --eval_feature_extractor" in capsys.readouterr().err


def test_goes_on_with_a_run(tmp_path: Path) -> None:
    args, flags = pixels.parsed(["--runs", str(tmp_path)])
    assert "--resume" not in pixels.flags_of(pixels.SCALES["small"], 0, tmp_path, args, flags)
    (tmp_path / "distill_config.yaml").write_text("preset: pixels_small")
    assert "--resume" in pixels.flags_of(pixels.SCALES["small"], 0, tmp_path, args, flags)


def test_the_whole_recipe_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part runs and writes what it promises; nothing is learned, so what the method promises may fail."""
    monkeypatch.setenv("DI4C_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("di4c_ext.metrics.judge.classifier", partial(classifier, steps=20))
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "images.npz", images=rng.integers(0, 8, (40, 8, 8)), labels=np.arange(40) % 4)
    network = {"base_channels": 8, "ch_mult": [1, 1], "num_res_blocks": 1, "attention_scales": [], "time_embed_dim": 8}
    argv = ["--runs", tmp_path / "runs", "--results", tmp_path / "results", "--num_samples", 10, "--seeds", 2]
    argv += ["--dataset_name", tmp_path / "images.npz", "--num_states", 8, "--use_cpu", "--disable_tqdm", "true"]
    argv += ["--teacher_max_steps", 2, "--teacher_per_device_train_batch_size", 4, "--max_steps", 2]
    argv += ["--num_latents", 2, "--per_device_train_batch_size", 2, "--teacher_model_config", json.dumps(network)]
    assert pixels.main([str(word) for word in argv]) in (0, 1)
    assert sorted(file.name for file in (tmp_path / "results").iterdir()) == ["pixels.json", "pixels.md", "pixels.png"]
    text = (tmp_path / "results" / "pixels.md").read_text()
    assert "10 samples for each figure" in text and "| 2 | hybrid |" in text and "denoising cross-entropy" in text
    (measured,) = json.loads((tmp_path / "results" / "pixels.json").read_text()).values()
    assert {(row["model"], row["num_steps"]) for row in measured["rows"]} == {
        (model, n) for model in ("teacher", "student", "hybrid") for n in (5, 10, 20, 40)
    }
    page = (tmp_path / "runs" / "seed-2" / "report.html").read_text()
    assert "discretised Gaussian diffusion" in page and "Hybrid" in page
