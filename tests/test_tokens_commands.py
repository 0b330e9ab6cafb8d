"""The image-token system by its commands: a VQ model, its codes, a teacher of them, its student, and their pictures."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import TOKENS, VQ, as_words

from di4c_ext import codes, data, distill, evaluate, pretrain, random, sample
from di4c_ext.callbacks import read_metrics
from di4c_ext.evaluation.compare import TIMED
from di4c_ext.generate import SamplingArguments, generate
from di4c_ext.metrics.features import classifier
from di4c_ext.models import TokenDenoiser, VQConfig, VQModel
from di4c_ext.process import ConfidenceProcess
from di4c_ext.sampler import sample_confidence
from di4c_ext.systems import latents_of, load_model, process_of
from di4c_ext.trainer import DistillTrainer

NETWORK = TOKENS | {"dropout": 0.1, "attention_dropout": 0.1}
CLASSES = 3


@pytest.fixture(scope="module", autouse=True)
def _small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache of these tests' own, and a classifier of few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DI4C_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("di4c_ext.metrics.judge.classifier", partial(classifier, steps=20))
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grey images of 8 x 8 in 256 levels, bright in the rows of their class."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % CLASSES
    pixels = rng.integers(0, 100, (60, 8, 8))
    for i, label in enumerate(labels):
        pixels[i, 2 * label : 2 * label + 2] += 150
    file = tmp_path_factory.mktemp("data") / "rows.npz"
    np.savez(file, images=pixels, labels=labels)
    return file


def _shared(images: Path, output: Path) -> dict[str, Any]:
    quiet = {"use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
    return {"preset": "tokens_small", "dataset_name": images, "num_states": 256, "output_dir": output, **quiet}


def _vq(images: Path, output: Path, **more: Any) -> list[str]:
    own = {"kind": "vq", "max_steps": 6, "per_device_train_batch_size": 8, "restart_steps": 2, "model_config": VQ}
    return as_words(_shared(images, output) | own | {"save_steps": 3} | more)


def _distill(images: Path, vq: Path, output: Path, **more: Any) -> list[str]:
    own = {
        **{"vq_model": vq, "teacher_max_steps": 4, "teacher_per_device_train_batch_size": 8},
        **{"teacher_model_config": NETWORK, "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4},
        **{"num_latents": 3, "num_targets": 2, "eval_num_samples": 12, "eval_batch_size": 5},
        "eval_num_steps": [1, 3],
    }
    return as_words(_shared(images, output) | own | more)


@pytest.fixture(scope="module")
def vq(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "vq"
    assert pretrain.main(_vq(images, output)) == 0
    return output


@pytest.fixture(scope="module")
def finished(images: Path, vq: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests read it and leave it as it is."""
    output = tmp_path_factory.mktemp("runs") / "tokens"
    assert distill.main(_distill(images, vq, output)) == 0
    return output


def _loaded(images: Path) -> data.ImageTokens:
    return data.load(str(images), num_states=256)


def test_vq_model_is_trained_and_shown(vq: Path) -> None:
    model = VQModel.from_pretrained(vq)
    assert model.config.image_shape == (1, 8, 8) and model.config.grid == [4, 4]
    lines = read_metrics(vq / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert line["loss"] == pytest.approx(line["reconstruction"] + 1.25 * line["commitment"], rel=1e-3, abs=1e-3)
        assert 1 <= line["perplexity"] <= line["codes_used"] + 0.01 <= 12.02
    assert lines[0]["codes_used"] > 6, "the first codes are places of the first images"
    assert (vq / "samples" / "reconstructions.png").is_file()


def test_whole_way(images: Path, vq: Path, finished: Path) -> None:
    student, teacher = load_model(finished, is_student=True), load_model(finished / "teacher", is_student=False)
    own = VQModel.from_pretrained(finished / "vq")
    for model in (student, teacher):
        assert isinstance(model, TokenDenoiser) and model.config.num_classes == CLASSES
        assert model.config.codebook == own.fingerprint() == VQModel.from_pretrained(vq).fingerprint()
        assert type(process_of(model.config)) is ConfidenceProcess
        own.check_denoiser(model.config)
    assert any(weight.any() for name, weight in student.latent_parameters() if "latent_in" in name), "it has trained"
    evaluation = json.loads((finished / "evaluation.json").read_text())
    assert {(row["model"], row["num_steps"], row["sampler"]) for row in evaluation["rows"]} == {
        (model, n, "confidence") for model in ("teacher", "student") for n in (1, 3)
    }
    assert all(row["frechet_features"] > 0 and row["frechet_pixels"] > 0 for row in evaluation["rows"])
    assert sorted(file.name for file in (finished / "samples").iterdir()) == [
        f"{model}-{n:03d}steps.png" for model in ("student", "teacher") for n in (1, 3)
    ]
    best = evaluation["reconstructions"]
    assert best.keys() == evaluation["floors"].keys() and best["frechet_pixels"] > 0
    card = (finished / "README.md").read_text()
    assert "real images that come back from their own codes score" in card and "Decoder(vq_beside(" in card
    assert "8 x 8" in card and "masked diffusion" in (finished / "report.html").read_text()


def test_vq_training_that_was_stopped_goes_on(images: Path, vq: Path, tmp_path: Path) -> None:
    for name in ("pretrain_config.yaml", "checkpoint-3", "metrics.jsonl"):
        copy = shutil.copytree if (vq / name).is_dir() else shutil.copy
        copy(vq / name, tmp_path / name)
    assert pretrain.main(["--resume", "--output_dir", str(tmp_path)]) == 0  # of kind vq, as it was told
    assert (tmp_path / "model.safetensors").read_bytes() == (vq / "model.safetensors").read_bytes()
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_codes_are_made_once_and_gone_on_with(
    images: Path, vq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, model = _loaded(images), codes.open_vq(vq)
    expected = model.encode(loaded.images().float()[:, None] * (2 / 255) - 1)
    encode, calls = model.encode, []

    def stop_at_the_third(inputs: torch.Tensor, batch_size: int) -> torch.Tensor:
        calls.append(len(inputs))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(inputs, batch_size)

    monkeypatch.setattr(codes, "CHUNK", 16)
    monkeypatch.setattr(model, "encode", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        codes.codes_of(loaded, model, tmp_path)
    made = codes.codes_of(loaded, model, tmp_path)
    assert calls == [16, 16, 16, 16, 12], "what was made before the stop is kept"
    assert torch.equal(made.tokens.long(), expected)
    again = codes.codes_of(loaded, model, tmp_path)
    assert len(calls) == 5 and torch.equal(again.tokens, made.tokens)
    assert again.labels is loaded.labels and torch.equal(again.example, loaded.example)
    assert (again.shape, again.num_states, again.num_classes) == ((4, 4), 12, CLASSES)
    assert again.codebook == model.fingerprint() and again.fingerprint() != loaded.fingerprint()
    batch = again.__getitems__([3, 7])
    assert batch["label"].tolist() == [0, 1] and torch.equal(batch["x_0"], expected[[3, 7]])
    assert again[7]["label"] == 1 and torch.equal(again[7]["x_0"], expected[7])
    with torch.no_grad():
        model.encoder.conv_in.bias += 1  # the same code-book, other codes
    codes.codes_of(loaded, model, tmp_path)
    codes.codes_of(loaded.subset(torch.arange(20)), model, tmp_path)
    assert len(calls) == 5 + 4 + 2 and len(list(tmp_path.iterdir())) == 3
    whole = codes.open_vq(vq)
    for cut in (b"", b"cut"):
        (tmp_path / f"codes-{codes._key(loaded, whole)}" / "codes.npy").write_bytes(cut)
        assert torch.equal(codes.codes_of(loaded, whole, tmp_path).tokens.long(), expected), "a damaged file is none"


def test_decoder_gives_levels_of_pixels(vq: Path) -> None:
    model = codes.open_vq(vq)
    tokens = torch.arange(16)[None] % 12
    levels = codes.Decoder(model)(tokens)
    assert levels.shape == (1, 64) and levels.dtype == torch.uint8
    expected = ((model.decode(tokens) + 1) * 127.5).round().clamp(0, 255)
    assert torch.equal(levels.float().view(1, 1, 8, 8), expected)
    assert codes.Decoder(model, num_states=4)(tokens).max() <= 3
    colour = VQModel(VQConfig(**VQ, image_size=[4, 6], num_channels=3)).eval()
    made = codes.Decoder(colour)(colour.encode(torch.zeros(2, 3, 4, 6)))
    assert made.shape == (2, 72) and codes.image_shape_of(colour.config) == (4, 6, 3)
    both = [torch.arange(2 * 72).view(2, 72), torch.arange(2 * 72).view(2, 4, 6, 3).permute(0, 3, 1, 2).reshape(2, 72)]
    seen = [
        codes.as_input(x, data.ImageTokens("x", x, torch.arange(2), None, (4, 6, 3), 256, layout))
        for x, layout in zip(both, ("HWC", "CHW"), strict=True)
    ]
    assert torch.equal(*seen) and float(seen[0][1, 2, 3, 5]) == pytest.approx(143 * 2 / 255 - 1)


def test_classes_of_samples_are_as_among_the_images(images: Path) -> None:
    loaded = _loaded(images)
    assert codes.classes_like(loaded, 7).tolist() == [0, 1, 2, 0, 1, 2, 1]  # one after the other
    uneven = loaded.subset(torch.tensor([0, 3, 6, 9, 1, 4, 2, 5]))
    drawn = codes.classes_like(uneven, 80)
    assert drawn.bincount().tolist() == [40, 20, 20] and drawn[:6].tolist() == [0, 1, 2, 0, 1, 2]


def test_samples_hang_on_their_own_class_and_key(finished: Path) -> None:
    student, teacher = load_model(finished), load_model(finished / "teacher")
    found = generate(student, 3, 7, seed=1, batch_size=3)
    latents = latents_of(student.config)
    keys = random.keys(1, 7)
    x = process_of(student.config).prior((7, 16), keys)
    shared = {"latents": lambda key: latents(key, 1)[:, 0]}
    turns = torch.arange(7) % CLASSES
    by_hand = sample_confidence(
        partial(student, labels=turns), process_of(student.config), x, 3, keys, **shared
    )  # fmt: skip
    assert torch.equal(found, by_hand)
    assert torch.equal(generate(student, 3, 4, seed=1, labels=turns[:4]), found[:4])
    for network, by_teacher in ((student, False), (teacher, True)):
        options = SamplingArguments(class_guidance=4, teacher_guides=by_teacher, gumbel=2, randomize="warm_up")
        guided = generate(student, 3, 7, seed=1, teacher=teacher if by_teacher else None, options=options)
        by_hand = sample_confidence(
            partial(student, labels=turns), process_of(student.config), x, 3, keys, **shared, guidance=4,
            unconditional=partial(network, drop_label=True), hybrid=by_teacher, gumbel=2, randomize="warm_up",
        )  # fmt: skip
        assert torch.equal(guided, by_hand) and not torch.equal(guided, found)
    for labels, message in ((turns[:5], "one for each of the 7"), (turns + 2, "labels must be classes 0..2, got 3")):
        with pytest.raises(ValueError, match=message):
            generate(student, 3, 7, seed=1, labels=labels)
    for options, message in (
        ({"guidance": 1.5}, "image tokens have --class_guidance"),
        ({"sampler": "ancestral"}, "of image tokens, it takes confidence"),
        ({"hybrid": 1}, "for the analytic sampler of pixel models"),
        ({"last_latents": 2}, "for the analytic sampler"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(student, 3, 7, seed=1, teacher=teacher, options=SamplingArguments(**options))
    for options, message in (
        ({"teacher_guides": True}, "give --class_guidance"),
        ({"randomize": "no"}, "must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            SamplingArguments(**options)


def test_sample_by_classes(finished: Path, vq: Path, tmp_path: Path) -> None:
    words = as_words({"model": finished, "num_steps": 2, "num_samples": 5, "output": tmp_path / "two"})
    assert sample.main([*words, "--labels", "2", "0"]) == 0
    with np.load(tmp_path / "two.npz") as written:
        assert written["labels"].tolist() == [2, 0, 2, 0, 2]
        student = load_model(finished)
        made = generate(student, 2, 5, seed=0, labels=torch.tensor([2, 0, 2, 0, 2]))
        assert np.array_equal(written["codes"], made.numpy())
        decoded = codes.Decoder(codes.open_vq(vq))(made).view(5, 8, 8)
        assert written["images"].dtype == np.uint8 and np.array_equal(written["images"], decoded.numpy())
    assert (tmp_path / "two.png").is_file()
    assert sample.main(as_words({"model": finished / "teacher", "num_steps": 1, "output": tmp_path / "all"})) == 0
    with np.load(tmp_path / "all.npz") as written:
        assert written["labels"][:4].tolist() == [0, 1, 2, 0] and written["images"].shape == (64, 8, 8)
    other = VQModel(VQConfig(image_size=8, num_channels=1, **VQ))
    other.save_pretrained(tmp_path / "other")
    for flags, message in (
        (["--labels", "3"], "--labels 3: the classes of .* are 0..2"),
        (["--labels", "-1"], "--labels -1"),
        (["--vq_model", str(tmp_path / "other")], "codes of another VQ model: codebook"),
        (["--vq_model", str(finished)], "holds a network 'di4c_tokens', a VQ model is wanted"),
    ):
        with pytest.raises(ValueError, match=message):
            sample.main([*words, *flags])
    alone = shutil.copytree(finished / "teacher", tmp_path / "alone" / "teacher")
    with pytest.raises(ValueError, match="no folder 'vq' lies in it; name its VQ model by --vq_model"):
        sample.main(as_words({"model": alone, "output": tmp_path / "none"}))


def test_evaluate_measures_what_the_run_did(images: Path, finished: Path, tmp_path: Path) -> None:
    words = {"model": finished, "teacher": finished / "teacher", "dataset_name": images, "num_states": 256}
    more = {"eval_num_samples": 12, "eval_batch_size": 12, "eval_seeds": 0, "output_dir": tmp_path / "measured"}
    quick = {"eval_num_bootstraps": 0, "eval_num_turns": 0, "output_file": tmp_path / "rows.jsonl"}
    assert evaluate.main([*as_words(words | more | quick), "--eval_num_steps", "1", "3"]) == 0
    head, *rows = (json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines())
    told = json.loads((finished / "evaluation.json").read_text())
    assert head["floors"] == told["floors"] and len(rows) == 4
    other = (*TIMED, "batch_size")  # which the run had another of
    for row, one in zip(rows, told["rows"], strict=True):
        assert {key: row[key] for key in row if key not in other} == {
            key: pytest.approx(value) if isinstance(value, float) else value
            for key, value in one.items()
            if key not in other
        }
    told = json.loads((tmp_path / "measured" / "evaluation.json").read_text())
    assert [row["num_evaluations"] for row in told["rows"]] == [1, 1, 3, 3] and told["latents"][0]["t"] == 1


def test_classes_reach_the_objective_and_a_guided_teacher_is_asked_without(
    images: Path, vq: Path, finished: Path, tmp_path: Path
) -> None:
    both = {"process_config": {"guidance": 2, "gumbel": 1}, "step_guidance": 3}
    flags = _distill(images, vq, tmp_path, **both, label_dropout=0.3)
    job = distill.Run(flags)
    teacher = load_model(finished / "teacher")
    student = distill.new_student(job, teacher).eval()
    process = job.process_of(student.config)
    assert (process.guidance, process.gumbel, process.mask_id, process.num_states) == (3, 1, 12, 12)
    told: list[dict[str, Any]] = []
    teacher.register_forward_pre_hook(lambda module, args, kwargs: told.append(kwargs), with_kwargs=True)
    trainer = DistillTrainer(
        student, teacher=teacher, latents=latents_of(student.config), process=process, args=job.args,
        train_dataset=job.train,
    )  # fmt: skip
    batch = job.train.__getitems__(list(range(40)))
    keys = random.keys(0, 40)
    parts = trainer.loss_parts(student, batch["x_0"], keys, labels=batch["label"])
    assert bool(torch.isfinite(parts["loss"]))
    conditional, unconditional = told
    assert torch.equal(conditional["labels"], batch["label"]) and unconditional == {"drop_label": True}
    dropped = conditional["drop_label"]
    assert 2 < int(dropped.sum()) < 25
    again = trainer.conditions(batch["label"][5:9], keys[5:9])
    assert torch.equal(again["drop_label"], dropped[5:9]), "of the key alone"


def test_a_network_without_classes(images: Path, vq: Path, tmp_path: Path) -> None:
    with np.load(images) as file:
        np.savez(tmp_path / "plain.npz", images=file["images"])
    output = tmp_path / "teacher"
    own = {"vq_model": vq, "max_steps": 2, "per_device_train_batch_size": 8, "model_config": NETWORK}
    assert pretrain.main(as_words(_shared(tmp_path / "plain.npz", output) | own)) == 0
    teacher = load_model(output)
    assert teacher.config.num_classes == 0 and (output / "vq" / "config.json").is_file()
    assert generate(teacher, 2, 3, seed=0).max() < 12
    with pytest.raises(ValueError, match="was trained without classes"):
        generate(teacher, 2, 3, seed=0, options=SamplingArguments(class_guidance=1))
    with pytest.raises(ValueError, match="was trained without classes; leave them out"):
        sample.main(as_words({"model": output, "labels": 1}))


def test_codes_by_command(images: Path, vq: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = _shared(images, tmp_path / "unused") | {"kind": "codes", "vq_model": vq}
    assert pretrain.main(as_words(words)) == 0
    assert "60 images of 'rows' as 4 x 4 codes" in capsys.readouterr().out
    assert not (tmp_path / "unused").exists()


def test_refuses_before_anything_is_written(images: Path, vq: Path, finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    other = tmp_path / "other"
    VQModel(VQConfig(image_size=8, num_channels=1, **VQ | {"num_codes": 9})).save_pretrained(other)
    wide, negative = tmp_path / "wide.npz", tmp_path / "negative.npz"
    np.savez(wide, images=np.zeros((4, 8, 12), dtype=np.uint8))
    np.savez(negative, images=np.zeros((4, 8, 8), dtype=np.uint8), labels=np.array([0, 1, -1, 0]))
    named, taught = "teacher_model_name_or_path", finished / "teacher"
    for change, message in (
        ({"vq_model": tmp_path / "none"}, "none: no such folder"),
        ({"vq_model": taught}, "holds a network 'di4c_tokens', a VQ model is wanted"),
        ({named: vq}, "names the network 'di4c_vq'"),
        ({named: taught, "vq_model": other}, "other codes than those of 'rows': num_codes 12, these 9; codebook"),
        ({"dataset_name": wide}, "takes images of 8 x 8, those of 'wide' are 8 x 12"),
        ({"dataset_name": negative}, "label -1: classes are numbered from 0"),
        ({"step_guidance": -1}, "guidance must be finite and >= 0, got -1"),
        (
            {"process": "absorbing", "process_config": {}, "student_model_config": {}},
            "is for --process confidence, this is absorbing",
        ),
        ({"process_config": {"mask_id": 3}}, "'mask_id' follows from other settings"),
        ({"process_config": {"ramp_steps": 1}}, "ramp_steps must be an integer of at least 2"),
        ({"process_config": {"schedule": "cosine"}, named: taught}, "this run asks for schedule = cosine"),
        ({"teacher_model_config": {"num_codes": 3}}, "'num_codes' follows from other settings"),
        ({"teacher_model_config": {"latent_form": "token"}}, "'latent_form' follows from other settings"),
        ({"teacher_augment_share": 0.5}, "alters pixels, codes have none"),
        ({"teacher_time_min": 0.1}, "--time_min 0.1"),
        ({"label_dropout": 2}, "--label_dropout 2"),
        ({"student_model_config": {"latent_form": "toke"}}, "latent_form must be one of"),
        ({"class_guidance": -1}, "--class_guidance -1.0: must be finite and >= 0"),
        ({"guidance": 1.0}, "image tokens have --class_guidance"),
    ):
        with pytest.raises(ValueError) as error:
            distill.main(_distill(images, vq, output, **change))
        assert message in str(error.value), (change, str(error.value))
        assert not output.exists(), change
    without = _distill(images, vq, output)
    at = without.index("--vq_model")
    del without[at : at + 2]
    with pytest.raises(ValueError, match="train one by `python -m di4c_ext"):
        distill.main(without)
    for change, message in (
        ({"kind": "vqq"}, "--kind 'vqq': must be one of teacher, vq, codes"),
        ({"model_config": {"image_size": 8}}, "'image_size' follows from other settings"),
        ({"model_config": {"ch_mult": [1, 1, 1, 1, 1]}}, "cannot be halved 4 times"),
        ({"reconstruction_norm": "l3"}, "--reconstruction_norm 'l3': must be one of l1, l2"),
        ({"restart_steps": -1}, "--restart_steps -1"),
        ({"commitment_weight": -1}, "--commitment_weight -1"),
    ):
        with pytest.raises(ValueError) as error:
            pretrain.main(_vq(images, output, **change))
        assert message in str(error.value), (change, str(error.value))
        assert not output.exists(), change
