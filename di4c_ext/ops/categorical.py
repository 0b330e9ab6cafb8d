"""Drawing classes from rows of logits: `sample_categorical` and the absorbing step.

Draws are pure functions of (key of the sample, position, number of the draw, stream): a batch of 64 draws what 64
batches of 1 draw, and the same key gives the same token on every device and backend, up to a draw that falls
within rounding of a boundary. The scheme is that of csrc/include/di4c/masses.h.
"""

from __future__ import annotations

import torch
from torch import Tensor

import di4c_ext.ops.categorical_op  # noqa: F401  (registers di4c::sample)
from di4c_ext.ops import checks
from di4c_ext.ops.hidden import CHUNK_BYTES, absorbing_step_from_hidden, sample_categorical_from_hidden
from di4c_ext.ops.logits import Hidden, Logistic, Logits, checked, packed
from di4c_ext.ops.truncation import check_top_p

_NO_HEAD = (None, None, None)  # weight, bias and what is certain, where di4c::sample_hidden is given logits


def sample_categorical(
    logits: Logits,
    keys: Tensor,
    *,
    draws: int | None = None,
    stream: int = 0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    return_log_prob: bool = False,
    first_position: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Tokens drawn from softmax(logits / temperature), row by row, in one read of the logits.

    Args:
        logits: (B, ..., S), float32, bfloat16, float16 or float64, 1 <= S <= 2^18. A row's position is its flat
            index within the sample. Or a Logistic or Hidden of (B, [L,] D, S), whose logits are never held whole.
        keys: (B,) int64, one per sample (`di4c_ext.random.keys`).
        draws: None for one draw per row, or n >= 0 draws per row.
        stream: number in [0, 2^31 - 1) that tells apart the uses of one key.
        temperature: >= 0; 0 takes the largest logit, the smallest index on ties, with log-probability 0.
        top_p: in (0, 1], below 1 the draw is from each row's nucleus (`truncation.nucleus`) alone; rows are sorted for
            it, a few at a time.
        return_log_prob: also return the log-probability of each token drawn.
        first_position: >= 0, the position of the first row: a piece of a sample draws what the whole would there.

    Returns:
        tokens int64, (B, ...) or (B, n, ...) where draws = n; with return_log_prob (tokens, log_prob), log_prob
        float32 of the same shape. A class of probability 0 is never drawn. A row with a NaN or without any class
        above -inf gives token -1 and log_prob NaN; a row with +inf gives its first +inf class and log_prob 0.
        Other rows are not affected. Not differentiable.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected.
    """
    op = "sample_categorical"
    if isinstance(logits, Hidden):
        return sample_categorical_from_hidden(
            logits,
            keys,
            draws=draws,
            stream=stream,
            temperature=temperature,
            top_p=top_p,
            return_log_prob=return_log_prob,
            first_position=first_position,
        )
    number = checks.draws(op, draws)
    checks.count(op, "first_position", first_position)
    checks.stream(op, stream)
    checks.temperature(op, temperature)
    check_top_p(op, top_p)
    if isinstance(logits, Logistic) and top_p < 1:
        logits = checked(op, "logits", logits, (2, 3), "(B, D) or (B, L, D)").logits()
    if isinstance(logits, Logistic):
        x, num_states = packed(checked(op, "logits", logits, (2, 3), "(B, D) or (B, L, D)")), logits.num_states
    else:
        x, num_states = checks.logits(op, "logits", logits, tuple(range(2, 65)), "(B, ..., S)"), None
    batch, middle = x.shape[0], x.shape[1:-1]
    checks.indices(op, "keys", keys, (batch,), "(B,)", x)
    # Not -1: it is ambiguous where the batch is empty.
    flat = (x.unsqueeze(1) if x.dim() == 2 else x.reshape(batch, _product(middle), x.shape[-1])).detach()
    settings = number, stream, float(temperature)
    if top_p < 1:
        tokens, log_prob = torch.ops.di4c.sample_hidden(
            flat, *_NO_HEAD, keys, None, None, -1, *settings, float(top_p), return_log_prob, first_position, CHUNK_BYTES
        )
    else:
        tokens, log_prob = torch.ops.di4c.sample(
            flat, keys, None, None, -1, *settings, return_log_prob, first_position, num_states
        )
    out = (batch, *middle) if draws is None else (batch, draws, *middle)
    return (tokens.view(out), log_prob.view(out)) if return_log_prob else tokens.view(out)


def absorbing_step(
    logits: Tensor | Hidden,
    x_t: Tensor,
    keys: Tensor,
    *,
    unmask_prob: float | Tensor,
    mask_id: int,
    draws: int | None = None,
    stream: int = 0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    return_log_prob: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """One step of the absorbing process: each masked position is unmasked with some probability, by its own logits.

    For every position equal to mask_id a coin is thrown first, and only if it falls below unmask_prob a token is
    drawn from softmax(logits / temperature) without class mask_id. The coin does not depend on the logits. Rows
    that keep their value are not read.

    Args:
        logits: (B, D, S); class mask_id, if < S, is never drawn whatever its logit. Of a Hidden only the rows are made
            that are drawn from.
        x_t: (B, D) int64.
        keys: (B,) int64.
        unmask_prob: in [0, 1], a number or one per sample (B,); the process's (alpha_s - alpha_t) / (1 - alpha_t).
        mask_id: >= 0, the state that means "masked".
        draws, stream, temperature, top_p, return_log_prob: as for `sample_categorical`; every draw throws its own
            coins, and a nucleus is that of the classes which may be drawn.

    Returns:
        x_s int64, (B, D) or (B, n, D) where draws = n; with return_log_prob (x_s, log_prob), log_prob 0 wherever
        nothing was drawn. A row to be drawn that holds a NaN or no class above -inf gives -1 and NaN.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected. The values of a tensor
        unmask_prob are checked on the CPU only.
    """
    op = "absorbing_step"
    x: Tensor | Hidden = logits
    if not isinstance(logits, Hidden):
        x = checks.logits(op, "logits", logits, (3,), "(B, D, S)").detach()
    batch, length, _ = x.shape
    checks.indices(op, "x_t", x_t, (batch, length), "(B, D)", x)
    checks.indices(op, "keys", keys, (batch,), "(B,)", x)
    checks.count(op, "mask_id", mask_id)
    number = checks.draws(op, draws)
    checks.stream(op, stream)
    checks.temperature(op, temperature)
    check_top_p(op, top_p)
    coins = _probabilities(op, unmask_prob, x)
    settings = number, stream, float(temperature)
    if isinstance(x, Hidden):
        tokens, log_prob = absorbing_step_from_hidden(
            x,
            x_t,
            keys,
            coins,
            mask_id=mask_id,
            draws=number,
            stream=stream,
            temperature=temperature,
            top_p=top_p,
            return_log_prob=return_log_prob,
        )
    elif top_p < 1:
        tokens, log_prob = torch.ops.di4c.sample_hidden(
            x, *_NO_HEAD, keys, x_t, coins, mask_id, *settings, float(top_p), return_log_prob, 0, CHUNK_BYTES
        )
    else:
        tokens, log_prob = torch.ops.di4c.sample(x, keys, x_t, coins, mask_id, *settings, return_log_prob)
    if draws is None:
        tokens, log_prob = tokens.view(batch, length), log_prob.view(batch, length) if return_log_prob else log_prob
    return (tokens, log_prob) if return_log_prob else tokens


def _product(sizes: torch.Size) -> int:
    product = 1
    for size in sizes:
        product = product * size
    return product


def _probabilities(op: str, value: float | Tensor, x: Tensor | Hidden) -> Tensor:
    """unmask_prob as (B,) float64 on the logits' device."""
    if isinstance(value, bool) or not isinstance(value, Tensor | int | float):
        raise TypeError(f"{op}: unmask_prob must be a number in [0, 1] or a tensor (B,) of them, got {value!r}")
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
