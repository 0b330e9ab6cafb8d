"""Rows and samples of an evaluation as they are measured, so that one that was stopped goes on where it was.

rows.jsonl      first what the rows are of, then a row a line
samples/        the first samples of each model and number of steps, <model>-<steps>steps-seed<seed>.npy
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from di4c_ext import checkpoints
from di4c_ext.callbacks import append_metrics, read_metrics
from di4c_ext.evaluation.compare import Cell, cell_of

ROWS, SAMPLES = "rows.jsonl", "samples"
OWN = (ROWS, SAMPLES, "report.html", "README.md", "evaluation.json")  # what an evaluation writes


class Store:
    """The folder of an evaluation.

    weights: a digest of each model, by name; one may join those that were measured before. told: the data and settings
    on which rows hang, name by name. temperature, seed: of the cells whose samples are kept. Raises ValueError for a
    folder that holds other files and no evaluation, or that of something else, unless overwrite says that this is to
    be deleted; other files never are.
    """

    def __init__(
        self,
        folder: Path,
        weights: dict[str, str],
        told: dict[str, Any],
        *,
        temperature: float,
        seed: int,
        overwrite: bool = False,
    ) -> None:
        self.folder, self.temperature, self.seed = folder, temperature, seed
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--output_dir {folder}: is a file; name a folder")
        file = folder / ROWS
        others = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        if others and not file.is_file():
            raise ValueError(
                f"--output_dir {folder}: holds {', '.join(others[:3])}, and no evaluation ({ROWS}); name another "
                "folder, or a new one"
            )
        if overwrite:
            for path in (folder / name for name in OWN):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        if not file.is_file():
            checkpoints.write_text(file, json.dumps({"weights": weights, "of": told}) + "\n")
        head, *rows = read_metrics(file) or [{}]
        head["weights"] = _checked(folder, head, weights, told)
        self.rows = [row for row in rows if cell_of(row)[2:] != (temperature, seed) or self._file(row).is_file()]
        # Without the line that a stop cut off, behind which no other could be read.
        checkpoints.write_text(file, "".join(json.dumps(line) + "\n" for line in [head, *self.rows]))

    @property
    def known(self) -> set[Cell]:
        """The cells that were measured."""
        return {cell_of(row) for row in self.rows}

    def add(self, row: dict[str, Any], samples: Tensor) -> None:
        """Keeps a row, after the samples that are shown of it."""
        if cell_of(row)[2:] == (self.temperature, self.seed):
            with checkpoints.whole_file(self._file(row)) as staging, staging.open("wb") as handle:
                np.save(handle, samples.cpu().numpy().astype(np.int32))
        append_metrics(self.folder / ROWS, row)
        self.rows.append(row)

    def samples(self) -> dict[tuple[str, int], Tensor]:
        """What was kept to be shown, by model and number of steps."""
        shown = [row for row in self.rows if cell_of(row)[2:] == (self.temperature, self.seed)]
        return {
            (row["model"], row["num_steps"]): torch.from_numpy(np.load(self._file(row), allow_pickle=False)).long()
            for row in shown
        }

    def _file(self, row: dict[str, Any]) -> Path:
        name = f"{row['model']}-{row['num_steps']:03d}steps-seed{row['seed']}.npy"
        return self.folder / SAMPLES / name


def _checked(folder: Path, head: dict[str, Any], weights: dict[str, str], told: dict[str, Any]) -> dict[str, str]:
    """The digests of all models, known ones and new; ValueError naming the first thing that is not as it was."""
    known, held = head.get("weights", {}), head.get("of", {})
    asked = json.loads(json.dumps(told))
    pairs = [(name, known.get(name, digest), digest) for name, digest in weights.items()]
    pairs += [(name, held.get(name), asked.get(name)) for name in {**held, **asked}]
    for name, was, now in pairs:
        if was != now:
            raise ValueError(
                f"--output_dir {folder}: holds an evaluation of another {name} ({str(was)[:40]}, now {str(now)[:40]}); "
                "name another folder, or replace it by --overwrite_output_dir"
            )
    return {**known, **weights}
