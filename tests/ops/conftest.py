"""One thread for these small tensors; `test_threads_change_no_bit` and its kin take more."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread(_threads_restored: None) -> None:
    torch.set_num_threads(1)
