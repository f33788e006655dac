"""What a network takes for what: pairs of classes, and single photos.

::

    label   said    share           confusions    lotus taken for water_lilly: 9 of 20 images
    lotus   lotus   0.91
    lotus   water_lilly   0.98      mistakes      the images that are wrong, those first of which it is surest:
    ...                                           photos in the wrong folder are often among them
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MOST = 20  # pairs that are kept


@dataclass(frozen=True)
class Mistake:
    """One image that was taken for another class."""

    path: Path
    label: str
    said: str
    share: float
    """The network's probability of what it said."""


def confusions(labels: Sequence[int], said: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    """(class, class it was taken for, images) of the `MOST` frequent pairs, the most frequent first."""
    pairs = Counter((a, b) for a, b in zip(labels, said, strict=True) if a != b)
    ranked = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))
    return tuple((a, b, count) for (a, b), count in ranked[:MOST])


def surest(
    paths: Sequence[Path], labels: Sequence[int], said: Sequence[int], shares: Sequence[float], names: Sequence[str]
) -> tuple[Mistake, ...]:
    """All mistakes, those first of which the network is surest."""
    found = [
        Mistake(path, names[a], names[b], share)
        for path, a, b, share in zip(paths, labels, said, shares, strict=True)
        if a != b
    ]
    return tuple(sorted(found, key=lambda mistake: (-mistake.share, mistake.path)))
