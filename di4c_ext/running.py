"""What a training run counts on its way: sums of the loss's parts since the last line of metrics, skipped steps, and
its place in a stream of data. All of it goes into checkpoints, so that a resumed run writes the same lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from di4c_ext import checkpoints, processes

NAME = "running.json"  # in a checkpoint


class Running:
    """sums and number: of micro-batches of this process. skipped: steps without an update so far. length: D."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.number = 0
        self.skipped = self.skipped_in_a_row = 0
        self.place: Any = None
        self.next_place: Any = None  # of the step at hand, which may yet go wrong
        self.loss_before: Tensor | None = None  # the Trainer's own sum before the step at hand
        self.timed_step = 0  # the last one of which the time has been told
        self.length = 0

    def add(self, parts: Iterable[Mapping[str, Tensor]]) -> None:
        """Counts the micro-batches of a step that is good."""
        for each in parts:
            for name, value in each.items():
                self.sums[name] = self.sums.get(name, 0.0) + value.detach()
            self.number += 1
        self.skipped_in_a_row = 0

    def take(self) -> dict[str, float]:
        """Means over all processes' micro-batches since the last call; nothing where every step was skipped."""
        names = [*self.sums]
        summed = [self.sums[name].float() for name in names]
        number = torch.tensor(float(self.number), device=summed[0].device if summed else None)
        # Processes whose every step was skipped are all of them: steps are skipped together.
        *totals, count = processes.total(torch.stack([*summed, number])).tolist()
        self.sums, self.number = {}, 0
        told = {name: value / count for name, value in zip(names, totals, strict=True)}
        return told | ({"skipped_steps": float(self.skipped)} if self.skipped else {})

    def save(self, checkpoint: Path, *, write: bool) -> None:
        """Writes what all processes count into a checkpoint; one that does not write only tells."""
        sums = {name: float(value) for name, value in self.sums.items()}
        each = processes.tell_all({"sums": sums, "number": self.number})
        told = {"processes": each, "skipped": self.skipped, "in_a_row": self.skipped_in_a_row, "place": self.place}
        if write:
            (checkpoint / NAME).write_text(json.dumps(told), encoding="utf-8")

    def load(self, checkpoint: Path, device: torch.device) -> None:
        """Takes up what `save` wrote; other numbers of processes than then share the sums out as well as they can."""
        if not (checkpoint / NAME).is_file():
            return  # of a version that kept none
        told = checkpoints.read_json(checkpoint / NAME)
        each, rank = told["processes"], processes.rank()
        if len(each) != processes.count():
            first = rank == 0
            names = each[0]["sums"]
            own: dict[str, Any] = {
                "sums": {name: sum(one["sums"][name] for one in each) if first else 0.0 for name in names},
                "number": sum(one["number"] for one in each) if first else 0,
            }
        else:
            own = each[rank]
        self.sums = {name: torch.tensor(value, device=device) for name, value in own["sums"].items()}
        self.number, self.skipped, self.skipped_in_a_row = own["number"], told["skipped"], told["in_a_row"]
        self.place = told["place"]
