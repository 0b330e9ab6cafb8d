"""What every op would launch on a GPU, without one: grids, clusters, shared memory, occupancy, waves and bytes.

    python benchmarks/plans.py [--gpus H100 A100 B200] [--output benchmarks/results/plans.md]

The launchers of csrc/cuda are asked through the host's emulator (tests/simt), which records launches in place of
running them; nvcc says how many registers and how much shared memory each kernel takes. Occupancy follows from the
published limits of each architecture. Needs a C++ compiler and nvcc.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "csrc" / "cuda"
sys.path.insert(0, str(ROOT / "tests" / "simt"))

import emulate  # noqa: E402

WARP, DTYPES, SIZES = 32, {"bf16": 1, "fp32": 0}, {"bf16": 2, "fp32": 4}  # config.h: DType
MIXTURES = ((2, 8, 256, 8192), (4, 16, 768, 256), (2, 32, 256, 1025), (1, 8, 64, 50258))  # (B, L, D, S)
ROWS = ((4096, 8192), (1024, 50258), (64, 126464), (8, 262144))  # (rows, S)
KINDS = {"masked_kl": 0, "masked_cross_entropy": 4}  # api.h: RowLoss; the other divergences are launched as masked_kl
ROOF = 0.9  # of the published bandwidth: what copies reach

HEADER = """\
What each op would launch, computed and not measured (`python benchmarks/plans.py`). Shapes are (B, L, D, S), K = L
sequences and T = L targets for the mixture, (rows, S) for sampling. `moves` is what the launchers say their kernels
move to and from memory, `floor` what the op must (every row of its inputs and outputs once), `floor us` that at 0.9 of
the H100's 3.35 TB/s; `CTAs/SM` is limited by registers, shared memory, warps or CTAs, `waves` the CTAs over those that
fit on the device at a time. In brackets behind a kernel's
name are its template arguments, the dtype first (0 fp32, 1 bf16).

{devices}.
"""


@dataclass(frozen=True)
class Gpu:
    """The limits of one multiprocessor, from the programming guide's table of compute capabilities."""

    name: str
    capability: int
    multiprocessors: int
    shared: int  # bytes, one KiB of which each CTA takes for the system
    warps: int = 64
    ctas: int = 32
    registers: int = 1 << 16

    def resident(self, threads: int, registers: int, shared: int) -> int:
        """CTAs that fit; registers are given out 256 to a warp at a time, to each of four schedulers' warps."""
        warps = -(-threads // WARP)
        by_registers = self.registers // 4 // (-(-registers * WARP // 256) * 256) * 4
        return min(self.ctas, min(self.warps, by_registers) // warps, self.shared // (shared + 1024))


H100 = Gpu("H100", 90, 132, 228 << 10)
GPUS = (H100, Gpu("A100", 80, 108, 164 << 10), Gpu("B200", 100, 148, 228 << 10))
BANDWIDTH = 3.35e12  # of the H100, bytes/s


@dataclass(frozen=True)
class Resources:
    registers: int
    shared: int  # static, bytes


@dataclass(frozen=True)
class Case:
    """One op at one shape: what to ask the driver, and what it must move."""

    op: str
    shape: tuple[int, ...]
    dtype: str
    requests: tuple[tuple[str, dict[str, float], tuple[str, ...]], ...]
    floor: int


def sources(unit: Path) -> list[Path]:
    """A file and all of ours that it includes."""
    found, left = [], [unit]
    while left:
        found.append(left.pop())
        for name in re.findall(r'#include "([^"]+)"', found[-1].read_text()):
            places = (folder / name for folder in (CUDA, CUDA.parent / "include"))
            left += [p for p in places if p.exists() and p not in (*found, *left)]
    return sorted(found)


def ptxas_report(unit: Path, capability: int) -> str:
    """What ptxas says of a file's kernels; kept in the temporary folder until a source changes, for nvcc is slow."""
    text = repr([p.read_bytes() for p in sources(unit)])
    name = f"di4c-ptxas-{unit.stem}-{capability}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.log"
    kept = Path(tempfile.gettempdir()) / name
    if not kept.exists():
        options = ["-std=c++17", f"-I{CUDA.parent / 'include'}", "--expt-relaxed-constexpr", "-Xptxas=-v"]
        options += [f"-gencode=arch=compute_{capability},code=sm_{capability}", "-c", str(unit), "-o", os.devnull]
        done = subprocess.run(["nvcc", *options], capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(done.stderr)
        kept.write_text(done.stderr)
    return kept.read_text()


def resources(gpus: Sequence[Gpu]) -> dict[tuple[int, str], Resources]:
    """Of every kernel (capability, mangled name)."""
    units = sorted(CUDA.glob("*.cu"))
    with ThreadPoolExecutor(2) as pool:
        text = "".join(pool.map(ptxas_report, *zip(*((u, g.capability) for g in gpus for u in units), strict=True)))
    found = {}
    entry = r"Compiling entry function '(\S+)' for 'sm_(\d+)'.*?Used (\d+) registers([^\n]*)"
    for name, capability, registers, rest in re.findall(entry, text, re.DOTALL):
        shared = re.search(r"(\d+) bytes smem", rest)
        found[int(capability), name] = Resources(int(registers), int(shared[1]) if shared else 0)
    return found


def strides(name: str, dtype: str, rows: int, length: int, states: int) -> dict[str, float]:
    """The fields of contiguous Logits (B, rows, D, S) called `name`."""
    return {
        f"{name}_dtype": DTYPES[dtype],
        f"{name}_stride_b": rows * length * states,
        f"{name}_stride_l": length * states,
        f"{name}_stride_d": states,
    }


def mixture(shape: tuple[int, ...], dtype: str, *, tokens: bool, teacher: bool, target: bool) -> Iterator[Case]:
    """Forward and backward of the fused mixture with some of what it may compare to."""
    B, L, D, S = shape
    given = [name for name, wanted in (("teacher", teacher), ("target", target)) if wanted]
    K, T = (L if tokens else 0), (L if target else 0)
    numbers: dict[str, float] = {"B": B, "L": L, "D": D, "S": S, "K": K, "T": T, "information": 0}
    for name, rows in (("logits", L), ("teacher", 1), ("target", L)):
        numbers |= strides(name, dtype, rows, D, S)
    numbers |= {"tokens_stride_b": K * D, "tokens_stride_k": D, "tokens_stride_d": 1}
    inputs = ("logits", *given, *(("tokens",) if tokens else ()))
    values = ("joint", "correlation")
    kept = ("lse", "lse_teacher", "lse_target", "share", "pull")
    name = "mixture_objective" if len(given) == 2 else "mixture_log_prob" if tokens else "mixture_kl"
    row = B * D * S * SIZES[dtype]
    read = row * (L + teacher + (L if target else 0))
    forward = ("mixture", numbers, (*inputs, *values, *kept, "parts", "work", "row"))
    yield Case(name, shape, dtype, (forward,), read)
    gradients = ("grad_joint", "grad_correlation", "grad_parts", "grad")
    yield Case(
        f"{name} backward",
        shape,
        dtype,
        (("mixture_backward", numbers, (*inputs, *values, *kept, *gradients)),),
        read + row * L,
    )


def row_loss(kind: str, shape: tuple[int, ...], dtype: str) -> Iterator[Case]:
    B, L, D, S = shape
    divergence = kind != "masked_cross_entropy"
    numbers: dict[str, float] = {"kind": KINDS[kind], "B": B, "L": L, "D": D, "S": S}
    numbers |= strides("logits", dtype, L, D, S) | strides("target", dtype, 1, D, S)
    inputs = ("logits", "target" if divergence else "tokens", "stats")
    row = B * D * S * SIZES[dtype]
    read = row * (L + divergence)
    yield Case(kind, shape, dtype, (("row_loss", numbers, (*inputs, "loss", "row", "split")),), read)
    backward = ("row_loss_backward", numbers, (*inputs, "grad_loss", "grad"))
    yield Case(f"{kind} backward", shape, dtype, (backward,), read + row * L)


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for count, S in ROWS:
            numbers: dict[str, float] = {"B": 1, "D": count, "S": S, "draws": 1, "mask_id": -1, "stream": 0}
            numbers |= {"temperature": 1.0} | strides("logits", dtype, 1, count, S)
            request = ("sample", numbers, ("logits", "keys", "tokens", "split"))
            yield Case("sample", (count, S), dtype, (request,), count * (S * SIZES[dtype] + 8))
    for shape in MIXTURES:
        yield from mixture(shape, "bf16", tokens=True, teacher=True, target=True)
        yield from mixture(shape, "bf16", tokens=True, teacher=False, target=False)
        yield from mixture(shape, "bf16", tokens=False, teacher=False, target=True)
        for kind in KINDS:
            yield from row_loss(kind, shape, "bf16")


def dimensions(sizes: tuple[int, ...]) -> str:
    return " x ".join(str(n) for n in sizes[: max(i + 1 for i in range(3) if i == 0 or sizes[i] > 1)])


def short_name(mangled: str) -> str:
    """`row_loss_kernel<1, 0>` for _ZN4di4c4cuda15row_loss_kernelILi1ELi0EEEv..."""
    name = re.match(r"_ZN4di4c4cuda(\d+)", mangled)
    if name is None:
        return mangled
    begin, size = name.end(), int(name[1])
    arguments = re.match(r"I((?:L\w+?E)+)E", mangled[begin + size :])
    values = re.findall(r"L[a-z](\d+)E", arguments[1]) if arguments else []
    return mangled[begin : begin + size] + (f"<{', '.join(values)}>" if values else "")


def launch_rows(case: Case, gpu: Gpu, known: dict[tuple[int, str], Resources]) -> Iterator[str]:
    """The table's rows of one op on one device: a line for the op, then one for each launch."""
    plans = [p for request in case.requests for p in emulate.plan(*request, capability=gpu.capability)]
    moves = sum(p.bytes for p in plans)
    floor = f" | {case.floor / BANDWIDTH / ROOF * 1e6:.1f}" if gpu is H100 else " | "
    yield (
        f"| **{case.op}** {case.shape} {case.dtype} | {len(plans)} launch{'es' * (len(plans) > 1)} | | | | | | "
        f"{moves / 1e6:.1f} | {case.floor / 1e6:.1f} | {moves / case.floor:.2f}{floor} |"
    )
    for p in plans:
        needs = known[gpu.capability, p.kernel]
        threads = p.block[0] * p.block[1] * p.block[2]
        ctas = p.grid[0] * p.grid[1] * p.grid[2]
        fit = gpu.resident(threads, needs.registers, needs.shared + p.shared)
        waves = ctas / (fit * gpu.multiprocessors)
        cluster = f" (clusters of {p.cluster})" if p.cluster > 1 else ""
        yield (
            f"| {short_name(p.kernel)} | {dimensions(p.grid)}{cluster} | {dimensions(p.block)} | {needs.registers} | "
            f"{needs.shared} + {p.shared} | {fit} ({fit * threads // WARP} warps) | {waves:.2f} | "
            f"{p.bytes / 1e6:.1f} | | | |"
        )


def report(gpus: Sequence[Gpu]) -> str:
    known = resources(gpus)
    devices = ", ".join(
        f"{g.name} (sm_{g.capability}, {g.multiprocessors} multiprocessors, {g.shared >> 10} KiB of shared memory each)"
        for g in gpus
    )
    parts = ["# Launch plans\n", HEADER.format(devices=devices)]
    for gpu in gpus:
        parts.append(f"\n## {gpu.name}, sm_{gpu.capability}\n")
        parts.append(
            "| op, kernel | grid | block | registers | shared: static + dynamic | CTAs/SM | waves | moves MB | "
            "floor MB | moves / floor | floor us |"
        )
        parts.append("|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|")
        for case in cases():
            parts.extend(launch_rows(case, gpu, known))
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="What every op would launch on a GPU, as a Markdown table.")
    parser.add_argument("--output", type=Path, help="file to write; default: print")
    names = [g.name for g in GPUS]
    parser.add_argument("--gpus", nargs="+", choices=names, default=names, help="default: %(default)s")
    arguments = parser.parse_args()
    text = report([g for g in GPUS if g.name in arguments.gpus])
    if arguments.output is None:
        print(text, end="")
    else:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
