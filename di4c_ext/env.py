"""Prints what a bug report needs: versions, device, and which kernels are built and used.

python -m di4c_ext.env
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence

import torch

import di4c_ext
from di4c_ext.ops import native

LIBRARIES = ("numpy", "transformers", "accelerate", "datasets", "safetensors", "matplotlib", "pillow", "tqdm")
VARIABLES = ("DI4C_NATIVE", "DI4C_ISA", "DI4C_CACHE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def facts() -> list[tuple[str, str]]:
    """(name, value) in the order they are printed; values never hold a user's name or path but DI4C_CACHE."""
    found = [
        ("di4c_ext", di4c_ext.__version__),
        ("python", f"{platform.python_version()} ({platform.python_implementation()})"),
        ("platform", platform.platform()),
        ("processor", f"{platform.machine()}, {os.cpu_count()} logical cores"),
        ("torch", torch.__version__),
        ("torch threads", str(torch.get_num_threads())),
    ]
    found += [(name, _version(name)) for name in LIBRARIES]
    found += [("CUDA of torch", torch.version.cuda or "none")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            memory = torch.cuda.get_device_properties(index).total_memory / 2**30
            found.append((f"GPU {index}", f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}, {memory:.0f} GiB"))
    else:
        found.append(("GPU", "none that torch can use"))
    return found + kernel_facts() + [(name, os.environ[name]) for name in VARIABLES if name in os.environ]


def kernel_facts() -> list[tuple[str, str]]:
    """What is known of the compiled extension."""
    info = native.info()
    if not info.get("native"):
        return [("kernels", f"plain torch: {info.get('reason', 'unknown reason')}")]
    if info["cuda"]:
        cuda = f"built for {info['cuda_archs']}, CUDA {info['cuda_version']}"
    else:
        cuda = f"not built: {info['cuda_reason']}"
    return [
        ("kernels", "compiled"),
        ("CPU instruction sets", f"{info['isa_active']} in use, built: {', '.join(info['isa_built'])}"),
        ("CUDA kernels", cuda),
        ("compiler", str(info["compiler"])),
    ]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main(argv: Sequence[str]) -> int:
    if argv and argv[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0
    if argv:
        print(f"error: unknown flag {argv[0]!r}; env takes none", file=sys.stderr)
        return 2
    rows = facts()
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
