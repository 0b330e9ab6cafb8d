"""The peers: what others have written for the same work, each called as its documentation says.

Plain torch is in plain.py. Liger-Kernel, FlashInfer, quack and TRL are used where they are installed; where they are
not, or want a GPU that is not there, the table says so.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

# name in the tables: (root module, whether it runs on a GPU alone)
OPTIONAL = {
    "Liger-Kernel": ("liger_kernel", True),
    "FlashInfer": ("flashinfer", True),
    "quack": ("quack", True),
    "TRL": ("trl", False),
}


class Missing(Exception):
    """A peer cannot be measured here; the message says why."""


def load(name: str, module: str, device: torch.device) -> Any:
    """A module of an optional peer.

    Raises:
        Missing: it is not installed, cannot be imported, or wants a GPU where there is none.
    """
    root, wants_gpu = OPTIONAL[name]
    if importlib.util.find_spec(root) is None:
        raise Missing("not installed")
    if wants_gpu and device.type != "cuda":
        raise Missing("runs on a GPU alone")
    try:
        return importlib.import_module(module)
    except Exception as error:  # whatever its dependencies raise
        raise Missing(f"installed, but its import fails: {type(error).__name__}: {error}") from error


def compiled(f: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """torch.compile of these very shapes; on a GPU it may try every plan it knows and replay graphs."""
    return torch.compile(f, dynamic=False, mode="max-autotune" if device.type == "cuda" else None)


def liger_cross_entropy(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Rows (N, S) and tokens (N,) -> (N,). Its gradient takes the place of the logits."""
    module = load("Liger-Kernel", "liger_kernel.transformers.functional", device)
    return lambda rows, tokens: module.liger_cross_entropy(rows, tokens, reduction="none")


def liger_divergence(op: str, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Target and logits (N, S) -> the sum over rows; it takes log-probabilities or probabilities, made by torch.

    Raises:
        Missing: also where it has no such divergence.
    """
    module = load("Liger-Kernel", "liger_kernel.transformers.functional", device)
    if op == "masked_kl":
        return lambda target, logits: module.liger_kl_div(
            log_softmax(logits, -1), log_softmax(target, -1), reduction="sum", log_target=True
        )
    if op == "masked_js":
        return lambda target, logits: module.liger_jsd(log_softmax(logits, -1), log_softmax(target, -1))
    if op == "masked_tv":
        return lambda target, logits: module.liger_tvd(
            torch.softmax(logits, -1), torch.softmax(target, -1), reduction="sum"
        )
    raise Missing("has no such divergence")


def quack_cross_entropy(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Rows (N, S) and tokens (N,) -> (N,)."""
    module = load("quack", "quack.cross_entropy", device)
    return lambda rows, tokens: module.cross_entropy(rows, tokens, reduction="none")


def flashinfer_sampling(device: torch.device) -> Callable[[Tensor], Tensor]:
    """Rows (N, S) -> tokens (N,), by a Gumbel race over logits that it takes in float32."""
    module = load("FlashInfer", "flashinfer.sampling", device)
    return lambda rows: module.sampling_from_logits(rows.float())


def flashinfer_sampling_probs(device: torch.device) -> Callable[[Tensor], Tensor]:
    """Rows (N, S) -> tokens (N,), by its softmax and its inverse of the distribution function."""
    module = load("FlashInfer", "flashinfer.sampling", device)
    return lambda rows: module.sampling_from_probs(module.softmax(rows.float()))


def trl_chunked_divergence(device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Student's hidden rows (N, H), teacher's (N, H), one head (S, H) -> KL(teacher || student) of each row (N,)."""
    function = load("TRL", "trl.kernels.chunked_divergence", device).ChunkedDivergenceFunction
    return lambda student, teacher, head: function.apply(student, head, None, teacher, head, None, 0.0)[0]
