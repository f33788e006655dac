"""A network must not be judged on photos that the network it started from has learned from."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from afds import lineage
from afds.compare.plan import CompareConfig
from afds.compare.run import preflight
from afds.config import DataConfig, FitConfig, OptimConfig
from afds.data import Splits, make_splits, scan, write_digits
from afds.errors import ConfigError
from afds.fitting import fit
from runs import changed

ARCH = '{"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_width": 8}'
DRAWN = DataConfig(input_size=32, flip=False, workers=0, val_fraction=0.2, test_fraction=0.2)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders, nothing split."""
    root = tmp_path_factory.mktemp("lineage")
    write_digits(root / "digits", range(2), per_class=20, test_per_class=1)
    shutil.move(root / "digits" / "train", root / "photos")
    return root / "photos"


def options(data: Path, out: Path | None = None, **changes: Any) -> FitConfig:
    config = FitConfig(data=data, out=out, source="resnet18", arch_args=ARCH, method="scratch", data_options=DRAWN,
                       optim=OptimConfig(epochs=1, batch_size=8))  # fmt: skip
    return changed(config, changes)


@pytest.fixture(scope="module")
def base(photos: Path) -> Path:
    out = photos.parent / "base"
    fit(options(photos, out), quiet=True)
    return out


def split(config: FitConfig) -> Splits:
    assert config.data is not None
    drawn = config.data_options
    return make_splits(
        scan(config.data), val_fraction=drawn.val_fraction, test_fraction=drawn.test_fraction, seed=config.seed
    )


def notes(config: FitConfig) -> list[str]:
    return lineage.check_unseen(config, split(config))


@pytest.mark.parametrize("drawn", [{"seed": 1}, {"data_options": dataclasses.replace(DRAWN, test_fraction=0.4)}])
def test_another_split_than_that_of_the_source_is_refused(photos: Path, base: Path, drawn: dict[str, Any]) -> None:
    other = options(photos, photos.parent / "refused", source=str(base), method="l2", **drawn)
    learned, held_out = split(options(photos)), split(other)
    seen = len(set(learned.train) & set(held_out.test or ()))
    assert seen > 0
    counts = f"{seen} of the {len(held_out.test or ())} test photos"
    told = rf"--source .*: {counts}.*--seed 0 --data-options.val-fraction 0.2 --data-options.test-fraction 0.2"
    with pytest.raises(ConfigError, match=told):
        fit(other, quiet=True)
    assert not (photos.parent / "refused").exists()


def test_the_same_split_and_unrelated_photos_are_not(photos: Path, base: Path, tmp_path: Path) -> None:
    assert notes(options(photos, source=str(base), method="l2")) == []
    other = write_digits(tmp_path / "other", range(2, 4), per_class=20, test_per_class=1)
    assert notes(options(other, source=str(base), method="l2", seed=1)) == []


def test_so_is_one_where_the_photos_have_moved_and_where_a_run_lies_between(
    photos: Path, base: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(photos, moved)
    record = json.loads((base / "config.json").read_text())
    record["config"]["data"] = str(tmp_path / "where it was")
    first, second = tmp_path / "first", tmp_path / "second"
    for run in (first, second):
        shutil.copytree(base, run)
    (first / "config.json").write_text(json.dumps(record))
    record["config"] |= {"source": str(first), "seed": 1}
    record["data"]["fingerprint"] = "of other photos"
    (second / "config.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=rf"--source {second}: .* that {first} has learned from"):
        notes(options(moved, source=str(second), method="l2", seed=1))
    assert notes(options(moved, source=str(second), method="l2", seed=0)) == []


def test_where_photos_have_changed_a_note_says_that_nobody_can_tell(photos: Path, base: Path, tmp_path: Path) -> None:
    changed, run = tmp_path / "changed", tmp_path / "run"
    shutil.copytree(photos, changed)
    shutil.copytree(base, run)
    record = json.loads((run / "config.json").read_text())
    record["config"]["data"] = str(changed)
    (run / "config.json").write_text(json.dumps(record))
    next(iter(sorted(changed.glob("*/*")))).unlink()
    (note,) = notes(options(changed, source=str(run), method="l2"))
    assert note.startswith(f"note: the photos have changed since {run}")


def test_a_comparison_is_refused_for_the_seeds_that_draw_another_split(photos: Path, base: Path) -> None:
    from rich.console import Console

    c = CompareConfig(data=(photos,), out=photos.parent / "compared", methods="l2", budgets="1x", seeds=1, epochs=1,
                      base_epochs=1, source=str(base), data_options=DRAWN)  # fmt: skip
    preflight(c, Console(quiet=True))
    with pytest.raises(ConfigError, match=r"^l2, seed 1 on .*--seed 0"):
        preflight(dataclasses.replace(c, seeds=2), Console(quiet=True))


def test_photos_of_a_source_step_are_known_too(photos: Path, base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(base, run)
    shutil.copytree(base, run / "source")  # what came before it has learned from `photos`, it itself from others
    record = json.loads((run / "config.json").read_text())
    record["config"]["data"] = str(tmp_path / "elsewhere")
    record["data"]["fingerprint"] = "of other photos"
    (run / "config.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=rf"--source {run}: .* that {run / 'source'} has learned from"):
        notes(options(photos, source=str(run), method="l2", seed=1))
