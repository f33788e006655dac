"""The six published data sets in small: the member names, list syntax and oddities of the real archives, tiny images.

What is copied from the real ones: folder and file names, `./` or not, the .mat cell arrays, `ID VALUE` lines,
`{CLASS: [CLASS/NUMBER]}`, files that no list names, the stray files of Caltech-256, PNG and GIF bytes in files called
.jpg, greys and CMYK. What is not: the number of images and their content.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

Files = dict[str, bytes]

DOGS = {
    "n02085620-Chihuahua": ["n02085620_7", "n02085620_199", "n02085620_242", "n02085620_275"],
    "n02085782-Japanese_spaniel": ["n02085782_2", "n02085782_17", "n02085782_1039"],
    "n02105855-Shetland_sheepdog": ["n02105855_2933", "n02105855_2001", "n02105855_9415"],
}
INDOORS = {
    "airport_inside": ["airport_inside_0001.jpg", "aeropuerto_15_12_altavista.jpg", "00 a'b.jpg", "t4.jpg"],
    "casino": ["casino_0336.jpg", "casino_0338.jpg", "casino_0512.jpg"],
    "tv_studio": ["Big__Studio.jpg", "studio 1.JPG", "tv_studio_03.jpg"],
}
CUB = {
    "001.Black_footed_Albatross": [
        "Black_Footed_Albatross_0046_18.jpg",
        "Black_Footed_Albatross_0009_34.jpg",
        "Black_Footed_Albatross_0002_55.jpg",
    ],
    "002.Laysan_Albatross": [
        "Laysan_Albatross_0002_1027.jpg",
        "Laysan_Albatross_0003_1033.jpg",
        "Laysan_Albatross_0082_524.jpg",
    ],
    "200.Common_Yellowthroat": [
        "Common_Yellowthroat_0003_190521.jpg",
        "Common_Yellowthroat_0055_190967.jpg",
        "Common_Yellowthroat_0120_190402.jpg",
    ],
}
FOOD = {
    "apple_pie": ["1005649", "1014775", "1026328", "1028787"],
    "bread_pudding": ["1375816", "1005287", "102037"],
    "steak": ["1340977", "100135", "1003501"],
}


def image(kind: str = "RGB", form: str = "JPEG", shade: int = 100, size: tuple[int, int] = (12, 10)) -> bytes:
    """An image file. kind: a mode of Pillow's."""
    colour = {"L": shade, "CMYK": (shade, 20, 30, 0), "RGBA": (shade, 20, 30, 128), "P": shade}.get(
        kind, (shade, 20, 30)
    )
    buffer = io.BytesIO()
    Image.new(kind, size, colour).save(buffer, form)
    return buffer.getvalue()


def write_tar(
    path: Path, files: Mapping[str, bytes], *, mode: str = "w", folders: bool = True, dot: bool = False
) -> Path:
    """A tar of `files` with entries for their folders, as `tar -c` makes it. dot: names begin with ./"""
    made: set[str] = set()
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in files.items():
            parents = [str(p) for p in reversed(Path(name).parents)][1:]
            for folder in parents if folders else []:
                if folder not in made:
                    made.add(folder)
                    info = tarfile.TarInfo(("./" if dot else "") + folder)
                    info.type, info.mode = tarfile.DIRTYPE, 0o755
                    tar.addfile(info)
            info = tarfile.TarInfo(("./" if dot else "") + name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def caltech256_files(classes: int = 3, each: int = 82) -> Files:
    """Class folders of 256_ObjectCategories, a stray file, a stray folder, clutter."""
    names = {1: "001.ak47", 56: "056.dog", 198: "198.spider"} | {i: f"{i:03d}.class-{i}" for i in range(2, classes - 1)}
    files: Files = {}
    for number, label in sorted(names.items())[:classes]:
        for i in range(1, each + 1):
            files[f"256_ObjectCategories/{label}/{number:03d}_{i:04d}.jpg"] = image(
                "L" if i == 3 else "RGB", shade=(number + i) % 256
            )
    files["256_ObjectCategories/056.dog/greg/vision309/056_0001.jpg"] = image()
    files["256_ObjectCategories/198.spider/RENAME2"] = b"#!/usr/bin/perl\n"
    for i in range(1, 6):
        files[f"256_ObjectCategories/257.clutter/257_{i:04d}.jpg"] = image(shade=i)
    return files


def caltech256(folder: Path, **options: int) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    return [write_tar(folder / "256_ObjectCategories.tar", caltech256_files(**options))]


def mat(entries: list[str]) -> bytes:
    """A list of Stanford Dogs: cell arrays and labels, N x 1."""
    cells = np.empty((len(entries), 1), dtype=object)
    annotations = np.empty((len(entries), 1), dtype=object)
    for i, entry in enumerate(entries):
        cells[i, 0], annotations[i, 0] = entry, entry.removesuffix(".jpg")
    classes = sorted({e.split("/")[0] for e in entries})
    labels = np.array([[classes.index(e.split("/")[0]) + 1] for e in entries], dtype=np.uint8)
    buffer = io.BytesIO()
    savemat(buffer, {"file_list": cells, "annotation_list": annotations, "labels": labels})
    return buffer.getvalue()


def dogs120_files() -> tuple[Files, Files]:
    """(images.tar, lists.tar): the first two of each breed train, the others test."""
    images: Files = {}
    train, test = [], []
    for label, names in DOGS.items():
        for i, name in enumerate(names):
            odd = name == "n02105855_2933"  # the real one is a PNG with transparency, too
            images[f"Images/{label}/{name}.jpg"] = image("RGBA", "PNG") if odd else image(shade=10 * i)
            (train if i < 2 else test).append(f"{label}/{name}.jpg")
    return images, {
        "file_list.mat": mat(train + test),
        "test_list.mat": mat(test),
        "train_list.mat": mat(train),
    }


def dogs120(folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    images, lists = dogs120_files()
    return [write_tar(folder / "images.tar", images), write_tar(folder / "lists.tar", lists, folders=False)]


def indoors67_files() -> tuple[Files, str, str]:
    """(indoorCVPR_09.tar, TrainImages.txt, TestImages.txt); one image of each class is in neither list."""
    images: Files = {}
    train, test = [], []
    for label, names in INDOORS.items():
        for i, name in enumerate(names):
            forms = {"casino_0336.jpg": ("RGB", "PNG"), "casino_0338.jpg": ("P", "GIF"), "t4.jpg": ("CMYK", "JPEG")}
            images[f"Images/{label}/{name}"] = image(*forms.get(name, ("RGB", "JPEG")), shade=20 * i)
            (train if i < 2 else test).append(f"{label}/{name}")
        images[f"Images/{label}/unlisted_{label}.gif"] = image("P", "GIF")
    images["Images/casino/Thumbs.db"] = b"\xd0\xcf\x11\xe0"
    # The published lists end their lines in various ways; both are read.
    return images, "\r\n".join(train) + "\r\n", "\n".join(test) + "\n"


def indoors67(folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    images, train, test = indoors67_files()
    (folder / "TrainImages.txt").write_bytes(train.encode())
    (folder / "TestImages.txt").write_bytes(test.encode())
    tar = write_tar(folder / "indoorCVPR_09.tar", images, dot=True)
    return [tar, folder / "TrainImages.txt", folder / "TestImages.txt"]


def cub200_files() -> Files:
    """CUB_200_2011.tgz with attributes.txt at its top, as published; IDs from 1 in the order of images.txt."""
    files: Files = {"attributes.txt": b"1 has_bill_shape::curved_(up_or_down)\n"}
    pairs = [f"{label}/{name}" for label, names in CUB.items() for name in names]
    root = "CUB_200_2011"
    for i, pair in enumerate(pairs):
        files[f"{root}/images/{pair}"] = image("L" if i == 1 else "RGB", shade=20 * i)
    files[f"{root}/images.txt"] = "".join(f"{i} {p}\n" for i, p in enumerate(pairs, 1)).encode()
    files[f"{root}/classes.txt"] = "".join(f"{i} {c}\n" for i, c in enumerate(CUB, 1)).encode()
    firsts = {f"{label}/{names[0]}" for label, names in CUB.items()}
    # the real one begins `1 0`, `2 1`: the first image of a class is a test image there as well
    files[f"{root}/train_test_split.txt"] = "".join(
        f"{i} {int(p not in firsts)}\n" for i, p in enumerate(pairs, 1)
    ).encode()
    labels = "".join(f"{i} {list(CUB).index(p.split('/')[0]) + 1}\n" for i, p in enumerate(pairs, 1))
    files[f"{root}/image_class_labels.txt"] = labels.encode()
    files[f"{root}/parts/parts.txt"] = b"1 back\n"
    return files


def cub200(folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    return [write_tar(folder / "CUB_200_2011.tgz", cub200_files(), mode="w:gz")]


def food101_files() -> Files:
    """food-101.tar.gz: images, then meta/ with both kinds of lists."""
    files: Files = {}
    parts: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    for label, numbers in FOOD.items():
        for i, number in enumerate(numbers):
            grey = number in ("1375816", "1340977")  # greys in the real one, too
            files[f"food-101/images/{label}/{number}.jpg"] = image("L" if grey else "RGB", shade=20 * i)
            split = "test" if i == len(numbers) - 1 else "train"
            parts[split].setdefault(label, []).append(f"{label}/{number}")
    files["food-101/meta/classes.txt"] = "\n".join(FOOD).encode()
    files["food-101/meta/labels.txt"] = b"Apple pie\nBread pudding\nSteak\n"
    for split, content in parts.items():
        files[f"food-101/meta/{split}.json"] = json.dumps(content).encode()
        files[f"food-101/meta/{split}.txt"] = "\n".join(e for part in content.values() for e in part).encode()
    files["food-101/README.txt"] = b"The Food-101 Data Set\n"
    files["food-101/license_agreement.txt"] = b"terms\n"
    return files


def food101(folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    return [write_tar(folder / "food-101.tar.gz", food101_files(), mode="w:gz")]


MINIATURES = {
    "caltech256-30": caltech256,
    "caltech256-60": caltech256,
    "dogs120": dogs120,
    "indoors67": indoors67,
    "cub200": cub200,
    "food101": food101,
}
COUNTS = {  # classes, training images, test images
    "caltech256-30": (3, 90, 60),
    "caltech256-60": (3, 180, 60),
    "dogs120": (3, 6, 4),
    "indoors67": (3, 6, 4),
    "cub200": (3, 6, 3),
    "food101": (3, 7, 3),
}
