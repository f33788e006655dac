"""Layouts that are read, and those that are refused by name."""

from __future__ import annotations

import os

import pytest

import afds  # noqa: F401  (mends torchvision before afds.data imports it)
from afds.data.folder import image_files, scan
from afds.errors import AfdsWarning, DataError


def test_class_folders(make_tree):
    folder = scan(make_tree({"dog": 2, "cat": 3}))
    assert folder.classes == ("cat", "dog")
    assert list(folder.splits) == ["all"]
    assert [(i.path.parent.name, i.label) for i in folder.splits["all"]] == [("cat", 0)] * 3 + [("dog", 1)] * 2
    assert not folder.warnings
    assert folder.ignored == 0


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Val"])
def test_split_folders(make_tree, name):
    folder = scan(make_tree({"train/a": 2, "train/b": 2, f"{name}/a": 1, f"{name}/b": 1, "test/b": 1}))
    assert {s: len(items) for s, items in folder.splits.items()} == {"train": 4, "val": 2, "test": 1}
    assert folder.splits["test"][0].label == 1
    assert "no image of 1 class: a" in folder.warnings[0]


def test_a_class_called_train(make_tree):
    folder = scan(make_tree({"train": 2, "bus": 2, "test": 2}))
    assert folder.classes == ("bus", "test", "train")
    assert list(folder.splits) == ["all"]


def test_what_is_no_image_is_passed_over(make_tree):
    root = make_tree({"a": 2, "b": 2, ".git/x": 1, "__MACOSX/a": 1})
    for path in ("README.txt", "a/Thumbs.db", "a/.DS_Store", "b/._001.png", "b/movie.mpg"):
        (root / path).write_bytes(b"x")
    folder = scan(root)
    assert folder.classes == ("a", "b")
    assert len(folder.splits["all"]) == 4
    assert folder.ignored == 3  # the hidden ones are not even counted


def test_endings_in_capitals_and_jpeg_variants_count(make_tree):
    root = make_tree({"a": 1, "b": 1})
    for name in ("x.JPG", "y.jpeg", "z.WebP", "w.tif"):
        (root / "a" / name).write_bytes(b"x")
    assert len(scan(root).splits["all"]) == 6


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ({}, "no class folders and no images"),
        ({"": 2}, "2 images and no class folders"),
        ({"only": 3}, "only one class ('only')"),
        ({"train/only": 3}, "only one class ('only')"),
        ({"a": 2, "b": 0}, "class folders without an image: b"),
        ({"train/a": 2, "train/b": 0}, "class folders without an image: b"),
        ({"a": 0, "b": 0}, "no image in its 2 folders"),
        ({"photos/a": 2, "photos/b": 2}, "Give {root}/photos instead"),
        ({"photos/train/a": 2, "photos/train/b": 2}, "Give {root}/photos instead"),
        ({"val/a": 1, "val/b": 1, "test/a": 1}, "name the training split train/"),
        ({"a": 2, "b": 2, "c/deeper": 2}, "images of c may lie one level deeper"),
        ({"train/a": 1, "train/b": 1, "val/a": 1, "val/z": 1}, "classes that train/ does not have: z"),
        ({"train/a": 1, "train/b": 1, "test": 3}, "3 images and no class folders"),
        ({"train/a": 1, "train/b": 1, "val/a": 1, "valid/a": 1}, "both val/ and valid/ mean 'val'"),
    ],
)
def test_mistakes_of_layout(make_tree, counts, says):
    root = make_tree(counts)
    with pytest.raises(DataError) as caught:
        scan(root)
    assert says.format(root=root) in str(caught.value)
    assert str(root) in str(caught.value)


@pytest.mark.parametrize(("name", "says"), [("photos.zip", "Unpack it"), ("photo.jpg", "a file, not a folder")])
def test_a_file_in_place_of_a_folder(tmp_path, name, says):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=says):
        scan(tmp_path / name)


def test_a_missing_path(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        scan(tmp_path / "nowhere")


def test_formats_pillow_cannot_read_are_named(make_tree):
    root = make_tree({"a": 2, "b": 0})
    for i in range(3):
        (root / "b" / f"{i}.heic").write_bytes(b"x")
    with pytest.raises(DataError, match=r"3 files with \.heic"):
        scan(root)


def test_things_to_live_with_are_warned_of(make_tree):
    root = make_tree({"train/a": 1, "train/b": 2, "train/b/raw": 1, "notes": 1, "val/a": 0, "val/b": 1})
    warnings = " ".join(scan(root).warnings)
    assert "lies beside train/: notes/" in warnings
    assert "folders inside class folders are not used: in b" in warnings
    assert "1 class with a single image" in warnings
    assert "no image of 1 class: a" in warnings


def test_class_names_match_across_unicode_forms(make_tree):
    folder = scan(make_tree({"train/caf\u00e9": 1, "train/tea": 1, "val/cafe\u0301": 1, "val/tea": 1}))
    assert folder.classes == ("caf\u00e9", "tea")
    assert len(folder.splits["val"]) == 2


@pytest.mark.skipif(os.name == "nt", reason="bytes as file names")
def test_a_class_name_that_is_not_utf8(make_tree):
    root = make_tree({"a": 1, "b": 1})
    try:
        os.mkdir(os.fsencode(root) + b"/\xff")
    except OSError:
        pytest.skip("this file system has no such names")
    with pytest.raises(DataError, match="not UTF-8"):
        scan(root)


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_classes(tmp_path, count):
    for i in range(count):
        folder = f"{tmp_path}/{i:05d}"
        os.mkdir(folder)
        os.close(os.open(f"{folder}/0.jpg", os.O_CREAT))
    folder = scan(tmp_path)
    assert len(folder.classes) == len(folder.splits["all"]) == count
    assert len(folder.warnings) == 1  # of single images: one line for all
    assert len(folder.warnings[0]) < 300


def test_a_single_training_image_that_a_test_checks(make_tree) -> None:
    root = make_tree({"train/cat": 1, "train/dog": 3, "train/eel": 1, "test/cat": 2, "test/dog": 2})
    warnings = scan(root).warnings
    assert "1 class with a single training image: cat." in warnings
    assert "1 class with a single image, which goes to training and is never checked: eel." in warnings


def test_links_that_lead_in_circles_are_named_and_passed_over(make_tree) -> None:
    root = make_tree({"cat": 3, "dog": 3})
    (root / "again").symlink_to(root, target_is_directory=True)
    (root / "self").symlink_to("self")
    (root / "shared").symlink_to(root / "dog", target_is_directory=True)  # an honest link is a class
    folder = scan(root)
    assert folder.classes == ("cat", "dog", "shared")
    assert any("again" in w and "circle" in w for w in folder.warnings)
    assert any("self" in w and "circle" in w for w in folder.warnings)


def test_photos_beside_others_that_cannot_be_read_are_counted(make_tree) -> None:
    root = make_tree({"cat": 3, "dog": 3})
    for i in range(4):
        (root / "cat" / f"{i}.HEIC").write_bytes(b"x")
    (root / "dog" / "notes.txt").write_text("x")
    (root / "dog" / "Thumbs.db").write_bytes(b"x")
    (warning,) = scan(root).warnings
    assert "not all that is in the class folders is used" in warning
    assert warning.endswith("Pillow reads no such photos: 4 files with .heic.")
    with pytest.warns(AfdsWarning, match=r"4 files with \.heic\.$"):
        assert len(list(image_files([root]))) == 6


def test_a_folder_is_read_where_links_in_it_lead_in_circles(make_tree) -> None:
    root = make_tree({"cat": 3})
    (root / "self").symlink_to("self")
    (root / "cat/again").symlink_to(root, target_is_directory=True)
    assert len(list(image_files([root]))) == 3


def test_a_link_that_may_not_be_followed_is_left_to_who_reads_it(make_tree) -> None:
    root = make_tree({"cat": 3})
    (root / "cat/lost.png").symlink_to(next((root / "cat").iterdir()) / "below_a_file.png")
    assert len(list(image_files([root]))) == 4
