"""Batches addressed by the training step, and the DataLoader that reads them.

The data's position is the step number itself. Global item number k, counted over all ranks and all steps,
belongs to epoch k // length and stands at place k % length of that epoch's permutation. So a run resumed at
step n starts at n, two ranks see between them what one process with the doubled batch sees, and a batch may
straddle epochs (data sets smaller than a batch work).
"""

import json
import logging
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldm_audio.errors import InputError
from ldm_audio.files import write_json

logger = logging.getLogger(__name__)

REPLACEMENT_TRIES = 20  # clips that are tried in the place of one before the data set counts as unreadable
PREFETCH = 4  # batches that each worker keeps ready


class ItemKey(NamedTuple):
    """Which clip (`index`), in which pass over the data, as which of all items that training ever sees."""

    epoch: int
    index: int
    item: int


class ClipData(Protocol):
    """What a data set is; an item is a dict that holds at least `caption`."""

    def __len__(self) -> int: ...
    def captions(self) -> list[str]: ...
    def __getitem__(self, key: ItemKey | int) -> dict: ...


class StepBatches:
    """The batches of steps `start_step` to `start_step + num_steps` for one rank, as lists of ItemKey.

    batch_size: items a rank and step. seed: of the permutations, `default_rng([seed, epoch])`.
    """

    def __init__(
        self,
        length: int,
        *,
        batch_size: int,
        seed: int,
        start_step: int,
        num_steps: int,
        rank: int,
        world_size: int,
    ):
        if length < 1:
            raise InputError("the data set is empty: expected at least 1 item")
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size}: expected at least 1")
        if seed < 0:
            raise InputError(f"seed={seed}: expected 0 or more")
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.start_step = start_step
        self.num_steps = num_steps
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[list[ItemKey]]:
        global_batch = self.batch_size * self.world_size
        shuffled, order = -1, np.empty(0, dtype=np.int64)  # the epoch whose permutation `order` is
        for step in range(self.start_step, self.start_step + self.num_steps):
            first = step * global_batch + self.rank * self.batch_size
            keys = []
            for item in range(first, first + self.batch_size):
                epoch, place = divmod(item, self.length)
                if epoch != shuffled:
                    shuffled, order = (
                        epoch,
                        np.random.default_rng([self.seed, epoch]).permutation(self.length),
                    )
                keys.append(ItemKey(epoch, int(order[place]), item))
            yield keys


def sequential_batches(length: int, batch_size: int, limit: int | None) -> list[list[ItemKey]]:
    """The first `limit` items (all for None) in order, in epoch 0; the last batch may be smaller."""
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}: expected at least 1")
    count = length if limit is None else min(limit, length)
    if count < 1:
        raise InputError(f"no items to go through: {length} in the data set, limit {limit}")
    keys = [ItemKey(0, index, index) for index in range(count)]
    return [keys[start : start + batch_size] for start in range(0, count, batch_size)]


def share_of(batches: list[list[ItemKey]], *, rank: int, world_size: int) -> list[list[ItemKey]]:
    """The batches of one rank: every `world_size`-th, as many for every rank.

    A rank that would have one fewer gets the first batch again, with the item number -1: to be computed, for
    the ranks work in step, and not to be counted.
    """
    own = batches[rank::world_size]
    if len(own) < -(-len(batches) // world_size):
        own = [*own, [key._replace(item=-1) for key in batches[0]]]
    return own


class Unreadable:
    """The clips that a run could not read: each named once and listed in the JSON file `path`."""

    def __init__(self, path: Path):
        self.path = path
        listed = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        self.clips = {entry["index"]: entry["reason"] for entry in listed}

    def note(self, index: int, reason: str) -> None:
        """Names a clip that was not known as unreadable."""
        if index in self.clips:
            return
        self.clips[index] = reason
        logger.warning(f"{reason}; another clip takes its place (listed in {self.path})")
        write_json(self.path, [{"index": i, "reason": text} for i, text in sorted(self.clips.items())])


def make_loader(
    dataset: ClipData,
    batches: Iterable[Sequence[ItemKey]],
    *,
    num_workers: int,
    pin_memory: bool = False,
    unreadable: Unreadable | None = None,
) -> DataLoader:
    """A DataLoader over `batches`, each a dict as `collate` makes it.

    unreadable: where given, a clip that raises InputError is noted there and another, which its epoch and
    index determine, takes its place under its item number; else the first InputError is raised, also one of a
    worker. Workers persist from one pass to the next and run one torch thread each. Signals to the whole
    process group are left to the main process. Iterating draws nothing from torch's global generator.
    """
    return Loader(
        KeyedItems(dataset, replace=unreadable is not None),
        unreadable,
        batch_sampler=batches,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        prefetch_factor=PREFETCH if num_workers else None,
        pin_memory=pin_memory,
        collate_fn=collate,
        worker_init_fn=outlive_group_signals,
        # the workers' base seed would otherwise come from the generator that a resumed run restores
        generator=torch.Generator().manual_seed(0),
    )


def outlive_group_signals(worker: int) -> None:
    """Leaves Ctrl-C and a scheduler's SIGTERM to the main process, which could not stop in order alone.

    Only the parent's own SIGTERM ends a worker. macOS cannot tell the sender; there all of them do.
    """
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        threading.Thread(target=obey_parent, daemon=True).start()


def obey_parent() -> None:
    while signal.sigwaitinfo((signal.SIGTERM,)).si_pid != os.getppid():
        pass
    os._exit(0)


class Read(NamedTuple):
    """An item with the key it was read by, or the InputError in its place, and what could not be read."""

    key: ItemKey
    item: dict | InputError
    failures: list[tuple[int, str]]


class KeyedItems(Dataset):
    """Items of a data set as `Read`; `replace` takes another clip for one that cannot be read."""

    def __init__(self, dataset: ClipData, *, replace: bool):
        self.dataset = dataset
        self.tries = REPLACEMENT_TRIES if replace else 0

    def __getitem__(self, key: ItemKey) -> Read:
        draw = np.random.default_rng([key.epoch, key.index])
        failures: list[tuple[int, str]] = []
        place = key
        while True:
            try:
                return Read(place, self.dataset[place], failures)
            except InputError as error:
                failures.append((place.index, str(error)))
            if len(failures) > self.tries:
                return Read(key, InputError(failures[0][1]), failures)
            place = key._replace(index=int(draw.integers(len(self.dataset))))


class Loader(DataLoader):
    """Raises in the main process what `collate` passes on as a value, and notes what it says of failures.

    A DataLoader re-raises a worker's exception with the worker's traceback as its message; a user's mistake
    is to stay one line.
    """

    def __init__(self, dataset: KeyedItems, unreadable: Unreadable | None, **settings: Any):
        super().__init__(dataset, **settings)
        self.unreadable = unreadable

    def __iter__(self) -> Iterator[dict]:
        for batch in super().__iter__():
            if isinstance(batch, InputError):
                raise InputError(str(batch))  # not `batch` itself: it and this frame would keep workers alive
            for index, reason in batch.pop("failures"):
                self.unreadable.note(index, reason)
            yield batch


def collate(read: list[Read]) -> dict | InputError:
    """One dict of the batch: tensors stacked, anything else listed, and two int64 tensors (b,) added.

    `item` holds the global item numbers, `index` the places in the data set; `failures` lists the clips that
    others replace, `replaced` counts the rows with such a clip. The first InputError among the items is
    returned in place of a batch.
    """
    for _, item, _ in read:
        if isinstance(item, InputError):
            return item
    keys, items, failures = zip(*read)
    batch = {name: stack_or_list([item[name] for item in items]) for name in items[0]}
    return batch | {
        "item": torch.tensor([key.item for key in keys], dtype=torch.int64),
        "index": torch.tensor([key.index for key in keys], dtype=torch.int64),
        "failures": [failure for failed in failures for failure in failed],
        "replaced": sum(bool(failed) for failed in failures),
    }


def stack_or_list(values: list) -> Tensor | list:
    return torch.stack(values) if isinstance(values[0], Tensor) else values
