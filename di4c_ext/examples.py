"""What data sets of tokens have in common, whatever the tokens stand for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from di4c_ext.lazy_rows import Rows


class Examples(Dataset[dict[str, Tensor]]):
    """N examples of D tokens: tokens (N, D) integers, example (N,) int64, the number that an example keeps for good."""

    tokens: Rows
    example: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x_0": self.tokens[index].long(), "example": self.example[index]}

    def __getitems__(self, index: Sequence[int]) -> dict[str, Tensor]:
        """A whole batch in two gathers; the data loader calls this instead of one `__getitem__` an example."""
        rows = torch.as_tensor(index, dtype=torch.int64)
        return {"x_0": self.tokens[rows].long(), "example": self.example[rows]}

    @property
    def length(self) -> int:
        """D, tokens of an example."""
        return self.tokens.shape[1]
