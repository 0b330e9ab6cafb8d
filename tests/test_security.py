"""What others made is read, never run: checkpoints that are programs, archives that swell, configurations with tags,
links that lead out of the output folder."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import zipfile
from pathlib import Path
from typing import Any

import parallel_jobs
import pytest
import torch
import yaml

from di4c_ext import checkpoints, manifest
from di4c_ext.arguments import DataArguments, RunArguments, UsageError, parse, read_yaml
from di4c_ext.config import PretrainConfig
from di4c_ext.models.checkpoint import read_checkpoint


class Malicious:
    """A pickle of it writes a file when it is opened."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    parallel_jobs.distillation(folder, max_steps=2, save_steps=1, per_device_train_batch_size=4).train()
    return folder


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def test_the_canary_would_sing(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Malicious(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_that_is_a_program_is_refused(name: str, copied: Path, tmp_path: Path) -> None:
    checkpoint = copied / "checkpoint-2"
    torch.save({"state": Malicious(tmp_path / "canary")}, checkpoint / name)
    manifest.seal(checkpoint)  # whoever made it made its list too
    with pytest.raises(ValueError, match=rf"{name}: refused, it holds more than tensors"):
        checkpoints.check_resumable(checkpoint)
    with pytest.warns(UserWarning, match=f"checkpoint-2 is passed over.*{name}"):
        assert checkpoints.latest_whole(copied) == copied / "checkpoint-1"
    assert not (tmp_path / "canary").exists()


def test_files_that_nobody_needs_are_not_opened(copied: Path, tmp_path: Path) -> None:
    """transformers writes its arguments as a pickle; resuming does not read it, nor weights that are one."""
    checkpoint = copied / "checkpoint-1"
    for name in ("training_args.bin", "pytorch_model.bin"):
        (checkpoint / name).write_bytes(pickle.dumps(Malicious(tmp_path / "canary")))
    manifest.seal(checkpoint)
    trainer = parallel_jobs.distillation(copied, max_steps=2, per_device_train_batch_size=4)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 2 and not (tmp_path / "canary").exists()


def _bomb(file: Path, megabytes: int = 512) -> None:
    """A torch file of which one part is nothing but zeros, pressed together."""
    torch.save({"weight": torch.zeros(4)}, file)
    with zipfile.ZipFile(file) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            if not name.endswith("data/0"):
                archive.writestr(name, content)
                continue
            with archive.open(name, "w", force_zip64=True) as part:
                for _ in range(megabytes):
                    part.write(bytes(1 << 20))


def test_an_archive_that_swells_is_refused(copied: Path, tmp_path: Path) -> None:
    _bomb(tmp_path / "weights.pt")
    assert (tmp_path / "weights.pt").stat().st_size < 1 << 20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"weights\.pt: refused, its \d+ bytes would become \d{9} when read"):
        read_checkpoint(tmp_path / "weights.pt")
    shutil.copy(tmp_path / "weights.pt", copied / "checkpoint-2" / "optimizer.pt")
    manifest.seal(copied / "checkpoint-2")
    with pytest.raises(ValueError, match=r"optimizer\.pt: refused, its \d+ bytes would become"):
        checkpoints.check_resumable(copied / "checkpoint-2")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 128 << 10  # KiB


def test_yaml_with_tags_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    command = f"touch {tmp_path / 'canary'}"
    for tag in (
        f'max_steps: !!python/object/apply:os.system ["{command}"]',
        f'!!python/object/new:subprocess.Popen [["sh", "-c", "{command}"]]',
        "max_steps: !!python/name:os.system",
        "max_steps: !mine 3",
    ):
        file.write_text(tag)
        with pytest.raises(UsageError, match=r"settings\.yaml: not YAML"):
            read_yaml(file)
    assert not (tmp_path / "canary").exists()


def test_yaml_that_swells_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    file.write_text("\n".join(lines))
    with pytest.raises(UsageError, match="aliases stand for more than 100000 values"):
        read_yaml(file)
    file.write_text("a: &a [*a]")
    with pytest.raises(UsageError, match="aliases stand for more"):
        read_yaml(file)
    file.write_text("a: &a [1, 2]\nb: *a")
    assert read_yaml(file) == {"a": [1, 2], "b": [1, 2]}


def _parse(*argv: object, stored: dict[str, Any] | None = None) -> Any:
    kinds = [DataArguments, PretrainConfig, RunArguments]
    words = [str(word) for word in argv]
    return parse("pretrain", kinds, words, stored=None if stored is None else lambda early: stored)


def test_no_file_may_push_or_run_the_code_of_others(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump({"push_to_hub": True}))
    with pytest.raises(UsageError, match=r"'push_to_hub' in .*: is taken from the command line only"):
        _parse("--config", file)
    with pytest.raises(UsageError, match="'push_to_hub' in the stored configuration: is taken from the command line"):
        _parse("--resume", "--output_dir", tmp_path, stored={"push_to_hub": True})


def test_a_stored_configuration_does_not_say_where_to_write(tmp_path: Path) -> None:
    stored = {"output_dir": str(tmp_path / "elsewhere"), "max_steps": 7}
    (_, args, _), settings = _parse("--resume", "--use_cpu", "--output_dir", tmp_path / "here", stored=stored)
    assert args.output_dir == settings["output_dir"] == str(tmp_path / "here") and args.max_steps == 7


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoint-2", "checkpoint-2/ema", "teacher"])
def test_links_that_lead_out_are_refused(name: str, copied: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (copied / "pretrain_config.yaml").write_text("")
    path = copied / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(precious)
    with pytest.raises(ValueError, match=f"{name} is a link to .*precious, outside the folder"):
        checkpoints.claim(copied, "pretrain_config.yaml", resume=True, overwrite=False)
    checkpoints.claim(copied, "pretrain_config.yaml", resume=False, overwrite=True)
    assert precious.is_dir()  # the link is taken away, not what it leads to


def test_a_list_of_files_cannot_point_outside(copied: Path) -> None:
    checkpoint = copied / "checkpoint-2"
    listed = json.loads((checkpoint / manifest.NAME).read_text())
    (checkpoint / manifest.NAME).write_text(json.dumps({**listed, "/etc/passwd": [1, "0"]}))
    with pytest.raises(ValueError, match="names '/etc/passwd', which is outside"):
        checkpoints.check_resumable(checkpoint)
