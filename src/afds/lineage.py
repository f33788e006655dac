"""What a run has learned from, and that none of it is held out now.

::

    RUN/config.json: photos, seed, fractions --> the same split again --> its training photos --+
                     source: another run ------> ... ------------------> its training photos --+--> held out now? refuse

A split that is drawn is drawn by the seed and the fractions. With others than those of the run that a training starts
from, photos that this run knows by heart would be test photos: the figures would be flattered, and nobody would see it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from afds.artifact import is_run
from afds.config import FitConfig
from afds.data import Folder, Item, Splits, Unreadable, make_splits, scan, without
from afds.errors import AfdsError, ConfigError
from afds.files import read_json

NOT_OURS = (OSError, LookupError, TypeError, ValueError, AttributeError, AfdsError)
"""What reading the record of a run can end in, where it or its photos are gone or of another make."""


def repeat_split(record: Mapping[str, Any], folder: Folder) -> Splits | None:
    """The split that a run made, where ``folder`` holds the photos that it was fitted on, unchanged.

    record: its config.json.
    """
    try:
        options, facts = record["config"], record["data"]
        splits = make_splits(
            folder,
            val_fraction=options["data_options"]["val_fraction"],
            test_fraction=options["data_options"]["test_fraction"],
            seed=options["seed"],
        )
        gone = {Path(path).parts[-2:] for path in facts["unreadable"]}
        splits = without(splits, [Unreadable(i.path, "") for i in splits.items() if i.path.parts[-2:] in gone])
        return splits if splits.fingerprint() == facts["fingerprint"] else None
    except NOT_OURS:
        return None  # other photos, or a record that is not ours


def photos_changed(record: Mapping[str, Any], folder: Folder) -> bool:
    """Whether this is the folder that a run was fitted on, and no longer what it was then."""
    try:
        return os.path.samefile(record["config"]["data"], folder.root) and repeat_split(record, folder) is None
    except NOT_OURS:
        return False


def check_unseen(config: FitConfig, splits: Splits) -> list[str]:
    """That the networks which a training starts from have not learned from what is held out; notes where none can tell.

    Raises:
        ConfigError: how many of the photos they know, and the options with which they know none.
    """
    assert config.data is not None
    folder, notes = scan(config.data), []
    for option, spec in (("source", config.source), ("teacher", config.teacher), ("small-source", config.small_source)):
        for run in _ancestors(spec):
            record = read_json(run / "config.json")
            known = _learned_from(record, folder)
            test, val = _among(known, splits.test or ()), _among(known, splits.val)
            if test or val:
                counts = [f"{n} of the {len(items)} {name} photos"
                          for n, items, name in ((test, splits.test or (), "test"), (val, splits.val, "validation"))
                          if n]  # fmt: skip
                raise ConfigError(f"--{option} {spec}: {' and '.join(counts)} are among those that {run} has learned "
                                  f"from, so that figures would be flattered. {_way_out(record)}")  # fmt: skip
            if photos_changed(record, folder):
                notes.append(f"note: the photos have changed since {run} was trained on them, so some that are held "
                             "out now may be among those that it has learned from.")  # fmt: skip
    return notes


def _ancestors(spec: str | Path | None) -> Iterable[Path]:
    """The run, its step on source photos, the run that it started from, and so on."""
    seen: set[str] = set()
    left = [spec]
    while left:
        spec = left.pop()
        if not spec or not is_run(spec) or os.path.realpath(spec) in seen or not (Path(spec) / "config.json").exists():
            continue
        seen.add(os.path.realpath(spec))
        yield Path(spec)
        left.append(Path(spec) / "source")
        with contextlib.suppress(*NOT_OURS):
            left.append(read_json(Path(spec) / "config.json")["config"]["source"])


def _learned_from(record: Mapping[str, Any], here: Folder) -> set[str]:
    """Real paths of a run's training photos; empty where they cannot be told."""
    places = [here]
    try:
        if not os.path.samefile(record["config"]["data"], here.root):
            places.append(scan(record["config"]["data"]))
    except NOT_OURS:
        pass  # its photos are not where they were: they may be `here`, moved
    for folder in places:
        splits = repeat_split(record, folder)
        if splits is not None:
            return {os.path.realpath(item.path) for item in splits.train}
    return set()


def _among(known: set[str], items: Iterable[Item]) -> int:
    return sum(os.path.realpath(item.path) in known for item in items) if known else 0


def _way_out(record: Mapping[str, Any]) -> str:
    options = record["config"]
    drawn = options["data_options"]
    return (f"It was trained with --seed {options['seed']} --data-options.val-fraction {drawn['val_fraction']:g} "
            f"--data-options.test-fraction {drawn['test_fraction']:g}: give the same, or have folders train/, val/ and "
            "test/ from the start.")  # fmt: skip
