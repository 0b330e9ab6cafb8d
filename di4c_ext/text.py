"""Text as tokens: documents cut by a tokenizer, laid end to end and cut into blocks of one length.

Packing is that of the masked language models that were published: the documents of a group (1,000 of them) follow
each other, each with an end-of-sequence token behind it; what they make is cut into blocks of D - 2 tokens, each put
between a beginning- and an end-of-sequence token, and what is left over at the end of a group is dropped. Characters
have neither: their documents are a space apart and blocks are D characters.

Held out are documents, not blocks: each by a coin of its own that is the same on every machine, whatever comes after
it. Read as a stream or whole, a side has the same blocks under the same numbers, on which the noise of a training
step hangs (`di4c_ext.random`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from di4c_ext import random
from di4c_ext.data import SPLIT_SEED
from di4c_ext.examples import Examples
from di4c_ext.text_sources import Cutter, Texts, cutter_of, documents

if TYPE_CHECKING:
    from di4c_ext.models.teacher import TeacherDescription

GROUP = 1000  # documents packed together, as published
Side = Literal["train", "heldout"]
_COINS = 4096


@dataclass(frozen=True)
class TextTokens(Examples):
    """N blocks of text as tokens.

    tokens (N, D) int32; example (N,) int64, the number of each block on its side; num_states S; cutter, which turns
    tokens back into text.
    """

    name: str
    tokens: Tensor
    example: Tensor
    num_states: int
    cutter: Cutter

    def subset(self, index: Tensor) -> TextTokens:
        """The blocks named by `index` (int64), with their numbers."""
        return replace(self, tokens=self.tokens[index], example=self.example[index])

    def text(self, tokens: Tensor) -> list[str]:
        """tokens (N, D) as N strings."""
        return [self.cutter.decode(row) for row in tokens.tolist()]

    def fingerprint(self) -> str:
        """Hex digest of everything a model trained on this data depends on."""
        digest = hashlib.sha256(f"text {self.num_states} {tuple(self.tokens.shape)}".encode())
        digest.update(self.tokens.contiguous().numpy().tobytes())
        digest.update(self.example.contiguous().numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Blocks:
    """One side of a text, cut into blocks of `length` tokens; see the head of this file.

    wrap: whether a block lies between bos and eos. group: documents packed together. check: what is asked of the
    tokens of each group before they are given out.
    """

    name: str
    texts: Texts
    cutter: Cutter
    length: int
    wrap: bool
    group: int
    side: Side
    heldout_fraction: float
    teacher: TeacherDescription | None = None

    @property
    def num_states(self) -> int:
        """S: the teacher's classes, or the tokens where there is no teacher yet."""
        return self.cutter.num_tokens if self.teacher is None else self.teacher.num_states

    def groups(self, first: int = 0) -> Iterator[tuple[int, Tensor]]:
        """For each group from document `first` on: the document after it, and its blocks (N, D) int32, N >= 0."""
        pending: list[str] = []
        number = first
        for text, coin in zip(self.texts(first), _coins(first), strict=False):
            number += 1
            if (coin < self.heldout_fraction) == (self.side == "heldout"):
                pending.append(text)
            if len(pending) == self.group:
                yield number, self._packed(pending)
                pending = []
        if pending:
            yield number, self._packed(pending)

    def _packed(self, texts: list[str]) -> Tensor:
        blocks = pack(
            self.cutter.encode(texts),
            self.length,
            separator=self.cutter.separator,
            bos=self.cutter.bos if self.wrap else None,
            eos=self.cutter.eos if self.wrap else None,
        )
        if self.teacher is not None:
            self.teacher.check_tokens(f"--dataset_name {self.name!r}", blocks)
        return blocks

    def settings(self) -> str:
        """What a position in the stream means nothing without."""
        return f"{self.name} {self.cutter.num_tokens} {self.length} {self.wrap} {self.group} {self.side} " + (
            f"{self.heldout_fraction:g}"
        )

    def nothing(self) -> ValueError:
        """The error of a side without a block."""
        return ValueError(
            f"--dataset_name {self.name!r}: the {self.side} side has not one block of {self.length} tokens; give "
            f"more text, shorter blocks, or another --heldout_fraction (now {self.heldout_fraction:g}). Whole "
            "documents go to either side; --separator parts a .txt file into several, '\\n\\n' at its blank lines"
        )


class StreamedText(IterableDataset[dict[str, Tensor]]):
    """Blocks as they come, for text that is read anew in each pass: {"x_0": (D,) int64, "example": () int64}.

    With `seed` the blocks of a group come in an order of this pass alone, and keep their numbers. `state_dict` is the
    place after the last block given; `load_state_dict` goes on from there. Reading in worker processes is refused: each
    would read everything, and the place would not be known here.
    """

    def __init__(self, blocks: Blocks, seed: int | None = None) -> None:
        super().__init__()
        self.blocks = blocks
        self.seed = seed
        self._place = {"epoch": 0, "document": 0, "example": 0, "block": 0}

    @property
    def length(self) -> int:
        """D, tokens per block."""
        return self.blocks.length

    @property
    def num_states(self) -> int:
        """S."""
        return self.blocks.num_states

    def state_dict(self) -> dict[str, Any]:
        """The place: passes done, first document and first number of the group, blocks of it given."""
        return {**self._place, "settings": self.blocks.settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken; ValueError where that was of other data or other blocks."""
        if state.get("settings") != self.blocks.settings():
            raise ValueError(
                f"StreamedText: the place was taken in {state.get('settings')!r}, this is {self.blocks.settings()!r}; "
                "resume with the settings of the run"
            )
        self._place = {name: int(state[name]) for name in self._place}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        if worker is not None:
            raise ValueError(
                f"StreamedText: {worker.num_workers} worker(s) would each read all documents and keep the place to "
                "themselves; give --dataloader_num_workers 0"
            )
        epoch, document, example, given = (self._place[name] for name in ("epoch", "document", "example", "block"))
        for following, blocks in self.blocks.groups(document):
            for place, index in list(enumerate(self._order(epoch, document, len(blocks))))[given:]:
                self._place = {"epoch": epoch, "document": document, "example": example, "block": place + 1}
                yield {"x_0": blocks[index].long(), "example": torch.tensor(example + index)}
            document, example, given = following, example + len(blocks), 0
        if example == 0:
            raise self.blocks.nothing()
        self._place = {"epoch": epoch + 1, "document": 0, "example": 0, "block": 0}

    def _order(self, epoch: int, document: int, size: int) -> list[int]:
        if self.seed is None:
            return list(range(size))
        root = random.fold_in(random.keys(self.seed, 1), epoch)
        key = random.fold_in(root, document)
        order: list[int] = random.fold_in(key, torch.arange(size)).argsort().tolist()
        return order


def load(dataset_name: str, *, length: int, tokenizer: Any, most: int | None = None, **options: Any) -> TextTokens:
    """One side of a text, whole in memory, or its first `most` blocks.

    Args:
        dataset_name: sotu, the messages of the presidents (dataset_config "modern": from 1947 on); a file .txt
            (a document, or several by `document_separator`), .jsonl, .parquet or .arrow, or a folder of such; else
            what `datasets.load_dataset` knows by the name.
        length: D, tokens per block.
        tokenizer: "characters", "gpt2", a tokenizer of transformers or the folder or hub name of one: the teacher's.
        options: those of `blocks`.

    Raises:
        ValueError: where the source cannot be read, teacher and data do not fit, or there is not one block.
    """
    side = blocks(dataset_name, length=length, tokenizer=tokenizer, **options)
    groups, held = [torch.empty(0, length, dtype=torch.int32)], 0
    for _, found in side.groups():
        groups.append(found)
        held += len(found)
        if most is not None and held >= most:
            break
    tokens = torch.cat(groups)[:most]
    if not len(tokens):
        raise side.nothing()
    return TextTokens(side.name, tokens, torch.arange(len(tokens)), side.num_states, side.cutter)


def stream(dataset_name: str, *, length: int, tokenizer: Any, seed: int | None = None, **options: Any) -> StreamedText:
    """As `load`, read as it is needed; seed: mix the blocks of each group, None: leave them in order."""
    return StreamedText(blocks(dataset_name, length=length, tokenizer=tokenizer, streaming=True, **options), seed)


def blocks(
    dataset_name: str,
    *,
    length: int,
    tokenizer: Any,
    teacher: TeacherDescription | None = None,
    side: Side = "train",
    heldout_fraction: float = 0.0,
    wrap: bool | None = None,
    group: int = GROUP,
    dataset_config: str | None = None,
    dataset_split: str = "train",
    text_column: str | None = None,
    document_separator: str | None = None,
    streaming: bool = False,
    trust_remote_code: bool = False,
) -> Blocks:
    """What `load` and `stream` read.

    Args:
        teacher: its description, which tokens, mask and length must fit.
        side: "train" or "heldout"; heldout_fraction: the share of the documents that are held out.
        wrap: blocks between bos and eos; None: where the tokenizer has both.
        group: documents packed together.
        dataset_config, dataset_split: of a data set's name. text_column: its column; None: "text", or the first.
        document_separator: what lies between the documents of a .txt file; None: a file is a document.
        streaming: whether a data set's name is read over the network as it is needed.
        trust_remote_code: consent to run a tokenizer's own code.
    """
    cutter = cutter_of(tokenizer, trust_remote_code)
    name = str(dataset_name)
    if side not in get_args(Side):
        raise ValueError(f"side must be one of {get_args(Side)}, got {side!r}")
    if not 0 <= heldout_fraction < 1 or (side == "heldout" and heldout_fraction == 0):
        raise ValueError(f"--heldout_fraction {heldout_fraction}: must lie between 0 and 1, e.g. 0.1")
    if group < 1:
        raise ValueError(f"group must be at least 1 document, got {group}")
    has_both = cutter.bos is not None and cutter.eos is not None
    if wrap and not has_both:
        raise ValueError("wrap=True: the tokenizer has no tokens for the beginning and the end of a sequence")
    wrap = has_both if wrap is None else wrap
    if length < (3 if wrap else 1):
        raise ValueError(f"--length {length}: a block needs at least {3 if wrap else 1} tokens")
    if teacher is not None:
        teacher.check_length(f"--length {length}", length)
        teacher.check_tokenizer(f"--dataset_name {name!r}", cutter.num_tokens, cutter.mask_id)
    texts = documents(
        name,
        dataset_config=dataset_config,
        dataset_split=dataset_split,
        text_column=text_column,
        document_separator=document_separator,
        streaming=streaming,
    )
    return Blocks(name, texts, cutter, length, wrap, group, side, heldout_fraction, teacher)


def pack(
    documents: Sequence[Sequence[int]],
    length: int,
    *,
    separator: int | None = None,
    bos: int | None = None,
    eos: int | None = None,
) -> Tensor:
    """Documents end to end, the separator after each, cut into blocks (N, length) int32; what is left over is dropped.

    bos, eos: stand at the ends of every block, whose inside is then shorter by as many tokens.
    """
    behind = [] if separator is None else [separator]
    joined = torch.tensor([token for document in documents for token in (*document, *behind)], dtype=torch.int32)
    inside = length - (bos is not None) - (eos is not None)
    cut = joined[: len(joined) // inside * inside].view(-1, inside)
    ends = [cut.new_full((len(cut), 1), token) if token is not None else cut[:, :0] for token in (bos, eos)]
    return torch.cat([ends[0], cut, ends[1]], 1)


def _coins(first: int) -> Iterator[float]:
    """The coin of each document from `first` on: uniform on [0, 1), a function of its number alone."""
    for start in count(first, _COINS):
        keys = random.fold_in(SPLIT_SEED, torch.arange(start, start + _COINS))
        yield from random.uniform(keys, 1)[:, 0].tolist()
