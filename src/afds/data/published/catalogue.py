"""The six targets of the AFDS paper as their authors publish them: files, sizes, checksums, counts.

None of these pages was open when this was written: sizes and checksums are those that public code records, named
in each file's ``recorded_by``. A file passes when *one* of its recorded digests matches.

Which split is whose: Stanford Dogs, MIT Indoors, CUB and Food-101 bring their own lists of training and test images.
Caltech-256 has none; see ``caltech256.py`` for what is the custom and what is our choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from afds.data.published.plan import Options, Plan, Readable


@dataclass(frozen=True)
class PublishedFile:
    """One file to fetch."""

    name: str
    size: int | None
    """Bytes, None where nobody records them."""
    url: str
    unpacked: tuple[str, ...]
    """Files or folders whose presence shows that this archive lies unpacked in a folder."""
    md5: str = ""
    sha256: str = ""
    recorded_by: str = ""
    """Whose code records size and digests."""
    note: str = ""


@dataclass(frozen=True)
class PublishedSet:
    """A data set with a fixed split."""

    name: str
    title: str
    home: str
    files: tuple[PublishedFile, ...]
    classes: int
    train: int
    test: int
    images: int
    """In the archive, used or not."""
    split: str
    """Whose split it is, for people."""
    plan: Callable[[Readable, Options], Plan]


def catalogue() -> dict[str, PublishedSet]:
    """The six sets by name, in the paper's order."""
    return {s.name: s for s in (*_caltech(), _dogs(), _indoors(), _cub(), _food())}


def _caltech() -> tuple[PublishedSet, PublishedSet]:
    from afds.data.published.caltech256 import plan_caltech256

    archive = PublishedFile(
        name="256_ObjectCategories.tar",
        size=1_183_006_720,
        url="https://data.caltech.edu/records/nyy15-4j048/files/256_ObjectCategories.tar",
        unpacked=("256_ObjectCategories",),
        md5="67b4f42ca05d46448c6bb8ecd2220f6d",
        sha256="08ff01b03c65566014ae88eb0490dbe4419fc7ac4de726ee1163e39fd809543e",
        recorded_by="torchvision (MD5), TensorFlow Datasets (size, SHA-256)",
    )

    def at(per_class: int) -> PublishedSet:
        return PublishedSet(
            name=f"caltech256-{per_class}",
            title=f"Caltech-256, {per_class} training images per class (Griffin, Holub, Perona 2007)",
            home="https://data.caltech.edu/records/nyy15-4j048",
            files=(archive,),
            classes=256,
            train=256 * per_class,
            test=256 * 20,
            images=30_607,
            split=f"no official one: {per_class} + 20 images per class, drawn by --seed (our choice; see --split)",
            plan=lambda source, options: plan_caltech256(source, options, per_class),
        )

    return at(30), at(60)


def _dogs() -> PublishedSet:
    from afds.data.published.listed import plan_dogs120

    home = "http://vision.stanford.edu/aditya86/ImageNetDogs/"
    recorded_by = "TensorFlow Datasets (size, SHA-256), several public loaders (MD5)"
    return PublishedSet(
        name="dogs120",
        title="Stanford Dogs 120 (Khosla, Jayadevaprakash, Yao, Fei-Fei 2011)",
        home=home,
        files=(
            PublishedFile(
                name="images.tar",
                size=793_579_520,
                url=home + "images.tar",
                unpacked=("Images",),
                md5="1bb1f2a596ae7057f99d7d75860002ef",
                sha256="a443fc2f9a851aa1a7b8e4fa4af94b8459fce2c9f5a2f4dd4669cf9673a4ec58",
                recorded_by=recorded_by,
            ),
            PublishedFile(
                name="lists.tar",
                size=481_280,
                url=home + "lists.tar",
                unpacked=("train_list.mat", "test_list.mat"),
                md5="edbb9f16854ec66506b5f09b583e0656",
                sha256="34b47cacd9a98b5d150e084f24d29391c084c55272295ec65c85651bc35f4d6c",
                recorded_by=recorded_by,
            ),
        ),
        classes=120,
        train=12_000,
        test=8_580,
        images=20_580,
        split="official: train_list.mat, test_list.mat",
        plan=plan_dogs120,
    )


def _indoors() -> PublishedSet:
    from afds.data.published.listed import plan_indoors67

    one_loader = "one public loader (MD5); not confirmed by a second"
    return PublishedSet(
        name="indoors67",
        title="MIT Indoors 67 (Quattoni, Torralba 2009)",
        home="https://web.mit.edu/torralba/www/indoor.html",
        files=(
            PublishedFile(
                name="indoorCVPR_09.tar",
                size=2_592_010_240,
                url="http://groups.csail.mit.edu/vision/LabelMe/NewImages/indoorCVPR_09.tar",
                unpacked=("Images",),
                md5="5d176e5f0e56624a453f2fe0d8b19ff7",
                recorded_by=f"{one_loader}; a download log of 2020 (size)",
                note="reported gone from this address in 2026; copies elsewhere may be packed differently",
            ),
            PublishedFile(
                name="TrainImages.txt",
                size=None,
                url="https://web.mit.edu/torralba/www/TrainImages.txt",
                unpacked=("TrainImages.txt",),
                md5="fd987513d0f623c424252770fac3f354",
                sha256="7ec85f88735739d8159061e4bcf6a9765aab8606ab444605b3f8e0641be0260e",
                recorded_by="two public loaders, of about 2014 (MD5) and 2026 (SHA-256)",
            ),
            PublishedFile(
                name="TestImages.txt",
                size=None,
                url="https://web.mit.edu/torralba/www/TestImages.txt",
                unpacked=("TestImages.txt",),
                md5="f00bef137f39d51e4894303a7bf4c2d4",
                sha256="906c529a5a0918feec371de5b07a465ddb1f15ebaebc90a33cc321c371133bf1",
                recorded_by="two public loaders, of about 2014 (MD5) and 2026 (SHA-256)",
            ),
        ),
        classes=67,
        train=5_360,
        test=1_340,
        images=15_620,
        split="official: TrainImages.txt, TestImages.txt (most images are in neither)",
        plan=plan_indoors67,
    )


def _cub() -> PublishedSet:
    from afds.data.published.listed import plan_cub200

    return PublishedSet(
        name="cub200",
        title="Caltech-UCSD Birds 200-2011 (Wah, Branson, Welinder, Perona, Belongie 2011)",
        home="https://www.vision.caltech.edu/datasets/cub_200_2011/",
        files=(
            PublishedFile(
                name="CUB_200_2011.tgz",
                size=1_150_585_339,
                url="https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
                unpacked=("CUB_200_2011",),
                md5="97eceeb196236b17998738112f37df78",
                sha256="0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081",
                recorded_by="many public loaders (MD5), TensorFlow Datasets (size, SHA-256)",
            ),
        ),
        classes=200,
        train=5_994,
        test=5_794,
        images=11_788,
        split="official: train_test_split.txt",
        plan=plan_cub200,
    )


def _food() -> PublishedSet:
    from afds.data.published.listed import plan_food101

    return PublishedSet(
        name="food101",
        title="Food-101 (Bossard, Guillaumin, Van Gool 2014)",
        home="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
        files=(
            PublishedFile(
                name="food-101.tar.gz",
                size=4_996_278_331,
                url="http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz",
                unpacked=("food-101",),
                md5="85eeb15f3717b99a5da872d97d918f87",
                sha256="d97d15e438b7f4498f96086a4f7e2fa42a32f2712e87d3295441b2b6314053a4",
                recorded_by="torchvision (MD5), TensorFlow Datasets (size, SHA-256)",
            ),
        ),
        classes=101,
        train=75_750,
        test=25_250,
        images=101_000,
        split="official: meta/train.json, meta/test.json",
        plan=plan_food101,
    )
