"""Files of a run folder: written whole or not at all, read with suspicion."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from afds.errors import RunFolderError

LOCK = ".lock"
STEPS = ("source", "base")  # sub-folders of a run folder that hold the runs before
PATIENCE = 5.0  # seconds in which a process that was told to end lets go of its folder
MAX_JSON_BYTES = 64 * 2**20  # a ResNet-152's structure.json has 0.2 MB; more than this is not ours


def write_atomic(path: Path | str, content: bytes | str) -> None:
    """Write `content` (text as UTF-8) so that `path` holds the old content or the new, never a half.

    A temporary file in the same folder is filled, flushed to the disk and renamed over `path`.
    Raises RunFolderError naming the file, where the folder cannot be written to.
    """
    path = Path(path)
    # A name that is not UTF-8 reaches Python as lone surrogates: \udc.. is how JSON spells them, too.
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:  # not tempfile: its files are closed to the user's group
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or "unknown reason"
        raise RunFolderError(f"{path}: cannot be written ({reason}). Check its folder and the space.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path | str, value: Any) -> None:
    """Write plain data as JSON, atomically. Raises ValueError for NaN and infinity, which are not JSON."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_bytes(path: Path | str, max_bytes: int) -> bytes:
    """The content of a regular file of at most `max_bytes`. Raises RunFolderError naming the file."""
    path = Path(path)
    try:
        if not path.is_file():  # a pipe or a device would block or never end
            raise RunFolderError(
                f"{path}: {'not a plain file' if path.exists() else 'missing'}. "
                "Give a whole run folder, as `afds fit` writes it."
            )
        with open(path, "rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be read ({error.strerror}).") from error
    if len(data) > max_bytes:
        raise RunFolderError(f"{path}: larger than {max_bytes:,} bytes, so it is not a file that afds wrote.")
    return data


def read_json(path: Path | str, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Plain data from a JSON file. NaN and infinity are refused.

    Raises RunFolderError naming the file: missing, no plain file, too large, not UTF-8, not JSON.
    """
    data = read_bytes(path, max_bytes)
    try:
        return json.loads(data.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # ValueError: JSON, UTF-8, numbers of thousands of digits
        reason = str(error) if isinstance(error, ValueError) else "nested too deeply"
        raise RunFolderError(f"{path}: not readable as JSON ({reason}).") from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def check_place(out: Path) -> Path:
    """Refuse a folder that could not be made or written to, before any work is done for it.

    Returns:
        The folder itself where it is there, else the nearest one above it.
    Raises:
        RunFolderError: a file or a broken link is in its way, or its place is not open to this user.
    """
    try:
        here = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists() or p.is_symlink())
    except OSError as error:
        raise RunFolderError(f"--out {out}: {error.strerror}.") from error
    if not here.is_dir():
        what = "a link to nothing" if here.is_symlink() and not here.exists() else "a file"
        raise RunFolderError(f"--out {out}: {here} is {what}; name a folder that does not exist yet.")
    if not may_write(here):
        raise RunFolderError(f"--out {out}: {here} cannot be written to; name another place.")
    return here


def may_write(folder: Path | str) -> bool:
    """Whether files can be made in a folder, as far as the system tells beforehand."""
    return os.access(folder, os.W_OK | os.X_OK)


def no_file_at(out: Path) -> str:
    """Why no file can be written at a place, as the rest of a sentence that begins with it; "" where one can.

    It tells what can be told before any work is done: not whether there is room for it.
    """
    if not out.parent.is_dir():
        return f": there is no folder {out.parent}."
    if not may_write(out.parent):
        return f": {out.parent} cannot be written to; name another place."
    if out.is_dir():
        return " is a folder; name a file."
    return " is no plain file; name another." if out.exists() and not out.is_file() else ""


def check_beside(out: Path, *photos: Path) -> None:
    """Refuse a folder for results among the photos: the next look at these would take it for a class.

    Raises:
        RunFolderError: it lies in one of ``photos``.
    """
    for folder in photos:
        place, root = os.path.realpath(out), os.path.realpath(folder)
        if os.path.commonpath([place, root]) == root:
            raise RunFolderError(f"--out {out} lies among the photos of {folder}; name a folder outside of it.")


def whole_run(folder: Path) -> Path:
    """The run folder that a step's folder belongs to, which is what can be resumed."""
    while folder.name in STEPS and (folder.parent / "config.json").exists():
        folder = folder.parent
    return folder


def go_on(path: Path) -> str:
    """What to do where a file of a run folder could not be written: make room and resume, if the folder is there."""
    if not path.parent.is_dir():
        return f"{path.parent} was moved or removed while the run went on."
    return f"Make room, then go on with: afds fit --resume {whole_run(path.parent)}"


def is_empty(folder: Path) -> bool:
    """Whether nothing is in a folder but what `alone_in` may have left there."""
    return all(entry.name == LOCK for entry in folder.iterdir())


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """While this lasts no other process works in a folder, of those that ask; a process that dies lets go of it.

    Raises:
        RunFolderError: another one does.
    """
    lock = FileLock(folder / LOCK, timeout=PATIENCE)
    try:
        lock.acquire()
    except Timeout as error:
        raise RunFolderError(
            f"{folder}: another process is training in it. Wait until it is done, or stop it first."
        ) from error
    except (NotImplementedError, OSError):  # a file system without locks: as if there were no other
        pass
    try:
        yield
    finally:
        lock.release()
