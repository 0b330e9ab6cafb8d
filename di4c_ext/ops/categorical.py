"""Drawing classes from rows of logits: `sample_categorical` and the absorbing step.

Draws are pure functions of (key of the sample, position, number of the draw, stream): a batch of 64 draws what 64
batches of 1 draw, and the same key gives the same token on every device and backend, up to a draw that falls
within rounding of a boundary. The scheme is that of csrc/include/di4c/masses.h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from di4c_ext.ops import checks, native, reference
from di4c_ext.ops.library import register


def sample_categorical(
    logits: Tensor,
    keys: Tensor,
    *,
    draws: int | None = None,
    stream: int = 0,
    temperature: float = 1.0,
    return_log_prob: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Tokens drawn from softmax(logits / temperature), row by row, in one read of the logits.

    Args:
        logits: (B, ..., S), float32, bfloat16, float16 or float64, 1 <= S <= 2^18. A row's position is its flat
            index within the sample.
        keys: (B,) int64, one per sample (`di4c_ext.random.keys`).
        draws: None for one draw per row, or n >= 0 draws per row.
        stream: number in [0, 2^31 - 1) that tells apart the uses of one key.
        temperature: >= 0; 0 takes the largest logit, the smallest index on ties, with log-probability 0.
        return_log_prob: also return the log-probability of each token drawn.

    Returns:
        tokens int64, (B, ...) or (B, n, ...) where draws = n; with return_log_prob (tokens, log_prob), log_prob
        float32 of the same shape. A class of probability 0 is never drawn. A row with a NaN or without any class
        above -inf gives token -1 and log_prob NaN; a row with +inf gives its first +inf class and log_prob 0.
        Other rows are not affected. Not differentiable.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected.
    """
    op = "sample_categorical"
    x = checks.logits(op, "logits", logits, tuple(range(2, 65)), "(B, ..., S)").detach()
    batch, middle = x.shape[0], x.shape[1:-1]
    checks.indices(op, "keys", keys, (batch,), "(B,)", x)
    checks.count(op, "draws", draws)
    checks.stream(op, stream)
    checks.temperature(op, temperature)
    # Not -1: it is ambiguous where the batch is empty.
    flat = x.unsqueeze(1) if x.dim() == 2 else x.reshape(batch, _product(middle), x.shape[-1])
    tokens, log_prob = torch.ops.di4c.sample(
        flat, keys, None, None, -1, 1 if draws is None else draws, stream, float(temperature), return_log_prob
    )
    out = (batch, *middle) if draws is None else (batch, draws, *middle)
    return (tokens.view(out), log_prob.view(out)) if return_log_prob else tokens.view(out)


def absorbing_step(
    logits: Tensor,
    x_t: Tensor,
    keys: Tensor,
    *,
    unmask_prob: float | Tensor,
    mask_id: int,
    draws: int | None = None,
    stream: int = 0,
    temperature: float = 1.0,
    return_log_prob: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """One step of the absorbing process: each masked position is unmasked with some probability, by its own logits.

    For every position equal to mask_id a coin is thrown first, and only if it falls below unmask_prob a token is
    drawn from softmax(logits / temperature) without class mask_id. The coin does not depend on the logits. Rows
    that keep their value are not read.

    Args:
        logits: (B, D, S); class mask_id, if < S, is never drawn whatever its logit.
        x_t: (B, D) int64.
        keys: (B,) int64.
        unmask_prob: in [0, 1], a number or one per sample (B,); the process's (alpha_s - alpha_t) / (1 - alpha_t).
        mask_id: >= 0, the state that means "masked".
        draws, stream, temperature, return_log_prob: as for `sample_categorical`; every draw throws its own coins.

    Returns:
        x_s int64, (B, D) or (B, n, D) where draws = n; with return_log_prob (x_s, log_prob), log_prob 0 wherever
        nothing was drawn. A row to be drawn that holds a NaN or no class above -inf gives -1 and NaN.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected. The values of a tensor
        unmask_prob are checked on the CPU only.
    """
    op = "absorbing_step"
    x = checks.logits(op, "logits", logits, (3,), "(B, D, S)").detach()
    batch, length, _ = x.shape
    checks.indices(op, "x_t", x_t, (batch, length), "(B, D)", x)
    checks.indices(op, "keys", keys, (batch,), "(B,)", x)
    checks.count(op, "mask_id", mask_id)
    checks.count(op, "draws", draws)
    checks.stream(op, stream)
    checks.temperature(op, temperature)
    coins = _probabilities(op, unmask_prob, x)
    tokens, log_prob = torch.ops.di4c.sample(
        x, keys, x_t, coins, mask_id, 1 if draws is None else draws, stream, float(temperature), return_log_prob
    )
    if draws is None:
        tokens, log_prob = tokens.view(batch, length), log_prob.view(batch, length) if return_log_prob else log_prob
    return (tokens, log_prob) if return_log_prob else tokens


def _product(sizes: torch.Size) -> int:
    product = 1
    for size in sizes:
        product = product * size
    return product


def _probabilities(op: str, value: float | Tensor, x: Tensor) -> Tensor:
    """unmask_prob as (B,) float64 on the logits' device."""
    if not isinstance(value, Tensor):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{op}: unmask_prob must lie in [0, 1], got {value!r}")
        return torch.full((x.shape[0],), float(value), dtype=torch.float64, device=x.device)
    if checks.shape(value) != (x.shape[0],) or not value.is_floating_point():
        raise ValueError(
            f"{op}: unmask_prob must be a number or a floating tensor (B,) = ({x.shape[0]},), "
            f"got {value.dtype} of shape {checks.shape(value)}"
        )
    checks.same_device(op, "unmask_prob", value, x)
    return value.detach().to(torch.float64).contiguous()


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
) -> tuple[Tensor, Tensor]:
    if unmask_prob is not None and unmask_prob.device.type == "cpu":
        outside = ~((unmask_prob >= 0) & (unmask_prob <= 1))
        if bool(outside.any()):
            worst = unmask_prob[outside][0].item()
            raise ValueError(f"absorbing_step: unmask_prob must lie in [0, 1] everywhere, got {worst}")
    run = native.kernels(logits)
    if run is None:
        tokens, log_prob = reference.sample(logits, keys, x_t, unmask_prob, mask_id, draws, stream, temperature)
        return tokens, log_prob if with_log_prob else log_prob.new_empty(0)
    tokens, log_prob = _sample_fake(logits, keys, x_t, unmask_prob, mask_id, draws, stream, temperature, with_log_prob)
    x = native.rows(logits)
    run(
        "sample",
        **native.describe("logits", x),
        keys=native.dense(keys),
        x_t=native.dense(x_t),
        unmask_prob=native.dense(unmask_prob),
        mask_id=mask_id,
        tokens=tokens,
        log_prob=log_prob if with_log_prob else None,
        B=x.shape[0],
        D=x.shape[1],
        S=x.shape[2],
        draws=draws,
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
) -> tuple[Tensor, Tensor]:
    out = (logits.shape[0], draws, logits.shape[1])
    log_prob = logits.new_empty(out if with_log_prob else (0,), dtype=torch.float32)
    return logits.new_empty(out, dtype=torch.int64), log_prob


register(
    "sample(Tensor logits, Tensor keys, Tensor? x_t, Tensor? unmask_prob, int mask_id, SymInt draws, int stream, "
    "float temperature, bool with_log_prob) -> (Tensor, Tensor)",
    _sample,
    _sample_fake,
)
