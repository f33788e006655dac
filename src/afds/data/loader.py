"""Batches that repeat exactly.

The order of an epoch depends on (seed, epoch); what augmentation does to image i on (seed, epoch, i).
Neither depends on the number of workers or on what ran before, so a resumed run continues as the first
would have. To that end the sampler hands out tickets (image, epoch, seed) in place of bare positions:
workers need no state, persistent ones included, and Fabric's distributed sampler shares tickets out as it
would positions. The epoch is set in one place, `set_epoch(loader, epoch)`, also through Fabric's wrapper.
(The sampler has no `set_epoch` of its own on purpose: Fabric would call it with its own count, which starts
at 0 again in a resumed run.)
"""

from __future__ import annotations

import signal
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from afds.data.cache import ImageCache
from afds.data.folder import Item
from afds.data.images import ImageError, read_shrunk
from afds.data.shared import PLACE, ROOM, free_shared
from afds.data.transforms import Transform, TwoViews
from afds.errors import AfdsWarning, ConfigError, DataError

DEFAULT_CACHE_BYTES = 2**30


class Ticket(NamedTuple):
    """Which image, and what its augmentation is seeded with."""

    position: int
    epoch: int
    seed: int

    @property
    def random_seed(self) -> int:
        mixed = np.random.SeedSequence((self.seed, self.epoch, self.position))
        return int(mixed.generate_state(1, np.uint64)[0])


def step_seed(seed: int, step: int) -> int:
    """Seed of a step of a lineage: 0 the training from pretrained weights, 1 the run that starts from it, 2 its refit.

    Ours: with one seed for all, a network would be cut, refitted and trained on the very crops, in their very order,
    that it has been fitted to before.
    """
    return seed if step == 0 else int(np.random.SeedSequence((seed, step)).generate_state(1)[0])


class ImageDataset(Dataset[tuple[Any, int]]):
    """(image (3, H, W) float32, label) for each item; with `TwoViews` a pair of images in place of one."""

    def __init__(
        self,
        items: Sequence[Item],
        transform: Transform | TwoViews,
        *,
        cache: bool = False,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        """cache: keep the first `cache_bytes` of shrunk images in memory. It changes speed, never a value."""
        if not items:
            raise DataError("No image to load: the list of items is empty.")
        self.items = items
        self.transform = transform
        self.epoch = 0  # read by the sampler, in the main process
        paths = [item.path for item in items] if cache else []
        self._cache = ImageCache(paths, shrink_to=transform.shrink_to, max_bytes=cache_bytes)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: Ticket | int) -> tuple[Any, int]:
        """key: a ticket, or a position, for which the transform draws from the generator as it stands.

        Raises ImageError naming the file.
        """
        if isinstance(key, int):
            return self.transform(self._read(key)), self.items[key].label
        image = self._read(key.position)
        with torch.random.fork_rng(devices=[]):  # without workers this is the training's own generator
            torch.random.default_generator.manual_seed(key.random_seed)
            return self.transform(image), self.items[key.position].label

    def __getitems__(self, keys: Sequence[Ticket]) -> list[tuple[Any, int]] | ImageError:
        """A batch, not yet stacked; an unreadable file comes back as its error, for `_Loader` to raise."""
        try:
            return [self[key] for key in keys]
        except ImageError as error:
            return error.with_traceback(None)

    def _read(self, position: int) -> Image.Image:
        kept = self._cache.get(position)
        if kept is not None:
            return Image.fromarray(kept)
        image = read_shrunk(self.items[position].path, self.transform.shrink_to)
        self._cache.put(position, np.asarray(image))
        return image


class TicketSampler(Sampler[Ticket]):
    """Every image once, for the epoch that the data set stands at."""

    def __init__(self, dataset: ImageDataset, *, shuffle: bool, seed: int) -> None:
        self.dataset = dataset
        self.shuffle = shuffle
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Ticket]:
        epoch = self.dataset.epoch
        order = np.arange(len(self.dataset))
        if self.shuffle:
            np.random.default_rng((self.seed, epoch)).shuffle(order)
        for position in order.tolist():
            yield Ticket(position, epoch, self.seed)


class _Loader(DataLoader[tuple[Any, int]]):
    """Raises a worker's ImageError here, as it was: DataLoader would put the worker's traceback into it."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a generator serves as well
        for batch in super().__iter__():
            if isinstance(batch, ImageError):
                # Without the del: error -> traceback -> this frame -> error. Such a ring is left to the
                # garbage collector, and workers that it stops take 5 s.
                try:
                    raise batch
                finally:
                    del batch
            yield batch


def _stack(batch: list[tuple[Any, int]] | ImageError) -> Any:
    return batch if isinstance(batch, ImageError) else default_collate(batch)


def make_loader(
    dataset: ImageDataset,
    *,
    batch_size: int,
    shuffle: bool,
    seed: int,
    epoch: int = 0,
    workers: int = 0,
    drop_last: bool = False,
    pin_memory: bool = False,
) -> DataLoader[tuple[Any, int]]:
    """Batches of (images (B, 3, H, W) float32, labels (B,) int64), from `epoch` on.

    Call `set_epoch` before each further epoch. A data set smaller than `batch_size` gives one batch of all
    of it, also with `drop_last`. Raises ConfigError for numbers that make no sense; iterating raises
    ImageError for a file that cannot be read.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0), ("seed", seed, 0)):
        if value < least:
            raise ConfigError(f"{name} is {value}; give at least {least}.")
    dataset.epoch = epoch
    room = max(ROOM, 3 * workers * min(batch_size, len(dataset)) * dataset.transform.bytes)
    if workers and (free := free_shared()) < room:
        told = (f"{PLACE} has {free / 2**20:,.0f} MB free, and {workers} processes want {room / 2**20:,.0f} to hand "
                "photos over: they are read in this one. Give more (docker run --shm-size "
                f"{1 + -(-room // 2**30)}g), or --data-options.workers 0.")  # fmt: skip
        warnings.warn(told, AfdsWarning, stacklevel=2)
        workers = 0
    return _Loader(
        dataset,
        batch_size=min(batch_size, len(dataset)),
        sampler=TicketSampler(dataset, shuffle=shuffle, seed=seed),
        num_workers=workers,
        drop_last=drop_last,
        collate_fn=_stack,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # or each pass would draw a number from the training's own
    )


def set_epoch(loader: Any, epoch: int) -> None:
    """Make the next pass over `loader` (from `make_loader`, wrapped by Fabric or not) be pass `epoch`."""
    loader.dataset.epoch = epoch


def _start_worker(worker_id: int) -> None:
    """Ctrl-C is the main process's to answer: it stops the workers. And loading takes one core a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
