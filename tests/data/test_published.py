"""Published data sets, from miniature archives in the published format: what comes out, and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.io import savemat

from afds.data import make_splits, read_rgb, scan
from afds.data.published import Options, Prepared, PublishedSet, catalogue, prepare, preparing
from afds.data.published.archives import TarSource
from afds.data.published.plan import component
from afds.errors import ConfigError, DataError
from miniatures import (
    COUNTS,
    CUB,
    DOGS,
    MINIATURES,
    caltech256_files,
    cub200_files,
    dogs120_files,
    food101_files,
    image,
    mat,
    write_tar,
)

SETS = catalogue()
NAMES = list(SETS)


def take(name: str, given: list[Path], out: Path, **options: Any) -> Prepared:
    """Prepare a miniature, which is not of the published size."""
    return prepare(SETS[name], given, out, Options(**options), skip_checksum=True)


def tree(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def published_as(published: PublishedSet, files: list[Path], counts: tuple[int, int, int]) -> PublishedSet:
    """`published` with the sizes, checksums and counts of a miniature, so that the checks themselves are tested."""
    by_name = {f.name: f for f in files}
    return dataclasses.replace(
        published,
        files=tuple(
            dataclasses.replace(
                f,
                size=by_name[f.name].stat().st_size,
                md5=hashlib.md5(by_name[f.name].read_bytes()).hexdigest(),
                sha256="",
            )
            for f in published.files
        ),
        classes=counts[0],
        train=counts[1],
        test=counts[2],
    )


# What comes out


def test_the_six_of_the_paper() -> None:
    assert NAMES == ["caltech256-30", "caltech256-60", "dogs120", "indoors67", "cub200", "food101"]
    for s in SETS.values():
        assert s.train + s.test <= s.images
        for f in s.files:
            assert len(f.md5) in (0, 32)
            assert len(f.sha256) in (0, 64)
            assert f.recorded_by


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_that_fit_takes(name: str, tmp_path: Path) -> None:
    files = MINIATURES[name](tmp_path / "down")
    done = take(name, files, tmp_path / "out")
    assert (done.classes, done.train, done.test) == COUNTS[name]
    assert done.fresh
    folder = scan(tmp_path / "out")
    assert (len(folder.classes), len(folder.splits["train"]), len(folder.splits["test"])) == COUNTS[name]
    assert not folder.warnings
    for items in folder.splits.values():
        for item in items:
            assert read_rgb(item.path).mode == "RGB"  # greys, CMYK, PNG and GIF bytes called .jpg
    splits = make_splits(folder, seed=0, val_fraction=0.3)
    assert splits.test is not None
    assert {i.path for i in splits.train}.isdisjoint(i.path for i in splits.test)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("name", NAMES)
def test_found_in_a_folder(name: str, tmp_path: Path) -> None:
    MINIATURES[name](tmp_path / "down")
    (tmp_path / "down/holiday.zip").write_bytes(b"PK")
    take(name, [tmp_path / "down"], tmp_path / "out")
    take(name, MINIATURES[name](tmp_path / "again"), tmp_path / "other")
    assert tree(tmp_path / "out") == tree(tmp_path / "other")


@pytest.mark.parametrize("name", NAMES)
def test_from_an_unpacked_folder_by_hard_links(name: str, tmp_path: Path) -> None:
    packed = MINIATURES[name](tmp_path / "down")
    loose = tmp_path / "loose"
    loose.mkdir()
    for file in packed:
        if file.suffix == ".txt":
            shutil.copy(file, loose)
        else:
            with tarfile.open(file) as tar:
                tar.extractall(loose, filter="data")
    take(name, packed, tmp_path / "from-tar")
    done = take(name, [loose], tmp_path / "from-folder")
    assert tree(tmp_path / "from-tar") == tree(tmp_path / "from-folder")
    assert any("no checksum" in note for note in done.notes)
    images = list((tmp_path / "from-folder").rglob("*.jpg"))
    assert images
    assert all(p.stat().st_nlink == 2 for p in images)


def test_dogs_by_the_lists(tmp_path: Path) -> None:
    done = take("dogs120", MINIATURES["dogs120"](tmp_path / "down"), tmp_path / "out")
    for label, names in DOGS.items():
        assert sorted(p.stem for p in (tmp_path / "out/train" / label).iterdir()) == sorted(names[:2])
        assert sorted(p.stem for p in (tmp_path / "out/test" / label).iterdir()) == sorted(names[2:])
    assert any("1 PNG" in note for note in done.notes)


def test_cub_by_id(tmp_path: Path) -> None:
    take("cub200", MINIATURES["cub200"](tmp_path / "down"), tmp_path / "out")
    for label, names in CUB.items():
        assert [p.name for p in (tmp_path / "out/test" / label).iterdir()] == names[:1]
        assert sorted(p.name for p in (tmp_path / "out/train" / label).iterdir()) == sorted(names[1:])


def test_indoors_oddities(tmp_path: Path) -> None:
    done = take("indoors67", MINIATURES["indoors67"](tmp_path / "down"), tmp_path / "out")
    assert any("1 GIF, 1 PNG" in note for note in done.notes)
    assert any("3 images of the archive are in neither list" in note for note in done.notes)
    assert (tmp_path / "out/test/tv_studio/tv_studio_03.jpg").exists()
    assert (tmp_path / "out/test/airport_inside/00 a'b.jpg").exists()
    assert not list((tmp_path / "out").rglob("Thumbs.db"))


def test_food_from_text_lists_where_the_json_is_gone(tmp_path: Path) -> None:
    files = {n: d for n, d in food101_files().items() if not n.endswith(".json")}
    text = write_tar(tmp_path / "food-101.tar.gz", files, mode="w:gz")
    take("food101", [text], tmp_path / "a")
    take("food101", MINIATURES["food101"](tmp_path / "down"), tmp_path / "b")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_caltech_passes_over_what_is_no_image(tmp_path: Path) -> None:
    done = take("caltech256-30", MINIATURES["caltech256-30"](tmp_path / "down"), tmp_path / "out")
    names = tree(tmp_path / "out")
    assert not any("RENAME2" in n or "greg" in n or "clutter" in n for n in names)
    assert any("RENAME2" in note and "greg" in note for note in done.notes)
    assert any("257.clutter (5 images)" in note for note in done.notes)


def test_caltech_draws(tmp_path: Path) -> None:
    files = MINIATURES["caltech256-30"](tmp_path / "down")
    for out, name, seed in (("a", "caltech256-30", 0), ("b", "caltech256-60", 0), ("c", "caltech256-30", 1)):
        take(name, files, tmp_path / out, seed=seed)
    a, b, c = (set(tree(tmp_path / out)) - {"prepared.json"} for out in "abc")
    assert a < b  # the smaller training set lies in the larger, the test images are the same
    assert a != c
    assert {n for n in a if n.startswith("test")} == {n for n in b if n.startswith("test")}
    train = {Path(n).name for n in b if n.startswith("train")}
    assert train.isdisjoint(Path(n).name for n in b if n.startswith("test"))


def test_caltech_as_the_l2_sp_code_does(tmp_path: Path) -> None:
    files = caltech256_files()
    files |= {f"256_ObjectCategories/257.clutter/257_{i:04d}.jpg": image() for i in range(1, 83)}
    tar = write_tar(tmp_path / "256_ObjectCategories.tar", files)
    done = take("caltech256-30", [tar], tmp_path / "out", split="l2-sp", clutter=True)
    assert (done.classes, done.train, done.test) == (4, 120, 80)
    for split, numbers in (("train", range(1, 31)), ("test", range(61, 81))):
        found = sorted(p.name for p in (tmp_path / "out" / split / "056.dog").iterdir())
        assert found == [f"056_{i:04d}.jpg" for i in numbers]


def test_caltech_tests_on_all_that_is_left(tmp_path: Path) -> None:
    done = take("caltech256-60", MINIATURES["caltech256-60"](tmp_path / "down"), tmp_path / "out", test_per_class=0)
    assert (done.train, done.test) == (3 * 60, 3 * 22)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"seed": -1}, "--seed"),
        ({"test_per_class": -1}, "--test-per-class"),
        ({"split": "l2-sp", "test_per_class": 5}, "61 to 80"),
    ],
)
def test_options_are_checked(options: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        Options(**options)


def test_caltech_too_few(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "256_ObjectCategories.tar", caltech256_files(each=40))
    with pytest.raises(DataError, match=r"001\.ak47: 40 images, and 30 for training with 20"):
        take("caltech256-30", [tar], tmp_path / "out")
    with pytest.raises(DataError, match="wants 80"):
        take("caltech256-30", [tar], tmp_path / "out", split="l2-sp")


# What is checked


@pytest.mark.parametrize("name", NAMES)
def test_the_published_files_pass_their_checksums(name: str, tmp_path: Path) -> None:
    files = MINIATURES[name](tmp_path / "down")
    done = prepare(published_as(SETS[name], files, COUNTS[name]), files, tmp_path / "out")
    assert (done.classes, done.train, done.test) == COUNTS[name]


def test_one_right_checksum_of_two_is_enough_and_none_is_not(tmp_path: Path) -> None:
    files = MINIATURES["cub200"](tmp_path / "down")
    right = published_as(SETS["cub200"], files, COUNTS["cub200"])
    (file,) = right.files
    other = dataclasses.replace(right, files=(dataclasses.replace(file, sha256="0" * 64),))
    prepare(other, files, tmp_path / "one")
    neither = dataclasses.replace(right, files=(dataclasses.replace(file, sha256="0" * 64, md5="1" * 32),))
    with pytest.raises(DataError, match=r"not the published CUB_200_2011\.tgz .*published 1{32}.*--skip-checksum"):
        prepare(neither, files, tmp_path / "two")
    assert not (tmp_path / "two").exists()


def test_no_checksum_known_is_said(tmp_path: Path) -> None:
    files = MINIATURES["cub200"](tmp_path / "down")
    right = published_as(SETS["cub200"], files, COUNTS["cub200"])
    unknown = dataclasses.replace(right, files=(dataclasses.replace(right.files[0], md5=""),))
    done = prepare(unknown, files, tmp_path / "out")
    assert any("no checksum is known" in note for note in done.notes)


def test_too_few_images_are_refused_where_no_checksum_could_be_taken(tmp_path: Path) -> None:
    files = MINIATURES["cub200"](tmp_path / "down")
    with tarfile.open(files[0]) as tar:
        tar.extractall(tmp_path / "loose", filter="data")
    with pytest.raises(DataError, match="3 classes in place of 200"):
        prepare(SETS["cub200"], [tmp_path / "loose"], tmp_path / "out")


@pytest.mark.parametrize("name", NAMES)
def test_another_size(name: str, tmp_path: Path) -> None:
    files = MINIATURES[name](tmp_path / "down")
    with pytest.raises(DataError, match=r"bytes, and the published .* has [0-9,]+: cut off\. Fetch it again from http"):
        prepare(SETS[name], files, tmp_path / "out")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keep", [0, 100, 512, 700, 0.3, 0.6, -600, -1])
def test_truncated(name: str, keep: float, tmp_path: Path) -> None:
    """Cut off at any place, header, content or end, an archive is refused and names itself; nothing is left."""
    files = MINIATURES[name](tmp_path / "down")
    archive = files[0]
    data = archive.read_bytes()
    if archive.suffix == ".tar":
        with tarfile.open(archive) as tar:
            tar.getmembers()
            data = data[: tar.offset + 512]  # without the padding, which may be cut off and nothing is lost
    kept = int(keep * len(data)) if isinstance(keep, float) else keep if keep >= 0 else len(data) + keep
    archive.write_bytes(data[:kept])
    with pytest.raises(DataError, match=archive.name.replace(".", r"\.")):
        take(name, files, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["down"]


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"<!DOCTYPE html><title>404</title>" + b" " * 600, "a web page"),
        (b"PK\x03\x04" + b"0" * 600, "a zip file"),
        (b"", "an empty file"),
        (b"nothing" * 200, "not a tar archive"),
    ],
)
def test_no_archive_at_all(content: bytes, wanted: str, tmp_path: Path) -> None:
    files = MINIATURES["dogs120"](tmp_path / "down")
    files[0].write_bytes(content)
    with pytest.raises(DataError, match=wanted):
        take("dogs120", files, tmp_path / "out")


def test_damaged_in_the_middle_of_a_compressed_archive(tmp_path: Path) -> None:
    files = MINIATURES["food101"](tmp_path / "down")
    data = bytearray(files[0].read_bytes())
    data[len(data) // 2] ^= 0xFF
    files[0].write_bytes(data)
    with pytest.raises(DataError, match=r"food-101\.tar\.gz"):
        take("food101", files, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# What is missing


def test_nothing_given_tells_where_to_get_it(tmp_path: Path) -> None:
    for s in SETS.values():
        with pytest.raises(DataError) as error:
            prepare(s, [], tmp_path / "out")
        for f in s.files:
            assert f.name in str(error.value)
            assert f.url in str(error.value)
        assert s.home in str(error.value)


def test_a_file_of_another_set(tmp_path: Path) -> None:
    (wrong,) = MINIATURES["food101"](tmp_path / "down")
    with pytest.raises(DataError, match=r"(?s)Missing:\n  images\.tar.*Found instead: food-101\.tar\.gz.*of food101"):
        take("dogs120", [wrong], tmp_path / "out")


def test_an_archive_missing_in_the_folder(tmp_path: Path) -> None:
    files = MINIATURES["dogs120"](tmp_path / "down")
    files[1].rename(tmp_path / "down/annotation.tar")
    with pytest.raises(DataError, match=r"(?s)lists\.tar \(481,280 bytes\).*Found instead: annotation\.tar"):
        take("dogs120", [tmp_path / "down"], tmp_path / "out")


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        take("dogs120", [tmp_path / "nowhere"], tmp_path / "out")


def test_renamed_by_a_browser(tmp_path: Path) -> None:
    files = MINIATURES["dogs120"](tmp_path / "down")
    renamed = files[0].rename(tmp_path / "down/images (1).tar")
    assert take("dogs120", [renamed, files[1]], tmp_path / "out").train == 6


def test_the_lists_of_dogs_unpacked(tmp_path: Path) -> None:
    files = MINIATURES["dogs120"](tmp_path / "down")
    with tarfile.open(files[1]) as tar:
        tar.extractall(tmp_path / "lists", filter="data")
    lists = [tmp_path / "lists/train_list.mat", tmp_path / "lists/test_list.mat"]
    assert take("dogs120", [files[0], *lists], tmp_path / "out").train == 6


@pytest.mark.parametrize(
    ("gone", "wanted"), [("CUB_200_2011/train_test_split.txt", "train_test_split.txt is missing"),
                         ("CUB_200_2011/images.txt", "images.txt is missing")]
)  # fmt: skip
def test_a_list_is_missing(gone: str, wanted: str, tmp_path: Path) -> None:
    files = cub200_files()
    del files[gone]
    tar = write_tar(tmp_path / "CUB_200_2011.tgz", files, mode="w:gz")
    with pytest.raises(DataError, match=wanted):
        take("cub200", [tar], tmp_path / "out")


def test_a_listed_image_is_missing(tmp_path: Path) -> None:
    images, lists = dogs120_files()
    del images["Images/n02085620-Chihuahua/n02085620_7.jpg"]
    tars = [write_tar(tmp_path / "images.tar", images), write_tar(tmp_path / "lists.tar", lists)]
    with pytest.raises(DataError, match=r"1 of the 10 listed images .*n02085620-Chihuahua/n02085620_7\.jpg"):
        take("dogs120", tars, tmp_path / "out")


# Lists


@pytest.mark.parametrize(
    ("before", "after"),
    [(b"", b""), (b"\xef\xbb\xbf", b""), (b"\r\n", b"  \r\n\r\n"), (b"", b"tv_studio/Big__Studio.jpg\n")],
    ids=["plain", "byte order mark", "blank lines", "a line twice"],
)
def test_list_syntax(before: bytes, after: bytes, tmp_path: Path) -> None:
    files = MINIATURES["indoors67"](tmp_path / "down")
    files[1].write_bytes(before + files[1].read_bytes() + after)
    assert take("indoors67", files, tmp_path / "out").train == 6


def test_list_from_windows(tmp_path: Path) -> None:
    files = MINIATURES["indoors67"](tmp_path / "down")
    files[1].write_bytes(files[1].read_bytes().replace(b"/", b"\\").upper().replace(b"\n", b"\r\n"))
    done = take("indoors67", files, tmp_path / "out")
    assert done.train == 6
    assert any("other capitals" in note for note in done.notes)


def test_an_image_in_both_lists(tmp_path: Path) -> None:
    files = MINIATURES["indoors67"](tmp_path / "down")
    files[2].write_bytes(files[2].read_bytes() + files[1].read_bytes().splitlines()[0] + b"\n")
    with pytest.raises(DataError, match="in both lists"):
        take("indoors67", files, tmp_path / "out")


@pytest.mark.parametrize(
    "line", ["../../etc/passwd", "noclass.jpg", "a/..", "tv_studio/.hidden", "a/\x01.jpg", "a/" + "x" * 300]
)
def test_hostile_lines(line: str, tmp_path: Path) -> None:
    files = MINIATURES["indoors67"](tmp_path / "down")
    files[1].write_bytes(files[1].read_bytes() + line.encode() + b"\n")
    with pytest.raises(DataError, match=r"TrainImages\.txt|TrainImages"):
        take("indoors67", files, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("train_list.mat", b"MATLAB 5.0 MAT-file" + b"\x00" * 300, "not a MATLAB file|no `file_list`"),
        ("train_list.mat", b"", "not a MATLAB file"),
        ("train_list.mat", None, "no `file_list`"),
    ],
)
def test_damaged_mat(name: str, content: bytes | None, wanted: str, tmp_path: Path) -> None:
    if content is None:
        buffer = io.BytesIO()
        savemat(buffer, {"something": np.zeros(3)})
        content = buffer.getvalue()
    images, lists = dogs120_files()
    tars = [write_tar(tmp_path / "images.tar", images), write_tar(tmp_path / "lists.tar", lists | {name: content})]
    with pytest.raises(DataError, match=wanted):
        take("dogs120", tars, tmp_path / "out")


def test_mat_of_numbers(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    savemat(buffer, {"file_list": np.arange(4)})
    images, lists = dogs120_files()
    lists["test_list.mat"] = buffer.getvalue()
    tars = [write_tar(tmp_path / "images.tar", images), write_tar(tmp_path / "lists.tar", lists)]
    with pytest.raises(DataError, match="CLASS/IMAGE"):
        take("dogs120", tars, tmp_path / "out")


def test_an_empty_list(tmp_path: Path) -> None:
    images, lists = dogs120_files()
    tars = [write_tar(tmp_path / "images.tar", images),
            write_tar(tmp_path / "lists.tar", lists | {"test_list.mat": mat([])})]  # fmt: skip
    with pytest.raises(DataError, match="empty list"):
        take("dogs120", tars, tmp_path / "out")


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"{}", b'{"apple_pie": 3}', b'{"apple_pie": [3]}', b"[" * 100_000, b"\xff\xfe"]
)
def test_damaged_json(content: bytes, tmp_path: Path) -> None:
    files = food101_files() | {"food-101/meta/train.json": content}
    tar = write_tar(tmp_path / "food-101.tar.gz", files, mode="w:gz")
    with pytest.raises(DataError, match=r"train\.json"):
        take("food101", [tar], tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "change", "wanted"),
    [
        ("train_test_split.txt", (b"1 0\n", b""), "different images"),
        ("train_test_split.txt", (b"1 0\n", b"1 2\n"), "where 0 or 1"),
        ("train_test_split.txt", (b"2 1\n", b"1 1\n"), "stands there twice"),
        ("images.txt", (b"1 001", b"one 001"), "not of the form"),
    ],
)
def test_damaged_cub_lists(name: str, change: tuple[bytes, bytes], wanted: str, tmp_path: Path) -> None:
    files = cub200_files()
    path = f"CUB_200_2011/{name}"
    assert change[0] in files[path]
    files[path] = files[path].replace(*change, 1)
    tar = write_tar(tmp_path / "CUB_200_2011.tgz", files, mode="w:gz")
    with pytest.raises(DataError, match=wanted):
        take("cub200", [tar], tmp_path / "out")


def test_a_class_that_is_only_tested(tmp_path: Path) -> None:
    files = MINIATURES["indoors67"](tmp_path / "down")
    lines = [line for line in files[1].read_text().splitlines() if not line.startswith("casino")]
    files[1].write_text("\n".join(lines))
    with pytest.raises(DataError, match="No training image of: casino"):
        take("indoors67", files, tmp_path / "out")


@given(st.text(max_size=40))
def test_a_component_stays_in_its_folder(text: str) -> None:
    try:
        name = component(text, "here")
    except DataError:
        return
    assert name not in ("", ".", "..")
    assert "/" not in name
    assert "\\" not in name
    assert (Path("/a") / name).parent == Path("/a")


# Hostile archives


def add(path: Path, change: Any) -> None:
    """Append one member to a tar; `change` makes it hostile."""
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("Images/x/y.jpg")
        info.size = 4
        change(info)
        tar.addfile(info, io.BytesIO(b"evil" if info.isreg() else b""))


@pytest.mark.parametrize("name", ["../evil.jpg", "/evil.jpg", "Images/../../evil.jpg", "..\\evil.jpg", "C:/evil.jpg"])
def test_paths_that_point_outside(name: str, tmp_path: Path) -> None:
    files = MINIATURES["dogs120"](tmp_path / "down")
    add(files[0], lambda info: setattr(info, "name", name))
    with pytest.raises(DataError, match="points outside"):
        take("dogs120", files, tmp_path / "out")
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_never_made(kind: bytes, tmp_path: Path) -> None:
    """In place of a listed image: it is missing. Beside them: passed over."""
    images, lists = dogs120_files()
    wanted = "Images/n02085620-Chihuahua/n02085620_7.jpg"

    def hostile(name: str) -> Any:
        def change(info: tarfile.TarInfo) -> None:
            info.name, info.type, info.size, info.linkname = name, kind, 0, "/etc/passwd"

        return change

    beside = write_tar(tmp_path / "images.tar", images)
    add(beside, hostile("Images/n02085620-Chihuahua/odd.jpg"))
    list_tar = write_tar(tmp_path / "lists.tar", lists)
    take("dogs120", [beside, list_tar], tmp_path / "out")
    assert all(p.is_file() and not p.is_symlink() for p in (tmp_path / "out").rglob("*.jpg"))
    del images[wanted]
    instead = write_tar(tmp_path / "images.tar", images)
    add(instead, hostile(wanted))
    with pytest.raises(DataError, match="1 of the 10 listed images"):
        take("dogs120", [instead, list_tar], tmp_path / "other")


def test_links_in_an_unpacked_folder_are_not_followed(tmp_path: Path) -> None:
    images, lists = dogs120_files()
    for name, data in (images | lists).items():
        (tmp_path / "loose" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "loose" / name).write_bytes(data)
    one = tmp_path / "loose/Images/n02085620-Chihuahua/n02085620_7.jpg"
    one.unlink()
    one.symlink_to("/etc/passwd")
    (tmp_path / "loose/Images/loop").symlink_to(tmp_path / "loose", target_is_directory=True)
    with pytest.raises(DataError, match="1 of the 10 listed images"):
        take("dogs120", [tmp_path / "loose"], tmp_path / "out")


def test_a_member_twice_counts_as_tar_has_it(tmp_path: Path) -> None:
    files = MINIATURES["dogs120"](tmp_path / "down")
    later = image(shade=255)
    with tarfile.open(files[0], "a") as tar:
        info = tarfile.TarInfo("Images/n02085620-Chihuahua/n02085620_7.jpg")
        info.size = len(later)
        tar.addfile(info, io.BytesIO(later))
    take("dogs120", files, tmp_path / "out")
    assert (tmp_path / "out/train/n02085620-Chihuahua/n02085620_7.jpg").read_bytes() == later


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tar,) = MINIATURES["cub200"](tmp_path)
    monkeypatch.setattr("afds.data.published.archives.MAX_MEMBERS", 5)
    with pytest.raises(DataError, match="over 5 members"):
        TarSource(tar)
    monkeypatch.undo()
    monkeypatch.setattr("afds.data.published.archives.MAX_TOTAL_BYTES", 1000)
    with pytest.raises(DataError, match="larger than any published archive"):
        TarSource(tar)


# The folder


def test_a_second_run_leaves_the_folder_alone(tmp_path: Path) -> None:
    files = MINIATURES["dogs120"](tmp_path / "down")
    take("dogs120", files, tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    shutil.rmtree(tmp_path / "down")  # what is done needs the archives no more
    again = take("dogs120", [], tmp_path / "out")
    assert not again.fresh
    assert any("not the published set" in note for note in again.notes)  # said again, as it still holds
    assert (again.train, again.test) == (6, 4)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}


def test_another_folder_is_never_touched(tmp_path: Path) -> None:
    files = MINIATURES["caltech256-30"](tmp_path / "down")
    take("caltech256-30", files, tmp_path / "out")
    with pytest.raises(DataError, match=r"other options \(seed 0\)"):
        take("caltech256-30", files, tmp_path / "out", seed=1)
    with pytest.raises(DataError, match=r"other options \(set caltech256-30\)"):
        take("caltech256-60", files, tmp_path / "out")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "a.txt").write_text("mine")
    with pytest.raises(DataError, match="not empty and afds did not prepare it"):
        take("caltech256-30", files, mine)
    assert tree(mine) == ["a.txt"]
    with pytest.raises(DataError, match="a file is there"):
        take("caltech256-30", files, mine / "a.txt")


def test_a_folder_with_images_taken_out_is_named(tmp_path: Path) -> None:
    files = MINIATURES["dogs120"](tmp_path / "down")
    take("dogs120", files, tmp_path / "out")
    next((tmp_path / "out/train").rglob("*.jpg")).unlink()
    with pytest.raises(DataError, match=r"5 training and 4 test images .* are there, and 6 and 4"):
        take("dogs120", files, tmp_path / "out")


def test_a_folder_with_an_emptied_image_is_named(tmp_path: Path) -> None:
    files = MINIATURES["dogs120"](tmp_path / "down")
    take("dogs120", files, tmp_path / "out")
    next((tmp_path / "out/train").rglob("*.jpg")).write_bytes(b"")
    with pytest.raises(DataError, match="taken out, added or changed"):
        take("dogs120", files, tmp_path / "out")


def test_an_empty_folder_will_do(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert take("dogs120", MINIATURES["dogs120"](tmp_path / "down"), tmp_path / "out").fresh


def test_interrupted_nothing_is_left_and_a_kill_is_named(tmp_path: Path) -> None:
    files = MINIATURES["dogs120"](tmp_path / "down")

    def stop(what: str, done: int, total: int) -> None:
        if what == "Taking out" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(SETS["dogs120"], files, tmp_path / "out", skip_checksum=True, tell=stop)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["down"]
    (tmp_path / ".out.preparing-abc").mkdir()  # as a power cut leaves it
    done = take("dogs120", files, tmp_path / "out")
    assert any(".out.preparing-abc" in note for note in done.notes)


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = MINIATURES["dogs120"](tmp_path / "down")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(preparing.shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    with pytest.raises(DataError, match="are needed there and 1 MiB are free"):
        take("dogs120", files, tmp_path / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_right_to_write(tmp_path: Path) -> None:
    files = MINIATURES["dogs120"](tmp_path / "down")
    (tmp_path / "shut").mkdir(mode=0o555)
    with pytest.raises(DataError, match="cannot be written to"):
        take("dogs120", files, tmp_path / "shut/out")
