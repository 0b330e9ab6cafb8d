"""Builds the one extension, di4c_ext/_C, with CMake and ninja. Neither torch nor a GPU is needed.

Environment, read at build time:
    DI4C_NATIVE=off     no extension: a pure-Python install served by the reference ops (no compiler needed)
    DI4C_CUDA           auto (default: with CUDA kernels where an nvcc is found), on (an error where none is), off
    DI4C_CUDA_ARCHS     semicolon-separated, default 80;86;89;90;100;120: machine code for each, PTX of the last
    CUDACXX, CUDA_HOME  where nvcc is looked for first; then PATH, then the pip package nvidia-cuda-nvcc
    MAX_JOBS            compile jobs at once; capped by the number of cores and by memory
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = ("80", "86", "89", "90", "100", "120")
GIB_PER_JOB = 2.0  # an nvcc job over several architectures at its largest


def choice(name: str, default: str, allowed: tuple[str, ...]) -> str:
    """The environment variable `name`, which must hold one of `allowed`."""
    value = os.environ.get(name, "") or default
    if value.lower() not in allowed:
        raise SystemExit(f"di4c_ext: {name}={value!r} is not known; set it to one of {', '.join(allowed)}")
    return value.lower()


def tool(name: str) -> str:
    """Path of cmake or ninja: beside this Python, or on PATH."""
    beside = Path(sysconfig.get_path("scripts")) / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise SystemExit(
            f"di4c_ext: {name} was not found; `pip install {name}`, or install with build isolation (pip's default)"
        )
    return found


def find_nvcc() -> tuple[str | None, str]:
    """An nvcc, or None and the reason."""
    for variable, suffix in (("CUDACXX", ""), ("CUDA_HOME", "bin/nvcc"), ("CUDA_PATH", "bin/nvcc")):
        value = os.environ.get(variable)
        if value:
            path = shutil.which(str(Path(value) / suffix)) if suffix else shutil.which(value)
            if path is None:
                return None, f"{variable}={value} holds no nvcc that can be run"
            return path, ""
    path = shutil.which("nvcc")
    if path:
        return path, ""
    for folder in [*site.getsitepackages(), site.getusersitepackages(), *sys.path]:
        for candidate in sorted(Path(folder or ".").glob("nvidia/cu*/bin/nvcc"), reverse=True):
            if os.access(candidate, os.X_OK):
                return str(candidate), ""
    return None, "no nvcc on CUDACXX, CUDA_HOME, PATH, nor in the pip package nvidia-cuda-nvcc"


def cuda_archs(nvcc: str) -> list[str]:
    """The architectures to compile for: those asked for, or those of the default list this nvcc knows."""
    listing = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False)
    if listing.returncode:
        raise SystemExit(f"di4c_ext: {nvcc} does not run: {listing.stderr.strip()}; set DI4C_CUDA=off or CUDACXX")
    known = set(re.findall(r"sm_(\w+)", listing.stdout))
    value = os.environ.get("DI4C_CUDA_ARCHS", "")
    asked = [arch.strip().replace(".", "") for arch in re.split(r"[;, ]+", value) if arch.strip()]
    unknown = [arch for arch in asked if arch not in known]
    if unknown:
        raise SystemExit(
            f"di4c_ext: DI4C_CUDA_ARCHS={value!r} names {', '.join(unknown)}, which {nvcc} does not know; "
            f"it knows {', '.join(sorted(known, key=lambda a: (len(a), a)))}"
        )
    return asked or [arch for arch in DEFAULT_ARCHS if arch in known]


def jobs() -> int:
    """Compile jobs: MAX_JOBS where set, never more than cores or memory allow."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = cores
    try:
        available = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
        if available:
            limit = min(limit, int(int(available[1]) / 2**20 / GIB_PER_JOB))
    except OSError:
        pass  # not Linux: cores alone decide
    value = os.environ.get("MAX_JOBS", "")
    if value:
        if not value.isdigit() or int(value) < 1:
            raise SystemExit(f"di4c_ext: MAX_JOBS={value!r} must be a whole number of at least 1")
        limit = min(limit, int(value))
    return max(1, limit)


class CMakeBuild(build_ext):
    """build_ext that leaves the work to CMakeLists.txt."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11  # a build requirement, absent where DI4C_NATIVE=off

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        build = ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        cmake = tool("cmake")
        configure = [
            cmake,
            *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DDI4C_EXTENSION={target.name}",
            *self.cuda_options(build),
        ]
        for command in (configure, [cmake, "--build", str(build), "--parallel", str(jobs())]):
            if subprocess.run(command, check=False).returncode:
                raise SystemExit(
                    f"di4c_ext: `{shlex.join(command)}` failed, see above. It needs a C++17 compiler; DI4C_CUDA=off "
                    "leaves the CUDA kernels out, DI4C_NATIVE=off installs without compiled kernels"
                )
        shutil.copy2(build / target.name, target)

    @staticmethod
    def cuda_options(build: Path) -> list[str]:
        """CMake's settings for the CUDA part, and a word on what was decided."""
        wanted = choice("DI4C_CUDA", "auto", ("auto", "on", "off"))
        nvcc, reason = (None, "DI4C_CUDA=off at build time") if wanted == "off" else find_nvcc()
        if nvcc is None and wanted == "on":
            raise SystemExit(f"di4c_ext: DI4C_CUDA=on, but {reason}; install a CUDA toolkit or name nvcc by CUDACXX")
        if nvcc is None:
            print(f"di4c_ext: building the CPU kernels alone: {reason}", file=sys.stderr)
            return ["-DDI4C_CUDA=OFF", f"-DDI4C_CUDA_REASON={reason}"]
        cache = build / "CMakeCache.txt"
        compiler = re.search(r"^CMAKE_CUDA_COMPILER:\w+=(.*)$", cache.read_text(), re.M) if cache.exists() else None
        if compiler and compiler[1] != nvcc:  # CMake cannot change a compiler in place
            shutil.rmtree(build)
            build.mkdir()
        library = Path(nvcc).resolve().parents[1] / "lib"
        if (library / "libcudart_static.a").is_file():  # the pip packages' layout; nvcc itself looks in lib64 alone
            given = os.environ.get("LIBRARY_PATH")
            os.environ["LIBRARY_PATH"] = os.pathsep.join([str(library), given] if given else [str(library)])
        archs = cuda_archs(nvcc)
        print(f"di4c_ext: building the CPU and CUDA kernels with {nvcc} for {';'.join(archs)}", file=sys.stderr)
        return [
            "-DDI4C_CUDA=ON",
            "-DDI4C_CUDA_REASON=",
            f"-DCMAKE_CUDA_COMPILER={nvcc}",
            f"-DDI4C_CUDA_ARCHS={';'.join(archs)}",
        ]


if choice("DI4C_NATIVE", "on", ("on", "off")) == "off":
    print("di4c_ext: DI4C_NATIVE=off: installing without compiled kernels", file=sys.stderr)
    setup()
else:
    setup(ext_modules=[Extension("di4c_ext._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
