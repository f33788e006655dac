"""Unreadable files are found at the start, and the run can go on without them."""

from __future__ import annotations

import pytest

import afds  # noqa: F401
from afds.data.check import Unreadable, check_images, describe, without
from afds.data.folder import scan
from afds.data.split import make_splits
from afds.errors import DataError


@pytest.fixture
def damaged(make_tree):
    root = make_tree({"a": 8, "b": 8})
    (root / "a" / "003.png").write_bytes(b"")
    path = root / "b" / "005.png"
    path.write_bytes(path.read_bytes()[:50])
    (root / "b" / "006.png").unlink()
    (root / "b" / "006.png").symlink_to("nowhere")  # listed by the scan, as its name is an image's
    return scan(root)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_they_are_named_in_order_with_a_reason(damaged, workers):
    found = check_images(damaged.splits["all"], workers=workers)
    assert [f"{u.path.parent.name}/{u.path.name}" for u in found] == ["a/003.png", "b/005.png", "b/006.png"]
    assert found[0].reason == "the file is empty"
    assert "truncated" in found[1].reason
    assert found[2].reason == "no such file"
    assert describe(found, limit=1).endswith("and 2 more")


def test_the_run_goes_on_without_them(damaged):
    splits = make_splits(damaged, seed=0)
    found = check_images(damaged.splits["all"], workers=1)
    left = without(splits, found)
    assert len(left.train) + len(left.val) + len(left.test) == 16 - 3
    assert not check_images([*left.train, *left.val, *left.test], workers=1)
    assert without(splits, []) == splits


def test_a_class_may_not_lose_its_last_training_image(damaged):
    splits = make_splits(damaged, seed=0)
    gone = [Unreadable(i.path, "test") for i in splits.train if i.label == 1]
    with pytest.raises(DataError, match="training image is left of: b"):
        without(splits, gone)
    with pytest.raises(DataError, match="validation images"):
        without(splits, [Unreadable(i.path, "test") for i in splits.val])
