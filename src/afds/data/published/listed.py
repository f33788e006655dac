"""The sets whose authors say which images train and which test: Stanford Dogs, MIT Indoors, CUB, Food-101."""

from __future__ import annotations

import io
import json

import numpy as np

from afds.data.published.plan import Options, Plan, Readable, find_one, from_lists, lines_of
from afds.errors import DataError


def plan_dogs120(source: Readable, options: Options) -> Plan:
    """`Images/n02085620-Chihuahua/n02085620_7.jpg` by `train_list.mat` and `test_list.mat`.

    Each .mat holds `file_list`, `annotation_list` (cell arrays, N x 1) and `labels` (N x 1, from 1).
    One image, n02105855_2933.jpg, is a PNG with transparency; it is read by its content.
    """
    names = {"train": find_one(source, "train_list.mat"), "test": find_one(source, "test_list.mat")}
    return from_lists(source, "Images", {s: (n, _file_list(source, n)) for s, n in names.items()})  # type: ignore[misc]


def _file_list(source: Readable, name: str) -> list[str]:
    from scipy.io import loadmat  # only this set needs it

    where = source.where(name)
    try:
        content = loadmat(io.BytesIO(source.read(name)), variable_names=["file_list"], chars_as_strings=True)
    except DataError:
        raise
    except Exception as error:  # damaged files make scipy raise almost anything
        raise DataError(f"{where}: not a MATLAB file that SciPy reads ({error}). Fetch it again.") from error
    if "file_list" not in content:
        raise DataError(f"{where}: it holds no `file_list`. The file is not as published.")
    entries = []
    for cell in content["file_list"].ravel():
        while isinstance(cell, np.ndarray):  # a cell is an array that holds an array
            if cell.size != 1:
                raise DataError(f"{where}: an entry of `file_list` is no file name. The file is not as published.")
            cell = cell.ravel()[0]
        entries.append(str(cell))
    return entries


def plan_indoors67(source: Readable, options: Options) -> Plan:
    """`Images/airport_inside/airport_inside_0001.jpg` by `TrainImages.txt` and `TestImages.txt`: CLASS/IMAGE lines.

    The lists hold 77 to 83 training and 17 to 23 test images per class. Some images called .jpg are no JPEGs.
    """
    names = {"train": find_one(source, "TrainImages.txt"), "test": find_one(source, "TestImages.txt")}
    return from_lists(source, "Images", {s: (n, lines_of(source, n)) for s, n in names.items()})  # type: ignore[misc]


def plan_cub200(source: Readable, options: Options) -> Plan:
    """`CUB_200_2011/images/001.Black_footed_Albatross/...jpg`; `images.txt`: ID CLASS/IMAGE; `train_test_split.txt`: ID
    and 1 for training."""
    images_name = find_one(source, "images.txt")
    beside = images_name.removesuffix("images.txt")
    split_name = find_one(source, f"{beside}train_test_split.txt")
    images, trains = _by_id(source, images_name), _by_id(source, split_name)
    if set(images) != set(trains):
        odd = min(set(images) ^ set(trains))
        raise DataError(f"{source.where(split_name)} and images.txt name different images (ID {odd}, for one).")
    if wrong := [v for v in trains.values() if v not in ("0", "1")]:
        raise DataError(f"{source.where(split_name)}: {wrong[0][:40]!r} where 0 or 1 should be.")
    return from_lists(
        source,
        "images",
        {
            "train": (images_name, [images[i] for i in images if trains[i] == "1"]),
            "test": (images_name, [images[i] for i in images if trains[i] == "0"]),
        },
    )


def _by_id(source: Readable, name: str) -> dict[str, str]:
    """Lines `ID VALUE` as a dict."""
    found: dict[str, str] = {}
    for line in lines_of(source, name):
        number, _, value = line.partition(" ")
        if not number.isdigit() or not value.strip():
            raise DataError(f"{source.where(name)}: {line[:60]!r} is not of the form `ID VALUE`.")
        if number in found:
            raise DataError(f"{source.where(name)}: ID {number} stands there twice.")
        found[number] = value.strip()
    return found


def plan_food101(source: Readable, options: Options) -> Plan:
    """`food-101/images/apple_pie/1005649.jpg` by `meta/train.json` and `meta/test.json`: {CLASS: [CLASS/NUMBER, ..]}.

    Where the .json files are gone, `meta/train.txt` and `meta/test.txt` say the same, a CLASS/NUMBER a line.
    """
    lists = {}
    for split in ("train", "test"):
        try:
            name = find_one(source, f"meta/{split}.json")
        except DataError:
            name = find_one(source, f"meta/{split}.txt")
        entries = _json_entries(source, name) if name.endswith(".json") else lines_of(source, name)
        lists[split] = (name, [f"{entry}.jpg" for entry in entries])
    return from_lists(source, "images", lists)  # type: ignore[arg-type]


def _json_entries(source: Readable, name: str) -> list[str]:
    where = source.where(name)
    try:
        content = json.loads(source.read(name).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not readable as JSON ({error}). Fetch the archive again.") from error
    lists = list(content.values()) if isinstance(content, dict) else []
    if not lists or not all(isinstance(entries, list) for entries in lists):
        raise DataError(f"{where}: not of the form {{CLASS: [CLASS/NUMBER, ..]}}. The file is not as published.")
    entries = [entry for part in lists for entry in part]
    if not all(isinstance(entry, str) for entry in entries):
        raise DataError(f"{where}: an entry is no text. The file is not as published.")
    return entries
