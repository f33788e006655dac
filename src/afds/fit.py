"""`afds fit`: a folder of photos and a pretrained network in, a run folder with a cheaper network out.

    setup: options -> photos -> source -> selection -> budget      every check comes before any training
    train                                                          (training.py)
    finish: the budget once more, the test split once, the artifact, the report
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
import shutil
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from afds.artifact import is_run, load_run, save_run
from afds.config import FitConfig, from_json, parse_method, resolve_method, to_json
from afds.cost import Cost, LayerCost, has_selection, measure_cost
from afds.data import (
    Augment, ImageDataset, Item, Preprocess, Splits, check_images, describe, eval_transform, make_loader,
    make_splits, scan, train_transform, without,
)  # fmt: skip
from afds.distillation import AttentiveDistillation, FrozenNetwork, feature_sizes
from afds.errors import ConfigError, DataError, RunFolderError
from afds.evaluation import Metrics, evaluate
from afds.files import read_json, write_json
from afds.graph import stage_ends
from afds.hardware import make_fabric, stamp
from afds.progress import Progress
from afds.record import Record
from afds.schedule import Allocation, Descent, parse_budget, plan_descent, powered, solve, uniform
from afds.selection import gates, select, selective_units, set_density
from afds.sources import check_supported, load_source
from afds.training import Plan, Task, train

IMAGES_SEEN = 60_000  # by default a training shows about so many images ...
FEWEST_EPOCHS, MOST_EPOCHS = 12, 60  # ... within these bounds


@dataclass(frozen=True)
class FitResult:
    """Where the run is and what came out."""

    out: Path
    val: Metrics
    test: Metrics | None
    cost: Cost
    seconds: float


def fit(config: FitConfig, *, quiet: bool = False) -> FitResult:
    """Transfer ``config.source`` to the photos in ``config.data`` within ``config.budget``.

    Raises:
        AfdsError: anything wrong with the options, the photos, the source or the run folder, before training.
    """
    if config.resume is not None:
        config = _resumed(config.resume)
    config = resolve_method(config)
    if config.data is None or config.out is None:
        missing = "a folder of photos" if config.data is None else "--out RUN, the folder to write"
        raise ConfigError(f"afds fit needs {missing} (or --resume RUN).")
    progress = Progress(quiet=quiet)
    if config.source_data is not None:
        config = _source_step(config, quiet)
    splits, facts = _photos(config, progress)
    assert config.out is not None
    resuming = config.resume is not None
    _check_out(config.out, resuming)

    fabric = make_fabric(config.hardware)
    fabric.launch()
    torch.manual_seed(config.seed)  # the fresh classifier, phi and low-rank predictors
    setup = _Setup(config, splits, fabric)
    out = config.out
    if fabric.is_global_zero:
        out.mkdir(parents=True, exist_ok=True)
        if resuming:
            _same_data(out, facts)
        else:
            write_json(out / "config.json", setup.record(facts))
            write_json(out / "labels.json", list(splits.classes))
    fabric.barrier()
    record = Record(out, enabled=fabric.is_global_zero, tensorboard=config.tensorboard)
    progress.say(setup.describe())
    with progress:
        train(fabric, setup.plan, out, record, progress.update)
    return setup.finish(record, progress)


def read_result(out: Path) -> FitResult:
    """The figures of a finished run, from its folder.

    Raises:
        RunFolderError: the record lacks its last line.
    """
    finals = Record(out, enabled=False).lines("final")
    if not finals:
        raise RunFolderError(f"{out / 'metrics.jsonl'} has no final line: the run did not finish.")
    final = finals[-1]
    layers = {name: LayerCost(**layer) for name, layer in read_json(out / "structure.json")["cost"]["layers"].items()}
    cost = Cost(layers, final["val"]["images"])
    val, test = (_metrics(final[split]) if final[split] else None for split in ("val", "test"))
    assert val is not None
    return FitResult(out, val, test, cost, final["seconds"])


def _metrics(saved: dict[str, Any]) -> Metrics:
    entropy = float("nan") if saved["cross_entropy"] is None else saved["cross_entropy"]
    return Metrics(**{**saved, "cross_entropy": entropy, "per_class": tuple(saved["per_class"])})


def _resumed(run: Path) -> FitConfig:
    """The options of an interrupted run.

    Raises:
        RunFolderError: not a run folder, or a finished one.
    """
    if not (run / "config.json").exists():
        raise RunFolderError(f"{run} is not a run folder: it has no config.json.")
    if is_run(run):
        raise RunFolderError(f"{run} is finished: there is nothing to resume. Use it, or start a new run.")
    saved = read_json(run / "config.json")
    if not isinstance(saved, dict) or "config" not in saved:
        raise RunFolderError(f"{run / 'config.json'} does not hold the options of a run.")
    config: FitConfig = from_json(FitConfig, saved["config"], str(run / "config.json"))
    return dataclasses.replace(config, resume=run, out=run)


def _source_step(config: FitConfig, quiet: bool) -> FitConfig:
    """Learn the source task with selection at d = 1, as the paper's source model has; then go on from there."""
    assert config.out is not None
    source_run = config.out / "source"
    if not is_run(source_run):
        step = dataclasses.replace(
            config, data=config.source_data, source_data=None, out=source_run, method="l2+afs", budget="1x",
            resume=source_run if (source_run / "last.ckpt").exists() else None,
            optim=dataclasses.replace(config.optim, epochs=config.source_epochs),
        )  # fmt: skip
        _check_out(config.out, resuming=config.resume is not None or step.resume is not None)
        fit(step, quiet=quiet)
    return dataclasses.replace(config, source=str(source_run), source_data=None)


def _photos(config: FitConfig, progress: Progress) -> tuple[Splits, dict[str, Any]]:
    """Scan, split and read every photo once; the facts go into the record."""
    assert config.data is not None
    folder = scan(config.data)
    options = config.data_options
    splits = make_splits(
        folder, val_fraction=options.val_fraction, test_fraction=options.test_fraction, seed=config.seed
    )
    items = [*splits.train, *splits.val, *(splits.test or ())]
    with progress.waiting(f"Reading {len(items)} photos in {len(splits.classes)} classes"):
        unreadable = check_images(items, workers=max(2, options.workers))
    if unreadable:
        progress.say(describe(unreadable))
        if not options.skip_unreadable:
            raise DataError(f"{len(unreadable)} photos cannot be read (listed above). Mend or remove them, or go on "
                            "without them with --data-options.skip-unreadable.")  # fmt: skip
        splits = without(splits, unreadable)
    if len(splits.train) < 2 * config.optim.batch_size and len(splits.train) < 8:
        raise DataError(f"{config.data}: {len(splits.train)} training photos are too few to train on.")
    for warning in folder.warnings:
        progress.say(f"warning: {warning}")
    counts = {"train": len(splits.train), "val": len(splits.val), "test": len(splits.test or ())}
    digest = hashlib.sha256()
    for name in ("train", "val", "test"):
        for item in getattr(splits, name) or ():
            digest.update(f"{name}\0{item.path.parent.name}\0{item.path.name}\0{item.label}\n".encode())
    return splits, {"classes": len(splits.classes), **counts, "fingerprint": digest.hexdigest(),
                    "warnings": list(folder.warnings), "unreadable": [str(u.path) for u in unreadable]}  # fmt: skip


def _check_out(out: Path, resuming: bool) -> None:
    if resuming:
        return
    if out.exists() and not out.is_dir():
        raise RunFolderError(f"--out {out} is a file; name a folder that does not exist yet.")
    rest = [p.name for p in out.iterdir() if p.name != "source"] if out.exists() else []
    if rest:
        hint = f" To go on with the run in it: afds fit --resume {out}" if (out / "last.ckpt").exists() else ""
        raise RunFolderError(f"--out {out} is not empty; name a new folder, nothing is ever overwritten.{hint}")
    parent = next(p for p in (out, *out.parents) if p.exists())
    if shutil.disk_usage(parent).free < 2**30:
        raise RunFolderError(f"--out {out}: less than 1 GiB is free there.")


def _same_data(out: Path, facts: dict[str, Any]) -> None:
    saved = read_json(out / "config.json")
    if saved.get("data", {}).get("fingerprint") != facts["fingerprint"]:
        raise DataError(f"The photos have changed since {out} was started: a resumed run would mix two data sets. "
                        "Start a new run.")  # fmt: skip


class _Setup:
    """Everything that training needs, built and checked in the order in which things can be wrong."""

    def __init__(self, config: FitConfig, splits: Splits, fabric: Fabric) -> None:
        self.config, self.splits, self.fabric = config, splits, fabric
        transfer, compression = parse_method(config.method)
        budget = parse_budget(config.budget)
        self.network = self._network(transfer, compression)
        size = self.preprocess.input_size
        o, d = config.optim, config.data_options
        n = len(splits.train)
        self.epochs = o.epochs or max(FEWEST_EPOCHS, min(MOST_EPOCHS, round(IMAGES_SEEN / n)))
        train_set = ImageDataset(splits.train, train_transform(self.preprocess, Augment(scale=(d.scale, 1.0), flip=d.flip)), cache=d.cache)  # noqa: E501 # fmt: skip
        loader = make_loader(train_set, batch_size=o.batch_size, shuffle=True, seed=config.seed,
                             workers=d.workers, drop_last=True)  # fmt: skip
        self.val_loader = self._eval_loader(splits.val)
        self.network.to(fabric.device)
        probe = self._images(splits.val, config.descent.images)
        self.dense_macs = measure_cost(self.network, probe[:1]).dense
        self.ratio = budget.wanted_ratio(self.dense_macs)
        descent, allocation = self._descent(len(loader))
        if descent is not None and allocation is not None:
            solve(self.network, allocation, self.ratio, probe[:1], steps=0)  # a hopeless budget: now, not later
            set_density(self.network, 1.0)
        features = self._features()
        source = FrozenNetwork(self.network, features).to(fabric.device) if transfer == "afd" else None
        afd = None
        if source is not None:
            sizes = feature_sizes(source, torch.zeros(1, 3, size, size, device=fabric.device))
            afd = AttentiveDistillation(sizes, hidden=config.distillation.hidden, squared=config.distillation.squared)
        task = Task(self.network, afd, config).to(memory_format=torch.channels_last)
        if transfer == "l2-sp":
            task.start = {n: p.detach().clone() for n, p in self.network.named_parameters() if not self._is_new(n)}
        self.plan = Plan(
            config=config, task=task, train_loader=fabric.setup_dataloaders(loader),
            val_loader=fabric.setup_dataloaders(self.val_loader, use_distributed_sampler=False),
            probe=probe, mask_images=self._images(splits.train, 4 * config.descent.images) if descent else [],
            num_classes=len(splits.classes), epochs=self.epochs, steps_per_epoch=len(loader), source=source,
            descent=descent, allocation=allocation, features=features,
        )  # fmt: skip

    def _network(self, transfer: str, compression: str) -> nn.Module:
        c, classes = self.config, len(self.splits.classes)
        path = Path(c.source)
        if path.is_dir() and is_run(path):
            run = load_run(path)
            self.arch, self.arch_args, self.selection = run.arch, run.arch_args, run.selection
            self.origin, self.pretrained_cfg = f"the run {c.source}", None
            self._preprocess_of_run = run.preprocess
            network = run.model
            set_density(network, 1.0) if has_selection(network) else None
            for gate in gates(network).values():  # a new task chooses anew
                gate.kept.fill_(True)
                gate.dynamic.fill_(True)
            network.reset_classifier(classes)  # type: ignore[operator]
        else:
            source = load_source(c.source, num_classes=classes, arch_args=json.loads(c.arch_args) or None,
                                 scratch=transfer == "scratch")  # fmt: skip
            self.arch, self.arch_args, self.selection = source.arch, source.arch_args, None
            self.origin, self.pretrained_cfg = source.origin, source.pretrained_cfg
            network = source.model
        self.preprocess = self._preprocess()
        if not has_selection(network):
            check_supported(network, self.preprocess.input_size)
        if compression == "afs" and not has_selection(network):
            network = select(network, c.selection)
            self.selection = c.selection
        elif compression == "dense" and has_selection(network):
            raise ConfigError(f"--source {c.source} carries selection: {c.method} would train it as a dense network. "
                              "Use a method with +afs, or another source.")  # fmt: skip
        for parameter in network.parameters():
            parameter.requires_grad_(True)
        return network

    def _preprocess(self) -> Preprocess:
        size = self.config.data_options.input_size
        if self.pretrained_cfg is not None:
            return Preprocess.for_source(self.pretrained_cfg, size or None)
        if size and size != self._preprocess_of_run.input_size:
            p = self._preprocess_of_run
            return dataclasses.replace(p, input_size=size, resize=max(size, round(p.resize * size / p.input_size)))
        return self._preprocess_of_run

    def _eval_loader(self, items: Sequence[Item]) -> Any:
        return make_loader(ImageDataset(items, eval_transform(self.preprocess), cache=self.config.data_options.cache),
                           batch_size=64, shuffle=False, seed=self.config.seed, workers=0)  # fmt: skip

    def _images(self, items: Sequence[Item], count: int) -> list[Tensor]:
        """Evenly spaced images, which cover the classes, in batches of 32 on the device."""
        spread = [items[i * len(items) // min(count, len(items))] for i in range(min(count, len(items)))]
        dataset = ImageDataset(spread, eval_transform(self.preprocess))
        images = [dataset[i][0] for i in range(len(dataset))]
        return [torch.stack(images[i : i + 32]).to(self.fabric.device) for i in range(0, len(images), 32)]

    def _descent(self, steps_per_epoch: int) -> tuple[Descent | None, Allocation | None]:
        if not has_selection(self.network) or self.ratio <= 1:
            return None, None
        d, total = self.config.descent, self.epochs * steps_per_epoch
        names = list(gates(self.network))
        if d.allocation == "uniform":
            allocation = uniform(self.network)
        else:
            allocation = powered({n: _exponent(n, i == 0) for i, n in enumerate(names)})
        return plan_descent(total, d.start, d.end, d.stages, self.ratio), allocation

    def _features(self) -> list[str]:
        names = [name for name, _ in selective_units(self.network)]
        if not names:
            from afds.graph import convbn_units

            names = [unit.name for unit in convbn_units(self.network)]
        return stage_ends(self.network, names)

    def _is_new(self, parameter: str) -> bool:
        head = getattr(self.network, "pretrained_cfg", {}).get("classifier", "fc")
        heads = head if isinstance(head, tuple | list) else (head,)
        return any(parameter.startswith(f"{h}.") for h in heads)

    def record(self, facts: dict[str, Any]) -> dict[str, Any]:
        """What config.json says: everything needed to repeat the run."""
        from afds import __version__

        fabric = self.fabric
        return {
            "afds": __version__, "command": shlex.join(["afds", *sys.argv[1:]]),
            "config": to_json(dataclasses.replace(self.config, resume=None)), "data": facts,
            "resolved": {"epochs": self.epochs, "steps_per_epoch": self.plan.steps_per_epoch,
                         "input_size": self.preprocess.input_size, "source": self.origin,
                         "dense_macs": self.dense_macs, "ratio": self.ratio},
            "hardware": stamp(fabric.device.type, str(fabric._precision.precision)),
        }  # fmt: skip

    def describe(self) -> str:
        """One paragraph for the terminal, before the first step."""
        s, size = self.splits, self.preprocess.input_size
        test = f", {len(s.test)} test" if s.test else ", no test split"
        lines = [
            f"{len(s.classes)} classes: {len(s.train)} training, {len(s.val)} validation{test} photos, {size} px",
            f"{self.arch} from {self.origin}: {self.dense_macs / 1e9:.3f} GMACs dense"
            + (f", to {self.dense_macs / self.ratio / 1e9:.3f} ({self.ratio:.3g}x fewer)" if self.ratio > 1 else ""),
            f"{self.config.method}, {self.epochs} epochs of {self.plan.steps_per_epoch} steps "
            f"({self.fabric.device.type}, {self.fabric._precision.precision})",
        ]
        return "\n".join(lines)

    def finish(self, record: Record, progress: Progress) -> FitResult:
        """Meet the budget on all validation images, read the test split once, write the artifact."""
        from afds.report import write_report

        c, fabric, network = self.config, self.fabric, self.network
        assert c.out is not None
        with progress.waiting("Final validation"):
            val = self._meet_budget()
        test = None
        if self.splits.test:
            with progress.waiting("The test split, once"):
                test = evaluate(network, self._eval_loader(self.splits.test), len(self.splits.classes), count_macs=True)
        assert val.cost is not None
        seconds = sum(line["seconds"] for line in record.lines("epoch"))
        record.write("final", val=val.to_dict(), test=test.to_dict() if test else None, budget=c.budget,
                     dense_macs=val.cost.dense, counted_macs=val.cost.counted, ratio=val.cost.ratio,
                     seconds=seconds)  # fmt: skip
        if fabric.is_global_zero:
            save_run(
                c.out, model=network, arch=self.arch, arch_args=self.arch_args, num_classes=len(self.splits.classes),
                selection=self.selection if has_selection(network) else None, labels=self.splits.classes,
                preprocess=self.preprocess, summary=cost_summary(val.cost),
            )  # fmt: skip
            try:
                write_report(c.out)
            except Exception as error:  # a page that fails must not take a trained network with it
                warnings.warn(f"The report could not be written ({error}); afds report {c.out} tries again.", stacklevel=2)  # noqa: E501
            (c.out / "last.ckpt").unlink(missing_ok=True)
        fabric.barrier()
        result = FitResult(c.out, val, test, val.cost, seconds)
        progress.say(_closing(result, c))
        return result

    def _meet_budget(self) -> Metrics:
        """Validation metrics; if all validation images cost more than the probe did, take the densities down."""
        classes = len(self.splits.classes)
        metrics = evaluate(self.network, self.val_loader, classes, count_macs=True)
        assert metrics.cost is not None
        if self.plan.descent is None or metrics.cost.ratio >= self.ratio:
            return metrics
        assert self.plan.allocation is not None
        batches = [x.to(self.fabric.device) for x, _ in self.val_loader]
        solve(self.network, self.plan.allocation, self.ratio, batches)
        return evaluate(self.network, self.val_loader, classes, count_macs=True)


def _exponent(name: str, stem: bool) -> float:
    """Ours: stem and shortcuts hold a tenth of the MACs and the whole residual stream."""
    return 0.25 if stem or "downsample" in name or "shortcut" in name else 1.0


def cost_summary(cost: Cost) -> dict[str, Any]:
    """Plain data of a cost, per layer and in sum."""
    return {
        "dense_macs": cost.dense, "counted_macs": cost.counted, "ratio": cost.ratio, "images": cost.images,
        "layers": {name: dataclasses.asdict(layer) for name, layer in cost.layers.items()},
    }  # fmt: skip


def _closing(result: FitResult, config: FitConfig) -> str:
    lines = [f"validation {result.val.top1:.1%}" + (f", test {result.test.top1:.1%}" if result.test else ""),
             f"{result.cost.counted / 1e6:.1f} M MACs per image, {result.cost.ratio:.2f}x fewer than dense",
             f"run folder: {result.out}"]  # fmt: skip
    if result.cost.ratio < 1 and config.budget != "1x":
        lines.append("Not worth it: the predictors cost more than selection saves.")
    return "\n".join(lines)
