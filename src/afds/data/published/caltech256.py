"""Caltech-256 has no official split; papers draw one, and say little about how.

Archive: `256_ObjectCategories/001.ak47/001_0001.jpg`, 257 folders, 30,607 images, at least 80 in each; the last,
`257.clutter`, is no category. Two things in it are no images of a class: the file `198.spider/RENAME2` and the
folder `056.dog/greg`. Both are passed over.

What is known of the custom. The L2-SP code (holyseven/TransferLearningClassification, `create_caltech.py`): by file
number, training 1 to 30 or 1 to 60, test 61 to 80, clutter as a 257th class. That is ``--split l2-sp --clutter``.
The AFDS paper names 30 and 60 training images per class; which images, how many to test on and whether clutter is a
class, we do not know.

Ours, the default: 256 classes; 20 test images drawn first, then 60 for training, of which Caltech-256-30 takes the
first 30. So both sets share their test images, the smaller training set lies in the larger, and two seeds are two
draws.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict

from afds.data.folder import image_extensions
from afds.data.published.plan import Options, Plan, Readable, Target, component, hidden
from afds.errors import DataError

FOLDER = "256_ObjectCategories"
LARGEST = 60  # training images per class that are drawn, whatever number is then used
_CLASS = re.compile(r"\d{3}\..+")


def plan_caltech256(source: Readable, options: Options, per_class: int) -> Plan:
    """Draw `per_class` training images and the test images of every class."""
    plan, strays = Plan(), []
    files: dict[str, dict[str, str]] = defaultdict(dict)  # class -> file name -> name in the archive
    endings = image_extensions()
    for name in source.names:
        parts = name.split("/")
        if FOLDER not in parts or hidden(name):
            continue
        inside = parts[parts.index(FOLDER) + 1 :]
        plain = len(inside) == 2 and _CLASS.fullmatch(inside[0]) and "." in inside[1]
        if plain and "." + inside[1].rsplit(".", 1)[1].lower() in endings:
            files[component(inside[0], name)][component(inside[1], name)] = name
        else:
            strays.append("/".join(inside))
    clutter = [c for c in files if c.endswith(".clutter")]
    if not options.clutter:
        for label in clutter:
            plan.notes.append(f"{label} ({len(files.pop(label))} images) is no category and stays out (--clutter).")
    if not files:
        raise DataError(f"No images at {FOLDER}/001.ak47/001_0001.jpg and the like. It is not Caltech-256's archive.")
    for label in sorted(files):
        train, test = _draw(label, sorted(files[label]), options, per_class)
        for split, chosen in (("train", train), ("test", test)):
            plan.targets.update({files[label][f]: Target(split, label, f) for f in chosen})  # type: ignore[arg-type]
    if strays:
        shown = ", ".join(sorted(strays)[:3]) + (" ..." if len(strays) > 3 else "")
        plan.notes.append(f"passed over, as no image of a class: {shown}.")
    return plan


def _draw(label: str, files: list[str], options: Options, per_class: int) -> tuple[list[str], list[str]]:
    """(training files, test files) of one class."""
    n_test = options.test_per_class
    if options.split == "l2-sp":
        if len(files) < 80:
            raise DataError(f"{label}: {len(files)} images, and --split l2-sp wants 80 of each class.")
        return files[:per_class], files[60:80]
    # a stream of its own for each class, so that the draw of one does not hang on the others
    order = files.copy()
    random.Random(f"{options.seed}/{label}").shuffle(order)
    if len(order) < per_class + max(1, n_test):
        raise DataError(
            f"{label}: {len(files)} images, and {per_class} for training with {max(1, n_test)} for the test "
            "were asked for. Lower --test-per-class; in the published archive each class has 80 or more."
        )
    if n_test:
        return order[n_test : n_test + per_class], order[:n_test]
    return order[:per_class], order[per_class:]  # all that is left; the larger set then tests on fewer images
