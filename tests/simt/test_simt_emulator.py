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
        ("peer_not_started", "before that CTA had started"),
        ("missing_cluster_barrier", "values depends on the order of the threads"),
        ("peer_has_left", "use-after-poison"),
        ("divergent_cluster_barrier", "at a cluster barrier"),
        ("write_beyond_cta_memory", "heap-buffer-overflow"),
        ("write_beyond_a_peers_memory", "heap-buffer-overflow"),
        ("static_memory_in_a_cluster", "CTAs that run together need shared memory by SIMT_SHARED"),
        ("cluster_that_does_not_fit", "invalid configuration"),
        ("ticket_before_its_sum", "values depends on the order of the threads"),
        ("ticket_not_reset", "values depends on the order of the threads"),
        ("write_beyond_dynamic_memory", "heap-buffer-overflow"),
        ("too_much_dynamic_memory", "invalid configuration"),
    ],
)
def test_a_broken_kernel_is_caught(kernel: str, message: str) -> None:
    with pytest.raises(emulate.KernelFault, match=message):
        emulate.run(kernel, {}, VALUES, device=0, capability=90, orders=range(8))


def test_clusters_that_are_right() -> None:
    values = emulate.run("right_cluster", {}, VALUES, device=0, capability=90, orders=range(8))["values"]
    assert values.tolist() == [1] * 64  # the peer's number, and in the peer its peer's


def test_a_cluster_needs_a_device_that_has_them() -> None:
    with pytest.raises(emulate.KernelFault, match="invalid configuration"):
        emulate.run("right_cluster", {}, VALUES, device=0, capability=89)


def test_tickets_that_are_right() -> None:
    values = emulate.run("right_ticket", {}, VALUES, device=0, orders=range(8))["values"]
    assert values.tolist() == [1 + 2 + 3 + 4] * 64


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


@pytest.mark.parametrize(("way", "cluster", "grid"), [("turns", 1, 6), ("cluster", 8, 48), ("ticket", 1, 48)])
def test_a_plan_says_what_would_be_launched(way: str, cluster: int, grid: int) -> None:
    capability, has_workspace = emulate.WAYS[way]
    numbers = {"B": 2, "D": 3, "S": 1 << 18, "draws": 1, "mask_id": -1, "stream": 0, "temperature": 1.0}
    numbers |= {"logits_dtype": 1, "logits_stride_b": 3 << 18, "logits_stride_l": 0, "logits_stride_d": 1 << 18}
    arrays = ["logits", "keys", "tokens", *(["split"] if has_workspace else [])]
    (launch,) = emulate.plan("sample", numbers, arrays, capability=capability, small=True)
    assert (launch.name, launch.cluster, launch.grid, launch.block) == ("sample", cluster, (grid, 1, 1), (256, 1, 1))
    assert "sample_long_kernel" in launch.kernel and launch.bytes == 6 * ((2 << 18) + 8)
