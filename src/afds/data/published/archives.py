"""Reading published archives with suspicion: nothing is unpacked but what was planned, to names of our own making.

    TarSource    the members of a .tar, .tgz or .tar.gz
    FolderSource the same archive, unpacked by the user
    FileSource   a list that is published as a plain file

Refused: an archive that ends in the middle, is damaged, or holds a member with an absolute path, with `..`, or more
and larger members than any published one. Links, devices and pipes are passed over; an image that should be there
and is a link is then missing, and named.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

from afds.data.published.plan import MAX_LIST_BYTES, hidden
from afds.errors import DataError

MAX_MEMBERS = 500_000  # Food-101 has 101,000
MAX_IMAGE_BYTES = 256 * 2**20
MAX_TOTAL_BYTES = 64 * 2**30  # Food-101 has 5 GB; beyond this it is a decompression bomb
_BLOCK = 2**20

Sink = Callable[[str, IO[bytes] | Path], None]
"""Takes the name of a file and its content: a stream, or a path that may be linked to."""


class Source(Protocol):
    """One of the files that the user gave, opened."""

    path: Path
    names: dict[str, int]

    def read(self, name: str) -> bytes: ...

    def each(self, wanted: Mapping[str, object], sink: Sink) -> None: ...


class TarSource:
    """A tar archive, compressed or not. Opening it reads all headers (a compressed one: all of it)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: dict[str, int] = {}
        self._small: dict[str, bytes] = {}
        total = 0
        with _tar(path) as tar:
            for count, member in enumerate(_members(tar, path)):
                if count >= MAX_MEMBERS:
                    raise DataError(f"{path}: over {MAX_MEMBERS:,} members; no published archive has so many.")
                total += member.size
                if total > MAX_TOTAL_BYTES or member.size > MAX_IMAGE_BYTES:
                    raise DataError(f"{path}: {member.name[:80]!r} makes it larger than any published archive.")
                if not member.isreg():
                    continue
                name = _clean(member.name)
                self.names[name] = member.size
                if _is_list(name) and member.size <= MAX_LIST_BYTES:
                    self._small[name] = _content(tar, member).read()  # now, so that lists cost no second pass
            _check_end(tar, path)
        if not self.names:
            raise DataError(f"{path}: an empty archive. Fetch it again.")

    def read(self, name: str) -> bytes:
        if name not in self._small:
            raise DataError(f"{self.path}: {name} is too large for a list.")
        return self._small[name]

    def each(self, wanted: Mapping[str, object], sink: Sink) -> None:
        """Hand the content of the members in `wanted` to `sink`, in the archive's order."""
        with _tar(self.path) as tar:
            for member in _members(tar, self.path):
                name = _clean(member.name)
                if member.isreg() and name in wanted:
                    sink(name, _content(tar, member))


class FolderSource:
    """A folder, read to a depth that the published archives have. Links are passed over."""

    DEPTH = 5

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: dict[str, int] = {}
        for name, size in self._walk(path, ""):
            self.names[name] = size
            if len(self.names) > MAX_MEMBERS:
                raise DataError(f"{path}: over {MAX_MEMBERS:,} files. Give the folder that holds the data set alone.")

    def _walk(self, folder: Path, prefix: str) -> Iterator[tuple[str, int]]:
        try:
            with os.scandir(folder) as entries:
                listed = sorted(entries, key=lambda e: e.name)
        except OSError as error:
            raise DataError(f"{folder}: cannot be listed ({error.strerror}); check its rights.") from error
        for entry in listed:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                if prefix.count("/") < self.DEPTH:
                    yield from self._walk(Path(entry.path), f"{prefix}{entry.name}/")
            elif entry.is_file(follow_symlinks=False):
                yield f"{prefix}{entry.name}", entry.stat(follow_symlinks=False).st_size

    def read(self, name: str) -> bytes:
        return _read_file(self.path / name)

    def each(self, wanted: Mapping[str, object], sink: Sink) -> None:
        for name in self.names:
            if name in wanted:
                sink(name, self.path / name)


class FileSource:
    """A plain file, known by its published name whatever it is called here."""

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.names = {name: path.stat().st_size}

    def read(self, name: str) -> bytes:
        return _read_file(self.path)

    def each(self, wanted: Mapping[str, object], sink: Sink) -> None:
        for name in self.names:
            if name in wanted:
                sink(name, self.path)


class Bundle:
    """All that was given for one data set, as one. Where two sources hold the same name, the first counts."""

    def __init__(self, sources: list[Source]) -> None:
        self.sources = sources
        self._by_name: dict[str, Source] = {}
        for source in sources:
            for name in source.names:
                self._by_name.setdefault(name, source)

    @property
    def names(self) -> dict[str, int]:
        return {name: source.names[name] for name, source in self._by_name.items()}

    def read(self, name: str) -> bytes:
        return self._by_name[name].read(name)

    def source_of(self, name: str) -> Source:
        return self._by_name[name]

    def where(self, name: str) -> str:
        path = self._by_name[name].path
        return str(path) if path.name == name else f"{name} in {path}"

    def each(self, wanted: Mapping[str, object], sink: Sink) -> None:
        for source in self.sources:
            source.each({n: v for n, v in wanted.items() if self._by_name[n] is source}, sink)


def digests(path: Path, algorithms: tuple[str, ...], advance: Callable[[int], None]) -> dict[str, str]:
    """Hexadecimal digests of a file, in one pass. `advance` is told the bytes read. Raises DataError."""
    # they find damage, they keep no secrets: MD5 is what the authors give
    hashes = {a: hashlib.new(a, usedforsecurity=False) for a in algorithms}
    try:
        with open(path, "rb") as file:
            while block := file.read(_BLOCK):
                for one in hashes.values():
                    one.update(block)
                advance(len(block))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    return {a: h.hexdigest() for a, h in hashes.items()}


@contextmanager
def _tar(path: Path) -> Iterator[tarfile.TarFile]:
    """The archive; whatever goes wrong in it becomes an error that names it."""
    try:
        with tarfile.open(path, "r:*") as tar:
            yield tar
    except (EOFError, tarfile.TarError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, ValueError) as error:
        text = " ".join(str(error).split())
        if isinstance(error, EOFError) or "unexpected end" in text:
            raise _cut_off(path) from error
        if "could not be opened" in text or "empty file" in text:
            raise DataError(f"{path}: not a tar archive{_what_it_is(path)}. Fetch it again.") from error
        raise DataError(f"{path}: a damaged archive ({text or type(error).__name__}). Fetch it again.") from error


def _cut_off(path: Path) -> DataError:
    return DataError(f"{path}: it ends in the middle, the download was cut off. Fetch it again.")


def _check_end(tar: tarfile.TarFile, path: Path) -> None:
    """Where the members end there must be a block of zeros: `tarfile` takes a cut-off header for the end.

    A compressed archive is read to its end instead, which compares its own checksum.
    """
    file = tar.fileobj
    assert file is not None
    if isinstance(file, io.BufferedReader):
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise _cut_off(path)
    else:
        while file.read(_BLOCK):
            pass


def _members(tar: tarfile.TarFile, path: Path) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        parts = member.name.replace("\\", "/").split("/")
        if member.name.startswith(("/", "\\")) or ".." in parts or (":" in parts[0] and len(parts[0]) == 2):
            raise DataError(f"{path}: the member {member.name[:80]!r} points outside. It is not a published archive.")
        yield member


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    stream = tar.extractfile(member)
    assert stream is not None  # a plain file
    return stream


def _clean(name: str) -> str:
    """`./Images//a.jpg` and `Images\\a.jpg` as `Images/a.jpg`."""
    return "/".join(p for p in name.replace("\\", "/").split("/") if p not in ("", "."))


def _is_list(name: str) -> bool:
    return name.endswith((".mat", ".txt", ".json")) and not hidden(name)


def _read_file(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_LIST_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    if len(data) > MAX_LIST_BYTES:
        raise DataError(f"{path}: {len(data):,} bytes and more are too many for a list.")
    return data


def _what_it_is(path: Path) -> str:
    """A guess at what lies there in place of an archive, for the message."""
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        return " but an empty file"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return " but a web page (the download gave an error page)"
    return " but a zip file" if head.startswith(b"PK\x03\x04") else ""


def copy(content: IO[bytes] | Path, target: Path) -> bytes:
    """Write one file, by a hard link where it lies on the same disk; returns its first 16 bytes."""
    if isinstance(content, Path):
        with open(content, "rb") as file:
            head = file.read(16)
        try:
            os.link(content, target)
        except OSError:  # another disk, or a file system without hard links
            shutil.copyfile(content, target)
        return head
    with open(target, "wb") as file:  # a member that comes twice: the later one counts, as tar has it
        head = content.read(16)
        file.write(head)
        shutil.copyfileobj(content, file, _BLOCK)
    return head
