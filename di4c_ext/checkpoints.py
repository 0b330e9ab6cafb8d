"""Files that are whole or absent: writing through a temporary name, and checks before a checkpoint is trusted."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from di4c_ext import engine, manifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS, CONFIG, STATE = "model.safetensors", "config.json", "trainer_state.json"
# What a run writes into its output folder, and all that --overwrite_output_dir deletes there.
OWN = (
    *("checkpoint-*", ".saving-*", "teacher", "vq", "samples", "stages", "runs", "*_config.yaml", "non_finite"),
    *("metrics.jsonl", "evaluation.json", "text.json", "tokenizer.json", "tokenizer_config.json"),
    *("report.html", "README.md", WEIGHTS, CONFIG, "training_args.bin"),
)


def cache_folder() -> Path:
    """DI4C_CACHE, else di4c_ext under XDG_CACHE_HOME or ~/.cache."""
    named = os.environ.get("DI4C_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "di4c_ext"


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place on success and vanishes on any error.

    An earlier `target` stays untouched until the new one is complete and on disk.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield staging
        sync_folder(staging)
        replace_folder(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Waits until every file of `folder` is on disk; a disk that turns out full raises here, before any rename."""
    for file in folder.rglob("*"):
        if file.is_file():
            _sync(file)


def keep_newest(folder: Path, limit: int | None) -> None:
    """Deletes all but the `limit` checkpoints of the largest steps; None keeps all."""
    if limit is None:
        return
    for _, path in sorted(_checkpoints(folder), reverse=True)[limit:]:
        shutil.rmtree(path, ignore_errors=True)


def replace_folder(source: Path, target: Path) -> None:
    """Renames `source` to `target`; an old `target` is moved aside first, and put back if the rename fails."""
    source.chmod(0o755)  # mkdtemp folders are private, a checkpoint need not be
    if not target.exists():
        source.rename(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    target.rename(aside / target.name)
    try:
        source.rename(target)
    except OSError:
        (aside / target.name).rename(target)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A temporary file name beside `target` that takes its place on success and vanishes on any error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield staging
        _sync(staging)
        staging.replace(target)
    finally:
        staging.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Writes `text` to `target`, whole or not at all."""
    with whole_file(target) as staging:
        staging.write_text(text, encoding="utf-8")


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Writes config.json and model.safetensors into `folder`, which may hold other files; each whole or not at all."""
    staging = folder / ".saving-model"
    try:
        model.save_pretrained(staging)
        sync_folder(staging)
        for file in sorted(staging.iterdir()):
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def keep_copy(files: Iterable[Path], folder: Path) -> None:
    """Copies files into a new cache folder; only warns where that cannot be written: no reason to lose a run."""
    try:
        with whole_folder(folder) as staging:
            for file in files:
                shutil.copy(file, staging)
    except OSError as error:
        _cache_warning(error)


def keep_state(model: nn.Module, file: Path) -> None:
    """The module's tensors as one safetensors file of the cache; only warns where that cannot be written."""
    keep_tensors(model.state_dict(), file)


def keep_tensors(tensors: dict[str, Tensor], file: Path, told: dict[str, str] | None = None) -> None:
    """Tensors, and what is `told` of them, as one safetensors file of the cache; only warns like `keep_state`."""
    from safetensors.torch import save_file

    try:
        with whole_file(file) as staging:
            save_file(tensors, staging, told)
    except OSError as error:
        _cache_warning(error)


def load_state(model: nn.Module, file: Path) -> None:
    """Fills `model` from `file`; raises ValueError where the file is cut short or holds other tensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file, load_model

    try:
        if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
            engine.fill(model, load_file(str(file)))
        else:
            load_model(model, str(file))
    except (SafetensorError, RuntimeError, OSError, KeyError) as error:
        raise ValueError(f"{file}: cannot be read ({str(error).splitlines()[0]}); use another copy") from error


def check_model(folder: Path) -> None:
    """Raises ValueError naming the file that is missing, truncated or no JSON in a saved model's folder."""
    from safetensors import SafetensorError, safe_open

    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give one that holds {CONFIG} and {WEIGHTS}")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: {name} is missing, so it is no saved model; {_saved_models_in(folder)}")
    read_json(folder / CONFIG)
    try:
        with safe_open(str(folder / WEIGHTS), framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        size = (folder / WEIGHTS).stat().st_size
        raise ValueError(
            f"{folder / WEIGHTS}: truncated or damaged ({size} bytes, {error}); copy it again or use another checkpoint"
        ) from error


def check_resumable(checkpoint: Path) -> None:
    """check_model, the trainer's own files as well, and that all of them are as they were written (`manifest`)."""
    check_model(checkpoint)
    for name in (STATE, "optimizer.pt", "scheduler.pt"):
        if not (checkpoint / name).is_file():
            raise ValueError(f"{checkpoint}: {name} is missing; resume from another checkpoint, or start anew")
    read_json(checkpoint / STATE)
    manifest.verify(checkpoint)
    for file in sorted([*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]):
        manifest.check_archive(file)
        _check_state(file)


def _check_state(file: Path) -> None:
    """ValueError unless a torch file holds numbers and tensors alone; nothing in it is run, no tensor is read."""
    import torch
    from transformers.trainer_pt_utils import safe_globals

    try:
        with safe_globals():  # numpy's arrays, which the states of generators are
            torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged file can raise anything
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file}: refused, it holds more than tensors and numbers ({told}); use another") from error


def latest_whole(folder: Path) -> Path | None:
    """The newest checkpoint that can be gone on from; None where there is none at all.

    Each that is truncated or damaged is named in a warning and passed over for the one before. Raises ValueError where
    no checkpoint is whole.
    """
    newest_first = [path for _, path in sorted(_checkpoints(folder), reverse=True)]
    for checkpoint in newest_first:
        try:
            check_resumable(checkpoint)
            return checkpoint
        except ValueError as error:
            warnings.warn(f"{checkpoint.name} is passed over: {error}", stacklevel=2)
    if newest_first:
        raise ValueError(
            f"--resume: none of the {len(newest_first)} checkpoint(s) in {folder} is whole, as told above; "
            "begin anew with --overwrite_output_dir"
        )
    return None


def claim(folder: Path, stored: str, *, resume: bool, overwrite: bool) -> None:
    """Makes `folder` this run's: new or empty, or holding the run to resume (its settings in `stored`), or cleared.

    Raises ValueError for a folder that holds anything else, and for a resume without a run. Only the files a run
    writes are ever deleted.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder}: is a file; name a folder")
    holds = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if resume:
        if stored not in holds:
            raise ValueError(f"--resume_from_checkpoint: {folder} holds no {stored}; name the folder of a run")
        _refuse_links(folder)
    elif holds and overwrite:
        for path in {path for pattern in OWN for path in folder.glob(pattern)}:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    elif holds:
        run = f"another run ({stored})" if stored in holds else f"other files ({', '.join(holds[:3])})"
        raise ValueError(
            f"--output_dir {folder}: holds {run}; name another folder, go on with it by --resume, "
            "or replace it by --overwrite_output_dir"
        )
    folder.mkdir(parents=True, exist_ok=True)


def _refuse_links(folder: Path) -> None:
    """A run that somebody made may name other places by links; what is written must stay in its folder."""
    home = folder.resolve()
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and not path.resolve().is_relative_to(home):
            raise ValueError(
                f"--output_dir {folder}: {path.relative_to(folder)} is a link to {path.resolve()}, outside the folder, "
                "and resuming would write there; remove the link"
            )


def latest(folder: Path) -> Path | None:
    """The checkpoint-N of the largest N, None where there is none."""
    found = _checkpoints(folder)
    return max(found)[1] if found else None


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    named = [path for path in folder.glob("checkpoint-*") if path.is_dir()]
    return [(int(path.name[11:]), path) for path in named if path.name[11:].isdigit()]


def _cache_warning(error: OSError) -> None:
    warnings.warn(f"not kept in the cache: {error}; set DI4C_CACHE to a folder with room", stacklevel=3)


def read_json(file: Path) -> Any:
    """What a JSON file holds; ValueError naming it where it cannot be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{file}: not readable JSON ({error}); copy it again or use another checkpoint") from error


def _saved_models_in(folder: Path) -> str:
    inside = sorted(path.parent.name for path in folder.glob(f"*/{WEIGHTS}"))
    return f"inside it are {', '.join(inside)}" if inside else "give the output folder of a run"


def _sync(file: Path) -> None:
    """Asks the disk to hold the bytes before a rename makes them the truth."""
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())
