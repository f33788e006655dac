"""Every image is read once before the training starts, so that a damaged one is named now and not in an hour.

Checked is that the file decodes to its end. JPEGs are decoded at an eighth of their size, which still reads
every byte, so truncation shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from afds.data.folder import Item
from afds.data.images import ImageError, read_rgb
from afds.data.split import Splits
from afds.errors import DataError


class Unreadable(NamedTuple):
    """A file that cannot be read, and why."""

    path: Path
    reason: str


def check_images(items: Sequence[Item], *, workers: int) -> list[Unreadable]:
    """Read every file of `items` once, in `workers` threads (Pillow decodes outside the GIL).

    Returns the unreadable ones, in the order of `items`.
    """
    with ThreadPoolExecutor(max(1, workers)) as pool:
        reasons = pool.map(_why_unreadable, (item.path for item in items))
        return [Unreadable(i.path, reason) for i, reason in zip(items, reasons, strict=True) if reason]


def _why_unreadable(path: Path) -> str | None:
    try:
        read_rgb(path, at_least=1)
    except ImageError as error:
        return error.reason
    return None


def describe(unreadable: Sequence[Unreadable], limit: int = 20) -> str:
    """One line a file, at most `limit` of them."""
    lines = [f"  {path}: {reason}" for path, reason in unreadable[:limit]]
    if len(unreadable) > limit:
        lines.append(f"  and {len(unreadable) - limit} more")
    return "\n".join(lines)


def without(splits: Splits, unreadable: Sequence[Unreadable]) -> Splits:
    """`splits` less the unreadable files.

    Raises DataError where that takes the last training image of a class, or all of val or test.
    """
    gone = {entry.path for entry in unreadable}
    train, val = _keep(splits.train, gone), _keep(splits.val, gone)
    test = None if splits.test is None else _keep(splits.test, gone)
    left = Counter(item.label for item in train)
    had = {item.label for item in splits.train}
    bare = [splits.classes[label] for label in sorted(had) if not left[label]]
    if bare:
        raise DataError(
            f"No readable training image is left of: {', '.join(bare[:5])}"
            f"{f' and {len(bare) - 5} more' if len(bare) > 5 else ''}. "
            f"Replace these files, or delete the class folders:\n{describe(unreadable)}"
        )
    for name, before, after in (("validation", splits.val, val), ("test", splits.test, test)):
        if before and not after:
            raise DataError(f"None of the {len(before)} {name} images can be read:\n{describe(unreadable)}")
    return replace(splits, train=train, val=val, test=test, unlabelled=_keep(splits.unlabelled, gone))


def _keep(items: tuple[Item, ...], gone: set[Path]) -> tuple[Item, ...]:
    return tuple(item for item in items if item.path not in gone)
