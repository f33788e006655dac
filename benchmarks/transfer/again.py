"""What training does today after its last step, done to a finished run of before.

    python benchmarks/transfer/again.py RUN OUT --what norms
    python benchmarks/transfer/again.py RUN OUT --what view

norms: measured anew on mixtures, with the order of images and chance as at the end of RUN's own training. view: the
photos are resized for evaluation and prediction so that things appear as large as in training crops. The weights stay.
OUT is a copy with the validation figures after it; its record says so.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from afds.artifact import Run, load_run, save_run
from afds.config import FitConfig, from_json, recovering
from afds.cost import CostMeter
from afds.data import ImageDataset, eval_transform, make_loader, make_splits, scan, set_epoch
from afds.data.split import Splits
from afds.data.transforms import Augment, train_transform
from afds.errors import RunFolderError
from afds.evaluation import evaluate
from afds.files import read_json, write_atomic
from afds.fitting import cost_summary
from afds.mixing import mixture
from afds.norms import reestimate_norms
from afds.record import read_lines


@dataclass(frozen=True)
class Options:
    """Finish a run as it would be today."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder whose photos are where they were; with norms, of a settled network."""
    out: Annotated[Path, tyro.conf.Positional]
    """New folder."""
    what: Literal["norms", "view"]
    """What is done."""


def main(options: Options) -> None:
    run, record = load_run(options.run), read_json(options.run / "config.json")
    norms, preprocess = options.what == "norms", run.preprocess
    if (norms and run.selection is None) or options.out.exists():
        raise RunFolderError(f"{options.run} has no selection, or {options.out} is there already.")
    config = recovering(from_json(FitConfig, record["config"]))
    d = config.data_options
    folder, seed = scan(config.data), config.seed
    splits = make_splits(folder, val_fraction=d.val_fraction, test_fraction=d.test_fraction, seed=seed)
    if splits.fingerprint() != record["data"]["fingerprint"]:
        raise RunFolderError(f"{config.data}: not the photos that {options.run} has learned from.")
    if norms:
        _measure_norms(run, config, splits, record["resolved"]["epochs"])
    else:
        preprocess = preprocess.as_large_as_in(d.scale)
    held = make_loader(ImageDataset(splits.val, eval_transform(preprocess)), batch_size=32, shuffle=False, seed=0,
                       workers=0)  # fmt: skip
    saved = run.structure["cost"]
    val = evaluate(run.model, held, len(run.labels), count_macs=CostMeter(run.model, saved.get("reference_macs", 0.0)))
    assert val.cost is not None
    print(f"validation {val.top1:.1%}, cross-entropy {val.cross_entropy:.4f}, {val.cost.ratio:.2f}x fewer MACs")
    shutil.copytree(options.run, options.out, ignore=shutil.ignore_patterns("test.*", "measure*", "speed*", "report*"))
    save_run(options.out, model=run.model, arch=run.arch, arch_args=run.arch_args, num_classes=len(run.labels),
             selection=run.selection, labels=run.labels, preprocess=preprocess,
             summary={**saved, **cost_summary(val.cost)})  # fmt: skip
    lines = read_lines(options.out / "metrics.jsonl")
    final = next(line for line in reversed(lines) if line["kind"] == "final")
    final |= {
        "val": val.to_dict(),
        "val_hits": val.hits,
        "test": None,
        "test_hits": None,
        "again": options.what,
    }
    write_atomic(options.out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def _measure_norms(run: Run, config: FitConfig, splits: Splits, epochs: int) -> None:
    d, o = config.data_options, config.optim
    view = train_transform(run.preprocess, Augment(crop=d.crop, scale=(d.scale, 1.0), flip=d.flip))
    loader = make_loader(ImageDataset(splits.train, view, cache=d.cache), batch_size=o.batch_size, shuffle=True,
                         seed=config.seed, workers=0, drop_last=True)  # fmt: skip
    torch.manual_seed(config.seed * 100_003 + epochs)
    set_epoch(loader, epochs)
    reestimate_norms(run.model, ((mixture([x], o)[0][0], y) for x, y in loader), config.descent.reestimate)


if __name__ == "__main__":
    main(tyro.cli(Options))
