"""Handwritten digits as a folder of PNG files: data for `afds demo` that needs no download.

The images are scikit-learn's copy of the UCI "Optical Recognition of Handwritten Digits" set (Alpaydin and
Kaynak, 1998; CC BY 4.0): 1,797 images of 8 x 8 pixels, about 180 of each digit.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from afds.errors import ConfigError, DataError

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_NOTE = "digits.json"  # what the folder was made with; no image, so a scan passes it over


def write_digits(
    root: Path | str,
    digits: Sequence[int] = tuple(range(10)),
    *,
    per_class: int | None = None,
    test_per_class: int = 40,
    seed: int = 0,
    size: int = 32,
) -> Path:
    """Write `root`/train/three/0001.png and so on, and `root`/test/..; returns `root`.

    per_class: training images of each digit, None for all that `test_per_class` leaves. size: side in pixels.
    The folder appears whole or not at all; if it is there already, made with the same numbers, nothing is
    done. Raises ConfigError for numbers out of range, DataError if something else lies at `root`.
    """
    root = Path(root)
    made_with = {
        "digits": sorted(set(digits)),
        "per_class": per_class,
        "test_per_class": test_per_class,
        "seed": seed,
        "size": size,
    }
    _check(made_with)
    if root.exists():
        if _note_of(root) != made_with:
            raise DataError(f"{root}: something else is here. Choose another folder, or delete this one.")
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        _write(building, made_with)
        building.chmod(0o755)  # mkdtemp's are closed to others
        os.rename(building, root)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return root


def _check(made_with: dict) -> None:
    digits, per_class = made_with["digits"], made_with["per_class"]
    if len(digits) < 2 or not set(digits) <= set(range(10)):
        raise ConfigError(f"digits are {digits}; give two or more different ones from 0 to 9.")
    if made_with["test_per_class"] < 1 or (per_class is not None and per_class < 1):
        raise ConfigError("per_class and test_per_class: give at least 1.")
    if not 8 <= made_with["size"] <= 512:
        raise ConfigError(f"size is {made_with['size']}; give 8 to 512 pixels.")


def _note_of(root: Path) -> dict | None:
    try:
        note = json.loads((root / _NOTE).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) else None


def _write(root: Path, made_with: dict) -> None:
    from sklearn.datasets import load_digits  # a second to import, and only the demo needs it

    images_NHW, labels_N = load_digits(return_X_y=True)
    images_NHW = images_NHW.reshape(-1, 8, 8)  # values 0 to 16
    n_test, n_train = made_with["test_per_class"], made_with["per_class"]
    for digit in made_with["digits"]:
        rng = np.random.default_rng((made_with["seed"], digit))
        order = rng.permutation(np.flatnonzero(labels_N == digit))
        needed = n_test + (1 if n_train is None else n_train)
        if needed > len(order):
            raise ConfigError(
                f"There are {len(order)} images of the digit {digit}, and {needed} were asked for. "
                "Lower per_class or test_per_class."
            )
        parts = {"test": order[:n_test], "train": order[n_test:] if n_train is None else order[n_test:needed]}
        for part, chosen in parts.items():
            folder = root / part / CLASS_NAMES[digit]
            folder.mkdir(parents=True)
            for i in chosen:
                grey = Image.fromarray(np.rint(images_NHW[i] * (255 / 16)).astype(np.uint8))
                side = made_with["size"]
                grey.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{i:04d}.png")
    (root / _NOTE).write_text(json.dumps(made_with), "utf-8")
