"""Decoded images in memory that all worker processes share, so that each is decoded once.

One flat buffer, made before the workers start, with a slot for each image as large as its header says it
will be. Whoever decodes an image first writes it there. `multiprocessing.RawArray` is shared by forked and
by spawned workers alike, and moves to a temporary file where /dev/shm is too small (as in containers). Where it would
just fit there, and leave workers no room for their batches, fewer are kept.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from afds.data.images import header_size, shrunk_size
from afds.data.shared import ROOM, free_shared


class ImageCache:
    """uint8 images (h, w, 3) by position; the first ones of `paths` that fit into `max_bytes`."""

    def __init__(self, paths: Sequence[Path], *, shrink_to: int | None, max_bytes: int) -> None:
        """Reads headers only, about 0.1 ms a file. `shrink_to`: as in `read_shrunk`."""
        starts = [0]
        for path in paths:
            size = header_size(path, at_least=shrink_to)
            width, height = shrunk_size(size, shrink_to) if size else (0, 0)
            end = starts[-1] + 3 * width * height
            if end > max_bytes:
                break
            starts.append(end)
        free = free_shared()
        if free >= ROOM and starts[-1] <= free:  # with less than ROOM there are no workers, and above it goes to a file
            starts = [start for start in starts if start <= free - ROOM]
        self._starts = np.array(starts)
        self._pixels = multiprocessing.RawArray("B", max(1, starts[-1]))
        self._shapes = multiprocessing.RawArray("i", 2 * len(starts))  # height, width; 0 while not there
        self._lock = multiprocessing.Lock()  # pixels before shape, also where a processor reorders writes

    def __len__(self) -> int:
        """How many images have a slot."""
        return len(self._starts) - 1

    def get(self, i: int) -> NDArray[np.uint8] | None:
        """Image `i`, not to be written to, or None where it has not been put or has no slot."""
        if i >= len(self):
            return None
        with self._lock:
            height, width = self._shapes[2 * i : 2 * i + 2]
        if not height:
            return None
        start = int(self._starts[i])
        flat = np.frombuffer(self._pixels, np.uint8, 3 * height * width, start)
        return flat.reshape(height, width, 3)

    def put(self, i: int, image_HWC: NDArray[np.uint8]) -> None:
        """Keep image `i`; nothing happens where it has no slot or is larger than its header said."""
        if i >= len(self):
            return
        start, end = int(self._starts[i]), int(self._starts[i + 1])
        if image_HWC.size > end - start:
            return
        np.frombuffer(self._pixels, np.uint8, image_HWC.size, start)[:] = image_HWC.reshape(-1)
        with self._lock:
            self._shapes[2 * i : 2 * i + 2] = image_HWC.shape[:2]
