"""A seeded, stratified split into training, validation and test images.

What a folder already gives is kept. Where there is no val/, validation images are split off the training
images; where the folder is not split at all, test images are split off as well. The result depends on the
seed, the class names and the file names, never on the order or the place of the files on disk.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from afds.data.folder import Folder, Item, count_of, some_of
from afds.errors import ConfigError, DataError

DEFAULT_VAL_FRACTION = 0.10  # of the images that are split
DEFAULT_TEST_FRACTION = 0.15  # of the images that are split, where no train/ was given


@dataclass(frozen=True)
class Splits:
    """Who trains, who chooses, who judges. Every choice is made on `val`; `test` is read once, at the end."""

    classes: tuple[str, ...]
    train: tuple[Item, ...]
    val: tuple[Item, ...]
    test: tuple[Item, ...] | None
    """None where there is a train/ folder and no test/ beside it, or where `test_fraction` is 0."""
    unlabelled: tuple[Item, ...] = ()
    """Photos whose classes nobody told (`unlabelled.py`): learned from, where a teacher says what they show."""

    def items(self) -> tuple[Item, ...]:
        """All of them: training, validation, test, without labels."""
        return (*self.train, *self.val, *(self.test or ()), *self.unlabelled)

    def fingerprint(self) -> str:
        """SHA-256 of which photo is in which split: class folder, file name, label, wherever the folder lies."""
        digest = hashlib.sha256()
        for name in ("train", "val", "test"):
            for item in getattr(self, name) or ():
                digest.update(
                    f"{name}\0{item.path.parent.name}\0{item.path.name}\0{item.label}\n".encode(
                        errors="surrogateescape"
                    )
                )
        return digest.hexdigest()


def make_splits(
    folder: Folder,
    *,
    val_fraction: float = DEFAULT_VAL_FRACTION,
    test_fraction: float = DEFAULT_TEST_FRACTION,
    seed: int,
) -> Splits:
    """Split `folder`; each class keeps at least one training image.

    Apart from that, each class gives each part its share, rounded up or down, and the part as a whole its
    share to the nearest image. Raises ConfigError for fractions that make no sense, DataError where there
    are too few images to split.
    """
    _check_fractions(val_fraction, test_fraction)
    given = folder.splits
    train, val, test = given.get("train", given.get("all", ())), given.get("val"), given.get("test")
    total = len(train)
    if "all" in given and test_fraction > 0:
        train, test = _split_off(train, round(total * test_fraction), test_fraction, folder, f"{seed}/test")
        _refuse_empty(test, "test", test_fraction, total, folder)
    if val is None:
        # both fractions are of the same whole: what test took must not make validation smaller
        fraction = val_fraction * total / len(train)
        train, val = _split_off(train, round(total * val_fraction), fraction, folder, f"{seed}/val")
        _refuse_empty(val, "validation", val_fraction, total, folder)
    return Splits(folder.classes, train, val, test)


def classes_unseen(splits: Splits, folder: Folder) -> list[str]:
    """Which classes no image judges in the parts that were split off here: a sentence for each part."""
    told = []
    for part, name, items in (("val", "validation", splits.val), ("test", "test", splits.test or ())):
        known = {item.label for item in items}
        missing = [label for i, label in enumerate(splits.classes) if i not in known]
        if items and missing and part not in folder.splits:
            told.append(f"no {name} image of {count_of(len(missing), 'class')}, which have few: {some_of(missing)}.")
    return told


def _check_fractions(val_fraction: float, test_fraction: float) -> None:
    if not 0 < val_fraction < 1:
        raise ConfigError(f"val_fraction is {val_fraction}; give a number between 0 and 1, such as 0.1.")
    if not 0 <= test_fraction < 1:
        raise ConfigError(f"test_fraction is {test_fraction}; give 0 or a number under 1, such as 0.15.")
    if val_fraction + test_fraction > 0.9:
        raise ConfigError(
            f"val_fraction {val_fraction} and test_fraction {test_fraction} leave under a tenth "
            "for training. Lower one of them."
        )


def _split_off(
    items: Iterable[Item], wanted: int, fraction: float, folder: Folder, seed: str
) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """(what stays, what is split off), both sorted. `wanted`: how many images to split off in all."""
    by_class: list[list[Item]] = [[] for _ in folder.classes]
    for item in items:
        by_class[item.label].append(item)
    counts = _allot([len(c) for c in by_class], wanted, fraction, random.Random(seed))
    stay: list[Item] = []
    gone: list[Item] = []
    for name, members, count in zip(folder.classes, by_class, counts, strict=True):
        members.sort(key=_by_name)
        order = list(range(len(members)))
        # a stream of its own for each class, so that another class's new images leave this one's split alone
        random.Random(f"{seed}/{name}").shuffle(order)
        chosen = set(order[:count])
        for i, item in enumerate(members):
            (gone if i in chosen else stay).append(item)
    return tuple(stay), tuple(gone)


def _by_name(item: Item) -> tuple[str, str]:
    return item.path.name, str(item.path)


def _allot(sizes: list[int], wanted: int, fraction: float, rng: random.Random) -> list[int]:
    """How many of each class to split off: largest remainders first, ties drawn by lot.

    Plain rounding would fail small classes all the same way: a tenth of 4 images is 0 in every class.
    """
    shares = [size * fraction for size in sizes]
    counts = [max(0, min(int(share), size - 1)) for share, size in zip(shares, sizes, strict=True)]
    lot = [rng.random() for _ in sizes]
    order = sorted(range(len(sizes)), key=lambda c: (-round(shares[c] - int(shares[c]), 9), lot[c]))
    left = wanted - sum(counts)
    for c in order:
        if left <= 0:
            break
        if counts[c] < sizes[c] - 1 and counts[c] < shares[c]:
            counts[c] += 1
            left -= 1
    return counts


def _refuse_empty(items: tuple[Item, ...], what: str, fraction: float, total: int, folder: Folder) -> None:
    if items:
        return
    largest = max(Counter(i.label for part in folder.splits.values() for i in part).values(), default=0)
    reason = "every class has a single image" if largest <= 1 else f"{fraction:g} of {total} is less than one"
    raise DataError(
        f"{folder.root}: {total} images in {len(folder.classes)} classes are too few to split off "
        f"{what} images ({reason}). Add images, or raise the fraction, or give train/ and val/ folders."
    )
