"""Photos without labels, of what the network will see: more to distil from, where a teacher says what they show.

::

    FOLDER, or files --> every image in it --> less those that are in a split already --> items without a label

What a validation or test split holds must not be learned from, so a photo whose content is in any split is left out,
whatever it is called. Ours: with few labelled photos a narrow network repeats its teacher on the photos that it has
learned from and not on new ones (docs/accuracy.md).
"""

from __future__ import annotations

import filecmp
import hashlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from afds.data.folder import UNLABELLED, Item, image_files
from afds.data.split import Splits
from afds.errors import DataError


def with_unlabelled(splits: Splits, folder: Path) -> Splits:
    """``splits`` with the photos in a folder, or anywhere below it, that are in none of them; each content once.

    Raises:
        DataError: no such folder, no image in it, or only such as are in the splits already.
    """
    known: dict[int, list[Path]] = {}  # by size in bytes: few files need be read
    for item in splits.items():
        known.setdefault(_size(item.path), []).append(item.path)
    found, new = list(image_files([folder])), []
    for path in found:
        of_this_size = known.setdefault(_size(path), [])
        if not any(_same(path, other) for other in of_this_size):
            of_this_size.append(path)
            new.append(Item(path, UNLABELLED))
    if not new:
        raise DataError(f"--unlabelled {folder}: its photos, {len(found)}, are all among the labelled ones.")
    return replace(splits, unlabelled=tuple(new))


def fingerprint(items: Iterable[Item]) -> str:
    """SHA-256 of the names of photos, wherever their folder lies."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(f"{item.path.parent.name}\0{item.path.name}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # a link to nothing: told of with all that cannot be read
        return -1


def _same(one: Path, other: Path) -> bool:
    try:
        return filecmp.cmp(one, other, shallow=False)
    except OSError:  # what cannot be read is told of with all the others that cannot
        return False
