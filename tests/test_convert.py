"""Published checkpoints: files laid out as theirs, what becomes of them, and everything that is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from unets import SMALL, by_formula

from di4c_ext import arguments, convert
from di4c_ext.models import UNetDenoiser
from di4c_ext.models.checkpoint import read_checkpoint

SIZE = SMALL | {"ch_mult": [1, 2]}
UPDATES, ITERATION = 321_000, 320_999


def laid_out(model: UNetDenoiser, *, ddp: bool) -> dict[str, Any]:
    """A file's contents as the published code writes them after training with warm-up."""
    raw = {("net.module." + k.removeprefix("net.")) if ddp else k: v for k, v in model.state_dict().items()}
    average = [weight.detach() + 1 for weight in model.parameters()]
    extra = {"ema_decay": 0.9999, "ema_num_updates": UPDATES, "ema_shadow_params": average}
    moments = {i: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3)} for i in range(2)}
    group = {"lr": np.float64(2e-4), "betas": (0.9, 0.999), "params": [0, 1], "initial_lr": np.float32(2e-4)}
    return {"model": raw | extra, "optimizer": {"state": moments, "param_groups": [group]}, "n_iter": ITERATION}


@pytest.fixture
def teacher() -> UNetDenoiser:
    return by_formula(ch_mult=[1, 2])


@pytest.fixture
def student() -> UNetDenoiser:
    return by_formula(ch_mult=[1, 2], is_student=True)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "ckpt.pt"


Run = Callable[..., int]


@pytest.fixture
def run(file: Path, tmp_path: Path) -> Run:
    """python -m di4c_ext.convert on `file`, for the small network."""

    def call(*argv: str, size: dict[str, Any] | None = SIZE) -> int:
        words = ["--checkpoint", str(file), "--output_dir", str(tmp_path / "out"), *argv]
        return convert.main(words + (["--model_config", json.dumps(size)] if size else []))

    return call


@pytest.fixture
def refused(run: Run, file: Path, tmp_path: Path) -> Callable[..., str]:
    """The message of an error that names the file, and leaves nothing behind."""

    def call(*argv: str, **kwargs: Any) -> str:
        before = sorted(tmp_path.iterdir())
        with pytest.raises(ValueError) as stop:
            run(*argv, **kwargs)
        assert sorted(tmp_path.iterdir()) == before
        assert str(stop.value).startswith(f"{file}: ")
        return str(stop.value)

    return call


def opened(tmp_path: Path, **kwargs: Any) -> dict[str, Tensor]:
    model = UNetDenoiser.from_pretrained(tmp_path / "out", **kwargs)
    return dict(model.state_dict())


def all_equal(got: dict[str, Tensor], model: UNetDenoiser, plus: float) -> bool:
    wanted = model.state_dict()
    return list(got) == list(wanted) and all(torch.equal(got[name], wanted[name] + plus) for name in wanted)


@pytest.mark.parametrize("kind", ["auto", "pixels-teacher"])
@pytest.mark.parametrize(("weights", "plus"), [("ema", 1.0), ("raw", 0.0)])
def test_teacher(teacher, file, tmp_path, run, capsys, kind, weights, plus):
    torch.save(laid_out(teacher, ddp=True), file)
    assert run("--kind", kind, "--weights", weights) == 0
    assert all_equal(opened(tmp_path, is_student=False), teacher, plus)
    said = capsys.readouterr().out
    count = sum(weight.numel() for weight in teacher.parameters())
    for fact in ("pixels-teacher", f"{count:,} parameters", "321,000 updates", "iteration 320,999", "0.9999"):
        assert fact in said
    assert ("moving average as a" in said) == (weights == "ema")


@pytest.mark.parametrize("kind", ["auto", "pixels-student"])
def test_student(student, file, tmp_path, run, kind):
    torch.save(laid_out(student, ddp=False), file)
    run("--kind", kind)
    assert all_equal(opened(tmp_path, is_student=True), student, 1.0)


def test_the_average_follows_the_order_of_the_file(teacher, file, tmp_path, run):
    """Positions mean what the writing network's order was, which is that of its state."""
    contents = laid_out(teacher, ddp=False)
    extra = {key: contents["model"].pop(key) for key in list(contents["model"]) if key.startswith("ema_")}
    extra["ema_shadow_params"].reverse()
    contents["model"] = dict(reversed(contents["model"].items())) | extra
    torch.save(contents, file)
    run()
    assert all_equal(opened(tmp_path), teacher, 1.0)


def test_nothing_but_weights(teacher, file, tmp_path, run, refused):
    torch.save(teacher.state_dict(), file)
    assert "--weights raw" in refused()
    run("--weights", "raw")
    assert all_equal(opened(tmp_path), teacher, 0.0)


def test_old_files_with_the_names_of_numpy_1(teacher, file, tmp_path, run):
    torch.save(laid_out(teacher, ddp=True), file, _use_new_zipfile_serialization=False)
    old = file.read_bytes().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    assert b"cnumpy.core.multiarray\nscalar\n" in old
    file.write_bytes(old)
    lr = read_checkpoint(file)["optimizer"]["param_groups"][0]["lr"]
    assert type(lr) is float and lr == 2e-4
    run()
    assert all_equal(opened(tmp_path), teacher, 1.0)


NAME = "net.middle_modules.1.NIN_2.W"


def _drop(state: dict[str, Any]) -> None:
    del state[NAME]
    state["ema_shadow_params"].pop()


def _add(state: dict[str, Any]) -> None:
    average = [*state.pop("ema_shadow_params"), torch.zeros(2)]
    state |= {"net.stray": torch.zeros(2), "ema_shadow_params": average}


def _reshape(state: dict[str, Any]) -> None:
    state[NAME] = torch.zeros(16, 17)


def _shorten(state: dict[str, Any]) -> None:
    state["ema_shadow_params"].pop(3)


def _swap(state: dict[str, Any]) -> None:
    average = state["ema_shadow_params"]
    average[0], average[1] = average[1], average[0]


def _unlist(state: dict[str, Any]) -> None:
    state["ema_shadow_params"] = torch.zeros(3)


def _untensor(state: dict[str, Any]) -> None:
    state[NAME] = [1.0]


def _integers(state: dict[str, Any]) -> None:
    state[NAME] = state[NAME].long()


def _twice(state: dict[str, Any]) -> None:
    state[NAME.replace("net.", "net.module.")] = state[NAME]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_drop, f"missing [{NAME}]"),
        (_add, "unexpected [net.stray]"),
        (_reshape, f"of another shape [{NAME} (16, 17), not (16, 16)]"),
        (_shorten, "ema_shadow_params lists 207 tensors, the file has 208 weights"),
        (_swap, "moving average: the weights are not the model's: of another shape [net.temb_modules.0.weight"),
        (_unlist, "ema_shadow_params is a Tensor"),
        (_untensor, f"no floating tensor [{NAME}]"),
        (_integers, f"no floating tensor [{NAME}]"),
        (_twice, f"two tensors are called {NAME}"),
    ],
)
@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_spoilt_weights_are_named(teacher, file, refused, spoil, message, weights):
    contents = laid_out(teacher, ddp=False)
    spoil(contents["model"])
    torch.save(contents, file)
    assert message in refused("--weights", weights)


def test_no_average_at_all(teacher, file, refused):
    contents = laid_out(teacher, ddp=True)
    del contents["model"]["ema_shadow_params"]
    torch.save(contents, file)
    assert "holds no moving average (ema_shadow_params)" in refused()


def test_student_and_teacher_are_told_apart(teacher, student, file, refused):
    torch.save(laid_out(student, ddp=False), file)
    message = refused("--kind", "pixels-teacher")
    assert "holds a student, a teacher is wanted: net.lemb_modules.0.weight and 35 more" in message
    torch.save(laid_out(teacher, ddp=True), file)
    assert "holds a teacher, a student is wanted" in refused("--kind", "pixels-student")


def test_another_size_is_named(teacher, file, refused):
    torch.save(laid_out(teacher, ddp=True), file)
    message = refused(size=None)  # the published size
    assert "of another shape [net.temb_modules.0.weight (32, 8), not (512, 128)" in message
    assert "missing [" in message and "and " in message and "--model_config" in message
    assert len(message) < 6000


class Payload:
    def __init__(self, call: Any, *args: Any) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> Any:
        return self.call, self.args


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_file_is_never_run(teacher, file, tmp_path, refused, legacy):
    trace = tmp_path / "ran"
    contents = laid_out(teacher, ddp=True)
    for call, arg, name in (
        (os.system, f"touch {trace}", "system"),
        (eval, f"open({str(trace)!r}, 'w')", "eval"),
        (torch.load, str(trace), "torch.serialization.load"),
    ):
        contents["optimizer"] = Payload(call, arg)
        torch.save(contents, file, _use_new_zipfile_serialization=not legacy)
        message = refused()
        assert name in message and "nothing in the file was executed" in message
        assert not trace.exists()


def test_only_numbers_of_numpy_are_read(file, refused):
    scalar = np.float64(1).__reduce__()[0]
    torch.save({"n_iter": Payload(scalar, np.dtype("O"), b"12345678")}, file)
    assert "NumPy value of type 'O8'" in refused()
    torch.save({"n_iter": Payload(scalar, "f8", b"12345678")}, file)
    assert "NumPy number without its type" in refused()
    torch.save({"n_iter": np.arange(3)}, file)
    assert "_reconstruct" in refused()
    for number in (np.int64(-3), np.float16(0.5), np.bool_(True), np.dtype(">i4").type(7)):
        torch.save({"n": number}, file)
        assert read_checkpoint(file)["n"] == number


def test_files_that_are_no_checkpoint(teacher, file, refused):
    assert "no such file" in refused()
    file.write_bytes(b"")
    assert "cannot be read" in refused()
    file.write_text("hello")
    assert "cannot be read" in refused()
    torch.save(laid_out(teacher, ddp=True), file)
    file.write_bytes(file.read_bytes()[:-4000])
    assert "cannot be read" in refused()
    torch.save([1, 2], file)
    assert "holds a list" in refused()
    torch.save({"weight": torch.zeros(2), 3: 4}, file)
    message = refused()
    assert "is of no kind known here, pixels-teacher, pixels-student, " in message and "it holds weight, 3" in message


def test_flags_are_checked(teacher, file, tmp_path, run):
    torch.save(laid_out(teacher, ddp=True), file)
    with pytest.raises(ValueError, match=r"--kind 'pixel-teacher'.*did you mean 'pixels-teacher'"):
        run("--kind", "pixel-teacher")
    with pytest.raises(ValueError, match="--weights 'live': must be one of ema, raw"):
        run("--weights", "live")
    with pytest.raises(ValueError, match="unknown setting 'ch_mults'; did you mean 'ch_mult'"):
        run(size={"ch_mults": [1]})
    with pytest.raises(ValueError, match="--checkpoint"):
        convert.main(["--output_dir", str(tmp_path / "out")])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(ValueError, match="is not an empty folder; name another"):
        run()
    assert (tmp_path / "out" / "mine").read_text() == "kept"


def test_as_a_command(file, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        arguments.run(convert.main, ["--checkpoint", str(file), "--output_dir", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {file}: no such file; give a checkpoint as its authors published it\n"
