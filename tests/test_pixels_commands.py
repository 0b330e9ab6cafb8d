"""The pixel system by its commands: a U-Net over levels, pretrained, distilled, resumed, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import UNET, as_words
from test_image_files import cifar10

from di4c_ext import checkpoints, distill, pretrain, random
from di4c_ext.callbacks import read_metrics, untimed
from di4c_ext.models import CompactConfig, CompactDenoiser, UNetConfig, UNetDenoiser
from di4c_ext.process import GaussianProcess, UniformProcess
from di4c_ext.systems import latents_of, load_model, process_of

NETWORK = UNET | {"dropout": 0.1}
CONSTANTS = {"rate_sigma": 2, "q_sigma": 30, "time_base": 0.3}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grey images of 8 x 8 in 8 levels, each bright or dark as a whole."""
    rng = np.random.default_rng(0)
    file = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(file, images=rng.integers(0, 6, (60, 1, 1)) + rng.integers(0, 3, (60, 8, 8)))
    return file


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DI4C_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def _settings(images: Path) -> dict[str, Any]:
    """Everything of the small preset in seconds, for both commands."""
    return {
        "preset": "pixels_small",
        "dataset_name": images,
        "num_states": 8,
        "process_config": CONSTANTS,
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
    }


def _distill(images: Path, output: Path, **more: Any) -> list[str]:
    own = {
        "teacher_max_steps": 4,
        "teacher_per_device_train_batch_size": 8,
        "teacher_model_config": NETWORK,
        "max_steps": 4,
        "save_steps": 2,
        "num_latents": 3,
        "distillation_rows": 2,
        "eval_num_samples": 8,
        "hybrid": 1,
        "eval_num_steps": [2, 3],
        "output_dir": output,
    }
    return as_words(_settings(images) | own | more)


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests read it and leave it as it is."""
    output = tmp_path_factory.mktemp("runs") / "pixels"
    assert distill.main(_distill(images, output)) == 0
    return output


def test_the_whole_way(finished: Path) -> None:
    student, teacher = load_model(finished, is_student=True), load_model(finished / "teacher", is_student=False)
    for model in (student, teacher):
        assert isinstance(model, UNetDenoiser) and model.config.shape == (1, 8, 8)
        assert repr(process_of(model.config)) == repr(GaussianProcess(8, **CONSTANTS))
    assert all(weight.isfinite().all() for weight in student.parameters())
    assert any(weight.any() for name, weight in student.latent_parameters() if "dense1" in name)  # it has trained

    lines = read_metrics(finished / "metrics.jsonl")
    parts = {"distillation", "correlation_data", "marginal_data", "correlation_consistency", "marginal_consistency"}
    trained = [line for line in lines if line["phase"] == "student"]
    assert [line["step"] for line in trained] == [1, 2, 3, 4]
    for line in trained:
        assert line["loss"] == pytest.approx(sum(line[part] for part in parts), rel=1e-4, abs=1e-3)
        assert {"gain_data", "gain_consistency", "latent_information"} <= line.keys()
    rows = [line for line in lines if line["phase"] == "evaluation"]
    assert sorted((row["model"], row["num_steps"]) for row in rows) == [
        (model, n) for model in ("hybrid", "student", "teacher") for n in (2, 3)
    ]
    evaluation = json.loads((finished / "evaluation.json").read_text())
    assert evaluation["bounds_name"] == "denoising cross-entropy in nats an image, mean over t in [0.01, 1]"
    assert evaluation["num_bounds"] == {"train": 50, "heldout": 10}
    assert all(0 < value < 64 * 8 for value in evaluation["bounds"].values())
    assert "denoising cross-entropy" in (finished / "report.html").read_text()


def test_a_new_student_is_its_teacher(images: Path, finished: Path, tmp_path: Path) -> None:
    job = distill.Run(_distill(images, tmp_path / "out"))
    teacher = load_model(finished / "teacher")
    student = distill.new_student(job, teacher).eval()
    x_t = job.train.tokens[:5].long()
    t = torch.linspace(0.01, 1, 5)
    latents = latents_of(student.config)
    assert latents is not None and latents_of(teacher.config) is None
    said, taught = student(x_t, t, latents(random.keys(0, 5), 3)), teacher(x_t, t)
    assert said.shape == (5, 3, 64, 8)
    for one, other in ((said.mean, taught.mean), (said.log_scale, taught.log_scale)):
        assert torch.equal(one, other[:, None].expand_as(one))


def test_a_resumed_run_is_the_run_that_never_stopped(images: Path, finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "broken"
    shutil.copytree(finished, output)
    for name in ("model.safetensors", "config.json", "report.html", "evaluation.json"):
        (output / name).unlink()
    shutil.rmtree(output / "checkpoint-4")
    assert distill.main(["--resume", "--output_dir", str(output)]) == 0
    assert (output / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    kept = [[untimed(line) for line in read_metrics(folder / "metrics.jsonl")] for folder in (finished, output)]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("process", ["gaussian", "uniform"])
def test_pretrain_and_its_resume(
    process: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "teacher"
    constants = CONSTANTS if process == "gaussian" else {"schedule": "cosine"}
    own = {"process": process, "process_config": constants, "max_steps": 4, "per_device_train_batch_size": 8}
    own |= {"model_config": NETWORK, "save_steps": 2, "time_min": 0.05, "horizontal_flip": True, "output_dir": folder}
    assert pretrain.main(as_words(_settings(images) | own)) == 0
    shown = capsys.readouterr().out
    assert "denoising cross-entropy in nats an image, mean over t in [0.05, 1]: " in shown
    assert "on 50 training images" in shown and "on 10 held-out ones" in shown
    trained = load_model(folder)
    assert isinstance(process_of(trained.config), GaussianProcess if process == "gaussian" else UniformProcess)
    whole = (folder / checkpoints.WEIGHTS).read_bytes()

    shutil.rmtree(folder / "checkpoint-4")
    (folder / checkpoints.WEIGHTS).unlink()
    assert pretrain.main(["--resume", "--output_dir", str(folder)]) == 0
    assert (folder / checkpoints.WEIGHTS).read_bytes() == whole
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["nats_per_image"] == pytest.approx(64 * line["loss"]) for line in lines)


def test_uniform_noise_distils_too(images: Path, tmp_path: Path) -> None:
    own = {"process": "uniform", "process_config": {}, "max_steps": 2, "teacher_max_steps": 2}
    assert distill.main(_distill(images, tmp_path / "out", **own)) == 0
    assert isinstance(process_of(load_model(tmp_path / "out").config), UniformProcess)
    assert len(read_metrics(tmp_path / "out" / "metrics.jsonl")) == 2 + 6


def test_the_published_preset_with_a_teacher_of_ones_own(tmp_path: Path) -> None:
    """A converted teacher has no process_config of its own: that is the published process."""
    UNetDenoiser(UNetConfig(**UNET | {"ch_mult": [1], "attention_scales": []})).save_pretrained(tmp_path / "teacher")
    cifar10(tmp_path / "cifar10")
    words = {"preset": "pixels", "dataset_name": tmp_path / "cifar10", "output_dir": tmp_path / "out", "use_cpu": True}
    words["teacher_model_name_or_path"] = tmp_path / "teacher"
    job = distill.Run(as_words(words))
    config = job.teacher_args.config(job.args)
    distill.check(job, config)
    assert (job.train.layout, job.train.shape, job.train.num_states, job.train.horizontal_flip) == (
        "CHW",
        (32, 32, 3),
        256,
        True,
    )
    assert job.args.objective() == job.args.objective().preset("pixels")
    args = job.args
    assert (args.learning_rate, args.ema_decay, args.weight_decay, args.per_device_train_batch_size) == (
        2e-4,
        0.9999,
        0,
        8,
    )
    assert (config.per_device_train_batch_size, config.warmup_steps, config.learning_rate) == (128, 5000, 2e-4)
    teacher, origin, _ = distill.get_teacher(job, config)
    assert repr(process_of(distill.new_student(job, teacher).config)) == repr(GaussianProcess(256))
    assert origin == f"loaded from {tmp_path / 'teacher'}"


def test_refusals_before_anything_is_written(images: Path, finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"

    def saved(name: str, **settings: Any) -> Path:
        made = {"num_states": 8, "num_channels": 1, "image_size": 8, "process": {"name": "gaussian", **CONSTANTS}}
        UNetDenoiser(UNetConfig(**NETWORK | made | settings)).save_pretrained(tmp_path / name)
        return tmp_path / name

    colour = tmp_path / "colour.npz"
    np.savez(colour, images=np.zeros((4, 8, 8, 3), dtype=np.uint8))
    black = tmp_path / "black.npz"
    np.savez(black, images=np.zeros((4, 8, 8), dtype=np.uint8))
    compact = tmp_path / "compact"
    CompactDenoiser(CompactConfig(num_states=8, hidden_size=8, num_blocks=1)).save_pretrained(compact)
    named = "teacher_model_name_or_path"
    no_config = {"process_config": {}}
    bare = no_config | {"student_model_config": {}}  # what the preset says is the U-Net's
    for change, message in (
        ({named: saved("small", image_size=4)}, "has D = 16 positions, an image of 'tiny' has 64 (8 x 8)"),
        ({named: saved("wide", image_size=[4, 16])}, "is for images of 4 x 16, those of 'tiny' are 8 x 8"),
        ({named: saved("fine"), "dataset_name": colour}, "an image of 'colour' has 192 (8 x 8 x 3)"),
        ({named: saved("coarse", num_states=6)}, "has S = 6 states, the data 'tiny' has 8"),
        ({"num_states": 7}, "is outside the 7 states 0..6"),
        ({"num_states": 1, "dataset_name": black}, "num_states must be at least 2"),
        ({named: finished}, "holds a student, a teacher is wanted"),
        ({named: compact}, "was trained for AbsorbingProcess(num_states=8"),
        ({named: compact}, "this run is for --process gaussian; give --process absorbing"),
        ({named: tmp_path / "fine", "process": "absorbing", **bare}, "give --process gaussian"),
        ({named: tmp_path / "fine", "process": "uniform", **no_config}, "this run is for --process uniform"),
        ({named: tmp_path / "fine", "process_config": {"time_base": 3}}, "this run asks for time_base = 3"),
        ({"process_config": {"time_bas": 3}}, "unknown setting 'time_bas'; did you mean 'time_base'?"),
        ({"process_config": {"time_base": -3}}, "time_base must be greater than 0"),
        ({"process_config": "[3]"}, "write a mapping, e.g. '{\"rate_sigma\": 3}'"),
        (
            {"process": "gausian"},
            "--process 'gausian': must be one of absorbing, gaussian, uniform, confidence; did you mean",
        ),
        ({"process": "absorbing"}, "absorbing diffusion has only a --schedule"),
        ({"schedule": "cosine"}, "--schedule cosine: is for --process absorbing, this is gaussian"),
        ({"process": "uniform", "schedule": "cosine", **no_config}, '--process_config \'{"schedule": "cosine"}\''),
        ({"process": "absorbing", "teacher_time_min": 0.1, "teacher_model_config": {}, **bare}, "--time_min 0.1"),
        ({"teacher_time_min": 1}, "--time_min 1.0: must lie in [0, 1)"),
        ({"teacher_model_config": {"hidden_size": 8}}, "unknown setting 'hidden_size'"),
        ({"teacher_model_config": {"image_size": 8}}, "'image_size' follows from other settings"),
        ({"teacher_model_config": {"ch_mult": 3}}, '--model_config {"ch_mult": 3}: '),
        ({"teacher_augment_share": 0.5}, "--augment_share 0.5: the U-Net cannot be told"),
        ({"augment_share": 0.5}, "this teacher was trained without augmentation"),
        ({"student_model_config": {"latent_hidden_size": 8}}, "unknown setting 'latent_hidden_size'"),
        ({"student_model_config": {"latent_law": "cauchy"}}, "latent_law must be one of"),
        ({"hybrid": 3}, "--hybrid 3"),
        ({"sampler": "ancestral"}, "ancestral"),
    ):
        with pytest.raises(ValueError) as error:
            distill.main(_distill(images, output, **change))
        assert message in str(error.value), change
        assert not output.exists(), change
