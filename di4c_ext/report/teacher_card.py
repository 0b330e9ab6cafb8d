"""README.md of a teacher's folder: what it is, how it was trained, what it knows, and how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from di4c_ext.config import PretrainConfig
from di4c_ext.models.base import MixtureDenoiser
from di4c_ext.report.facts import public_name
from di4c_ext.systems import process_of

TEMPLATE = """---
library_name: di4c_ext
tags:
- discrete-diffusion
datasets:
- {dataset}
---

# A teacher of {dataset}

A product denoiser of {parameters:,} parameters (`{network}`) for `{process}`. It predicts every position independently
of the others, so it is to be sampled in many steps; `di4c_ext.distill` makes a student of it that takes a few.

Trained for {steps:,} steps on batches of {batch:,} {unit}s, learning rate {rate:g}, seed {seed}; {average}.

{bounds}

## Use

```python
from di4c_ext.generate import generate, open_model

teacher = open_model("{folder}", is_student=False)
samples = generate(teacher, 64, 16, seed=0)
```

    python -m di4c_ext.sample --model {folder} --num_steps 64 --num_samples 16 --seed 0

With the data it was trained on, `python -m di4c_ext.distill --teacher_model_name_or_path {folder}` distils it.
"""


def teacher_card(
    teacher: MixtureDenoiser, args: PretrainConfig, found: Mapping[str, Any], *, dataset: str, unit: str, digits: int
) -> str:
    """Markdown with YAML metadata, as model hubs read it.

    found: as `task.Task.bounds` gives it; unit: what an example is called, digits: behind the point of a bound.
    """
    train, heldout = (f"{value:.{digits}f}" for value in found["bounds"].values())
    known, held = found["num_bounds"]["train"], found["num_bounds"]["heldout"]
    name = f"{found['bounds_name'][0].upper()}{found['bounds_name'][1:]}"
    decay = args.ema_decay
    return TEMPLATE.format(
        dataset=public_name(dataset),
        parameters=teacher.num_parameters(),
        network=type(teacher).__name__,
        process=process_of(teacher.config),
        steps=args.max_steps,
        batch=args.share().total,
        unit=unit,
        rate=args.learning_rate,
        seed=args.seed,
        average=f"these are the moving averages of its weights, of decay {decay:g}" if decay else "no moving average",
        bounds=f"{name}: {train} on {known:,} training {unit}s, {heldout} on {held:,} held-out ones.",
        folder=Path(str(args.output_dir)),
    )
