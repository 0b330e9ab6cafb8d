"""Select and reveal: `reveal`, the step of samplers that unmask the positions they are surest of."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from di4c_ext.ops import checks, native, reference
from di4c_ext.ops.library import register

_OP = "reveal"


def reveal(
    x_t: Tensor,
    tokens: Tensor,
    log_prob: Tensor,
    keys: Tensor,
    *,
    count: int | Tensor,
    mask_id: int,
    noise: float | Tensor = 0.0,
    stream: int = 0,
) -> Tensor:
    """x_s: of the masked positions of x_t, the `count` of highest confidence take their tokens; all else stays.

    confidence = log_prob + noise * g with independent Gumbel numbers g. At noise 1 that draws positions one after the
    other without replacement, in proportion to the probabilities of their tokens; at 0 it takes the largest.

    Args:
        x_t: (B, D) int64.
        tokens: (B, D) or (B, n, D) int64, a token for every masked position (what `absorbing_step` draws with
            unmask_prob 1); those elsewhere are not looked at.
        log_prob: float32 of the shape of tokens, their log-probabilities.
        keys: (B,) int64, one per sample (`di4c_ext.random.keys`).
        count: how many a sample reveals, a number or (B,) int64; fewer than 0 counts as none, more than there are as
            all. Each of the n draws reveals so many.
        mask_id: >= 0, the state that means "masked".
        noise: a number, or (B,) one per sample. Below 0 it acts like its opposite with mirrored Gumbel numbers.
        stream: number in [0, 2^31 - 1). The Gumbel numbers take the stream's coins, so that tokens which
            `sample_categorical` draws by the same keys on the same stream are independent of them.

    Returns:
        int64 of the shape of tokens. Of equal confidences the lower position comes first. A masked position whose
        token is negative, or whose confidence is NaN, becomes -1 and counts for nothing: rows without a distribution
        touch no other. The same arguments give the same positions on every device and backend, to the last one.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected.
    """
    checks.count(_OP, "mask_id", mask_id)
    checks.stream(_OP, stream)
    if not isinstance(tokens, Tensor) or tokens.dim() not in (2, 3):
        kind = f"shape {checks.shape(tokens)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"{_OP}: tokens must be an int64 tensor (B, D) or (B, n, D), got {kind}")
    for name, value in (("x_t", x_t), ("log_prob", log_prob), ("keys", keys), ("count", count), ("noise", noise)):
        if isinstance(value, Tensor) and value.device != tokens.device:
            raise ValueError(f"{_OP}: {name} must be on {tokens.device} like the tokens, got {value.device}")
    batch, length = tokens.shape[0], tokens.shape[-1]
    checks.indices(_OP, "tokens", tokens, checks.shape(tokens), "(B, D) or (B, n, D)", tokens)
    checks.indices(_OP, "x_t", x_t, (batch, length), "(B, D)", tokens)
    checks.indices(_OP, "keys", keys, (batch,), "(B,)", tokens)
    if not isinstance(log_prob, Tensor) or log_prob.dtype != torch.float32:
        kind = str(log_prob.dtype) if isinstance(log_prob, Tensor) else type(log_prob).__name__
        raise TypeError(f"{_OP}: log_prob must be a float32 tensor like the tokens, got {kind}")
    if log_prob.shape != tokens.shape:
        raise ValueError(
            f"{_OP}: log_prob must have the tokens' shape {checks.shape(tokens)}, got {checks.shape(log_prob)}"
        )
    x_s: Tensor = torch.ops.di4c.reveal(
        x_t,
        tokens if tokens.dim() == 3 else tokens[:, None],
        log_prob.detach() if tokens.dim() == 3 else log_prob.detach()[:, None],
        _counts(count, tokens),
        _noise(noise, tokens),
        keys,
        mask_id,
        stream,
    )
    return x_s.view(tokens.shape)


def _counts(value: object, tokens: Tensor) -> Tensor:
    """count as (B,) int64."""
    if isinstance(value, Tensor):
        return checks.indices(_OP, "count", value, (tokens.shape[0],), "(B,)", tokens)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{_OP}: count must be an integer or an int64 tensor (B,), got {value!r}")
    return torch.full((tokens.shape[0],), value, dtype=torch.int64, device=tokens.device)


def _noise(value: object, tokens: Tensor) -> Tensor:
    """noise as (B,) float32."""
    if isinstance(value, bool) or not isinstance(value, Tensor | int | float):
        raise TypeError(f"{_OP}: noise must be a number or a floating tensor (B,), got {value!r}")
    if not isinstance(value, Tensor):
        if not math.isfinite(value):
            raise ValueError(f"{_OP}: noise must be finite, got {value!r}")
        return torch.full((tokens.shape[0],), float(value), device=tokens.device)
    if checks.shape(value) != (tokens.shape[0],) or not value.is_floating_point():
        raise ValueError(
            f"{_OP}: noise must be a number or a floating tensor (B,) = ({tokens.shape[0]},), "
            f"got {value.dtype} of shape {checks.shape(value)}"
        )
    return value.detach().float()


def _reveal(
    x_t: Tensor,
    tokens: Tensor,
    log_prob: Tensor,
    count: Tensor,
    noise: Tensor,
    keys: Tensor,
    mask_id: int,
    stream: int,
) -> Tensor:
    run = native.kernels(tokens)
    if run is None:
        return reference.reveal(x_t, tokens, log_prob, count, noise, keys, mask_id, stream)
    x_s = _reveal_fake(x_t, tokens, log_prob, count, noise, keys, mask_id, stream)
    run(
        "reveal",
        x_t=native.dense(x_t),
        tokens=native.dense(tokens),
        log_prob=native.dense(log_prob),
        count=native.dense(count),
        noise=native.dense(noise),
        keys=native.dense(keys),
        x_s=x_s,
        mask_id=mask_id,
        B=tokens.shape[0],
        D=tokens.shape[2],
        draws=tokens.shape[1],
        stream=stream,
    )
    return x_s


def _reveal_fake(
    x_t: Tensor,
    tokens: Tensor,
    log_prob: Tensor,
    count: Tensor,
    noise: Tensor,
    keys: Tensor,
    mask_id: int,
    stream: int,
) -> Tensor:
    return tokens.new_empty(tokens.shape)


register(
    "reveal(Tensor x_t, Tensor tokens, Tensor log_prob, Tensor count, Tensor noise, Tensor keys, int mask_id, "
    "int stream) -> Tensor",
    _reveal,
    _reveal_fake,
)
