"""Which implementation serves a tensor: CPU kernels, CUDA kernels or the reference, and how tensors reach them.

Environment:
    DI4C_NATIVE=off   at run time: the reference ops serve everything (at install time: no extension is built).
    DI4C_ISA=...      baseline, avx2, avx512 or neon: forces one of the CPU instruction sets that were built.
"""

from __future__ import annotations

import importlib
import os
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # config.h: DType
LOGISTIC = 3  # a row of two floats, mean and log-scale

_warned: set[str] = set()


def enabled() -> bool:
    """False while DI4C_NATIVE=off is in the environment; looked at on every call."""
    return os.environ.get("DI4C_NATIVE", "").lower() != "off"


def _load() -> tuple[ModuleType | None, str]:
    """The compiled extension, or None and the reason it is missing."""
    if not enabled():
        return None, "DI4C_NATIVE=off was set when di4c_ext was imported"
    try:
        return importlib.import_module("di4c_ext._C"), ""
    except ModuleNotFoundError as error:
        if error.name != "di4c_ext._C":
            return None, f"importing di4c_ext._C failed: {error}"
    except ImportError as error:
        return None, f"di4c_ext._C was built but cannot be loaded here: {error}; reinstall with `pip install .`"
    root = Path(__file__).resolve().parents[2]
    if (root / "setup.py").is_file() and (root / "csrc").is_dir():
        return None, (
            f"di4c_ext was imported from its source folder {root}, where no extension has been built; "
            "run from another folder with the package installed, or `pip install -e .` here"
        )
    return None, "this installation was made without the extension (DI4C_NATIVE=off, or no compiler was found)"


_C, _missing = _load()
_info: dict[str, Any] = dict(_C.info()) if _C is not None else {}
POSITIONS: int = _C.POSITIONS if _C is not None else 0  # config.h: kPositions, by which workspaces are sized


def available(kind: str) -> bool:
    """Whether compiled kernels of this kind ('cpu' or 'cuda') serve ops now.

    Raises:
        ValueError: for any other kind.
    """
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"available: kind must be 'cpu' or 'cuda', got {kind!r}")
    if _C is None or not enabled():
        return False
    return kind == "cpu" or (bool(_info["cuda"]) and torch.cuda.is_available())


def info() -> dict[str, Any]:
    """What `python -m di4c_ext.env` prints of the kernels: the extension's own account, or why there is none."""
    if _C is None:
        return {"native": False, "reason": _missing}
    reason = "" if enabled() else "DI4C_NATIVE=off"
    return {"native": enabled(), "reason": reason, "path": str(_C.__file__), **_C.info()}


def warn_once(key: str, message: str) -> None:
    """A RuntimeWarning the first time this key comes up in the process."""
    if key not in _warned:
        _warned.add(key)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def _serves(tensor: Tensor) -> bool:
    """Whether compiled kernels exist for a tensor of this device and dtype; says so once where they are missed."""
    if tensor.dtype not in DTYPES and tensor.dtype != torch.int64:
        return False  # float64: the reference, by contract
    kind = tensor.device.type
    if kind not in ("cpu", "cuda") or not enabled():
        return False
    if _C is None:
        warn_once("missing", f"di4c_ext: compiled kernels are missing, the slow reference ops serve: {_missing}")
        return False
    if kind == "cuda" and not _info["cuda"]:
        warn_once(
            "cuda",
            "di4c_ext: CUDA tensors, but this build has no CUDA kernels "
            f"({_info['cuda_reason']}); the slow reference ops serve. Reinstall with nvcc on PATH (or in CUDA_HOME, "
            "or from pip, see the README) and DI4C_CUDA=on, which makes a missing nvcc an error.",
        )
        return False
    return True


class Kernels:
    """The kernels of one device: `kernels("sample", field=value, ...)`, fields named as the structs of api.h.

    Tensors become pointers, None becomes 0; the stream and device, or the number of threads, are added here. Kernels
    that share a struct run one after the other on the same fields.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, *names: str, **fields: Tensor | int | float | None) -> None:
        values = {k: v.data_ptr() if isinstance(v, Tensor) else 0 if v is None else v for k, v in fields.items()}
        if self._device.type == "cpu":
            threads = torch.get_num_threads()
            for name in names:
                getattr(_C.cpu, name)(**values, threads=threads)  # type: ignore[union-attr]
            return
        index = self._device.index
        stream = torch.cuda.current_stream(self._device).cuda_stream
        for name in names:
            getattr(_C.cuda, name)(**values, device=index, stream_handle=stream)  # type: ignore[union-attr]


def kernels(tensor: Tensor, *others: Tensor | None) -> Kernels | None:
    """The compiled kernels that serve a tensor, or None where the reference does, as it does beside any in float64."""
    for other in others:
        if other is not None and other.dtype == torch.float64:
            return None
    return Kernels(tensor.device) if _serves(tensor) else None


def rows(tensor: Tensor) -> Tensor:
    """The tensor itself where its classes are contiguous, else a contiguous copy: the kernels take any other stride."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def describe_sequences(name: str, tokens: Tensor | None) -> dict[str, Tensor | int]:
    """The fields of a `Sequences` called `name`: pointer and strides of tokens (B, K, D) or (B, D), or null."""
    stride = (0, 0, 0) if tokens is None else tokens.stride()
    return {
        name: 0 if tokens is None else tokens,
        f"{name}_stride_b": stride[0],
        f"{name}_stride_k": stride[1] if len(stride) == 3 else 0,
        f"{name}_stride_d": stride[-1],
    }


def dense(tensor: Tensor | None) -> Tensor | None:
    """Contiguous, as the kernels take all but logits and sequences; a compiler may have changed what the user gave."""
    return None if tensor is None else tensor.contiguous()


def split_workspace(x: Tensor, rows: int, states: int, numbers: int) -> dict[str, Tensor | None]:
    """The field `split` of kernels that share few long rows between CTAs: a ticket to each row, `numbers` words beside.

    CUDA devices without clusters (before compute capability 9) need it to do so; others, and other rows, get None.
    """
    if x.device.type != "cuda":
        return {}
    few = 0 < rows <= _C.FEW_ROWS and states > _C.LONG_ROW  # type: ignore[union-attr]
    if not few or torch.cuda.get_device_capability(x.device) >= (9, 0):
        return {"split": None}
    split = torch.empty(rows * (1 + numbers), dtype=torch.int32, device=x.device)
    split[:rows].zero_()
    return {"split": split}


def describe(name: str, tensor: Tensor | None, logistic: bool = False) -> dict[str, Tensor | int]:
    """The fields of a `Logits` called `name`: pointer, dtype, strides of logits (B, L, D, S) or (B, D, S), or null.

    logistic: the rows are (mean, log-scale) pairs of float32 in place of S logits. The caller must keep `tensor`
    alive, and its last dimension contiguous (see `rows`).
    """
    if tensor is None:
        return {name: 0, f"{name}_dtype": 0, f"{name}_stride_b": 0, f"{name}_stride_l": 0, f"{name}_stride_d": 0}
    stride = tensor.stride()
    return {
        name: tensor,
        f"{name}_dtype": LOGISTIC if logistic else DTYPES[tensor.dtype],
        f"{name}_stride_b": stride[0],
        f"{name}_stride_l": stride[1] if len(stride) == 4 else 0,
        f"{name}_stride_d": stride[-2],
    }
