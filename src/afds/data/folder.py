"""What lies in a folder of photos: classes, splits, and every mistake of layout by name.

Two layouts are read:

    DATA/cat/*.jpg  DATA/dog/*.jpg                  class folders; everything is in the split "all"
    DATA/train/cat/*.jpg  [DATA/val/..] [DATA/test/..]   splits; ``valid`` and ``validation`` mean ``val``

``train/`` is a split if and only if it holds folders and no images. A class that happens to be called
"train" holds images, so DATA/{bus,car,train}/*.jpg is the first layout. Only the images that lie directly
in a class folder count. Hidden files and folders are passed over; so are files that are no images, counted.
"""

from __future__ import annotations

import errno
import os
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from afds.errors import AfdsWarning, DataError

_SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_ARCHIVES = {".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst"}
_NOT_PHOTOS = {"EPS", "MPEG", "HDF5", "GRIB", "BUFR", "WMF"}  # stubs, or read through an outside program
_KNOWN_OTHERS = {
    "thumbs.db",
    "desktop.ini",
    ".txt",
    ".json",
    ".xml",
    ".csv",
    ".tsv",
    ".md",
    ".html",
    ".yaml",
    ".yml",
    ".ini",
    ".log",
    ".mat",
    ".npy",
}  # what lies beside photos and is none: nobody misses it
_SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "__pycache__"}  # left behind by zip tools, NAS boxes and Python


UNLABELLED = -100  # the label that torch's cross-entropy leaves out


class Item(NamedTuple):
    """One image file."""

    path: Path
    label: int
    """Position of its class in ``Folder.classes``, or `UNLABELLED`."""


@dataclass(frozen=True)
class Folder:
    """A scanned folder; the files have been listed, not opened."""

    root: Path
    classes: tuple[str, ...]
    """Folder names, sorted as plain strings (the order torchvision's ImageFolder gives)."""
    splits: dict[str, tuple[Item, ...]]
    """Only "all", or "train" and what there is of "val" and "test"; sorted by class, then file name."""
    ignored: int
    """How many visible files were passed over, not being images."""
    warnings: tuple[str, ...]
    """What a user should know and can live with, one sentence each."""


class _Listing(NamedTuple):
    folders: list[os.DirEntry[str]]
    images: list[str]  # full paths
    others: list[str]  # names of files that are no images


def image_extensions() -> frozenset[str]:
    """Endings, lower case with their dot, of the photo formats that the installed Pillow reads."""
    known = Image.registered_extensions()
    return frozenset(e for e, form in known.items() if form in Image.OPEN and form not in _NOT_PHOTOS)


def image_files(paths: Sequence[Path | str]) -> Iterator[Path]:
    """Files as they are, folders as the images anywhere in them, sorted by path; hidden ones are passed over.

    Raises DataError for a path that is not there, at once, and for a folder without an image, when its turn comes.
    """
    for path in map(Path, paths):
        if not path.exists():
            raise DataError(f"{path}: no such file or folder.")
    return _files_of(paths)


def _files_of(paths: Sequence[Path | str]) -> Iterator[Path]:
    extensions = image_extensions()
    for path in map(Path, paths):
        if not path.is_dir():
            yield path
            continue
        files = sorted(_files_below(path))
        found = [p for p in files if p.suffix.lower() in extensions]
        missed = [p.name for p in files if p.suffix.lower() not in extensions and not _is_known_other(p.name)]
        if not found:
            raise DataError(f"{path}: no image in this folder.{_passed_over(missed)}")
        if missed:
            warnings.warn(
                f"{path}: not all that is in this folder is used.{_passed_over(missed)}", AfdsWarning, stacklevel=2
            )
        yield from found


def _files_below(folder: str | Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Plain files anywhere below, also where links to folders lead, as `scan` follows them, but in no circle."""
    here = os.path.realpath(folder)
    if here in above:
        return
    try:
        with os.scandir(folder) as entries:
            visible = [e for e in entries if not e.name.startswith(".") and e.name not in _SYSTEM_FOLDERS]
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}); check its rights.") from error
    for entry in visible:
        if entry.is_symlink() and _circles(entry.path):
            continue
        if _is_dir(entry):
            yield from _files_below(entry.path, above | {here})
        elif entry.is_symlink() or entry.is_file():  # a link to nothing is named by who reads it
            yield Path(entry.path)


def scan(root: Path | str, *, least: int = 2) -> Folder:
    """List the images under `root` with their classes and splits.

    least: how many classes there have to be; 1 where nothing is learned from them.

    Reads directories only, so 100,000 files take about a second. Raises DataError, naming the place and the
    way out, for: a missing path, a file or an archive in place of a folder, images without class folders,
    one level of folders too many, an empty class folder, too few classes, no image at all, a class that
    ``val`` or ``test`` has and ``train`` has not.
    """
    return _Scanner(Path(root).expanduser(), least).scan()


class _Scanner:
    """One scan: holds what is gathered on the way (warnings, the count of ignored files)."""

    def __init__(self, root: Path, least: int) -> None:
        self.root, self.least = root, least
        self.extensions = image_extensions()
        self.ignored = 0
        self.warnings: list[str] = []

    def scan(self) -> Folder:
        self._check_root()
        top = self._list(self.root)
        split_folders = self._split_folders(top)
        if split_folders:
            classes, splits = self._read_splits(top, split_folders)
        else:
            classes, items = self._read_classes(self.root, top, None)
            splits = {"all": items}
        if len(classes) < self.least:
            where = split_folders["train"] if split_folders else self.root
            raise DataError(
                f"{where}: only one class ({classes[0]!r}), and telling classes apart needs two or more. "
                "Add a folder with images of what is not that class."
            )
        self._warn_small_classes(classes, splits)
        return Folder(self.root, classes, splits, self.ignored, tuple(self.warnings))

    def _check_root(self) -> None:
        if not self.root.exists():
            raise DataError(f"{self.root}: no such folder. Give the folder that holds the class folders.")
        if self.root.is_dir():
            return
        if self.root.suffix.lower() in _ARCHIVES:
            raise DataError(f"{self.root}: an archive, not a folder. Unpack it and give the folder.")
        raise DataError(f"{self.root}: a file, not a folder. Give the folder that holds the class folders.")

    def _list(self, folder: Path | str) -> _Listing:
        listing = _Listing([], [], [])
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_symlink() and _circles(entry.path):
                        self.warnings.append(f"{entry.path}: a link that leads in a circle; passed over.")
                    elif _is_dir(entry):
                        if entry.name not in _SYSTEM_FOLDERS:
                            listing.folders.append(entry)
                    elif os.path.splitext(entry.name)[1].lower() in self.extensions and (
                        entry.is_symlink() or entry.is_file()  # a link to nothing is named when it is read; no pipes
                    ):
                        listing.images.append(entry.path)
                    else:
                        listing.others.append(entry.name)
        except OSError as error:
            raise DataError(f"{folder}: cannot be listed ({error.strerror}); check its rights.") from error
        self.ignored += len(listing.others)
        return listing

    def _split_folders(self, top: _Listing) -> dict[str, Path]:
        """The split folders by split, or nothing where `top` holds class folders."""
        found: dict[str, Path] = {}
        for entry in sorted(top.folders, key=lambda e: e.name):
            split = _SPLIT_NAMES.get(entry.name.lower())
            if split in found:
                raise DataError(f"{self.root}: both {found[split].name}/ and {entry.name}/ mean {split!r}. Keep one.")
            if split:
                found[split] = Path(entry.path)
        if "train" not in found:
            return {}
        ignored = self.ignored
        train = self._list(found["train"])
        self.ignored = ignored  # it is listed again when it is read
        return found if train.folders and not train.images else {}

    def _read_splits(
        self, top: _Listing, folders: dict[str, Path]
    ) -> tuple[tuple[str, ...], dict[str, tuple[Item, ...]]]:
        beside = sorted(e.name for e in top.folders if Path(e.path) not in folders.values())
        if beside or top.images:
            names = some_of([f"{n}/" for n in beside] + [os.path.basename(p) for p in top.images])
            self.warnings.append(f"{self.root}: not used, because it lies beside train/: {names}.")
        train_folder = folders["train"]
        classes, train = self._read_classes(train_folder, self._list(train_folder), None)
        splits = {"train": train}
        for split in ("val", "test"):
            if split in folders:
                listing = self._list(folders[split])
                splits[split] = self._read_classes(folders[split], listing, classes)[1]
        return classes, splits

    def _read_classes(
        self, folder: Path, listing: _Listing, known: tuple[str, ...] | None
    ) -> tuple[tuple[str, ...], tuple[Item, ...]]:
        """The classes in `folder` and their items; labels follow `known` (the classes of train) if given."""
        if listing.images:
            if not listing.folders:
                raise DataError(
                    f"{folder}: {count_of(len(listing.images), 'image')} and no class folders. Put each "
                    f"image into a folder named after its class, as in {folder}/CLASS/image.jpg."
                )
            names = some_of(sorted(os.path.basename(p) for p in listing.images))
            self.warnings.append(f"{folder}: images outside the class folders are not used: {names}.")
        if not listing.folders:
            raise DataError(f"{folder}: no class folders and no images in it.{self._seen(listing.others)}")
        found: dict[str, _Listing] = {}
        for entry in listing.folders:
            name = _class_name(entry)
            if name in found:
                raise DataError(f"{folder}: two folders are called {name!r}, once with its accents composed and once "
                                "not (NFC, NFD). Put their photos into one.")  # fmt: skip
            found[name] = self._list(entry.path)
        if not any(inside.images for inside in found.values()):
            self._refuse_no_images(folder, found)
        if known is not None and (strangers := sorted(set(found) - set(known))):
            raise DataError(
                f"{folder}: classes that train/ does not have: {some_of(strangers)}. "
                "Rename them as in train/, or take them out."
            )
        self._check_each(folder, found, must_have_images=known is None)
        missed = [name for inside in found.values() for name in inside.others if not _is_known_other(name)]
        if missed:
            self.warnings.append(f"{folder}: not all that is in the class folders is used.{self._seen(missed)}")
        if known is not None and (missing := [c for c in known if c not in found or not found[c].images]):
            self.warnings.append(f"{folder}: no image of {count_of(len(missing), 'class')}: {some_of(missing)}.")
        classes = known or tuple(sorted(found))
        items = [
            Item(Path(path), label)
            for label, name in enumerate(classes)
            if name in found
            for path in sorted(found[name].images)
        ]
        return classes, tuple(items)

    def _refuse_no_images(self, folder: Path, found: dict[str, _Listing]) -> None:
        deeper = sorted({inside.name for listing in found.values() for inside in listing.folders})
        if len(found) == 1 and deeper:
            (only,) = found
            raise DataError(f"{folder}: the class folders seem to lie one level deeper. Give {folder / only} instead.")
        if deeper:
            raise DataError(
                f"{folder}: its folders hold no images, only folders ({some_of(deeper)}). "
                "Give a folder whose folders are the classes, or name the training split train/."
            )
        others = [name for listing in found.values() for name in listing.others]
        raise DataError(f"{folder}: no image in its {count_of(len(found), 'folder')}.{self._seen(others)}")

    def _check_each(self, folder: Path, found: dict[str, _Listing], *, must_have_images: bool) -> None:
        empty = sorted(name for name, inside in found.items() if not inside.images)
        if empty and must_have_images:
            others = [name for c in empty for name in found[c].others]
            nested = [c for c in empty if found[c].folders]
            hint = f" The images of {some_of(nested)} may lie one level deeper." if nested else ""
            raise DataError(
                f"{folder}: class folders without an image: {some_of(empty)}. Fill them or delete them."
                f"{hint}{self._seen(others)}"
            )
        nested = sorted(name for name, inside in found.items() if inside.images and inside.folders)
        if nested:
            self.warnings.append(f"{folder}: folders inside class folders are not used: in {some_of(nested)}.")

    def _seen(self, names: Iterable[str]) -> str:
        """What was found in place of images, as a sentence."""
        return _passed_over(names)

    def _warn_small_classes(self, classes: tuple[str, ...], splits: dict[str, tuple[Item, ...]]) -> None:
        sizes = Counter(item.label for item in splits.get("train", splits.get("all", ())))
        checked = {item.label for split in ("val", "test") for item in splits.get(split, ())}
        single = [label for label in range(len(classes)) if sizes[label] == 1]
        for what, labels in (
            ("a single image, which goes to training and is never checked", [i for i in single if i not in checked]),
            ("a single training image", [i for i in single if i in checked]),
        ):
            if labels:
                names = some_of([classes[i] for i in labels])
                self.warnings.append(f"{count_of(len(labels), 'class')} with {what}: {names}.")


def _is_known_other(name: str) -> bool:
    return name.lower() in _KNOWN_OTHERS or os.path.splitext(name)[1].lower() in _KNOWN_OTHERS


def _passed_over(names: Iterable[str]) -> str:
    endings = Counter(os.path.splitext(name)[1].lower() or "no ending" for name in names)
    if not endings:
        return ""
    listed = ", ".join(f"{count_of(n, 'file')} with {e}" for e, n in endings.most_common(3))
    return f" Passed over, as Pillow reads no such photos: {listed}."


def _is_dir(entry: os.DirEntry[str]) -> bool:
    """Also of links that may not be followed, where the entry's own method raises."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _circles(link: str) -> bool:
    """Whether a symbolic link leads to itself or to a folder that it lies in."""
    try:
        target = Path(link).resolve(strict=True)
    except RuntimeError:  # Python before 3.13 has an error of its own for loops
        return True
    except OSError as error:
        return error.errno == errno.ELOOP  # it dangles, or may not be followed: named when it is read
    return target in (here := Path(link).parent.resolve(), *here.parents)


def _class_name(entry: os.DirEntry[str]) -> str:
    """The folder's name, composed (NFC): macOS stores é as two characters, and val/ must match train/."""
    name = unicodedata.normalize("NFC", entry.name)
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{entry.path!r}: the class name is not UTF-8. Rename the folder.") from error
    return name


def some_of(names: list[str], limit: int = 5) -> str:
    """'a, b, c' or 'a, b, c and 7 more'."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def count_of(n: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{n} {noun if n == 1 else plural}"
