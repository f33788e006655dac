"""Small folders of images, made on the spot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MakeTree = Callable[[Mapping[str, int]], Path]


@pytest.fixture
def make_tree(tmp_path: Path) -> MakeTree:
    """make_tree({"cat": 3, "train/dog": 2}) writes that many tiny images into these folders."""

    def make(counts: Mapping[str, int]) -> Path:
        root = tmp_path / "data"
        root.mkdir(exist_ok=True)
        for c, (name, count) in enumerate(sorted(counts.items())):
            (root / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                colour = (40 * c % 256, 10 * i % 256, 128)
                Image.new("RGB", (12, 10), colour).save(root / name / f"{i:03d}.png")
        return root

    return make


@pytest.fixture
def photo() -> Image.Image:
    """64 x 48 of smooth colours with the top left corner dark and the bottom right bright."""
    y, x = np.mgrid[0:48, 0:64]
    pixels = np.stack([x * 4, y * 5, (x + y) * 2], axis=-1)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
