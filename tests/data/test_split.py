"""Properties of the split: disjoint, complete, stratified, repeatable, blind to the order of files."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import afds  # noqa: F401
from afds.data.folder import Folder, Item
from afds.data.split import classes_unseen, make_splits
from afds.errors import ConfigError, DataError


def folder_of(sizes: list[int], *, root: str = "/data", **given_splits: list[int]) -> Folder:
    """A folder as `scan` would give it, without files."""

    def items(where: str, counts: list[int]) -> tuple[Item, ...]:
        return tuple(Item(Path(f"{root}{where}/c{c}/{i:04d}.png"), c) for c, n in enumerate(counts) for i in range(n))

    classes = tuple(f"c{c}" for c in range(len(sizes)))
    if not given_splits:
        return Folder(Path(root), classes, {"all": items("", sizes)}, 0, ())
    splits = {"train": items("/train", sizes)} | {s: items(f"/{s}", n) for s, n in given_splits.items() if n}
    return Folder(Path(root), classes, splits, 0, ())


SIZES = st.lists(st.integers(1, 40), min_size=2, max_size=12).filter(lambda sizes: sum(sizes) >= 40)
FRACTIONS = st.sampled_from([0.05, 0.1, 0.15, 0.25])


@settings(max_examples=60, deadline=None)
@given(SIZES, FRACTIONS, FRACTIONS, st.integers(0, 5))
def test_properties(sizes, val_fraction, test_fraction, seed):
    folder = folder_of(sizes)
    kwargs = {"val_fraction": val_fraction, "test_fraction": test_fraction, "seed": seed}
    try:
        splits = make_splits(folder, **kwargs)
    except DataError:
        # some classes give nothing: a single image trains
        assert sum(n - 1 for n in sizes) < 2 or sum(sizes) * min(val_fraction, test_fraction) < 1
        return
    parts = {"val": (splits.val, val_fraction), "test": (splits.test, test_fraction)}

    everything = [*splits.train, *splits.val, *splits.test]
    assert sorted(everything) == sorted(folder.splits["all"])  # complete, and disjoint as nothing comes twice
    assert set(Counter(everything).values()) == {1}
    assert {i.label for i in splits.train} == set(range(len(sizes)))
    for items, fraction in parts.values():
        counts = Counter(i.label for i in items)
        for label, size in enumerate(sizes):
            assert abs(counts[label] - size * fraction) < 1 + 1e-6
        assert len(items) <= round(sum(sizes) * fraction) + 1

    mixed = list(folder.splits["all"])
    random.Random(seed).shuffle(mixed)
    again = make_splits(Folder(folder.root, folder.classes, {"all": tuple(mixed)}, 0, ()), **kwargs)
    assert again == splits
    elsewhere = make_splits(folder_of(sizes, root="/moved"), **kwargs)
    assert [i.path.name for i in elsewhere.val] == [i.path.name for i in splits.val]


def test_the_share_is_met_as_a_whole_though_each_class_is_small():
    splits = make_splits(folder_of([4] * 50), val_fraction=0.1, test_fraction=0, seed=0)
    assert len(splits.val) == 20  # rounding each class's 0.4 would give none
    assert splits.test is None


def test_another_seed_another_split():
    folder = folder_of([20, 20])
    assert make_splits(folder, seed=0) != make_splits(folder, seed=1)


def test_new_images_of_one_class_leave_the_others_alone():
    before = make_splits(folder_of([20, 20]), seed=0)
    after = make_splits(folder_of([20, 40]), seed=0)
    assert [i for i in before.test if i.label == 0] == [i for i in after.test if i.label == 0]


def test_what_is_given_is_kept():
    folder = folder_of([10, 10], val=[2, 2], test=[3, 3])
    splits = make_splits(folder, seed=0)
    assert (splits.train, splits.val, splits.test) == tuple(folder.splits[s] for s in ("train", "val", "test"))


def test_val_is_split_off_train_and_never_off_test():
    folder = folder_of([10, 10], test=[3, 3])
    splits = make_splits(folder, seed=0)
    assert splits.test == folder.splits["test"]
    assert len(splits.val) == 2
    assert set(splits.val) < set(folder.splits["train"])


def test_train_folder_without_test_gives_no_test():
    assert make_splits(folder_of([10, 10], val=[]), seed=0).test is None


def test_single_images_train():
    splits = make_splits(folder_of([1, 1, 30]), seed=0)
    assert {i.label for i in splits.val} == {i.label for i in splits.test} == {2}


@pytest.mark.parametrize(("sizes", "says"), [([1] * 10_000, "single image"), ([2, 2], "less than one")])
def test_too_few(sizes, says):
    with pytest.raises(DataError, match=says):
        make_splits(folder_of(sizes), val_fraction=0.1, test_fraction=0, seed=0)


@pytest.mark.parametrize("fractions", [(0.0, 0.1), (1.0, 0.0), (-0.1, 0.1), (0.1, -0.1), (0.6, 0.4)])
def test_fractions_that_make_no_sense(fractions):
    with pytest.raises(ConfigError):
        make_splits(folder_of([9, 9]), val_fraction=fractions[0], test_fraction=fractions[1], seed=0)


def test_classes_that_nothing_judges_are_named():
    folder = folder_of([5] * 12)
    splits = make_splits(folder, val_fraction=0.1, test_fraction=0.15, seed=0)
    told = classes_unseen(splits, folder)
    assert [line.split(",")[0] for line in told] == ["no validation image of 6 classes", "no test image of 3 classes"]
    folder = folder_of([20] * 3)
    assert classes_unseen(make_splits(folder, val_fraction=0.1, test_fraction=0.15, seed=0), folder) == []
