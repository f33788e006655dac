"""`afds prepare`: from the archives as published to a folder with train/ and test/ that `afds fit` takes.

    files given -> which is which -> sizes and checksums -> contents and lists -> the plan -> room on the disk
                -> everything into a hidden folder beside --out -> counted -> renamed to --out

So whatever stops it, the folder is whole or not there. What it was made from is kept in its `prepared.json`.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from afds.data.published.archives import Bundle, FileSource, FolderSource, Source, TarSource, copy, digests
from afds.data.published.catalogue import PublishedFile, PublishedSet, catalogue
from afds.data.published.plan import Options, Plan, same_classes
from afds.errors import DataError

NOTE = "prepared.json"
_SPARE_BYTES = 64 * 2**20  # left free on the disk
_TAR_ENDINGS = (".tar", ".tgz", ".tar.gz")
_MAGIC = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\x00": "TIFF",
    b"MM\x00*": "TIFF",
    b"RIFF": "WebP",
}

Tell = Callable[[str, int, int], None]
"""(what is being done, how much of it, out of how much): bytes or images."""


@dataclass(frozen=True)
class Prepared:
    """What lies in the folder."""

    out: Path
    classes: int
    train: int
    test: int
    notes: tuple[str, ...]
    fresh: bool
    """False where it was there already."""


def prepare(
    published: PublishedSet,
    given: Sequence[Path],
    out: Path,
    options: Options | None = None,
    *,
    skip_checksum: bool = False,
    tell: Tell = lambda what, done, total: None,
) -> Prepared:
    """Write `out`/train/CLASS/IMAGE and `out`/test/CLASS/IMAGE from the files in `given`.

    given: the published files, or folders that hold them, packed or unpacked. skip_checksum: take files of another
    size, checksum or number of images than the published ones.
    Raises DataError naming the file: not found, not the published one, damaged, hostile, a listed image missing, no
    room, or something else at `out`. A finished `out` made with the same options is left as it is.
    """
    options = options or Options()
    out = out.expanduser()
    made_with = {"set": published.name, **asdict(options)}
    if (ready := _finished(out, made_with)) is not None:
        return ready
    passing = [f"left behind by an interrupted run, delete it: {p}" for p in _leftovers(out)]
    notes: list[str] = []  # those about the data, which are kept in the folder
    found = locate(published, given)
    checked = [f for f in published.files if f in found.packed]
    if not skip_checksum:
        for file in checked:
            _check_size(file, found.packed[file])
    _check_room(out, _least_bytes(published, found))
    if not skip_checksum:  # before an archive is opened: what is not the published one is not parsed at all
        notes += _check_digests(checked, found.packed, tell)

    sources: list[Source] = [FolderSource(folder) for folder in found.unpacked]
    for file in checked:
        path = found.packed[file]
        tell(f"Reading {path.name}", 0, 0)
        sources.append(TarSource(path) if file.name.endswith(_TAR_ENDINGS) else FileSource(path, file.name))
    bundle = Bundle(sources)
    plan = published.plan(bundle, options)
    same_classes(plan)
    sizes = bundle.names
    _check_room(out, sum(sizes[n] for n in plan.targets if not _linkable(bundle, n, out)))
    if not skip_checksum:
        _check_counts(published, plan, options)
    elif difference := _difference(published, plan, options):
        notes.append(f"not the published set: {difference}.")
    if found.unpacked:
        notes.append("no checksum of what was unpacked already; the number of images is right."
                     if not skip_checksum else "no checksum of what was unpacked already.")  # fmt: skip
    notes += plan.notes
    _write(published, bundle, plan, out, made_with, notes, tell)
    return Prepared(out, plan.classes, plan.count("train"), plan.count("test"), (*passing, *notes), fresh=True)


# What was given


@dataclass(frozen=True)
class Found:
    """Which published file is where."""

    packed: dict[PublishedFile, Path]
    unpacked: tuple[Path, ...]
    """Folders that hold the content of the others."""


def locate(published: PublishedSet, given: Sequence[Path]) -> Found:
    """Find each published file in `given`. Raises DataError: what is missing, where to get it, what was found."""
    packed: dict[PublishedFile, Path] = {}
    unpacked: dict[PublishedFile, Path] = {}
    others: list[Path] = []
    for path in (p.expanduser() for p in given):
        if path.is_dir():
            entries = _entries(path)
            for file in published.files:
                lower = {n.lower(): n for n in entries}
                if file.name.lower() in lower:
                    packed.setdefault(file, path / lower[file.name.lower()])
                elif all(_holds(path, mark) for mark in file.unpacked):
                    unpacked.setdefault(file, path)
                elif path.name in file.unpacked:  # the unpacked folder itself
                    unpacked.setdefault(file, path.parent)
            others += [path / n for n in entries if n.lower().endswith((*_TAR_ENDINGS, ".zip"))]
        elif path.is_file():
            if file_of := _recognise(published, path):
                packed.setdefault(file_of, path)
            elif file_of := _loose(published, path):
                unpacked.setdefault(file_of, path.parent)
            else:
                others.append(path)
        else:
            raise DataError(f"{path}: no such file or folder.")
    missing = [f for f in published.files if f not in packed and f not in unpacked]
    renamed = [p for p in others if p in given and p.name.lower().endswith(_TAR_ENDINGS) and not _set_of(p)]
    if len(missing) == len(renamed) == 1 and missing[0].name.endswith(_TAR_ENDINGS):
        packed[missing.pop()] = renamed[0]  # its checksum tells whether it is the one
    if missing:
        unknown = [p for p in others if p not in packed.values()]
        raise DataError(_missing(published, missing, given, unknown))
    loose = dict.fromkeys(folder for file, folder in unpacked.items() if file not in packed)
    return Found(packed, tuple(loose))


def _entries(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}); check its rights.") from error


def _holds(folder: Path, mark: str) -> bool:
    return (folder / mark).exists() or any((folder / sub / mark).exists() for sub in ("lists", "indoorCVPR_09"))


def _recognise(published: PublishedSet, path: Path) -> PublishedFile | None:
    """By its name, or, where a browser renamed it (`images (1).tar`), by its exact size."""
    by_name = [f for f in published.files if f.name.lower() == path.name.lower()]
    size = path.stat().st_size
    return next(iter(by_name or [f for f in published.files if f.size == size]), None)


def _loose(published: PublishedSet, path: Path) -> PublishedFile | None:
    """The archive whose unpacked content `path` is, together with what lies beside it: train_list.mat, say."""
    for file in published.files:
        if path.name in file.unpacked and all((path.parent / mark).exists() for mark in file.unpacked):
            return file
    return None


def _set_of(path: Path) -> str:
    """The name of the set that publishes a file of this name, or nothing."""
    return next((s.name for s in catalogue().values() for f in s.files if f.name == path.name), "")


def _missing(published: PublishedSet, missing: list[PublishedFile], given: Sequence[Path], others: list[Path]) -> str:
    lines = [f"{published.title} needs {', '.join(f.name for f in published.files)}. Missing:"]
    for file in missing:
        size = f" ({file.size:,} bytes)" if file.size else ""
        lines += [f"  {file.name}{size}", f"    {file.url}", *([f"    {file.note}"] if file.note else [])]
    lines.append(f"  home page: {published.home}")
    if not given:
        lines.append(f"Give the files, or the folder that they are in: afds prepare {published.name} FOLDER --out DIR")
        return "\n".join(lines)
    looked = ", ".join(str(p) for p in given)
    lines.append(f"Looked in: {looked}.")
    if others:
        shown = ", ".join(f"{p.name} ({', '.join(_facts(p))})" for p in others[:5])
        zipped = any(p.suffix.lower() == ".zip" for p in others)
        lines.append(f"Found instead: {shown}." + (" Unpack a zip and give its folder." if zipped else ""))
    return "\n".join(lines)


def _facts(path: Path) -> list[str]:
    try:
        facts = [f"{path.stat().st_size:,} bytes"]
    except OSError:
        facts = ["unreadable"]
    return facts + ([f"of {_set_of(path)}"] if _set_of(path) else [])


# Checks


def _check_size(file: PublishedFile, path: Path) -> None:
    size = path.stat().st_size
    if file.size is None or size == file.size:
        return
    what = "cut off" if size < file.size else "another file"
    raise DataError(
        f"{path}: {size:,} bytes, and the published {file.name} has {file.size:,}: {what}. Fetch it again from "
        f"{file.url}, or take it as it is with --skip-checksum."
    )


def _check_digests(files: list[PublishedFile], packed: dict[PublishedFile, Path], tell: Tell) -> list[str]:
    """One recorded digest of each file must match. Returns notes. Raises DataError."""
    notes = []
    for file in files:
        recorded = {a: d for a, d in (("sha256", file.sha256), ("md5", file.md5)) if d}
        path = packed[file]
        if not recorded:
            notes.append(f"{file.name}: no checksum is known; its content was read to the end.")
            continue
        total, done = path.stat().st_size, 0

        def advance(count: int, name: str = path.name, total: int = total) -> None:
            nonlocal done
            done += count
            tell(f"Checking {name}", done, total)

        have = digests(path, tuple(recorded), advance)
        if not any(have[a] == d for a, d in recorded.items()):
            pairs = "; ".join(f"{a} {have[a]}, published {d}" for a, d in recorded.items())
            raise DataError(
                f"{path}: not the published {file.name} ({pairs}; recorded by {file.recorded_by}). Fetch it again from "
                f"{file.url}, or take it as it is with --skip-checksum."
            )
    return notes


def _difference(published: PublishedSet, plan: Plan, options: Options) -> str:
    """How the plan's counts are not the published ones, or nothing."""
    extra = 1 if options.clutter else 0
    per_class = published.train // published.classes
    want = {"classes": published.classes, "training images": published.train, "test images": published.test}
    have = {"classes": plan.classes, "training images": plan.count("train"), "test images": plan.count("test")}
    if published.name.startswith("caltech256"):
        want["classes"] += extra
        want["training images"] += extra * per_class
        want["test images"] = want["classes"] * options.test_per_class or have["test images"]
    return ", ".join(f"{have[k]:,} {k} in place of {want[k]:,}" for k in want if have[k] != want[k])


def _check_counts(published: PublishedSet, plan: Plan, options: Options) -> None:
    if difference := _difference(published, plan, options):
        raise DataError(
            f"{published.title}: {difference}. Something is missing in what was given; fetch the archives again, or "
            "take it as it is with --skip-checksum."
        )


def _least_bytes(published: PublishedSet, found: Found) -> int:
    """What the prepared folder takes at least, told from the archives' sizes alone."""
    archives = sum(p.stat().st_size for p in found.packed.values())
    return int(0.5 * archives * (published.train + published.test) / published.images)


def _check_room(out: Path, needed: int) -> None:
    parent = next(p for p in (out.absolute().parent, *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed + _SPARE_BYTES:
        raise DataError(
            f"--out {out}: about {needed / 2**20:,.0f} MiB are needed there and {free / 2**20:,.0f} MiB are free. "
            "Make room, or name a folder on another disk."
        )


def _linkable(bundle: Bundle, name: str, out: Path) -> bool:
    """Whether a hard link will do: an unpacked file on the same disk."""
    source = bundle.source_of(name)
    if not isinstance(source, FolderSource):
        return False
    parent = next(p for p in (out.absolute().parent, *out.absolute().parents) if p.exists())
    return source.path.stat().st_dev == parent.stat().st_dev


# The folder


def _finished(out: Path, made_with: dict[str, Any]) -> Prepared | None:
    """`out` where it is done already. Raises DataError where something else is there."""
    if not out.exists() and not out.is_symlink():
        return None
    if not out.is_dir():
        raise DataError(f"--out {out}: a file is there. Name a folder that does not exist yet.")
    if not any(out.iterdir()):
        return None
    try:
        note = json.loads((out / NOTE).read_text("utf-8"))
        train, test, classes = (int(note[k]) for k in ("train", "test", "classes"))
        before, notes = dict(note["made_with"]), tuple(str(line) for line in note["notes"])
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(
            f"--out {out} is not empty and afds did not prepare it. Name a new folder; nothing is ever overwritten."
        ) from None
    if before != made_with:
        other = ", ".join(f"{k} {before.get(k)}" for k in made_with if before.get(k) != made_with[k])
        raise DataError(f"--out {out} was prepared with other options ({other}). Name another folder, or delete it.")
    have, size = _count(out)
    if have != {"train": train, "test": test} or size != note.get("bytes"):
        raise DataError(
            f"--out {out}: {have['train']:,} training and {have['test']:,} test images of {size:,} bytes are there, "
            f"and {train:,} and {test:,} of {note.get('bytes')} were. Files were taken out, added or changed; delete "
            "the folder and prepare it again."
        )
    return Prepared(out, classes, train, test, notes, fresh=False)


def _count(folder: Path) -> tuple[dict[str, int], int]:
    """Files in the class folders of each split, and their bytes (a power cut may leave empty ones)."""
    counts, size = {"train": 0, "test": 0}, 0
    for split in counts:
        with contextlib.suppress(FileNotFoundError):
            for label in [e.path for e in os.scandir(folder / split) if e.is_dir()]:
                for file in os.scandir(label):
                    counts[split] += 1
                    size += file.stat().st_size
    return counts, size


def _leftovers(out: Path) -> list[Path]:
    parent = out.absolute().parent
    return sorted(parent.glob(f".{glob.escape(out.name)}.preparing-*")) if parent.is_dir() else []


def _write(
    published: PublishedSet,
    bundle: Bundle,
    plan: Plan,
    out: Path,
    made_with: dict[str, Any],
    notes: list[str],
    tell: Tell,
) -> None:
    """Take the planned images out, all or nothing. Adds to `notes` what their bytes tell."""
    parent = out.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{out.name}.preparing-", dir=parent))
    except OSError as error:
        raise DataError(f"--out {out}: cannot be written to ({error.strerror}).") from error
    try:
        formats: Counter[str] = Counter()
        odd: list[str] = []
        done = 0

        def sink(name: str, content: IO[bytes] | Path) -> None:
            nonlocal done
            target = plan.targets[name]
            folder = building / target.split / target.label
            folder.mkdir(parents=True, exist_ok=True)
            kind = _kind(copy(content, folder / target.file))
            formats[kind] += 1
            if kind == "":
                odd.append(f"{target.split}/{target.label}/{target.file}")
            done += 1
            tell("Taking out", done, len(plan.targets))

        bundle.each(plan.targets, sink)
        have, size = _count(building)
        if have != {s: plan.count(s) for s in ("train", "test")}:
            raise DataError(f"--out {out}: its file system took {sum(have.values()):,} files of {len(plan.targets):,}; "
                            "does it tell capitals apart?")  # fmt: skip
        notes += _about_formats(formats, odd)
        _note(building, published, bundle, plan, made_with, size, notes)
        building.chmod(0o755)  # mkdtemp's are closed to others
        os.rename(building, out.absolute())
    except OSError as error:
        raise DataError(f"--out {out}: cannot be written ({error.strerror}).") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _about_formats(formats: Counter[str], odd: list[str]) -> list[str]:
    notes = []
    others = {k: n for k, n in formats.items() if k not in ("JPEG", "")}
    if others:
        listed = ", ".join(f"{n} {k}" for k, n in sorted(others.items()))
        notes.append(f"not JPEG by content, whatever the names say: {listed}. afds reads them all the same.")
    if odd:
        shown = ", ".join(odd[:3]) + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
        notes.append(f"no image by the first bytes; `afds fit` will name it: {shown}.")
    return notes


def _kind(head: bytes) -> str:
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), "")


def _note(
    building: Path,
    published: PublishedSet,
    bundle: Bundle,
    plan: Plan,
    made_with: dict[str, Any],
    size: int,
    notes: list[str],
) -> None:
    content = {
        "made_with": made_with,
        "title": published.title,
        "home": published.home,
        "from": [s.path.name for s in bundle.sources],
        "classes": plan.classes,
        "train": plan.count("train"),
        "test": plan.count("test"),
        "bytes": size,
        "notes": notes,
    }
    (building / NOTE).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
