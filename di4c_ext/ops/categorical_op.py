"""The registered operator di4c::sample: who serves it, its kernel call, its FakeTensor rule.

logits (B, D, S), or with logistic_states = S the pairs (B, D, 2) of a Logistic; everything else as in
reference/sampling.py. Arguments are checked by ops/categorical.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from di4c_ext.ops import native, reference
from di4c_ext.ops.library import register
from di4c_ext.ops.reference.objective import unpacked
from di4c_ext.ops.reference.sampling import CHUNK


def _sample(
    logits: Tensor,
    keys: Tensor,
    x_t: Tensor | None,
    unmask_prob: Tensor | None,
    mask_id: int,
    draws: int,
    stream: int,
    temperature: float,
    with_log_prob: bool,
    first: int = 0,
    logistic_states: int | None = None,
) -> tuple[Tensor, Tensor]:
    check_probabilities(unmask_prob)
    run = native.kernels(logits)
    if run is None:
        x = logits if logistic_states is None else unpacked(logits, logistic_states)
        tokens, log_prob = reference.sample(x, keys, x_t, unmask_prob, mask_id, draws, stream, temperature, first)
        return tokens, log_prob if with_log_prob else log_prob.new_empty(0)
    return draw(
        run, logits, keys, x_t, unmask_prob, mask_id, draws, stream, temperature, with_log_prob, first, logistic_states
    )


def check_probabilities(unmask_prob: Tensor | None) -> None:
    """Looked at on the CPU only."""
    if unmask_prob is None or unmask_prob.device.type != "cpu":
        return
    outside = ~((unmask_prob >= 0) & (unmask_prob <= 1))
    if bool(outside.any()):
        worst = unmask_prob[outside][0].item()
        raise ValueError(f"absorbing_step: unmask_prob must lie in [0, 1] everywhere, got {worst}")


def draw(
    run: native.Kernels,
    logits: Tensor,
    keys: Tensor,
    x_t: Tensor | None,
    unmask_prob: Tensor | None,
    mask_id: int,
    draws: int,
    stream: int,
    temperature: float,
    with_log_prob: bool,
    first: int = 0,
    logistic_states: int | None = None,
) -> tuple[Tensor, Tensor]:
    """di4c::sample by these kernels, for arguments already checked."""
    tokens, log_prob = _sample_fake(logits, keys, x_t, unmask_prob, mask_id, draws, stream, temperature, with_log_prob)
    x = native.rows(logits)
    states = x.shape[2] if logistic_states is None else logistic_states
    run(
        "sample",
        **native.describe("logits", x, logistic_states is not None),
        **native.split_workspace(x, x.shape[0] * x.shape[1], states, 2 * -(-states // CHUNK)),
        keys=native.dense(keys),
        x_t=native.dense(x_t),
        unmask_prob=native.dense(unmask_prob),
        mask_id=mask_id,
        tokens=tokens,
        log_prob=log_prob if with_log_prob else None,
        B=x.shape[0],
        D=x.shape[1],
        S=states,
        draws=draws,
        first=first,
        stream=stream,
        temperature=temperature,
    )
    return tokens, log_prob


def _sample_fake(
    logits: Tensor,
    keys: Tensor,
    x_t: Tensor | None,
    unmask_prob: Tensor | None,
    mask_id: int,
    draws: int,
    stream: int,
    temperature: float,
    with_log_prob: bool,
    first: int = 0,
    logistic_states: int | None = None,
) -> tuple[Tensor, Tensor]:
    out = (logits.shape[0], draws, logits.shape[1])
    log_prob = logits.new_empty(out if with_log_prob else (0,), dtype=torch.float32)
    return logits.new_empty(out, dtype=torch.int64), log_prob


register(
    "sample(Tensor logits, Tensor keys, Tensor? x_t, Tensor? unmask_prob, int mask_id, SymInt draws, int stream, "
    "float temperature, bool with_log_prob, SymInt first=0, int? logistic_states=None) -> (Tensor, Tensor)",
    _sample,
    _sample_fake,
)
