"""What a loss that is not finite leaves behind: all that is needed to compute it once more, in one file.

A step is made of micro-batches. Of each the trainer keeps, until the step's loss is seen to be finite, its inputs, its
keys and the state of torch's generators before it (dropout is drawn from these). `save` writes one of them with the
weights as they were, `replay` computes it again: the same parts, and the values of its samples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from di4c_ext import checkpoints

FOLDER = "non_finite"  # in the output folder
POLICIES = ("stop", "skip")
LIMIT = 10  # steps skipped one after the other before skipping is given up
_KEPT = 4  # files of the newest skipped steps
_SHOWN = 4  # samples that a message names


@dataclass(frozen=True)
class MicroBatch:
    """inputs: as the data gave them, x_0 (B, D), example (B,) and more. keys (B,): of this step."""

    inputs: dict[str, Tensor]
    keys: Tensor
    parts: Mapping[str, Tensor]
    generators: dict[str, Tensor]

    def bad_parts(self) -> list[str]:
        """Names of the parts that are not finite for some sample, or as a whole."""
        each = self.per_sample()
        told = [name for name in getattr(self.parts, "parts", self.parts) if name in self.parts and name != "loss"]
        bad = [name for name in told if not bool(each.get(name, self.parts[name]).isfinite().all())]
        return bad if bad or bool(self.parts["loss"].isfinite()) else ["loss"]

    def bad_samples(self) -> list[dict[str, str]]:
        """The samples of which some value is not finite; all of them where single values are not known."""
        each = self.per_sample()
        bad = torch.zeros_like(self.keys, dtype=torch.bool)
        for value in each.values():
            bad |= ~value.to(bad.device).isfinite()
        if not each or not bool(bad.any()):
            bad[:] = True
        rows = bad.nonzero()[:, 0].tolist()
        return [{"example": str(int(self.inputs["example"][i])), "key": f"{int(self.keys[i]):#x}"} for i in rows]

    def per_sample(self) -> dict[str, Tensor]:
        """Values (B,) by name, where the loss tells them."""
        found: dict[str, Tensor] = getattr(self.parts, "per_sample", {})
        return found


class Measured(dict[str, Tensor]):
    """A loss and what else is logged, scalars; `per_sample` has values (B,) that a fault can be looked for in."""

    def __init__(self, values: Mapping[str, Tensor], per_sample: Mapping[str, Tensor]) -> None:
        super().__init__(values)
        self.per_sample = {name: value.detach() for name, value in per_sample.items()}


def generators(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's generators that a network on `device` draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_generators(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Puts them back."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def in_words(told: list[dict[str, Any]]) -> str:
    """The parts, samples and files that the processes tell of."""
    parts = sorted({part for each in told for part in each["parts"]})
    samples = [sample for each in told for sample in each["samples"]]
    named = ", ".join(f"{sample['example']} (key {sample['key']})" for sample in samples[:_SHOWN])
    more = f" and {len(samples) - _SHOWN} more" if len(samples) > _SHOWN else ""
    what = f"loss part {', '.join(parts)} is" if parts else "the loss is finite, but its gradient is"
    files = ", ".join(file for each in told for file in each["files"])
    return f"{what} not finite at step {told[0]['step']} of {told[0]['steps']}, example {named}{more}" + (
        f"; kept for --replay in {files}" if files else ""
    )


def save(batch: MicroBatch, file: Path, weights: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]) -> None:
    """Writes a micro-batch, the weights by the name of their model, and facts that JSON can hold; whole or not."""
    from safetensors.torch import save_file

    groups = {"inputs": batch.inputs, "generators": batch.generators, "keys": {"keys": batch.keys}, **weights}
    tensors = {
        f"{group}/{name}": value.detach().cpu().clone().contiguous()
        for group, values in groups.items()
        for name, value in values.items()
    }
    with checkpoints.whole_file(file) as staging:
        save_file(tensors, staging, metadata={"facts": json.dumps(dict(facts))})
    for old in sorted(file.parent.glob("*.safetensors"), key=lambda path: path.stat().st_mtime)[:-_KEPT]:
        old.unlink(missing_ok=True)


def read(file: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """What `save` wrote: tensors by group and name, and the facts. ValueError for a file that is none of these."""
    from safetensors import SafetensorError, safe_open

    groups: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(str(file), framework="pt") as held:
            facts: Any = json.loads((held.metadata() or {})["facts"])
            for name in held.keys():  # noqa: SIM118  (no mapping)
                group, _, key = name.partition("/")
                groups.setdefault(group, {})[key] = held.get_tensor(name)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"--replay {file}: is no file of a loss that was not finite ({error}); such lie in the folder "
            f"{FOLDER} of a run"
        ) from error
    missing = {"inputs", "keys", "generators", "model"} - groups.keys()
    if missing or not isinstance(facts, dict):
        raise ValueError(f"--replay {file}: holds no {', '.join(sorted(missing)) or 'facts'}; give another file")
    return groups, facts


def phase_of(file: str | Path) -> str:
    """Of which training a file is: teacher, student or a stage's name."""
    return str(read(Path(file))[1].get("phase"))


def report(file: Path, facts: Mapping[str, Any], batch: MicroBatch, gradient_norm: float) -> str:
    """What a replay found, as lines: the parts, then the samples with every value they have."""
    lines = [f"{file}: step {facts['step']} of the {facts['phase']}, {len(batch.keys)} samples"]
    lines += [f"  {name:<26}{float(value.detach()):.9g}" for name, value in batch.parts.items()]
    lines.append(f"  {'gradient norm':<26}{gradient_norm:.9g}")
    each = batch.per_sample()
    lines.append("  ".join(["example", *each]))
    for row, example in enumerate(batch.inputs["example"].tolist()):
        lines.append(
            "  ".join([f"{example:>7}", *(f"{float(value[row]):>{len(name)}.6g}" for name, value in each.items())])
        )
    return "\n".join(lines)
