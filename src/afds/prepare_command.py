"""`afds prepare`: its options, what it says, its bar."""

from __future__ import annotations

import difflib
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from afds.data.published import Options, Prepared, PublishedSet, catalogue, prepare
from afds.errors import ConfigError


@dataclass(frozen=True)
class Prepare:
    """A published data set, from its archives to a folder with train/ and test/ that `afds fit` takes.

    NAME is caltech256-30, caltech256-60, dogs120, indoors67, cub200 or food101. Nothing is downloaded: `--list` tells
    where each file is to be had. The folder appears whole or not at all.
    """

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = ""
    """Which data set."""
    archives: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="ARCHIVE ...")] = ()
    """The files as published, or folders with them, packed or unpacked."""
    out: Path | None = None
    """Folder to write."""
    show: Annotated[bool, tyro.conf.arg(name="list")] = False
    """Tell about the data sets (or about NAME): files, sizes, checksums, where to get them."""
    skip_checksum: bool = False
    """Take files of another size, checksum or number of images than the published ones."""
    split: Literal["random", "l2-sp"] = "random"
    """Caltech-256: `random` draws by --seed; `l2-sp` takes images by number, as the L2-SP code does."""
    test_per_class: int = 20
    """Caltech-256: test images per class. 0: all that are left."""
    clutter: bool = False
    """Caltech-256: take 257.clutter as a class."""
    seed: int = 0
    """Caltech-256: seed of the draw."""


def prepare_command(arguments: list[str]) -> int:
    """Parse and do; returns the exit code. Raises AfdsError."""
    o = tyro.cli(Prepare, prog="afds prepare", args=arguments, config=(tyro.conf.FlagCreatePairsOff,))
    sets = catalogue()
    if not o.name and not o.show:
        raise ConfigError(f"afds prepare needs the name of a data set: {', '.join(sets)}. More with --list.")
    if o.name and o.name not in sets:
        near = difflib.get_close_matches(o.name.lower(), sets, 1, cutoff=0.4)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"unknown data set {o.name!r}.{hint} There are: {', '.join(sets)}.")
    if o.show:
        _list([sets[o.name]] if o.name else list(sets.values()))
        return 0
    published, caltech = sets[o.name], o.name.startswith("caltech256")
    chosen = Options(o.seed, o.split, o.test_per_class, o.clutter)
    if not caltech and chosen != Options():
        raise ConfigError(f"{o.name} has an official split: --seed, --split, --test-per-class and --clutter are for "
                          "Caltech-256 alone.")  # fmt: skip
    if o.out is None:
        raise ConfigError("afds prepare needs --out DIR, the folder to write.")
    with _Teller() as teller:
        prepared = prepare(published, o.archives, o.out, chosen, skip_checksum=o.skip_checksum, tell=teller.tell)
    _show(prepared, published)
    return 0


def _show(prepared: Prepared, published: PublishedSet) -> None:
    for note in prepared.notes:
        print(f"note: {note}")
    done = "" if prepared.fresh else " (prepared before, left as it is)"
    print(f"{published.title}: {prepared.train:,} training and {prepared.test:,} test images in "
          f"{prepared.classes} classes, in {prepared.out}{done}")  # fmt: skip
    print(f"next: afds fit {shlex.quote(str(prepared.out))} --source resnet50 --budget 5x --out RUN")


def _list(sets: list[PublishedSet]) -> None:
    for s in sets:
        print(f"{s.name}: {s.title}")
        print(f"  {s.classes} classes, {s.train:,} training and {s.test:,} test images; {s.split}")
        print(f"  home page: {s.home}")
        for f in s.files:
            print(f"  {f.name}  {f'{f.size:,} bytes' if f.size else 'size not recorded'}")
            print(f"    {f.url}" + (f"  ({f.note})" if f.note else ""))
            for kind, digest in (("MD5", f.md5), ("SHA-256", f.sha256)):
                if digest:
                    print(f"    {kind} {digest}")
            print(f"    recorded by {f.recorded_by}" if f.md5 or f.sha256 else "    no checksum is known: not checked")
        print()
    print("Sizes and checksums are as public code records them; a file passes when one of its checksums matches.")


class _Teller:
    """A bar for each thing that takes a while in a terminal, a line for it elsewhere."""

    def __init__(self) -> None:
        console = Console(stderr=True, highlight=False)
        self._console = console
        self._bar = Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=console,
                             transient=True, refresh_per_second=4, disable=not console.is_terminal)  # fmt: skip
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _Teller:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def tell(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            for earlier in self._tasks.values():
                self._bar.update(earlier, visible=False)
            self._tasks[what] = self._bar.add_task(what, total=total or None)
            if not self._console.is_terminal:
                self._console.print(f"{what} ...", markup=False, soft_wrap=True)
        self._bar.update(self._tasks[what], completed=done)
