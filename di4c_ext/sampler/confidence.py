"""MaskGIT's sampler of masked codes: step by step the positions that it is surest of, so many as a schedule says.

At step i of T the sampler is at progress r = i / T, t = 1 - r. Of n positions that begin masked,

    N_i = round(n m(r_i)) are masked before step i,   c_i = max(N_i - N_{i+1}, 1) are revealed, the last step the rest,

m being a schedule of `process.schedules`, or "root", m(r) = 1 - sqrt(r). With n = D these are the published counts. The
ramp rho_i = i / (T - 1) takes the Gumbel noise down to nothing at the last step and guidance up to its full weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from di4c_ext import ops
from di4c_ext.denoiser import Denoiser, inference
from di4c_ext.ops import Logits
from di4c_ext.process import Process, rows
from di4c_ext.process.schedules import LOST
from di4c_ext.sampler.common import LATENTS, STEP, Callback, LatentSource, ask, evaluation_keys
from di4c_ext.sampler.guidance import LOGITS_BYTES, GuidedLogits, in_pieces

Randomize = Literal["linear", "warm_up", "random", "none"]
States: TypeAlias = Process | tuple[int, int]  # or (num_states, mask_id)

_OP = "sample_confidence"
_WARM_UP = 2  # steps in random order
SCHEDULES = (*LOST, "root")


def reveal_counts(open_positions: Tensor | int, num_steps: int, schedule: str = "arccos") -> Tensor:
    """c (..., T) int64, how many positions each of T steps reveals where so many (...) begin masked.

    They add up to what is masked. Where there are fewer positions than steps, the last steps reveal none.
    """
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"reveal_counts: num_steps must be an integer of at least 1, got {num_steps!r}")
    if schedule not in SCHEDULES:
        raise ValueError(f"reveal_counts: unknown schedule {schedule!r}; known are {', '.join(SCHEDULES)}")
    r = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    rates = 1 - r.sqrt() if schedule == "root" else LOST[schedule][0](1 - r)
    number = open_positions if isinstance(open_positions, Tensor) else torch.tensor(open_positions)
    # By numbers, not a tensor of rates: none has to be sent to the device.
    left = torch.stack([(number.double() * rate).round() for rate in rates.tolist()[:-1]], -1).long()
    revealed = (left[..., :-1] - left[..., 1:]).clamp(min=1).cumsum(-1).clamp(max=number[..., None])
    ends = torch.cat([torch.zeros_like(number)[..., None], revealed, number[..., None]], -1)
    return ends.diff(dim=-1)


def sample_confidence(
    denoiser: Denoiser,
    process: States,
    x: Tensor,
    num_steps: int,
    keys: Tensor,
    *,
    schedule: str | Sequence[int] | None = None,
    latents: LatentSource = None,
    unconditional: Denoiser | None = None,
    guidance: float = 0.0,
    hybrid: bool = False,
    randomize: Randomize = "linear",
    gumbel: float = 4.5,
    temperature: float = 1.0,
    check: bool = True,
    logits_bytes: int = LOGITS_BYTES,
    callback: Callback = None,
) -> Tensor:
    """x_0 (B, D) without masks, by T = num_steps steps of one evaluation each, two where guidance acts.

    process: one with masks, or (num_states, mask_id). x (B, D) int64: masks where codes are to be sampled, and codes
    that are kept as they are (inpainting). Then each sample's own number of masks takes the place of D in the counts,
    so that all T steps have something to do; published counts stay those of D and the last steps idle. x itself is not
    written to.

    schedule: of the counts, by name (`reveal_counts`), by default the process's own, or T counts; the last step reveals
    the rest. latents: None for a teacher; for a student keys (B,) -> (B, C), called at every step with fresh keys, or
    (B, C), the same at every step.

    guidance: w; at ramp rho the logits are (1 + w rho) conditional - w rho unconditional, so the first step has the
    conditional ones alone (it asks for no other) and the last the full weight, as has the only step of T = 1.
    unconditional: the denoiser told of no class; by default it has the step's latents as well, a student's. hybrid:
    it has none, a teacher's.

    randomize: how the order is drawn. "linear": confidence log p + gumbel (1 - rho) g with Gumbel numbers g; "warm_up":
    at random in the first two steps, then the most probable first; "random": always at random; "none": the most
    probable first. temperature divides the logits (a published multiplier is its inverse); 0 takes the likeliest code
    with probability 1, which leaves nothing to order them by. A mask is never drawn: a denoiser's logit for it, inside
    or after the states, has no say.

    keys (B,): a sample depends on its own key alone, whatever the batch. check: look, once and after the last step,
    whether any logits held no distribution; False never waits for the device and leaves -1 there. logits_bytes: for
    guided logits, see `GuidedDenoiser`. callback gets a dict at every step: i, t, s, x_t, logits, tokens (a code for
    every position), count (B,) and x_s; -1 in them where logits held no distribution.

    Raises ValueError and TypeError for arguments that do not fit, and ValueError for logits without a distribution.
    """
    num_states, mask_id = _states(process)
    _check(x, keys, num_states, mask_id)
    for name, value in (("guidance", guidance), ("gumbel", gumbel)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{_OP}: {name} must be a finite number, got {value!r}")
    if guidance and unconditional is None:
        raise ValueError(f"{_OP}: guidance {guidance} wants `unconditional`, the denoiser told of no class, got None")
    if randomize not in get_args(Randomize):
        raise ValueError(f"{_OP}: randomize must be one of {get_args(Randomize)}, got {randomize!r}")
    named = getattr(process, "schedule", "arccos") if schedule is None else schedule
    counts = _counts(named, num_steps, x, mask_id)
    failed = torch.zeros_like(x, dtype=torch.bool)
    with ExitStack() as modes:
        for network in (denoiser, unconditional):
            if network is not None:
                modes.enter_context(inference(network, x.device))
        for i in range(num_steps):
            rho = i / (num_steps - 1) if num_steps > 1 else 1.0
            t, s = 1 - i / num_steps, 1 - (i + 1) / num_steps
            key = evaluation_keys(keys, i)
            conditional = _logits(denoiser, x, t, latents, key[LATENTS], num_states, mask_id)
            logits: Logits | GuidedLogits = conditional
            if guidance * rho:
                assert unconditional is not None
                own = None if hybrid else latents
                without = _logits(unconditional, x, t, own, key[LATENTS], num_states, mask_id)
                logits = GuidedLogits(without, conditional, 1 + guidance * rho)
            at_random = randomize == "random" or (randomize == "warm_up" and i < _WARM_UP)
            noise = 1.0 if at_random else gumbel * (1 - rho) if randomize == "linear" else 0.0
            draw = partial(_reveal, mask_id, temperature, at_random, noise)
            x_s, tokens = in_pieces(draw, logits, logits_bytes, key[STEP], x, counts[:, i].contiguous())
            if callback is not None:
                seen = {"logits": logits, "tokens": tokens, "count": counts[:, i]}
                callback({"i": i, "t": t, "s": s, "x_t": x, "x_s": x_s, **seen})
            # A failed draw is given any code, that the network may go on with the others.
            failed |= x_s < 0
            x = x_s.clamp(min=0)
    x = x.masked_fill(failed, -1)
    if check and bool(failed.any()):
        b, d = failed.nonzero()[0].tolist()
        raise ValueError(
            f"{_OP}: the denoiser's logits hold no distribution (NaN or all -inf), first at sample {b}, position {d}; "
            "look at the weights, or sample in float32"
        )
    return x


def _reveal(
    mask_id: int,
    temperature: float,
    at_random: bool,
    noise: float,
    logits: Logits,
    key: Tensor,
    x: Tensor,
    count: Tensor,
) -> tuple[Tensor, Tensor]:
    """x_s and the tokens it was chosen from."""
    drawn = ops.absorbing_step(
        rows.whole(logits), x, key, unmask_prob=1.0, mask_id=mask_id, temperature=temperature, return_log_prob=True
    )
    tokens, log_prob = drawn
    confidence = log_prob * 0.0 if at_random else log_prob  # NaN stays
    return ops.reveal(x, tokens, confidence, key, count=count, mask_id=mask_id, noise=noise), tokens


def _logits(
    denoiser: Denoiser, x: Tensor, t: float, latents: LatentSource, key: Tensor, num_states: int, mask_id: int
) -> Logits:
    logits: Logits = ask(denoiser, x, t, latents, key)
    expected, shape = (*x.shape, num_states), tuple(logits.shape)
    if shape != expected and not (mask_id == num_states and shape == (*x.shape, num_states + 1)):
        raise ValueError(
            f"{_OP}: the denoiser must give logits (B, D, S) = {expected}, got {shape}; latents must be (B, C), "
            "one a sample"
        )
    return logits if shape == expected else rows.whole(logits)[..., :num_states]


def _states(process: States) -> tuple[int, int]:
    """S and mask_id."""
    given = process if isinstance(process, tuple) else (process.num_states, getattr(process, "mask_id", None))
    num_states, mask_id = given
    if mask_id is None:
        raise ValueError(f"{_OP}: process must have masks to reveal, got {process!r}; see sample_analytic")
    if num_states < 1 or not 0 <= mask_id <= num_states:
        raise ValueError(f"{_OP}: process must be (num_states, mask_id) with mask_id in 0..num_states, got {process!r}")
    return num_states, mask_id


def _check(x: Tensor, keys: Tensor, num_states: int, mask_id: int) -> None:
    if x.ndim != 2 or x.dtype != torch.int64:
        raise ValueError(f"{_OP}: x must be int64 (B, D), got {x.dtype} {tuple(x.shape)}; see process.prior")
    if keys.shape != x.shape[:1]:
        raise ValueError(f"{_OP}: keys must be ({x.shape[0]},), one a sample of x, got {tuple(keys.shape)}")
    if x.device.type == "cpu" and x.numel():
        least, most = (int(v) for v in x.aminmax())
        if least < 0 or most > max(num_states - 1, mask_id):
            raise ValueError(
                f"{_OP}: x must hold codes 0..{num_states - 1} and the mask {mask_id}, "
                f"got {least if least < 0 else most}"
            )


def _counts(schedule: str | Sequence[int], num_steps: int, x: Tensor, mask_id: int) -> Tensor:
    """(B, T) on the device of x."""
    masked = (x == mask_id).sum(1)
    if isinstance(schedule, str):
        try:
            return reveal_counts(masked, num_steps, schedule)
        except ValueError as error:
            raise ValueError(f"{_OP}: {error}") from error
    given = list(schedule)
    if len(given) != num_steps or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in given):
        raise ValueError(f"{_OP}: schedule must be a name or num_steps = {num_steps} counts >= 0, got {schedule!r}")
    return torch.stack([*(torch.full_like(masked, n) for n in given[:-1]), masked], -1)
