"""From the JSON of pytest-benchmark to the table of ratios: `python benchmarks/report.py results.json > results.md`."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any

HEADER = """\
`floor` is what must cross memory at least, GB/s is floor over time, `x copy` the time over that of a large copy, byte
for byte, on the same device in the same run, `speed-up` the time over that of di4c, `growth` the memory taken on top
of the inputs at the peak of one call. On a CPU the time is the best of the rounds, on a GPU their median.
"""


def machine() -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    import torch

    from di4c_ext.ops import native

    info = native.info()
    found: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
    if torch.cuda.is_available():
        found |= {"device": torch.cuda.get_device_name(), "kernels": info.get("cuda_archs", "reference")}
    else:
        found |= {"device": _processor(), "threads": torch.get_num_threads()}
        found["kernels"] = info.get("isa_active", "reference") if info["native"] else "reference"
    return found


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def render(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Markdown: one table, the rows of a group together, di4c first."""
    lines = [", ".join(f"{key} {value}" for key, value in about.items()), "", HEADER]
    lines += [
        "| what | by | ms | floor MB | GB/s | x copy | speed-up | growth MB |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for group in dict.fromkeys(row["group"] for row in rows):
        members = sorted((row for row in rows if row["group"] == group), key=lambda row: row["name"] != "di4c")
        ours = next((row["ms"] for row in members if row["name"] == "di4c"), None)
        for row in members:
            ratio = "" if ours is None or row["name"] == "di4c" else f"{row['ms'] / ours:.1f}"
            growth = "" if row["growth_mb"] is None else f"{row['growth_mb']:.0f}"
            lines.append(
                f"| {group if row is members[0] else ''} | {row['name']} | {row['ms']:.2f} | {row['floor_mb']:.1f} | "
                f"{row['gb_per_s']:.2f} | {row['times_copy']:.1f} | {ratio} | {growth} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        raise SystemExit("usage: python benchmarks/report.py FILE, FILE from `pytest benchmarks --benchmark-json=FILE`")
    found = json.loads(Path(sys.argv[1]).read_text())
    rows = [bench["extra_info"] for bench in found["benchmarks"] if "gb_per_s" in bench["extra_info"]]
    print(render(rows, found["machine_info"].get("di4c", {})), end="")


if __name__ == "__main__":
    main()
