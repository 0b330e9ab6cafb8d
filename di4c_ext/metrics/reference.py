"""What samples of images are held against, computed once: statistics of the real images, kept in the cache.

Looking at tens of thousands of real images takes a large network minutes to hours; all that figures need of them is
their moments, some rows of features, and what real images themselves score. The file hangs on the images, the network's
weights and its preprocessing, so another of any of these is another file.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from di4c_ext import checkpoints
from di4c_ext.metrics.frechet import Moments

_FORMAT = 1  # rises with what is kept, and with how a floor is computed


@dataclass(frozen=True)
class Reference:
    """moments: by space and side: features, features_heldout, pixels, pixels_heldout, those that there are.
    rows: features (M, F) of some real images, for what looks at pairs. floors: what real images score, by figure."""

    moments: dict[str, Moments]
    rows: Tensor | None
    floors: dict[str, float]


def reference_file(cache: Path | None, *told: object) -> Path | None:
    """The file for all that a reference hangs on, told in words; None without a cache."""
    if cache is None:
        return None
    key = hashlib.sha256(" ".join(map(str, (_FORMAT, *told))).encode()).hexdigest()[:24]
    return cache / f"reference-{key}.safetensors"


def keep(reference: Reference, file: Path) -> None:
    """Writes a reference, whole or not at all; only warns where the cache cannot be written."""
    tensors = {} if reference.rows is None else {"rows": reference.rows.contiguous()}
    for name, moments in reference.moments.items():
        tensors |= {f"mean_{name}": moments.mean, f"scatter_{name}": moments.scatter.contiguous()}
    told = {"sizes": {name: moments.n for name, moments in reference.moments.items()}, "floors": reference.floors}
    checkpoints.keep_tensors(tensors, file, {name: json.dumps(value) for name, value in told.items()})


def kept(file: Path) -> Reference | None:
    """The reference in a file; None where there is none, or a damaged one, which is made anew."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            told = {name: json.loads(value) for name, value in opened.metadata().items()}
        moments = {
            name: Moments.of(int(n), tensors[f"mean_{name}"], tensors[f"scatter_{name}"])
            for name, n in told["sizes"].items()
        }
        return Reference(moments, tensors.get("rows"), {name: float(x) for name, x in told["floors"].items()})
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError):
        return None
