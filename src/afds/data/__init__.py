"""From a folder of photos to batches.

In order: `scan`, `make_splits`, `with_unlabelled`, `check_images` and `without`, `ImageDataset` with a transform,
`make_loader`.
"""

from afds.data.check import Unreadable, check_images, describe, without
from afds.data.digits import write_digits
from afds.data.folder import UNLABELLED, Folder, Item, image_files, scan
from afds.data.images import ImageError, read_rgb, read_shrunk, to_rgb
from afds.data.loader import ImageDataset, make_loader, set_epoch
from afds.data.preprocess import Preprocess
from afds.data.split import Splits, classes_unseen, make_splits
from afds.data.timing import TimedLoader
from afds.data.transforms import Augment, Transform, TwoViews, eval_transform, train_transform
from afds.data.unlabelled import with_unlabelled

__all__ = [
    "UNLABELLED",
    "Augment",
    "Folder",
    "ImageDataset",
    "ImageError",
    "Item",
    "Preprocess",
    "Splits",
    "TimedLoader",
    "Transform",
    "TwoViews",
    "Unreadable",
    "check_images",
    "classes_unseen",
    "describe",
    "eval_transform",
    "image_files",
    "make_loader",
    "make_splits",
    "read_rgb",
    "read_shrunk",
    "scan",
    "set_epoch",
    "to_rgb",
    "train_transform",
    "with_unlabelled",
    "without",
    "write_digits",
]
