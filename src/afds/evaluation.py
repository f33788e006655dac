"""How good a network is on labelled images, and what it costs on the same images, in one pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import SumMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassStatScores

from afds.artifact import Run, load_run
from afds.cost import Cost, CostMeter, reference_macs
from afds.data import (
    Folder,
    ImageDataset,
    ImageError,
    Item,
    Splits,
    check_images,
    describe,
    eval_transform,
    make_loader,
    scan,
)  # fmt: skip
from afds.data.unlabelled import fingerprint
from afds.errors import AfdsError, DataError
from afds.inference import Model
from afds.lineage import photos_changed, repeat_split
from afds.mistakes import Mistake, confusions, surest

Meter = Callable[[Tensor], tuple[Tensor, Cost]]  # images (B, 3, H, W) -> logits (B, classes), cost of this batch
SPLITS = ("auto", "test", "val", "train", "all")
FLATTERED = {"val": "choices were made on it", "train": "the run may have learned from it"}


@dataclass(frozen=True)
class Metrics:
    """Shares from 0 to 1 over `images` images."""

    images: int
    top1: float
    top5: float | None
    """None for five classes or fewer, where it says nothing."""
    balanced_accuracy: float
    """Mean of the accuracies of the classes that occur: no large class hides a small one."""
    cross_entropy: float
    """Mean, in nats; NaN where the network's output is."""
    per_class: tuple[float | None, ...]
    """Accuracy of each class, None where no image of it was there."""
    cost: Cost | None = None
    """MACs on these images, where they were counted."""
    hits: str = ""
    """`1` for each image that was right, `0` for each that was not, in order: for paired comparisons."""
    class_images: tuple[int, ...] = ()
    """Images of each class."""
    confusions: tuple[tuple[int, int, int], ...] = ()
    """(class, class it was taken for, images): the most frequent pairs."""
    said: tuple[int, ...] = ()
    """The class of the largest logit, image by image."""
    shares: tuple[float, ...] = ()
    """Its probability; 0 where the network's output is not a number."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data without the cost and what is there for every image; numbers that are not finite become None."""
        names = ("images", "top1", "top5", "balanced_accuracy", "cross_entropy")
        values = {name: getattr(self, name) for name in names}
        if self.cross_entropy != self.cross_entropy or abs(self.cross_entropy) == float("inf"):
            values["cross_entropy"] = None
        pairs = [list(pair) for pair in self.confusions]
        return {**values, "per_class": list(self.per_class), "class_images": list(self.class_images),
                "confusions": pairs}  # fmt: skip


@torch.no_grad()
def evaluate(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    device: torch.device | str | None = None,
    *,
    count_macs: bool | Meter = False,
    progress: Callable[[int], None] | None = None,
) -> Metrics:
    """Run `network` in eval mode (its own mode is given back) over (images (B, 3, H, W), labels (B,)).

    device: where the batches are moved to; by default where the network's weights are.
    count_macs: count the MACs on the way, which costs little beside the forward; or a meter of `network`, which
    saves reading its graph again, or runs it elsewhere.
    progress: called after each batch with the images seen so far.
    Where several processes run, each is given all images and returns the figures of all.
    Raises DataError without a single image.
    """
    device = torch.device(device) if device is not None else next(network.parameters()).device
    scores = MulticlassStatScores(num_classes, average=None, validate_args=False, sync_on_compute=False).to(device)
    top5 = (
        MulticlassAccuracy(num_classes, top_k=5, average="micro", sync_on_compute=False).to(device)
        if num_classes > 5
        else None
    )
    # A NaN is to be seen, not left out. (MeanMetric would do, but with "disable" it forgets its weights.)
    entropy = SumMetric(nan_strategy="disable", sync_on_compute=False).to(device)
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    cost, seen = Cost(), 0
    labels: list[Tensor] = []
    said: list[Tensor] = []
    shares: list[Tensor] = []
    try:
        meter = count_macs if callable(count_macs) else CostMeter(network) if count_macs else None
        for x_BCHW, y_B in batches:
            x_BCHW, y_B = x_BCHW.to(device, non_blocking=True), y_B.to(device, non_blocking=True)
            if meter is not None:
                logits_BK, batch_cost = meter(x_BCHW)
                cost.add(batch_cost)
            else:
                logits_BK = network(x_BCHW)
            logits_BK = logits_BK.float()
            scores.update(logits_BK.argmax(1), y_B)
            labels.append(y_B)
            said.append(logits_BK.argmax(1))
            shares.append(logits_BK.softmax(1).amax(1).nan_to_num(0.0))
            if top5 is not None:
                top5.update(logits_BK, y_B)
            entropy.update(F.cross_entropy(logits_BK, y_B, reduction="sum"))
            seen += len(y_B)
            if progress is not None:
                progress(seen)
    finally:
        for module, mode in modes:
            module.training = mode
    if not seen:
        raise DataError("There is no image to evaluate on.")
    right_C, support_C = scores.compute()[:, 0], scores.compute()[:, 4]
    recalls = [int(r) / int(n) if n else None for r, n in zip(right_C, support_C, strict=True)]
    present = [recall for recall in recalls if recall is not None]
    images = int(support_C.sum())
    label_list, said_list = torch.cat(labels).tolist(), torch.cat(said).tolist()
    return Metrics(
        images=images,
        top1=int(right_C.sum()) / images,
        top5=None if top5 is None else float(top5.compute()),
        balanced_accuracy=sum(present) / len(present),
        cross_entropy=float(entropy.compute()) / images,
        per_class=tuple(recalls),
        cost=cost if meter is not None else None,
        hits="".join("1" if a == b else "0" for a, b in zip(label_list, said_list, strict=True)),
        class_images=tuple(int(n) for n in support_C),
        confusions=confusions(label_list, said_list),
        said=tuple(said_list),
        shares=tuple(torch.cat(shares).tolist()),
    )


@dataclass(frozen=True)
class FolderResult:
    """A run on a folder."""

    split: str
    metrics: Metrics
    labels: tuple[str, ...]
    """Class names in the order of `metrics.per_class`."""
    notes: tuple[str, ...]
    """What a reader of the figures should know, one sentence each."""
    items: tuple[Item, ...] = ()
    """The images, in the order of `metrics.said`."""

    def mistakes(self) -> tuple[Mistake, ...]:
        """The images that were taken for another class, those first of which the network is surest."""
        m, items = self.metrics, self.items
        return surest([i.path for i in items], [i.label for i in items], m.said, m.shares, self.labels)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the metrics, the MACs; accuracy, images and confusions by class name."""
        values = self.metrics.to_dict()
        per_class = dict(zip(self.labels, values.pop("per_class"), strict=True))
        values["class_images"] = dict(zip(self.labels, values["class_images"], strict=True))
        values["confusions"] = [
            {"class": self.labels[a], "taken_for": self.labels[b], "images": n} for a, b, n in values["confusions"]
        ]
        cost = self.metrics.cost
        macs = {}
        if cost is not None:
            macs = {"dense_macs": cost.dense, "counted_macs": cost.counted, "ratio": cost.ratio}
        return {"split": self.split, **values, **macs, "per_class": per_class, "notes": list(self.notes)}


def evaluate_folder(
    run_path: Path | str,
    data_path: Path | str,
    split: str = "auto",
    *,
    batch_size: int = 32,
    device: str = "cpu",
    workers: int = 0,
    runtime: str = "torch",
    precision: str = "float32",
    skip_unreadable: bool = False,
    progress: Callable[[int], None] | None = None,
) -> FolderResult:
    """Evaluate a run on a folder of class folders, matched to the run's classes by name.

    split: `auto` takes test/ where there is one, the images that this run held out where it is the folder it
    was fitted on, else all that is there; or one of `test`, `val`, `train`, `all`.
    runtime: `torch`, or `native`, whose MACs are those it executed.
    precision: of native's convolutions, `float32` or `bf16`.
    skip_unreadable: leave out photos that cannot be read, with a note of which, in place of refusing them.
    Raises RunFolderError for the run, DataError for the folder: among others a class that the run does not
    know, a split that is not there; and for the runtime what `inference.Model` raises.
    """
    run = load_run(run_path)
    chosen, items, notes = labelled_items(run, data_path, split)
    if skip_unreadable and (bad := check_images(items, workers=2)):
        notes.append(f"{len(bad)} photos cannot be read and are left out:\n{describe(bad)}")
        gone = {path for path, _ in bad}
        items = tuple(item for item in items if item.path not in gone)
        if not items:
            raise DataError(f"{data_path}: not one of the {len(bad)} photos can be read:\n{describe(bad)}")
    if absent := len(run.labels) - len({item.label for item in items}):
        notes.append(f"{absent} of the run's {len(run.labels)} classes have no image here.")
    dataset = ImageDataset(items, eval_transform(run.preprocess))
    loader = make_loader(dataset, batch_size=batch_size, shuffle=False, seed=0, workers=workers)
    model = Model(run, device, runtime=runtime, precision=precision)
    reference = reference_macs(run.structure)
    meter: Meter
    if model.executor is None:
        meter = CostMeter(model.network, reference)
    else:
        from afds.runtime import ExecutedMacs

        meter = ExecutedMacs(model.executor, model.network, reference)
    try:
        metrics = evaluate(model.network, loader, len(run.labels), device, count_macs=meter, progress=progress)
    except ImageError:
        bad = check_images(items, workers=2)
        if not bad:  # a share that was away for a moment
            raise
        raise DataError(f"{len(bad)} photos cannot be read:\n{describe(bad)}\nMend or remove them, or go on without "
                        "them with --skip-unreadable.") from None  # fmt: skip
    return FolderResult(chosen, metrics, run.labels, tuple(notes), items)


def labelled_items(run: Run, data_path: Path | str, split: str = "auto") -> tuple[str, tuple[Item, ...], list[str]]:
    """The images of a split with the run's own labels; the split's name, the items, and notes for the reader.

    Raises DataError for the folder: a class that the run does not know, a split that is not there.
    """
    if split not in SPLITS:
        raise DataError(f"{split!r} is no split; choose one of {', '.join(SPLITS)}.")
    folder = scan(data_path, least=1)
    labels = {name: position for position, name in enumerate(run.labels)}
    if strangers := [name for name in folder.classes if name not in labels]:
        more = f" and {len(strangers) - 5} more" if len(strangers) > 5 else ""
        raise DataError(
            f"{folder.root}: the run does not know the classes {', '.join(map(repr, strangers[:5]))}{more}. "
            f"It knows {', '.join(map(repr, run.labels[:5]))}{', ...' if len(run.labels) > 5 else ''}. "
            "Rename these folders or take them out."
        )
    chosen, items, notes = _choose(run, folder, split)
    items = tuple(Item(item.path, labels[folder.classes[item.label]]) for item in items)
    return chosen, items, [*folder.warnings, *notes]


def first_split(run: Run, place: Path, splits: tuple[str, ...]) -> tuple[str, tuple[Item, ...]]:
    """The first of these splits that is there, and its images. Raises DataError where none is."""
    for split in splits[:-1]:
        with contextlib.suppress(AfdsError):
            chosen, items, _ = labelled_items(run, place, split)
            return chosen, items
    chosen, items, _ = labelled_items(run, place, splits[-1])
    return chosen, items


def spaced(items: tuple[Item, ...], count: int) -> tuple[Item, ...]:
    """At most ``count``, evenly spaced, which covers the classes."""
    count = min(count, len(items))
    return tuple(items[i * len(items) // count] for i in range(count))


def eval_batches(run: Run, items: tuple[Item, ...]) -> Iterable[tuple[Tensor, Tensor]]:
    """Images (B, 3, H, W) as the run sees photos, and labels (B,), in order."""
    dataset = ImageDataset(items, eval_transform(run.preprocess))
    return make_loader(dataset, batch_size=32, shuffle=False, seed=0, workers=0)


def _choose(run: Run, folder: Folder, split: str) -> tuple[str, tuple[Item, ...], list[str]]:
    """The split's name, its items and notes about it."""
    record = run.config or {}
    held_out, notes = _parts(repeat_split(record, folder)), []
    changed = photos_changed(record, folder)
    available = {**folder.splits, **held_out}
    if split == "auto":
        order = ("test", "val", "train") if held_out else ("test", "all", "val", "train")
        split = next(name for name in order if name in available)
        if split in FLATTERED:
            notes.append(f"No test images here: these figures are of {split}, and flattered, since {FLATTERED[split]}.")
    known = record.get("data", {}).get("test_fingerprint")
    if changed and not (split == "test" and known and fingerprint(available.get("test", ())) == known):
        notes.append("These photos have changed since the run was fitted on them: some of them it has learned.")
    if split == "all":
        if not notes and (held_out or "train" in folder.splits):
            notes.append("Training images are among these.")
        return split, tuple(item for part in folder.splits.values() for item in part), notes
    if split not in available:
        raise DataError(
            f"{folder.root}: has no {split} images. It has: {', '.join(available)}. Choose another --split, or auto."
        )
    if split in held_out and split not in folder.splits:
        notes.append(f"The run's own split of these photos, repeated by its seed: {split}.")
    return split, available[split], notes


def _parts(splits: Splits | None) -> dict[str, tuple[Item, ...]]:
    parts = {"train": splits.train, "val": splits.val, "test": splits.test or ()} if splits else {}
    return {name: items for name, items in parts.items() if items}
