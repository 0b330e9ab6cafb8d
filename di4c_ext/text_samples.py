"""Samples of a model of text: what they begin from, and the files they are written into."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from di4c_ext import checkpoints
from di4c_ext.text_sources import Characters, Cutter, cutter_of, told_beside

SHOWN = 3  # samples that are printed
MARKER = "[MASK]"


@dataclass
class PromptArguments:
    """What a text begins from."""

    prompt: str | None = field(
        default=None,
        metadata={"help": "text to go on from; --mask_marker stands for a token to fill in, '[MASK]*12' for twelve"},
    )
    mask_marker: str = field(default=MARKER, metadata={"help": "what marks a token to fill in"})
    block_size: int | None = field(
        default=None, metadata={"help": "text: tokens of a sample; default: as many as it was trained on"}
    )
    num_new_tokens: int | None = field(
        default=None,
        metadata={"help": "tokens after the prompt; 0: only its gaps are filled; default: up to the block"},
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "text: characters, gpt2, a folder or hub name; default: the model's own"}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "text: consent to run the code that a model or tokenizer brings along"}
    )

    def __post_init__(self) -> None:
        if not self.mask_marker:
            raise ValueError("--mask_marker '': must be one character or more, e.g. [MASK]")
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"--block_size {self.block_size}: must be at least 1")
        if self.num_new_tokens is not None and self.num_new_tokens < 0:
            raise ValueError(f"--num_new_tokens {self.num_new_tokens}: must be at least 0")
        if self.num_new_tokens is not None and self.prompt is None:
            raise ValueError(
                f"--num_new_tokens {self.num_new_tokens}: goes with --prompt; for others give --block_size"
            )

    def refuse(self) -> None:
        """ValueError where any of these was given and the model is of images."""
        plain = PromptArguments()
        for name, value in vars(self).items():
            if value != getattr(plain, name):
                raise ValueError(f"--{name} {value}: is for models of text; leave it out")


class Start:
    """What samples of a model in `folder` begin from: `row` (D,), the mask where a token is wanted."""

    def __init__(self, folder: str, config: Any, args: PromptArguments) -> None:
        beside = _beside(folder)
        self.cutter = cutter_of(args.tokenizer_name or _place(folder), args.trust_remote_code)
        _check_tokens(self.cutter, config, folder)
        length = args.block_size or beside.get("block_size") or config.length
        if length is None:
            raise ValueError(f"--block_size is missing: nothing in {folder} says how long its texts are")
        given = [] if args.prompt is None else _pieces(args.prompt, args.mask_marker, self.cutter, config.mask_id)
        if given and beside.get("wrap") and self.cutter.bos is not None:
            given = [self.cutter.bos, *given]
        if args.num_new_tokens is not None:
            length = len(given) + args.num_new_tokens
        if config.length is not None and length > config.length:
            raise ValueError(f"--block_size {length}: this model takes at most {config.length} tokens; give fewer")
        if len(given) > length:
            raise ValueError(f"--prompt: has {len(given)} tokens, a sample has {length}; give a shorter one")
        self.row = torch.tensor([*given, *[config.mask_id] * (length - len(given))])
        if not (self.row == config.mask_id).any():
            raise ValueError(
                f"--prompt: nothing is left to fill in; mark gaps by {args.mask_marker}, or give --num_new_tokens"
            )

    def rows(self, n: int) -> Tensor:
        """(n, D)."""
        return self.row.expand(n, -1).contiguous()

    def write(self, tokens: Tensor, stem: Path, told: dict[str, Any]) -> Sequence[Path]:
        """Writes NAME.txt and NAME.jsonl, a line a sample: index, text, tokens, what is `told`; gives their names."""
        texts = [self.cutter.decode(row) for row in tokens.tolist()]
        files = [stem.with_name(stem.name + ending) for ending in (".txt", ".jsonl")]
        checkpoints.write_text(files[0], "\n\n".join(texts) + "\n")
        rows = zip(texts, tokens.tolist(), strict=True)
        lines = [{"index": i, "text": text, "tokens": row, **told} for i, (text, row) in enumerate(rows)]
        checkpoints.write_text(files[1], "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        print("\n\n".join(texts[:SHOWN]), end="\n\n")
        return files


def _place(folder: str) -> str:
    """The folder, or the run's above it, that has a tokenizer beside the model."""
    return str(Path(folder).parent) if not told_beside(folder) and told_beside(Path(folder).parent) else folder


def _beside(folder: str) -> dict[str, Any]:
    return told_beside(_place(folder))


def _check_tokens(cutter: Cutter, config: Any, folder: str) -> None:
    from di4c_ext.text_teachers import description_of

    description_of(config, cutter).check_tokenizer(f"--tokenizer_name for {folder}", cutter.num_tokens, cutter.mask_id)


def _pieces(prompt: str, marker: str, cutter: Cutter, mask_id: int) -> list[int]:
    """The tokens of a prompt, the mask where the marker stands."""
    tokens: list[int] = []
    at = 0
    for gap in re.finditer(re.escape(marker) + r"(?:\*(\d+))?", prompt):
        tokens += _encoded(prompt[at : gap.start()], cutter) + [mask_id] * int(gap[1] or 1)
        at = gap.end()
    return tokens + _encoded(prompt[at:], cutter)


def _encoded(text: str, cutter: Cutter) -> list[int]:
    """The tokens of a piece of text; of characters, a space at either end is one."""
    if not isinstance(cutter, Characters):
        return cutter.encode([text])[0] if text else []
    if not text.strip():
        return [0] * bool(text)
    return [0] * text[0].isspace() + cutter.encode([text])[0] + [0] * text[-1].isspace()
