"""The emulator sees what it is there to see: a test of the test."""

from __future__ import annotations

import emulate
import pytest
import torch

VALUES = {"values": ((64,), torch.int32)}


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("divergent_barrier", "divergent barrier.*not all threads reach it"),
        ("barriers_at_two_places", "divergent barrier"),
        ("divergent_shuffle", "not all threads reach it"),
        ("write_beyond_the_end", "AddressSanitizer"),
        ("read_before_the_start", "AddressSanitizer"),
        ("write_beyond_shared", "global-buffer-overflow|insufficient space"),
        ("misaligned_vector", "misaligned address"),
        ("missing_barrier", "values depends on the order of the threads"),
    ],
)
def test_a_broken_kernel_is_caught(kernel: str, message: str) -> None:
    with pytest.raises(emulate.KernelFault, match=message):
        emulate.run(kernel, {}, VALUES, device=0)


def test_the_missing_barrier_goes_unseen_in_one_order() -> None:
    """Why several orders are run: by index, this broken kernel gives the right answer."""
    result = emulate.run("missing_barrier", {}, VALUES, orders=(0,), device=0)
    assert result["values"].tolist() == list(range(-1, 63))


def test_an_error_names_kernel_shape_and_remedy() -> None:
    keys = torch.zeros(3, dtype=torch.int64)
    inputs = {"keys": keys, "B": 3, "N": 5, "stream": 0}
    with pytest.raises(emulate.KernelFault) as fault:
        emulate.run("random_bits", inputs, {"out": ((3, 5, 2), torch.int64)}, launch_error=209)
    for part in ("random_bits", "(3, 1, 5, 1)", "no kernel image", "sm_75", "800, 900", "DI4C_CUDA_ARCHS=75"):
        assert part in str(fault.value)


def test_no_such_device() -> None:
    inputs = {"keys": torch.zeros(1, dtype=torch.int64), "B": 1, "N": 1, "stream": 0}
    with pytest.raises(emulate.KernelFault, match="cannot use cuda:5: invalid device ordinal"):
        emulate.run("random_bits", inputs, {"out": ((1, 1, 2), torch.int64)}, device=5)
