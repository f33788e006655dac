"""Who should win: accuracy of a dense run with selection put in, before any training.

    python benchmarks/transfer/before_training.py d64 train-only/

For each ratio and each way to rank winners and to share out densities: validation accuracy as it is, and with the
batch norm statistics measured anew on training images.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from afds.artifact import load_run
from afds.cost import measure_cost
from afds.data import ImageDataset, Item, eval_transform, make_splits, scan
from afds.evaluation import evaluate
from afds.importance import by_importance, estimate, set_importance
from afds.norms import reestimate_norms
from afds.schedule import solve, sparing_stream, uniform
from afds.selection import select


@dataclass(frozen=True)
class Options:
    """Selection without training."""

    run: Annotated[Path, tyro.conf.Positional]
    """A dense run."""
    data: Annotated[Path, tyro.conf.Positional]
    """The photos it was fitted on."""
    ratios: tuple[float, ...] = (1.3, 2.0, 3.0, 5.0)
    images: int = 384
    """Training images for importance and batch norm."""


def main(options: Options) -> None:
    run = load_run(options.run)
    splits = make_splits(scan(options.data), seed=0)

    def batches(items: tuple[Item, ...], count: int) -> list[tuple[Tensor, Tensor]]:
        count = min(count, len(items))
        data = ImageDataset([items[i * len(items) // count] for i in range(count)], eval_transform(run.preprocess))
        images, labels = zip(*(data[i] for i in range(count)), strict=True)
        return [(torch.stack(images[i : i + 32]), torch.tensor(labels[i : i + 32])) for i in range(0, count, 32)]

    val, train = batches(splits.val, len(splits.val)), batches(splits.train, options.images)
    probe = [x_BCHW for x_BCHW, _ in val][:2]
    base = select(run.model).eval()
    importance, cost = estimate(base, train), measure_cost(base, probe)
    print(f"dense {evaluate(run.model, val, len(run.labels)).top1:.1%}")
    for ratio in options.ratios:
        for name in ("uniform, gamma", "uniform", "stream", "importance"):
            model = copy.deepcopy(base)
            if name != "uniform, gamma":
                set_importance(model, importance)
            allocation = {"stream": sparing_stream(model), "importance": by_importance(model, importance, cost)}
            solve(model, allocation.get(name, uniform(model)), ratio, probe)
            before = evaluate(model, val, len(run.labels)).top1
            reestimate_norms(model, train, len(train))
            print(f"{ratio:4.1f}x  {name:15} {before:6.1%}  bn {evaluate(model, val, len(run.labels)).top1:6.1%}")


if __name__ == "__main__":
    main(tyro.cli(Options))
