"""What the objective and the samplers ask of a process."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from di4c_ext.ops import Logits

AnyLogits = TypeVar("AnyLogits", bound=Logits)
Time = float | Tensor  # one for all samples, or (B,); 1 = noise, 0 = data


class Process(Protocol):
    num_states: int

    def prior(self, shape: Sequence[int], keys: Tensor) -> Tensor:
        """x_1 (B, D)."""

    def corrupt(self, x_0: Tensor, t: Time, keys: Tensor, *, stream: int = 0) -> Tensor:
        """x_t ~ q(x_t | x_0), (B, D)."""

    def step(
        self,
        x_t: Tensor,
        logits: Logits,
        t: Time,
        s: Time,
        keys: Tensor,
        *,
        draws: int | None = None,
        temperature: float = 1.0,
        stream: int = 0,
    ) -> Tensor:
        """x_s ~ p(x_s | x_t), (B, D) or (B, draws, D), for the product denoiser with these logits (B, D, S)."""

    def weight(self, x_t: Tensor) -> Tensor:
        """(B, D) float32: 0 where x_t already tells x_0, 1 elsewhere. The losses count only the latter."""

    def carry_over(self, logits: Logits, x: Tensor) -> Logits:
        """Logits (..., D, S) of x_0 in which what x (..., D) already tells is certain."""
