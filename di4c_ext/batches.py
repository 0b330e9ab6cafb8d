"""Which examples a process sees in a step: one order for all of them, of which each takes its share.

A global batch is B examples for each of A micro-batches of each of G groups of processes. It is cut from one order,
a function of (seed, pass), so that the same step has the same examples on 1 process or on 8, accumulated or not, and
a resumed run goes on with the next of them. What is left over at the end of a pass, less than a global batch, is
dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

PLACE = "place"  # in a batch of a stream: where its data set stands after it


@dataclass(frozen=True)
class Share:
    """The part of every global batch that is this process's: group `number` of `groups`.

    size: B, examples of a micro-batch. accumulation: A, micro-batches of a step.
    """

    size: int
    accumulation: int = 1
    groups: int = 1
    number: int = 0

    @property
    def total(self) -> int:
        """Examples of a global batch."""
        return self.size * self.accumulation * self.groups

    def rows(self, micro_batch: int) -> slice:
        """The rows of the global batch that this process takes in its micro-batch of this number."""
        first = (micro_batch * self.groups + self.number) * self.size
        return slice(first, first + self.size)


class GlobalBatches(Sampler[list[int]]):
    """Index lists of this process's micro-batches over one pass of `length` examples, in the order of (seed, pass)."""

    def __init__(self, length: int, share: Share, seed: int, *, shuffle: bool = True, drop_last: bool = True) -> None:
        if not drop_last and share.total != share.size:
            raise ValueError(
                "--dataloader_drop_last false: a last batch that is smaller cannot be split over "
                f"{share.groups} process(es) and {share.accumulation} micro-batch(es); leave the flag out"
            )
        self.length, self.share, self.seed, self.shuffle, self.drop_last = length, share, seed, shuffle, drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Which pass comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        whole = self.length // self.share.total * self.share.accumulation
        return whole + (not self.drop_last and self.length % self.share.size > 0)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(self.length))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(self.length, generator=generator).tolist()
        total = self.share.total
        for first in range(0, self.length, total):
            batch = order[first : first + total]
            if len(batch) == total or not self.drop_last:
                for micro_batch in range(self.share.accumulation):
                    yield batch[self.share.rows(micro_batch)]


class StreamedBatches(IterableDataset[dict[str, Any]]):
    """This process's micro-batches of an endless stream, made of passes over `dataset`, which every process reads.

    dataset: has state_dict() and load_state_dict(), the place after the last example that it gave. A batch holds under
    `PLACE` the place from which to go on after its step.
    """

    def __init__(self, dataset: Any, share: Share, collate: Callable[[list[Any]], dict[str, Any]]) -> None:
        super().__init__()
        self.dataset, self.share, self.collate = dataset, share, collate

    def __iter__(self) -> Iterator[dict[str, Any]]:
        chunk: list[Any] = []
        while True:
            for example in self.dataset:
                chunk.append(example)
                if len(chunk) == self.share.total:
                    place = self.dataset.state_dict()
                    for micro_batch in range(self.share.accumulation):
                        yield {**self.collate(chunk[self.share.rows(micro_batch)]), PLACE: place}
                    chunk = []


class Loader(DataLoader[Any]):
    """A DataLoader that knows which pass comes next."""

    def set_epoch(self, epoch: int) -> None:
        """Tells the order."""
        if isinstance(self.batch_sampler, GlobalBatches):
            self.batch_sampler.set_epoch(epoch)


def loader(dataset: Dataset[Any], share: Share, collate: Callable[[Any], Any], args: Any) -> Loader:
    """The training data of this process. args: TrainingArguments, for the flags that begin with `dataloader_`."""
    if is_stream(dataset):
        # A generator of its own: beginning to read takes no number from the one that dropout has, resumed or not.
        streamed = StreamedBatches(dataset, share, collate)
        return Loader(streamed, batch_size=None, generator=torch.Generator(), num_workers=args.dataloader_num_workers)
    length = len(dataset)  # type: ignore[arg-type]
    shuffle = args.train_sampling_strategy != "sequential"
    order = GlobalBatches(length, share, args.data_seed, shuffle=shuffle, drop_last=args.dataloader_drop_last)
    return Loader(
        dataset,
        batch_sampler=order,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
    )


def is_stream(dataset: Any) -> bool:
    """Whether a data set is read as it comes, without a length."""
    return isinstance(dataset, IterableDataset)
