"""`sample` and `evaluate` on small pixel models, teacher and student, and their refusals."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toys import pair, toy
from unets import by_formula

from di4c_ext import arguments, data, evaluate, pictures, sample
from di4c_ext.evaluate import EvaluationArguments, compare, latent_use
from di4c_ext.evaluation import enumerable, latents
from di4c_ext.evaluation.compare import TIMED
from di4c_ext.generate import SamplingArguments, generate
from di4c_ext.metrics.features import classifier
from di4c_ext.metrics.judge import Judge
from di4c_ext.models import CompactConfig, CompactDenoiser
from di4c_ext.report import evaluation_page


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """teacher, student and others of images of 8 x 8 in colour, and such images."""
    made = tmp_path_factory.mktemp("models")
    for name, settings in (
        ("teacher", {}),
        ("student", {"is_student": True}),
        ("grey", {"num_channels": 1}),
        ("few", {"num_states": 8}),
        ("uniform", {"process": {"name": "uniform"}}),
    ):
        by_formula(**settings).save_pretrained(made / name)
    CompactDenoiser(CompactConfig(num_states=16, length=192, hidden_size=8, num_blocks=1)).save_pretrained(made / "mlp")
    rng = np.random.default_rng(0)
    np.savez(made / "images.npz", images=rng.integers(0, 16, (60, 8, 8, 3)), labels=np.arange(60) % 3)
    return made


def run(main: Callable[[Sequence[str]], int], *argv: object) -> None:
    assert main([str(word) for word in argv]) == 0


def test_sample_writes_colours_in_their_places(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stem = tmp_path / "some"
    pair = ["--model", folder / "student", "--teacher", folder / "teacher"]
    run(sample.main, *pair, "--hybrid", 1, "--num_steps", 2, "--num_samples", 5, "--output", stem)
    assert "5 images in 2 steps" in capsys.readouterr().out
    with np.load(tmp_path / "some.npz") as file:
        images = file["images"]
    student, teacher = by_formula(is_student=True), by_formula()
    tokens = generate(student, 2, 5, seed=0, teacher=teacher, options=SamplingArguments(hybrid=1))
    assert images.shape == (5, 8, 8, 3) and images.dtype == np.uint8
    assert np.array_equal(images, tokens.view(5, 3, 8, 8).permute(0, 2, 3, 1).numpy())
    drawn = np.asarray(pytest.importorskip("PIL.Image").open(tmp_path / "some.png"))
    assert np.array_equal(drawn, pictures.enlarged(pictures.grid(tokens, (8, 8, 3), 16, 2, "CHW"), 6))


def test_sample_names_what_it_drew(folder: Path, tmp_path: Path) -> None:
    """Every kind beside its model; a picture shows no more than a look can take in."""
    copy = tmp_path / "grey"
    by_formula(num_channels=1).save_pretrained(copy)
    run(sample.main, "--model", copy, "--num_steps", 1, "--num_samples", 260, "--sampler", "tau_leaping")
    (array,) = (copy / "samples").glob("*.npz")
    assert array.name == "teacher-1steps-seed0.npz"
    with np.load(array) as file:
        assert file["images"].shape == (260, 8, 8)
    picture = pytest.importorskip("PIL.Image").open(array.with_suffix(".png"))
    assert picture.size == ((16 * 9 + 1) * 6, (16 * 9 + 1) * 6)


def test_evaluate_has_rows_of_all_three(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DI4C_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(latents, "ONE_STEP_SAMPLES", 4)
    monkeypatch.setattr("di4c_ext.metrics.judge.classifier", partial(classifier, steps=20))
    words = ["--model", folder / "student", "--teacher", folder / "teacher", "--dataset_name", folder / "images.npz"]
    words += ["--hybrid", 1, "--eval_num_steps", 1, 2, "--eval_num_samples", 20, "--eval_seeds", 0]
    words += ["--eval_num_bootstraps", 0, "--eval_num_turns", 0, "--eval_num_latents", 2]
    words += ["--output_dir", tmp_path / "measured"]
    run(evaluate.main, *words, "--output_file", tmp_path / "rows.jsonl")
    first, *rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["num_steps"], row["model"]) for row in rows] == [
        (n, model) for n in (1, 2) for model in ("teacher", "student", "hybrid")
    ]
    assert all(row["sampler"] == "analytic" and row["num_samples"] == 20 for row in rows)
    assert first["floors"]["label_score"] >= 1 and first["sizes"] == {"all": 60, "train": 50, "heldout": 10}
    figures = {name: [row[name] for row in rows] for name in ("frechet_features", "frechet_pixels", "label_score")}
    assert figures["frechet_pixels"][0] == figures["frechet_pixels"][2]  # a hybrid of 1 evaluation is the teacher
    page = (tmp_path / "measured" / "report.html").read_text()
    assert page.count("<figure><img") == 6 and "repeat(3, 1fr)" in page and 'class="hybrid"' in page
    assert figures["frechet_pixels"][3] != figures["frechet_pixels"][5] != figures["frechet_pixels"][4]
    # The data are put in the order that the network has, channel after channel.
    train, heldout = data.split(data.load(str(folder / "images.npz"), num_states=16, layout="CHW"), 1 / 6)
    judge = Judge(train, heldout, tmp_path / "cache", 20)
    again = judge.measure(generate(by_formula(is_student=True), 2, 20, seed=0))
    assert again["frechet_pixels"] == pytest.approx(figures["frechet_pixels"][4], rel=1e-9)


def test_a_teacher_alone(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "grey.npz", images=np.random.default_rng(0).integers(0, 16, (30, 8, 8)))
    words = ["--model", folder / "grey", "--dataset_name", tmp_path / "grey.npz", "--sampler", "tau_leaping"]
    words += ["--eval_num_bootstraps", 3, "--eval_num_turns", 1, "--output_dir", tmp_path / "measured"]
    run(evaluate.main, *words, "--num_steps", 2, "--eval_num_samples", 10, "--eval_seeds", 0, 1)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()][1:]
    assert [(row["model"], row["sampler"], row["seed"]) for row in rows] == [
        ("teacher", "tau_leaping", seed) for seed in (0, 1)
    ]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The flags of an evaluation of two models of 2 x 2 images without labels, into `measured`."""
    for name in ("TEACHER_STEPS", "NUM_LATENTS"):
        monkeypatch.setattr(enumerable, name, 3)
    monkeypatch.setattr(latents, "ONE_STEP_SAMPLES", 20)
    for name, model in pair().items():
        model.save_pretrained(tmp_path / name)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "four.npz", images=rng.integers(0, 3, (40, 2, 2)))
    words = [
        "--model",
        tmp_path / "student",
        "--teacher",
        tmp_path / "teacher",
        "--dataset_name",
        tmp_path / "four.npz",
    ]
    words += ["--num_states", 3, "--num_steps", 1, 2, "--eval_num_samples", 12, "--eval_seeds", 0, 1]
    words += ["--eval_num_bootstraps", 5, "--eval_num_turns", 1, "--eval_num_latents", 4]
    return [*words, "--output_dir", tmp_path / "measured"]


def kept(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()][1:]


def test_a_whole_report(small: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(evaluate.main, *small, "--eval_temperatures", 0.5)
    shown, measured = capsys.readouterr(), tmp_path / "measured"
    assert f"report: {measured / 'report.html'}" in shown.err and "Fréchet distance, raw pixels" in shown.err
    told = json.loads((measured / "evaluation.json").read_text())
    assert told["rows"] == [json.loads(line) for line in shown.out.splitlines()][1:] and len(told["rows"]) == 16
    for row in told["rows"]:
        assert row["frechet_pixels_low"] <= row["frechet_pixels"] <= row["frechet_pixels_high"]
        assert row["num_evaluations"] == row["num_steps"] and row["latency"] > 0 < row["latency_1"]
    assert set(told["floors"]) <= set(told["rows"][0])
    assert [row["num_steps"] for row in told["exact"]] == [1, 2] and told["exact"][0]["teacher_steps"] == 3
    assert [row["batch_size"] for row in told["overhead"]] == [12, 1]
    assert told["one_step"]["total_correlation_low"] <= told["one_step"]["total_correlation"]
    assert [row["t"] for row in told["latents"]] == [1, 0.75, 0.5, 0.25] and told["matched"][0]["student_steps"] == 1
    page, card = (measured / "report.html").read_text(), (measured / "README.md").read_text()
    for name in ("samples", "quality", "time", "latents", "exact", "again"):
        assert f'<section id="{name}">' in page
    assert "At equal entropy" in page and "In batches of 12" in page and "| student | 2 | 2 |" in card
    (tmp_path / "again.yaml").write_text(arguments.as_yaml(told["settings"]))
    run(evaluate.main, "--config", tmp_path / "again.yaml")
    assert capsys.readouterr().out == shown.out, "the settings that are told make the same evaluation, which is there"
    assert not list(measured.glob(".*")) and len(list((measured / "samples").iterdir())) == 4


def test_it_goes_on_where_it_was_stopped(
    small: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluation_page, "page", lambda facts: "drawn elsewhere")
    run(evaluate.main, *small[:-1], tmp_path / "whole")
    measure, calls = Judge.measure, []

    def stopped(self: Judge, samples: torch.Tensor, num_bootstraps: int = 0, seed: int = 0) -> dict[str, float]:
        if num_bootstraps:  # not for the floors
            calls.append(len(samples))
            if len(calls) == 4:
                raise KeyboardInterrupt
        return measure(self, samples, num_bootstraps, seed)

    monkeypatch.setattr(Judge, "measure", stopped)
    capsys.readouterr()
    assert evaluate.main([str(word) for word in small]) == 130
    assert "the same command goes on" in capsys.readouterr().err and not (tmp_path / "measured/report.html").exists()
    first = kept(tmp_path / "measured")
    assert len(first) == 3
    run(evaluate.main, *small)
    assert len(calls) == 4 + 5 and kept(tmp_path / "measured")[:3] == first
    figures = [
        [{name: value for name, value in row.items() if name not in TIMED} for row in kept(tmp_path / folder)]
        for folder in ("measured", "whole")
    ]
    assert figures[0] == figures[1]
    # More of the same is measured beside what there is; nothing that is there is measured again.
    monkeypatch.setattr(Judge, "measure", measure)
    run(evaluate.main, *small, "--num_steps", 4, "--eval_seeds", 0)
    assert kept(tmp_path / "measured")[:8] == kept(tmp_path / "measured")[:3] + kept(tmp_path / "measured")[3:8]
    assert [(row["model"], row["num_steps"]) for row in kept(tmp_path / "measured")[8:]] == [
        ("teacher", 4),
        ("student", 4),
    ]
    assert "| student | 4 |" in (tmp_path / "measured/README.md").read_text()


def test_what_lies_there_already(
    small: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.setattr(evaluation_page, "page", lambda facts: "drawn elsewhere")
    alone = [word for word in small if word not in ("--teacher", tmp_path / "teacher")]
    run(evaluate.main, *alone)
    assert len(kept(tmp_path / "measured")) == 4
    run(evaluate.main, *small)  # its teacher joins it
    assert len(kept(tmp_path / "measured")) == 8
    told = refused(evaluate.main, *small, "--eval_num_samples", 11)
    assert "holds an evaluation of another --eval_num_samples (12, now 11)" in told and "--overwrite_output_dir" in told
    toy(is_student=True, scale=0.4).save_pretrained(tmp_path / "student")
    assert "holds an evaluation of another student" in refused(evaluate.main, *small)
    run(evaluate.main, *small, "--overwrite_output_dir", "--eval_seeds", 0)
    assert len(kept(tmp_path / "measured")) == 4
    assert "holds config.json, model.safetensors, and no evaluation" in (
        refused(evaluate.main, *small[:-1], tmp_path / "teacher")
    )


def test_compare_leaves_a_teacher_what_it_has_not() -> None:
    """last_latents is for the student's rows alone; guidance makes rows of its own."""
    models: dict[str, Any] = {
        "teacher": by_formula(num_channels=1),
        "student": by_formula(num_channels=1, is_student=True),
    }
    images = data.from_arrays(np.random.default_rng(0).integers(0, 16, (30, 8, 8)), num_states=16)
    judge = Judge(*data.split(images, 1 / 3), None)
    args = EvaluationArguments(eval_num_steps=[2], eval_num_samples=4, eval_seeds=[0])
    sampling = SamplingArguments(last_latents=2, guidance=1.5)
    found = {row["model"]: samples for row, samples in compare(models, judge, args, 4, sampling)}
    assert list(found) == ["teacher", "student", "guided"]
    assert torch.equal(found["teacher"], generate(models["teacher"], 2, 4, seed=0))
    chosen = SamplingArguments(last_latents=2)
    assert torch.equal(found["student"], generate(models["student"], 2, 4, seed=0, options=chosen))
    assert torch.equal(
        found["guided"], generate(models["student"], 2, 4, seed=0, teacher=models["teacher"], options=sampling)
    )


def test_latents_of_a_pixel_student() -> None:
    """A student whose latents do nothing carries nothing; one by formula does."""
    from di4c_ext.models import UNetDenoiser

    images = data.from_arrays(np.random.default_rng(0).integers(0, 16, (4, 8, 8)), num_states=16)
    teacher = by_formula(num_channels=1)
    for student, least, most in (
        (UNetDenoiser.from_teacher(teacher), 0, 1e-3),
        (by_formula(num_channels=1, is_student=True), 0.05, 1e4),
    ):
        rows = latent_use(student, images, 4)
        assert [row["t"] for row in rows] == [1.0, 0.75, 0.5, 0.25] and rows[0]["num_images"] == 4
        assert all(least <= row["information"] <= most for row in rows), rows
        assert all(abs(row["correlation"]) <= most for row in rows)
    with pytest.raises(ValueError, match="a teacher has no latents"):
        latent_use(teacher, images, 4)


def test_refusals(folder: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    student = ["--model", folder / "student"]
    both = [*student, "--teacher", folder / "teacher"]
    measured = ["--dataset_name", folder / "images.npz", "--eval_num_steps", "2", "4"]
    for main, argv, message in (
        (sample.main, [*student, "--hybrid", 1], "--hybrid 1: needs the teacher; name its folder by --teacher"),
        (sample.main, [*both, "--hybrid", 5], "--hybrid 5: more evaluations of the teacher than the 4 there are"),
        (sample.main, both, "is for --hybrid or --guidance; give one of them, or leave it out"),
        (sample.main, [*student, "--teacher", folder / "few", "--hybrid", 1], "has S = 8, D = 192, the student S = 16"),
        (sample.main, [*student, "--teacher", folder / "grey", "--hybrid", 1], "D = 64, the student S = 16, D = 192"),
        (sample.main, [*student, "--teacher", folder / "uniform", "--hybrid", 1], "was trained for UniformProcess"),
        (sample.main, [*student, "--teacher", folder / "mlp", "--hybrid", 1], "was trained for AbsorbingProcess"),
        (sample.main, [*student, "--teacher", folder / "student", "--hybrid", 1], "holds a student, a teacher is"),
        (sample.main, ["--model", folder / "teacher", "--last_latents", 2], "a teacher has no latents"),
        (sample.main, ["--model", folder / "teacher", "--teacher", folder / "grey", "--hybrid", 1], "a teacher itself"),
        (sample.main, [*student, "--sampler", "euler"], "--sampler 'euler': must be one of auto, ancestral"),
        (sample.main, [*student, "--sampler", "tau_leaping"], "is for teachers of GaussianProcess"),
        (sample.main, ["--model", folder / "mlp", "--sampler", "tau_leaping"], "this model is masked"),
        (sample.main, ["--model", folder], "config.json is missing"),
        (evaluate.main, [*student, *measured, "--hybrid", 1], "--hybrid 1: needs a student and its teacher"),
        (evaluate.main, [*both, *measured, "--hybrid", 3], "than the 2 of the smallest --eval_num_steps"),
        (evaluate.main, [*student, "--teacher", folder / "few", *measured], "has S = 8, D = 192, the student S = 16"),
        (evaluate.main, ["--model", folder / "grey", *measured], "has S = 16, D = 64; the images of 'images' have S"),
        (
            evaluate.main,
            [*student, *measured, "--eval_temperatures", -1],
            "--eval_temperatures -1: each must be finite",
        ),
        (evaluate.main, [*student, *measured, "--eval_num_samples", 1], "--eval_num_samples 1: must be at least 2"),
    ):
        told = refused(main, *argv, *(["--output", tmp_path / "no"] if main is sample.main else []))
        assert message in told, (argv, told)
    assert not list(tmp_path.glob("no*"))
