"""The demo's data: a folder that the scan reads, whole or not there."""

from __future__ import annotations

import pytest
from PIL import Image

import afds  # noqa: F401
from afds.data.digits import write_digits
from afds.data.folder import scan
from afds.errors import ConfigError, DataError


def make(root, **changes):
    return write_digits(root, **{"digits": (3, 0), "per_class": 5, "test_per_class": 4, "seed": 1} | changes)


def test_a_folder_that_the_scan_reads(tmp_path):
    root = make(tmp_path / "new" / "digits")
    folder = scan(root)
    assert folder.classes == ("three", "zero")
    assert {s: len(items) for s, items in folder.splits.items()} == {"train": 10, "test": 8}
    assert not folder.warnings
    assert Image.open(folder.splits["train"][0].path).size == (32, 32)
    contents = [item.path.read_bytes() for items in folder.splits.values() for item in items]
    assert len(set(contents)) == len(contents)  # none is in train and in test
    assert [p.name for p in root.parent.iterdir()] == ["digits"]  # nothing half-made beside it


def test_again_does_nothing_and_elsewhere_the_same(tmp_path):
    first = make(tmp_path / "a")
    stamp = (first / "train").stat().st_mtime_ns
    assert make(tmp_path / "a") == first
    assert (first / "train").stat().st_mtime_ns == stamp
    other = make(tmp_path / "b")
    files = [p.relative_to(first) for p in sorted(first.rglob("*.png"))]
    assert [p.relative_to(other) for p in sorted(other.rglob("*.png"))] == files
    assert all((first / f).read_bytes() == (other / f).read_bytes() for f in files)


def test_all_of_a_digit(tmp_path):
    folder = scan(make(tmp_path / "a", per_class=None, test_per_class=100, size=8))
    assert len(folder.splits["train"]) + len(folder.splits["test"]) == 183 + 178


def test_what_lies_there_is_not_touched(tmp_path):
    make(tmp_path / "a")
    with pytest.raises(DataError, match="something else"):
        make(tmp_path / "a", seed=2)
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match="something else"):
        make(tmp_path / "b")


@pytest.mark.parametrize(
    "changes",
    [
        {"digits": (3,)},
        {"digits": (3, 10)},
        {"per_class": 0},
        {"per_class": 500},
        {"test_per_class": 0},
        {"size": 1},
    ],
)
def test_numbers_out_of_range(tmp_path, changes):
    with pytest.raises(ConfigError):
        make(tmp_path / "a", **changes)
    assert not list(tmp_path.iterdir())
