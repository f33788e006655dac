"""Which file of an archive becomes which image of the prepared folder.

    names in the archive, its lists  ->  Plan: {name in the archive: train/CLASS/FILE}

A name from an archive is never used as a path. It is split, its parts are checked, and class and file name are put
together anew.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from afds.errors import ConfigError, DataError

MAX_LIST_BYTES = 64 * 2**20  # the longest published list, Food-101's train.json, has 2 MB
_MAX_NAME_BYTES = 255  # of one component; common file systems take no more
_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f/\\]")  # separators and control characters


@dataclass(frozen=True)
class Options:
    """What is left to choose, which is something in Caltech-256 alone."""

    seed: int = 0
    split: Literal["random", "l2-sp"] = "random"
    test_per_class: int = 20
    clutter: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**31:
            raise ConfigError(f"--seed must be from 0 to 2147483647, got {self.seed}.")
        if self.test_per_class < 0:
            raise ConfigError(f"--test-per-class must be 0 (all that is left) or more, got {self.test_per_class}.")
        if self.split == "l2-sp" and self.test_per_class != 20:
            raise ConfigError("--split l2-sp tests on the images 61 to 80 of each class: leave --test-per-class out.")


class Readable(Protocol):
    """The files that were given, archives opened: names with forward slashes, and the content of small ones."""

    @property
    def names(self) -> Mapping[str, int]:
        """Size in bytes of every plain file, by name."""
        ...

    def read(self, name: str) -> bytes:
        """Content of a list file. Raises DataError naming the archive."""
        ...

    def where(self, name: str) -> str:
        """`name` and the archive it is in, for people."""
        ...


class Target(NamedTuple):
    """Where an image goes."""

    split: Literal["train", "test"]
    label: str
    file: str


@dataclass
class Plan:
    """What to take out, and what a user should know."""

    targets: dict[str, Target] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def classes(self) -> int:
        return len({t.label for t in self.targets.values()})

    def count(self, split: str) -> int:
        return sum(t.split == split for t in self.targets.values())


def component(text: str, where: str) -> str:
    """`text` as one component of a path. Raises DataError where it is none, naming `where` it stood."""
    trimmed = text.strip()
    bad = not trimmed or trimmed.startswith(".") or _FORBIDDEN.search(trimmed)
    if bad or len(trimmed.encode("utf-8", "replace")) > _MAX_NAME_BYTES:
        raise DataError(f"{where}: {text[:80]!r} is no name for a folder or an image. The file is not as published.")
    return trimmed


def hidden(name: str) -> bool:
    """Left behind by file managers: `._a.jpg`, `.DS_Store`, `__MACOSX/a.jpg`, `Thumbs.db`."""
    return any(p.startswith(".") or p in ("__MACOSX", "Thumbs.db", "desktop.ini") for p in name.split("/"))


def find_one(source: Readable, ending: str) -> str:
    """The name that is `ending` or ends with /`ending`; of several the least deep.

    Raises DataError where there is none, saying what lies there instead.
    """
    found = [n for n in source.names if (n == ending or n.endswith("/" + ending)) and not hidden(n)]
    if not found:
        base = ending.rsplit("/", 1)[-1]
        near = [n for n in source.names if n.lower().endswith(base.lower())]
        other = [n for n in source.names if n.lower().endswith((".mat", ".txt", ".json"))]
        seen = ", ".join(sorted(near or other)[:5]) or "no list file at all"
        raise DataError(f"{ending} is missing in what was given; found instead: {seen}.")
    return min(found, key=lambda n: (n.count("/"), n))


def lines_of(source: Readable, name: str) -> list[str]:
    """The lines of a text file that say something; a byte order mark, CR LF and blanks at the ends are taken off."""
    data = source.read(name)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{source.where(name)}: not a text file in UTF-8 ({error.reason}).") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def split_pair(entry: str, where: str) -> tuple[str, str]:
    """`CLASS/FILE` of a list, also `CLASS\\FILE` and with folders before it, as two checked components."""
    parts = entry.replace("\\", "/").split("/")
    if len(parts) < 2 or ".." in parts:
        raise DataError(f"{where}: {entry[:80]!r} is not of the form CLASS/IMAGE. The file is not as published.")
    return component(parts[-2], where), component(parts[-1], where)


def images_below(source: Readable, folder: str) -> dict[tuple[str, str], str]:
    """{(class, file): name} of the files at any/where/`folder`/CLASS/FILE."""
    found: dict[tuple[str, str], str] = {}
    for name in source.names:
        parts = name.split("/")
        if len(parts) >= 3 and parts[-3] == folder and not hidden(name):
            found.setdefault((parts[-2], parts[-1]), name)
    return found


def from_lists(
    source: Readable, folder: str, lists: Mapping[Literal["train", "test"], tuple[str, Iterable[str]]]
) -> Plan:
    """Take the images named in `lists` (split -> (name of the list, its CLASS/FILE entries)) from below `folder`.

    Raises DataError where a list names an image that is not there, or both lists name the same one.
    """
    plan, images = Plan(), images_below(source, folder)
    if not images:
        raise DataError(
            f"No images at {folder}/CLASS/IMAGE in what was given. The images' archive is not as published."
        )
    by_lower = {(c.lower(), f.lower()): (c, f) for c, f in images}
    seen: dict[tuple[str, str], str] = {}
    missing: list[str] = []
    respelled = twice = 0
    for split, (list_name, entries) in lists.items():
        where = source.where(list_name)
        count = 0
        for entry in entries:
            count += 1
            pair = split_pair(entry, where)
            if pair not in images:
                found = by_lower.get((pair[0].lower(), pair[1].lower()))
                respelled += found is not None
                pair = found or pair
            if pair in seen:
                if seen[pair] != split:
                    raise DataError(
                        f"{where}: {'/'.join(pair)} is in both lists; the test would not be one. "
                        "The lists are not as published."
                    )
                twice += 1
                continue
            seen[pair] = split
            if pair in images:
                label, file = (component(part, images[pair]) for part in pair)
                plan.targets[images[pair]] = Target(split, label, file)
            else:
                missing.append("/".join(pair))
        if not count:
            raise DataError(f"{where}: an empty list. The file is not as published.")
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise DataError(
            f"{len(missing)} of the {len(seen)} listed images are not in what was given: {shown}. "
            "The images' archive is incomplete or another one; fetch it again."
        )
    if twice:
        plan.notes.append(f"{twice} lines of the lists name an image a second time; it is taken once.")
    if respelled:
        plan.notes.append(f"{respelled} images are spelled in the lists with other capitals than in the archive.")
    unused = len(images) - len(plan.targets)
    if unused > 0:
        plan.notes.append(f"{unused:,} images of the archive are in neither list and stay out.")
    return plan


def same_classes(plan: Plan) -> None:
    """Raises DataError where a class is tested and never trained on."""
    have = {s: Counter(t.label for t in plan.targets.values() if t.split == s) for s in ("train", "test")}
    if strangers := sorted(set(have["test"]) - set(have["train"])):
        raise DataError(f"No training image of: {', '.join(strangers[:5])}. The lists are not as published.")
