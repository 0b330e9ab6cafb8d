"""The memory of one training step of the published language system at its full size, beyond the network's activations.

    python benchmarks/language_step.py                            1,024 positions, 16 latents, an eighth of them masked
    python benchmarks/language_step.py --time 1                   every position masked
    python benchmarks/language_step.py --length 64 --latents 4 --published       the published way, where it fits

One sequence, S = 50,257 tokens and the mask, hidden states 768 wide, float32, the preset `language`. The network is the
stand-in of bench_language.py: what it hands over, hidden states of L D H floats, is counted by itself and taken off, as
the activations of a network would be; the head, its gradient and all that the objective makes are not. Memory hangs on
the masked positions by numbers of L D size alone: logits are made 16 positions or 128 MB at a time however many there
are, and at most 256 MB of them are kept. `--time` says how many are masked and so how long it takes.

Prints a row of results/language.md, measured and counted; --save puts it there, in the place of one that says what it
says of another run. Exit code 1 where ours is not under LIMIT.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from bench_language import TOKENS, WIDTH, ours, published_way, setting
from measuring import memory_growth

from di4c_ext.ops.hidden import CHUNK_BYTES, KEEP_BYTES

LIMIT = 2 * 10**9
STATE_SIZED = {"least": 7.6, "most": 11.8}  # tensors of L D S floats at the published peak, by case; the head's beside
RESULTS = Path(__file__).parent / "results" / "language.md"
HEAD = "| device | by | L | D | masked | seconds | peak, GB | beyond activations, GB | counted, GB |"
_NAME = "torch, published"
_KEYS = 5  # columns that say what a row is of


def counted(length: int, latents: int, tokens: int = TOKENS, width: int = WIDTH) -> dict[str, int]:
    """Bytes of the largest things alive at the peak of our step, which lies in its backward pass, by name.

    The states of student and target and their gradient are the network's own and not among them.
    """
    rows = latents * length
    return {
        "gradient of the head": 4 * tokens * width,
        "kept for the backward pass": KEEP_BYTES,
        "logits of a piece": CHUNK_BYTES,
        "one number or a few to each row": 4 * rows * (2 + 2 + 2) + 8 * 4 * rows,
        "sums by sequence": 8 * -(-length // 16) * (latents + 1) * (latents + 1),
        "products of a piece with the head": 2 * 4 * width * max(16 * (2 * latents + 1), CHUNK_BYTES // (4 * tokens)),
    }


def saved(text: str, row: str) -> str:
    """A page of results with this row in the table of HEAD: in the place of the row of the same setting, else its last.

    Raises ValueError for a page without that table.
    """
    lines = text.splitlines()
    if HEAD not in lines:
        raise ValueError(f"language_step.py: the page has no table {HEAD}")
    first = lines.index(HEAD) + 2
    end = next((i for i in range(first, len(lines)) if not lines[i].startswith("|")), len(lines))

    def key(line: str) -> list[str]:
        return [cell.strip() for cell in line.split("|")[1 : 1 + _KEYS]]

    same = [i for i in range(first, end) if key(lines[i]) == key(row)]
    lines[same[0] if same else end : same[0] + 1 if same else end] = [row]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=1024, help="D, positions")
    parser.add_argument("--latents", type=int, default=16, help="L, latents and targets")
    parser.add_argument("--time", type=float, default=0.125, help="share of the positions that are masked")
    parser.add_argument("--published", action="store_true", help="the published way")
    parser.add_argument("--threads", type=int, default=None, help="of torch on a CPU; default: as it comes")
    parser.add_argument("--save", action="store_true", help="put the row into results/language.md")
    parser.add_argument("--busy", action="store_true", help="say that the machine had other work")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step = published_way if arguments.published else ours
    # Once small: what is made at the first call of anything is not the step's.
    small = setting(arguments.latents, 16, device)
    torch.autograd.grad(step(small, 0.5), list(small.student.parameters()))
    s = setting(arguments.latents, arguments.length, device)
    seconds = [0.0]

    def run() -> None:
        start = time.perf_counter()
        torch.autograd.grad(step(s, arguments.time), list(s.student.parameters()))
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds[0] = time.perf_counter() - start

    found = memory_growth(run, device)
    if found is None:
        raise SystemExit("language_step.py: this system does not tell the peak of memory")
    states = 4 * arguments.latents * arguments.length * WIDTH
    logits = 4 * arguments.latents * arguments.length * (TOKENS + 1)
    beyond = found - (2 if arguments.published else 3) * states  # the student's, its gradient's, the target's
    if arguments.published:
        least, most = ((STATE_SIZED[name] * logits + 4 * TOKENS * WIDTH) / 1e9 for name in ("least", "most"))
        by, count = _NAME, f"{least:.2f} to {most:.2f}"
    else:
        by, count = "di4c", f"{sum(counted(arguments.length, arguments.latents).values()) / 1e9:.2f}"
    threads = torch.get_num_threads()
    name = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    name = torch.cuda.get_device_name() if device.type == "cuda" else name
    sizes = f"{arguments.latents} | {arguments.length} | {arguments.time:g}"
    told = f"{seconds[0]:.1f} | {found / 1e9:.2f} | {beyond / 1e9:.2f} | {count}"
    row = f"| {name}{' (busy machine)' if arguments.busy else ''} | {by} | {sizes} | {told} |"
    print(f"{HEAD}\n|---|---|--:|--:|--:|--:|--:|--:|--:|\n{row}", flush=True)
    if arguments.save:
        RESULTS.write_text(saved(RESULTS.read_text(encoding="utf-8"), row), encoding="utf-8")
    raise SystemExit(not arguments.published and beyond >= LIMIT)


if __name__ == "__main__":
    main()
