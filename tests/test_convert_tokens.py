"""Published checkpoints of the image-token system: files laid out as theirs, what becomes of them, what is refused."""

from __future__ import annotations

import json
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from token_models import SMALL, SMALL_VQ, pictures, tokens_by_formula, vq_by_formula
from torch import nn

from di4c_ext import convert
from di4c_ext.models import TokenDenoiser, VQModel
from di4c_ext.models.checkpoint import read_checkpoint

Run = Callable[..., int]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint.pth"


@pytest.fixture
def run(file: Path, tmp_path: Path) -> Run:
    def call(*argv: str, size: dict[str, Any] = SMALL) -> int:
        words = ["--checkpoint", str(file), "--output_dir", str(tmp_path / "out"), *argv]
        return convert.main([*words, "--model_config", json.dumps(size)])

    return call


@pytest.fixture
def refused(run: Run, file: Path, tmp_path: Path) -> Callable[..., str]:
    """The message of an error that names the file, and leaves nothing behind."""

    def call(*argv: str, **kwargs: Any) -> str:
        with pytest.raises(ValueError) as stop:
            run(*argv, **kwargs)
        assert not (tmp_path / "out").exists()
        assert str(stop.value).startswith(f"{file}: ")
        return str(stop.value)

    return call


def maskgit(model: TokenDenoiser, prefix: str = "") -> dict[str, Any]:
    """A file's contents as the published code writes them: teacher and student alike."""
    state = {prefix + name.removeprefix("net."): weight for name, weight in model.state_dict().items()}
    moments = {i: {"step": 9, "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)} for i in range(3)}
    groups = [{"lr": 1e-4, "betas": (0.9, 0.96), "params": [0, 1, 2]}]
    optimizer = {"state": moments, "param_groups": groups}
    return {"iter": 755_200, "global_epoch": 300, "model_state_dict": state, "optimizer_state_dict": optimizer}


def same(got: nn.Module, wanted: nn.Module) -> bool:
    a, b = got.state_dict(), wanted.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize(
    ("is_student", "prefix", "kind"), [(False, "", "auto"), (True, "", "auto"), (True, "module.", "tokens-student")]
)
def test_tokens(file, tmp_path, run, capsys, is_student, prefix, kind):
    model = tokens_by_formula(is_student=is_student)
    torch.save(maskgit(model, prefix), file)
    assert run("--kind", kind) == 0
    opened = TokenDenoiser.from_pretrained(tmp_path / "out", is_student=is_student)
    assert same(opened, model) and opened.config.latent_form == "token"
    said = capsys.readouterr().out
    name = "tokens-student" if is_student else "tokens-teacher"
    for fact in (name, "parameters in", "iteration 755,200", "epoch 300", "live weights as a TokenDenoiser"):
        assert fact in said


def test_the_grid_is_told_by_the_file(file, tmp_path, run, refused):
    size = {name: value for name, value in SMALL.items() if name != "grid"}
    torch.save(maskgit(tokens_by_formula(grid=5)), file)
    run(size=size)
    assert TokenDenoiser.from_pretrained(tmp_path / "out").config.grid == [5, 5]
    (tmp_path / "out").rename(tmp_path / "square")
    torch.save(maskgit(tokens_by_formula()), file)
    assert "pos_emb (1, 13, 16) has 12 positions beside the class, which make no square grid" in refused(size=size)
    assert "of another shape [net.pos_emb (1, 13, 16), not (1, 17, 16)" in refused(size=SMALL | {"grid": 4})


def _drop(state: dict[str, Any]) -> None:
    del state["transformer.layers.1.0.norm.weight"]


def _add(state: dict[str, Any]) -> None:
    state["stray"] = torch.zeros(1)


def _twice(state: dict[str, Any]) -> None:
    state["module.bias"] = state["bias"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_drop, "missing [net.transformer.layers.1.0.norm.weight]"),
        (_add, "unexpected [net.stray]"),
        (_twice, "two tensors are called bias, once with DDP's prefix"),
    ],
)
def test_spoilt_weights_are_named(file, refused, spoil, message):
    contents = maskgit(tokens_by_formula())
    spoil(contents["model_state_dict"])
    torch.save(contents, file)
    assert message in refused()


def test_student_and_teacher_are_told_apart(file, refused):
    torch.save(maskgit(tokens_by_formula(is_student=True)), file)
    message = refused("--kind", "tokens-teacher")
    assert "holds a student, a teacher is wanted: latent_projection.0.weight and 3 more" in message
    torch.save(maskgit(tokens_by_formula()), file)
    assert "holds a teacher, a student is wanted" in refused("--kind", "tokens-student")
    assert "hold no moving average; leave --weights out" in refused("--weights", "ema")


class _Callback:
    """What Lightning's files name beside the weights: a class as a key, and objects with a state."""

    def __init__(self, told: int = 0) -> None:
        self.told = told


class _Trap:
    def __init__(self, call: Any, *args: Any) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> Any:
        return self.call, self.args


def installed(patch: pytest.MonkeyPatch, module: str, name: str, value: Any) -> None:
    """`value` as `module.name`, in modules of our own that are gone with the patch."""
    parts = module.split(".")
    for i in range(len(parts)):
        patch.setitem(sys.modules, ".".join(parts[: i + 1]), types.ModuleType(parts[i]))
    setattr(sys.modules[module], name, value)
    value.__module__, value.__qualname__ = module, name


def lightning(model: VQModel, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Writes a file as Lightning does, whose classes exist only while it is written."""
    state = dict(model.state_dict()) | {
        "loss.perceptual_loss.lin0.model.1.weight": torch.zeros(1, 8, 1, 1),
        "loss.discriminator.main.3.num_batches_tracked": torch.tensor(7),
    }

    def write(file: Path) -> None:
        with monkeypatch.context() as patch:
            callback, attributes = type("Own", (_Callback,), {}), type("Own", (dict,), {})
            installed(patch, "pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint", callback)
            installed(patch, "pytorch_lightning.utilities.parsing", "AttributeDict", attributes)
            contents = {
                "epoch": 11,
                "global_step": 450_000,
                "pytorch-lightning_version": "1.0.8",
                "callbacks": {callback: {"best_model_score": torch.tensor(0.5), "own": callback(3)}},
                "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}],
                "state_dict": state,
                "hyper_parameters": attributes(embed_dim=6),
            }
            torch.save(contents, file)

    return write


def test_vqgan(file, tmp_path, run, capsys, monkeypatch):
    model = vq_by_formula()
    lightning(model, monkeypatch)(file)
    assert b"pytorch_lightning.callbacks.model_checkpoint" in file.read_bytes()
    assert "pytorch_lightning" not in sys.modules
    assert run(size=SMALL_VQ) == 0
    opened = VQModel.from_pretrained(tmp_path / "out")
    assert same(opened, model)
    images = pictures(2, model.config).float()
    assert torch.equal(opened.encode(images), model.encode(images))
    said = capsys.readouterr().out
    for fact in ("vqgan", "step 450,000", "left out 2 tensors of its training loss (loss.*)", "as a VQModel"):
        assert fact in said
    assert read_checkpoint(file)["hyper_parameters"] == {"embed_dim": 6}


def test_spoilt_vqgan_is_named(file, refused, monkeypatch):
    model = vq_by_formula()
    lightning(model, monkeypatch)(file)
    message = refused(size=SMALL_VQ | {"num_codes": 21})
    assert "of another shape [quantize.embedding.weight (20, 6), not (21, 6)]" in message
    assert "missing [" in refused(size=SMALL_VQ | {"ch_mult": [1, 1, 2, 2], "image_size": 16})
    torch.save({"state_dict": model.state_dict() | {"encoder.stray": torch.zeros(1)}}, file)
    assert "unexpected [encoder.stray]" in refused(size=SMALL_VQ)


def test_nothing_of_a_framework_is_run(file, tmp_path, refused, monkeypatch):
    """A name below a framework's stands for an empty object, whatever it would have done; any other is refused."""
    trace = tmp_path / "ran"

    def touch(path: str) -> None:
        Path(path).touch()

    with monkeypatch.context() as patch:
        installed(patch, "omegaconf.trap", "touch", touch)
        torch.save({"own": _Trap(touch, str(trace)), "number": 3}, file)
        assert read_checkpoint(file)["number"] == 3
        torch.save({"own": _Trap(touch, str(trace)), "more": _Trap(os.system, f"touch {trace}")}, file)
        assert "system" in refused() and not trace.exists()
