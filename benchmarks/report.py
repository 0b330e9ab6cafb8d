"""From the JSON of `pytest benchmarks --benchmark-json=FILE` to tables and a picture.

    python benchmarks/report.py FILE [FILE ...] --output benchmarks/results/NAME     writes NAME.md and NAME.svg
    python benchmarks/report.py FILE [FILE ...]                                      prints the tables

Several files, of runs on one machine, make one report.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]

HEADER = """\
`floor` is what must cross memory at least, GB/s is floor over time, `of copy` that over the speed of a large copy into
warm memory on the same device in the same run, `ratio` the time over that of di4c (in a group without di4c: the first
row's time over this one's), `growth` the memory taken on top of the inputs at the peak of one call. On a CPU the time
is the best of the rounds, on a GPU their median, caches emptied between them; `graph ms` is a replay of the call's
CUDA graph, the device's work without the host's, where the host may be what takes the time. On a CPU the mixture's rows
and odd S are timed in turns with what they are held against, and a growth with a bound is that of a fresh process.
"""
FILLS_THE_CHIP = 64  # MB of floor, above which a GPU's row is held to the copy
WITHIN = 1.1  # of the floor
NO_BOUND = "none"
ARITHMETIC = ("hidden", "logistic")  # words of groups that matrix products or exponentials bound, not memory


def machine() -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    import torch
    from measuring import copy_speed

    from di4c_ext.ops import native

    info = native.info()
    found: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
    if torch.cuda.is_available():
        found |= {"device": torch.cuda.get_device_name(), "kernels": info.get("cuda_archs", "reference")}
    else:
        found |= {"device": _processor(), "threads": torch.get_num_threads()}
        found["kernels"] = info.get("isa_active", "reference") if info["native"] else "reference"
        found["torch's memory"] = "huge pages" if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" else "ordinary pages"
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return found | {"kind": kind, "copy": f"{copy_speed(torch.device(kind)) / 1e9:.1f} GB/s"}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def groups(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows by group, in the order of their first appearance, di4c first; a time taken in turns goes before another."""
    found: dict[str, list[Row]] = {}
    turns: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row["group"], []).append(row)
        turns.setdefault(row["group"], {}).update(row.get("turns") or {})
    for group, members in found.items():
        members[:] = [row | turns[group].get(row["name"], {}) for row in members]
        members.sort(key=lambda row: row["name"] != "di4c")
    return found


def family(group: str) -> str:
    """What is computed, without the shape."""
    return re.split(r" fwd\+bwd| forward\b|[:,]| \d", group)[0]


def bound_by_arithmetic(group: str) -> bool:
    return any(word in group for word in ARITHMETIC)


def promises(rows: list[Row], kind: str) -> Iterator[tuple[str, str, str, bool | None]]:
    """What a row promises: in words, the bound, what was measured, and whether it was kept (None: not measured)."""
    for group, members in groups(rows).items():
        by_name = {row["name"]: row for row in members}
        for row in members:
            if kind == "cpu":
                for peer, ratio in (row.get("at_least") or {}).items():
                    yield _beside(group, row, by_name.get(peer, {}), peer, ratio)
            limit = row.get("growth_limit_mb")
            if limit is not None and row.get("growth_mb") is not None:
                growth = row["growth_mb"]
                yield f"{group}: memory beyond the inputs", f"<= {limit:.1f} MB", f"{growth:.1f} MB", growth <= limit
        ours = by_name.get("di4c", {})
        if kind == "cuda" and ours.get("ms"):
            if (ours.get("floor_mb") or 0) >= FILLS_THE_CHIP and not bound_by_arithmetic(group):
                slower = 1 / ours["of_copy"]
                yield f"{group}: time over the floor's", f"<= {WITHIN}", f"{slower:.2f}", slower <= WITHIN
            for row in members:
                if row.get("ms") and not row["name"].startswith(("di4c", "own")):
                    yield _beside(group, ours, row, row["name"], 1.0)


def _beside(group: str, row: Row, peer: Row, name: str, ratio: float | None) -> tuple[str, str, str, bool | None]:
    measured = _speed(row) / _speed(peer) if peer.get("ms") else None
    kept = None if measured is None or ratio is None else measured >= ratio
    if ratio is not None and ratio < 1:
        shown = "not measured" if measured is None else f"{1 / measured:.2f}"
        return f"{group}: time over {name}'s", f"<= {1 / ratio:.2f}", shown, kept
    shown = "not measured" if measured is None else f"{measured:.1f}"
    return f"{group}: speed over {name}'s", NO_BOUND if ratio is None else f">= {ratio:g}", shown, kept


def _speed(row: Row) -> float:
    """Bytes of the floor a second, so that rows of different width compare; calls a second where there is no floor."""
    return row.get("gb_per_s") or 1 / row["ms"]


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _table(members: dict[str, list[Row]]) -> Iterator[str]:
    graphs = any(row.get("graph_ms") is not None for rows in members.values() for row in rows)
    items = any(row.get("items_per_s") is not None for rows in members.values() for row in rows)
    columns = ["ms", *(["graph ms"] if graphs else []), "floor MB", "GB/s", "of copy", "ratio", "growth MB"]
    columns += ["images/s"] if items else []
    yield "| what | by | " + " | ".join(columns) + " |"
    yield "|---|---|" + "--:|" * len(columns)
    for group, rows in members.items():
        first = next((row for row in rows if row.get("ms")), {})
        for row in rows:
            cells = [row.get("note") or _number(row.get("ms"), 3 if (row.get("ms") or 1) < 1 else 2)]
            cells += [_number(row.get("graph_ms"), 3)] if graphs else []
            speed = "" if row.get("gb_per_s") is None else f"{row['gb_per_s']:.3g}"
            cells += [_number(row.get("floor_mb"), 1), speed, _number(row.get("of_copy"), 3)]
            ratio = None
            if row is not first and row.get("ms"):
                ratio = row["ms"] / first["ms"] if first["name"] == "di4c" else first["ms"] / row["ms"]
            cells += [_number(ratio, 2 if (ratio or 0) < 10 else 0), _number(row.get("growth_mb"), 1)]
            cells += [_number(row.get("items_per_s"), 2)] if items else []
            yield f"| {group if row is rows[0] else ''} | {row['name']} | " + " | ".join(cells) + " |"


def render(rows: list[Row], about: dict[str, Any], picture: str | None = None) -> str:
    """Markdown: what was promised and kept, then one table for every family of ops."""
    lines = [", ".join(f"{key} {value}" for key, value in about.items() if key != "kind"), ""]
    lines += [f"![bytes per second against a copy]({picture})", ""] if picture else []
    lines += [HEADER]
    told = list(promises(rows, about.get("kind", "cpu")))
    promised, beside = ([row for row in told if (row[1] == NO_BOUND) == open_] for open_ in (False, True))
    if promised:
        kept = sum(outcome is True for *_, outcome in promised)
        lines += [f"## Promises: {kept} of {len(promised)} kept", "", "| promise | bound | measured | |"]
        lines += ["|---|--:|--:|---|"]
        words = {True: "kept", False: "**missed**", None: "not measured"}
        lines += [f"| {what} | {bound} | {found} | {words[outcome]} |" for what, bound, found, outcome in promised]
        lines += [""]
    if beside:
        lines += ["## Told, not promised", "", "| what | measured |", "|---|--:|"]
        lines += [f"| {what} | {found} |" for what, _, found, _ in beside]
        lines += [""]
    families: dict[str, dict[str, list[Row]]] = {}
    for group, members in groups(rows).items():
        families.setdefault(family(group), {})[group] = members
    for title, members in families.items():
        lines += [f"## {title}", "", *_table(members), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="JSON of pytest-benchmark")
    parser.add_argument("--output", type=Path, help="where NAME.md and NAME.svg go; without it the tables are printed")
    arguments = parser.parse_args()
    rows: list[Row] = []
    about: dict[str, Any] = {}
    for file in arguments.files:
        try:
            found = json.loads(file.read_text())["di4c"]
        except (OSError, ValueError, KeyError) as error:
            parser.error(f"{file} is no JSON of `pytest benchmarks --benchmark-json`: {type(error).__name__}: {error}")
        rows += found["rows"]
        about = about or found["machine"]
    if arguments.output is None:
        print(render(rows, about))
        return
    from plot import draw

    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    picture = draw(rows, about, Path(f"{arguments.output}.svg"))
    Path(f"{arguments.output}.md").write_text(render(rows, about, None if picture is None else picture.name))


if __name__ == "__main__":
    main()
