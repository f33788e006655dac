"""A fixed subset of a data set, as links: the first CLASSES class folders by name, or every second one.

python benchmarks/lab/subset.py $AFDS_DATA/caltech101 lab-data/caltech30 --classes 30
python benchmarks/lab/subset.py $AFDS_DATA/caltech101 lab-data/source-half --half 0
python benchmarks/lab/subset.py $AFDS_DATA/caltech101 lab-data/target-half --half 1
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Options:
    """Link some of the classes of a data set into a folder of their own."""

    data: Annotated[Path, tyro.conf.Positional]
    """Folder with train/ and test/."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder to write; it must not exist."""
    classes: int = 0
    """How many classes, the first by name. 0: all."""
    half: int | None = None
    """0 or 1: every second class."""


def main(options: Options) -> None:
    names = sorted(path.name for path in (options.data / "train").iterdir() if path.is_dir())
    names = names[options.half :: 2] if options.half is not None else names
    for split in ("train", "test"):
        for name in names[: options.classes or None]:
            target = options.out / split / name
            target.mkdir(parents=True)
            for photo in sorted((options.data / split / name).iterdir()):
                os.symlink(photo.resolve(), target / photo.name)
    print(f"{options.out}: {len(names[: options.classes or None])} classes")


if __name__ == "__main__":
    main(tyro.cli(Options))
