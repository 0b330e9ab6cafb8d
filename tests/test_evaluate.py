"""`sample` and `evaluate` on small pixel models, teacher and student, and their refusals."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from unets import by_formula

from di4c_ext import arguments, data, evaluate, pictures, sample
from di4c_ext.evaluate import EvaluationArguments, compare, latent_use
from di4c_ext.generate import SamplingArguments, generate
from di4c_ext.metrics.judge import Judge
from di4c_ext.models import CompactConfig, CompactDenoiser


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


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must refuse: exit code 2 and one line, which is returned."""

    def refuse(main: Callable[[Sequence[str]], int], *argv: object) -> str:
        with pytest.raises(SystemExit) as stop:
            arguments.run(main, [str(word) for word in argv])
        shown = capsys.readouterr()
        lines = [line for line in shown.err.splitlines() if line.startswith("error: ")]
        assert stop.value.code == 2 and len(lines) == 1, shown
        return lines[0]

    return refuse


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
    words = ["--model", folder / "student", "--teacher", folder / "teacher", "--dataset_name", folder / "images.npz"]
    words += ["--hybrid", 1, "--eval_num_steps", 1, 2, "--eval_num_samples", 20, "--eval_seeds", 0]
    run(evaluate.main, *words, "--output_file", tmp_path / "rows.jsonl")
    first, *rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["num_steps"], row["model"]) for row in rows] == [
        (n, model) for n in (1, 2) for model in ("teacher", "student", "hybrid")
    ]
    assert all(row["sampler"] == "analytic" and row["num_samples"] == 20 for row in rows)
    assert first["floors"]["label_score"] >= 1 and first["sizes"] == {"all": 60, "train": 50, "heldout": 10}
    figures = {name: [row[name] for row in rows] for name in ("frechet_features", "frechet_pixels", "label_score")}
    assert figures["frechet_pixels"][0] == figures["frechet_pixels"][2]  # a hybrid of 1 evaluation is the teacher
    assert figures["frechet_pixels"][3] != figures["frechet_pixels"][5] != figures["frechet_pixels"][4]
    # The data are put in the order that the network has, channel after channel.
    train, heldout = data.split(data.load(str(folder / "images.npz"), num_states=16, layout="CHW"), 1 / 6)
    judge = Judge(train, heldout, tmp_path / "cache", 20)
    again = judge.measure(generate(by_formula(is_student=True), 2, 20, seed=0))
    assert again["frechet_pixels"] == pytest.approx(figures["frechet_pixels"][4], rel=1e-9)


def test_a_teacher_alone(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "grey.npz", images=np.random.default_rng(0).integers(0, 16, (30, 8, 8)))
    words = ["--model", folder / "grey", "--dataset_name", tmp_path / "grey.npz", "--sampler", "tau_leaping"]
    run(evaluate.main, *words, "--eval_num_steps", 2, "--eval_num_samples", 10, "--eval_seeds", 0, 1)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()][1:]
    assert [(row["model"], row["sampler"], row["seed"]) for row in rows] == [
        ("teacher", "tau_leaping", seed) for seed in (0, 1)
    ]


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
        (evaluate.main, [*student, *measured, "--eval_num_samples", 1], "--eval_num_samples 1: must be at least 2"),
    ):
        told = refused(main, *argv, *(["--output", tmp_path / "no"] if main is sample.main else []))
        assert message in told, (argv, told)
    assert not list(tmp_path.glob("no*"))
