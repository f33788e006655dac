"""The cache holds what was put, within its bytes."""

from __future__ import annotations

import numpy as np
from PIL import Image

import afds  # noqa: F401
from afds.data.cache import ImageCache
from afds.data.images import read_shrunk
from afds.data.shared import ROOM


def test_what_is_put_comes_back_and_the_rest_does_not(tmp_path):
    rng = np.random.default_rng(0)
    sizes = [(640, 480), (110, 108), (64, 62), (481, 643), (30, 40), (7, 900), (1201, 333)]
    paths = []
    for i, (width, height) in enumerate(sizes):
        path = tmp_path / f"{i}.jpg"
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path)
        paths.append(path)
    paths.append(tmp_path / "missing.jpg")
    cache = ImageCache(paths, shrink_to=50, max_bytes=10**7)
    assert len(cache) == len(paths)
    images = [np.asarray(read_shrunk(path, 50)) for path in paths[:-1]]
    assert cache.get(0) is None
    for i, image in enumerate(images):
        cache.put(i, image)
    for i, image in enumerate(images):
        assert np.array_equal(cache.get(i), image), sizes[i]
    missing = len(images)
    cache.put(missing, images[0])  # no room was kept for an unreadable file
    assert cache.get(missing) is None


def test_it_stops_at_its_bytes(tmp_path):
    for i in range(4):
        Image.new("RGB", (10, 10)).save(tmp_path / f"{i}.png")
    cache = ImageCache([tmp_path / f"{i}.png" for i in range(4)], shrink_to=None, max_bytes=600)
    assert len(cache) == 2
    image = np.ones((10, 10, 3), np.uint8)
    cache.put(3, image)
    assert cache.get(3) is None
    cache.put(1, image)
    assert np.array_equal(cache.get(1), image)


def test_room_is_left_for_the_batches_of_workers(tmp_path, monkeypatch):
    Image.new("RGB", (10, 10)).save(tmp_path / "a.png")
    # 299: all go to a temporary file; below ROOM there are no workers
    for free, kept in ((299, 2), (600, 2), (ROOM, 0), (299 + ROOM, 0), (599 + ROOM, 1), (600 + ROOM, 2)):
        monkeypatch.setattr("afds.data.cache.free_shared", lambda free=free: free)
        assert len(ImageCache([tmp_path / "a.png"] * 2, shrink_to=None, max_bytes=600)) == kept
