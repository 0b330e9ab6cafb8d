"""The commands as a user runs them: the whole way in small, what they write, and how they refuse."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import di4c_ext
from di4c_ext import arguments, distill, generate, pretrain, sample
from di4c_ext.callbacks import read_metrics
from di4c_ext.models import CompactConfig, CompactDenoiser

QUICK = ("--preset", "digits_smoke", "--use_cpu")


def _environment(cache: Path) -> dict[str, str]:
    root = str(Path(di4c_ext.__file__).parents[1])
    return {**os.environ, "DI4C_CACHE": str(cache), "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}


def _command(cache: Path, module: str, *argv: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", f"di4c_ext.{module}", *map(str, argv)]
    return subprocess.run(words, env=_environment(cache), cwd=cache, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _cached(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DI4C_CACHE", str(cache))


@pytest.fixture(scope="module")
def finished(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the shortened preset; tests read it and leave it as it is."""
    output = tmp_path_factory.mktemp("runs") / "digits"
    done = _command(cache, "distill", *QUICK, "--output_dir", output)
    assert done.returncode == 0, done.stderr
    assert f"report: {output / 'report.html'}" in done.stdout
    assert "steps" in done.stdout and "teacher" in done.stdout and "student" in done.stdout
    return output


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_writes_all_it_promises(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    promised = {"report.html", "metrics.jsonl", "samples", "distill_config.yaml", "README.md", "model.safetensors"}
    assert promised | {"config.json", "evaluation.json"} <= names
    assert not [name for name in names if name.startswith(".")]
    student = CompactDenoiser.from_pretrained(finished)
    assert student.config.is_student and student.config.num_states == 17
    assert not [name for name in student.state_dict() if "teacher" in name]
    figures = sorted(path.name for path in (finished / "samples").iterdir())
    assert figures == [f"{model}-{n:03d}steps.png" for model in ("student", "teacher") for n in (1, 4)]

    lines = read_metrics(finished / "metrics.jsonl")
    assert [line["step"] for line in lines if line["phase"] == "student"] == list(range(5, 31, 5))
    rows = [line for line in lines if line["phase"] == "evaluation"]
    assert len(rows) == 2 * 2 * 2  # models, numbers of steps, seeds
    assert all(row["frechet_features"] > 0 and row["num_samples"] == 100 for row in rows)
    evaluation = json.loads((finished / "evaluation.json").read_text())
    assert evaluation["floors"]["frechet_features"] > 0 and evaluation["bounds"]["heldout"] > 0
    settings = arguments.read_yaml(finished / "distill_config.yaml")
    assert settings["preset"] == "digits_smoke" and settings["max_steps"] == 30


def test_report_stands_alone(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    for needed in (
        "Samples",
        "Quality against steps",
        "What the latents carry",
        "num_latents: 4",
        "torch",
        "data:image",
    ):
        assert needed in page
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(https?:|//|file:)""", page)
    assert page.count("<svg") >= 6 and "#050505" not in page  # every stand-in colour became a variable
    assert not re.search(r"\$[a-z]+", page)


def test_second_run_takes_the_teacher_from_the_cache(finished: Path, cache: Path, tmp_path: Path) -> None:
    done = _command(cache, "distill", *QUICK, "--eval_num_steps", 1, "--output_dir", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    assert "teacher: from the cache" in done.stdout
    same = "model.safetensors"
    assert (tmp_path / "again" / same).read_bytes() == (finished / same).read_bytes()


def test_ctrl_c_saves_and_resume_goes_on(finished: Path, cache: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    words = [sys.executable, "-m", "di4c_ext.distill", *QUICK, "--logging_steps", "1", "--output_dir", str(output)]
    process = subprocess.Popen(
        words, env=_environment(cache), cwd=cache, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not any(line["phase"] == "student" for line in read_metrics(output / "metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    shown, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert f"go on with:\n  python -m di4c_ext.distill --resume --output_dir {output}" in shown
    assert not (output / "checkpoint-30").exists() and not (output / "report.html").exists()

    done = _command(cache, "distill", "--resume", "--output_dir", output)
    assert done.returncode == 0, done.stderr
    assert (output / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    steps = [line["step"] for line in read_metrics(output / "metrics.jsonl") if line["phase"] == "student"]
    assert steps == list(range(1, 31))


def test_folder_of_another_run(finished: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    before = _contents(finished)
    assert "holds another run (distill_config.yaml)" in refused(distill.main, *QUICK, "--output_dir", finished)
    assert _contents(finished) == before
    (tmp_path / "thesis.txt").write_text("precious")
    assert "holds other files (thesis.txt)" in refused(distill.main, *QUICK, "--output_dir", tmp_path)
    assert "holds no distill_config.yaml" in refused(distill.main, *QUICK, "--output_dir", tmp_path, "--resume")
    assert _contents(tmp_path) == {"thesis.txt": b"precious"}


def test_overwriting_leaves_foreign_files(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-7").mkdir()
    for name in ("thesis.txt", "report.html", "checkpoint-7/model.safetensors"):
        (tmp_path / name).write_text("old")
    arguments.checkpoints.claim(tmp_path, distill.STORED, resume=False, overwrite=True)
    assert _contents(tmp_path) == {"thesis.txt": b"old"}


def test_refuses_bad_flags_before_writing(finished: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    images = tmp_path / "images.npz"
    np.savez(images, images=np.arange(32).reshape(2, 4, 4))
    teacher = tmp_path / "teacher"
    CompactDenoiser(CompactConfig(num_states=16, length=64, hidden_size=8, num_blocks=1)).save_pretrained(teacher)
    short = tmp_path / "short"
    CompactDenoiser(CompactConfig(num_states=17, length=49, hidden_size=8, num_blocks=1)).save_pretrained(short)
    cut = tmp_path / "cut"
    CompactDenoiser(CompactConfig(hidden_size=8, num_blocks=1)).save_pretrained(cut)
    whole = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    named = "--teacher_model_name_or_path"
    for argv, message in (
        (["--preset", "digit"], "unknown preset 'digit'"),
        (["--num_latent", "4"], "did you mean '--num_latents'"),
        (["--num_latents", "0"], "--num_latents 0: must be at least 1"),
        (["--eval_num_steps", "4", "0"], "--eval_num_steps 0: must be at least 1"),
        (["--max_steps", "0"], "--max_steps 0: must be at least 1"),
        (["--dataset_name", images, "--num_states", "16"], "value 16 at image 1, row 0, column 0"),
        (["--schedule", "sine"], "unknown schedule 'sine'"),
        (["--teacher_model_config", '{"hidden": 3}'], "unknown setting 'hidden'"),
        (["--student_model_config", '{"latent_dims": 3}'], "did you mean 'latent_dim'"),
        (["--teacher_model_config", "[1]"], "write a mapping"),
        ([named, tmp_path / "nowhere"], "no such folder"),
        ([named, tmp_path], "config.json is missing"),
        ([named, cut], "truncated or damaged"),
        ([named, teacher], "S = 16 states, the data 'digits' has 17"),
        ([named, short], "D = 49 positions, an image of 'digits' has 64 (8 x 8)"),
        ([named, finished], "holds a student, a teacher is wanted"),
    ):
        assert message in refused(distill.main, *QUICK, *argv, "--output_dir", output), argv
        assert not output.exists(), argv


def test_sample(finished: Path, cache: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    stem = tmp_path / "four.steps"
    done = _command(cache, "sample", "--model", finished, "--num_steps", 4, "--num_samples", 10, "--output", stem)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "four.steps.npz") as file:
        images = file["images"]
    assert images.shape == (10, 8, 8) and images.max() <= 16
    assert (tmp_path / "four.steps.png").read_bytes().startswith(b"\x89PNG")
    model = generate.open_model(finished)
    some = generate.generate(model, 4, 7, seed=0, batch_size=3)
    assert torch.equal(some, torch.from_numpy(images[:7].reshape(7, 64)).long())
    assert not torch.equal(some, generate.generate(model, 4, 7, seed=1))
    for argv, message in (
        (["--num_steps", 0], "--num_steps 0: must be at least 1"),
        (["--num_samples", -1], "--num_samples -1: must be at least 1"),
        (["--temperature", "nan"], "--temperature nan: must be finite"),
        (["--model", tmp_path / "nowhere"], "no such folder"),
        (["--steps", 4], "unknown flag '--steps'"),
    ):
        assert message in refused(sample.main, "--model", finished, "--output", tmp_path / "no", *argv)
    assert not list(tmp_path.glob("no*"))


def test_evaluate(finished: Path, cache: Path, refused: Callable[..., str]) -> None:
    quick = ["--eval_num_bootstraps", 0, "--eval_num_turns", 0, "--output_dir", cache / "measured"]
    done = _command(cache, "evaluate", "--model", finished, "--num_steps", 1, "--eval_num_samples", 100, *quick)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    known = [row for row in read_metrics(finished / "metrics.jsonl") if row.get("model") == "student"]
    assert lines[1]["frechet_features"] == pytest.approx(known[0]["frechet_features"])
    assert [line["seed"] for line in lines[1:]] == [0, 1, 2]


def test_pretrain_on_own_images(cache: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "mine.npz", images=rng.integers(0, 4, (80, 3, 5)))
    words = ["--dataset_name", tmp_path / "mine.npz", "--num_states", "4", "--max_steps", "3", *QUICK]
    words += ["--per_device_train_batch_size", "16", "--output_dir", tmp_path / "teacher"]
    assert pretrain.main([str(word) for word in words]) == 0
    teacher = CompactDenoiser.from_pretrained(tmp_path / "teacher")
    assert (teacher.config.num_states, teacher.config.length, teacher.config.image_shape) == (4, 15, [3, 5])
    card = (tmp_path / "teacher" / "README.md").read_text()
    assert "# A teacher of mine" in card and "Trained for 3 steps on batches of 16 images, learning rate 0.001" in card
    assert re.search(r"in nats an image: \d+\.\d on \d+ training images, \d+\.\d on \d+ held-out ones", card)
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    space: dict[str, torch.Tensor] = {}
    exec(code, space)
    assert space["samples"].shape == (16, 15)
    assert "holds another run (pretrain_config.yaml)" in refused(pretrain.main, *words)
    assert "unknown flag '--num_latents'" in refused(pretrain.main, *QUICK, "--num_latents", 3)


def test_env_needs_torch_and_numpy_only(cache: Path) -> None:
    script = (
        "import sys, runpy\n"
        "for name in ('transformers', 'datasets', 'accelerate', 'matplotlib', 'PIL', 'yaml', 'tqdm', 'safetensors'):\n"
        "    sys.modules[name] = None\n"
        "sys.argv = ['env']\n"
        "runpy.run_module('di4c_ext.env', run_name='__main__')\n"
    )
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, env=_environment(cache), cwd=cache, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    shown = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in done.stdout.splitlines())
    assert shown["di4c_ext"] == di4c_ext.__version__ and shown["torch"] == torch.__version__
    assert shown["kernels"] == "compiled" or shown["kernels"].startswith("plain torch: ")
    done = _command(cache, "env", "--verbose")
    assert done.returncode == 2 and "unknown flag '--verbose'" in done.stderr


def test_teacher_is_kept_beside_its_student(finished: Path) -> None:
    teacher = CompactDenoiser.from_pretrained(finished / "teacher")
    assert not teacher.config.is_student
    assert sorted(path.name for path in (finished / "teacher").iterdir()) == [
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
    ]


def test_cache_that_cannot_be_written_only_warns(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, where a folder is wanted")
    (tmp_path / "weights").write_text("x")
    with pytest.warns(UserWarning, match="not kept in the cache"):
        arguments.checkpoints.keep_copy([tmp_path / "weights"], tmp_path / "cache" / "teacher")
