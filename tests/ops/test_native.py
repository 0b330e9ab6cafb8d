"""Which implementation serves, what is said when it is not the expected one, and that it can be chosen."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch

from di4c_ext import ops, random
from di4c_ext.ops import native


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # The path is handed on so that the child imports the same package, from wherever it runs.
    given = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=given, timeout=120)


def test_off_is_looked_at_on_every_call(kernels, monkeypatch):
    assert native.available(kernels.name) and native.info()["native"]
    x = torch.zeros(1, 1, 3, device=kernels.device)
    assert native.kernels(x) is not None
    monkeypatch.setenv("DI4C_NATIVE", "off")
    assert not native.available(kernels.name) and native.kernels(x) is None
    assert native.info()["native"] is False and native.info()["reason"] == "DI4C_NATIVE=off"


def test_who_serves_what(kernels):
    for dtype, served in (*((d, True) for d in native.DTYPES), (torch.float64, False)):
        assert (native.kernels(torch.zeros(1, device=kernels.device, dtype=dtype)) is not None) == served
    assert native.kernels(torch.zeros(1, device="meta")) is None
    x, wide = torch.zeros(1, device=kernels.device), torch.zeros(1, device=kernels.device, dtype=torch.float64)
    assert native.kernels(x, None, x) is not None and native.kernels(x, None, wide) is None
    with pytest.raises(ValueError, match="available: kind must be 'cpu' or 'cuda', got 'gpu'"):
        native.available("gpu")


def test_info(kernels):
    info = native.info()
    assert {"native", "reason", "path", "isa_built", "isa_active", "cuda", "cuda_archs", "compiler"} <= info.keys()
    assert info["isa_active"] in info["isa_built"]
    assert info["cuda"] or info["cuda_reason"]


def test_only_contiguous_classes_are_taken_as_they_are():
    x = torch.zeros(4, 5, 6)
    assert native.rows(x) is x and native.rows(x[:, ::2]).data_ptr() == x.data_ptr()
    assert native.rows(x.mT).is_contiguous() and native.rows(x.mT[..., :1]).data_ptr() == x.data_ptr()
    fields = native.describe("y", x[:, ::2])
    assert (fields["y_stride_b"], fields["y_stride_l"], fields["y_stride_d"]) == (30, 0, 12)
    four = native.describe("y", x[:, None].expand(4, 3, 5, 6).to(torch.float16))
    assert (four["y_dtype"], four["y_stride_l"]) == (2, 0 if four["y_stride_b"] == 30 else 30)
    assert native.describe("y", None)["y"] == 0
    pairs = native.describe("y", torch.zeros(4, 3, 5, 2), logistic=True)
    assert (pairs["y_dtype"], pairs["y_stride_b"], pairs["y_stride_l"], pairs["y_stride_d"]) == (3, 30, 10, 2)


def test_kernels_of_one_struct_run_in_their_order(kernels, monkeypatch):
    """Each on the same fields: tensors as pointers, None as 0."""
    ran = []

    class Extension:
        class cpu:
            first = staticmethod(lambda **fields: ran.append(("first", fields)))
            second = staticmethod(lambda **fields: ran.append(("second", fields)))

        cuda = cpu

    monkeypatch.setattr(native, "_C", Extension)
    x = torch.zeros(3, device=kernels.device)
    native.Kernels(x.device)("first", "second", x=x, y=None, N=3)
    assert [name for name, _ in ran] == ["first", "second"] and ran[0][1] == ran[1][1]
    assert (ran[0][1]["x"], ran[0][1]["y"], ran[0][1]["N"]) == (x.data_ptr(), 0, 3)


def test_build_without_cuda_says_so_once(monkeypatch):
    """CUDA tensors and no CUDA kernels: one warning with the remedy, then silence."""

    class OnCuda:
        dtype, device = torch.float32, torch.device("cuda:0")

    monkeypatch.setattr(native, "_C", object())
    monkeypatch.setattr(native, "_info", {"cuda": False, "cuda_reason": "nvcc was not found"})
    monkeypatch.setattr(native, "_warned", set())
    monkeypatch.delenv("DI4C_NATIVE", raising=False)
    with pytest.warns(RuntimeWarning, match=r"no CUDA kernels \(nvcc was not found\).*DI4C_CUDA=on"):
        assert native.kernels(OnCuda()) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.kernels(OnCuda()) is None


def test_missing_extension_says_so_once(monkeypatch):
    monkeypatch.setattr(native, "_C", None)
    monkeypatch.setattr(native, "_missing", "there is none")
    monkeypatch.setattr(native, "_warned", set())
    monkeypatch.delenv("DI4C_NATIVE", raising=False)
    x, keys = torch.zeros(1, 2, 3), torch.zeros(1, dtype=torch.int64)
    with pytest.warns(RuntimeWarning, match="kernels are missing, the slow reference ops serve: there is none"):
        ops.sample_categorical(x, keys)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.sample_categorical(x, keys)
    assert native.info() == {"native": False, "reason": "there is none"}
    assert not native.available("cpu")


def test_import_with_native_off():
    """The package works, and says why, where no extension may be loaded."""
    code = (
        "import di4c_ext, torch; from di4c_ext.ops import native; print(native.info());"
        "print(di4c_ext.ops.masked_kl(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)).item())"
    )
    done = _python(code, DI4C_NATIVE="off")
    assert done.returncode == 0, done.stderr
    assert "DI4C_NATIVE=off was set" in done.stdout and "Warning" not in done.stderr


def test_forced_instruction_set_that_does_not_exist(kernels):
    if kernels.name != "cpu":
        pytest.skip("instruction sets are the CPU's")
    code = "import torch, di4c_ext.ops as o; o.masked_kl(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))"
    done = _python(code, DI4C_ISA="mmx")
    assert done.returncode != 0 and "DI4C_ISA=mmx" in done.stderr


def test_import_brings_in_torch_and_numpy_alone():
    heavy = ["transformers", "datasets", "accelerate", "PIL", "matplotlib", "yaml", "sklearn", "scipy", "pandas"]
    done = _python(
        f"import sys, torch; a = set(sys.modules); import di4c_ext; print(set({heavy}) & (set(sys.modules) - a))"
    )
    assert done.returncode == 0 and done.stdout.strip() == "set()", done.stderr + done.stdout


def test_current_stream_is_used(kernels, monkeypatch):
    """Kernels run on the stream that is current where they are called, on the tensor's device."""
    if kernels.name != "cuda":
        pytest.skip("streams are CUDA's")
    x = torch.randn(64, 32, 5000, device="cuda")
    keys = random.keys(0, 64, "cuda")
    expected = ops.sample_categorical(x, keys)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = x * 1.0
        tokens = ops.sample_categorical(y, keys)
    side.synchronize()
    assert torch.equal(tokens, expected)


def test_no_host_sync(kernels):
    if kernels.name != "cuda":
        pytest.skip("syncs are CUDA's")
    from cases import OPS, make

    inputs = make(300).to(kernels.device)
    keys, x_t = random.keys(0, 2, "cuda"), torch.full((2, 5), 300, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in OPS.values():
            call(inputs)
        ops.sample_categorical(inputs.target, keys, draws=3)
        ops.absorbing_step(inputs.target, x_t, keys, unmask_prob=0.5, mask_id=300)
    finally:
        torch.cuda.set_sync_debug_mode("default")
