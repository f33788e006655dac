"""Everything that a training needs, built and checked in the order in which things can be wrong."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from afds.artifact import is_run, load_run
from afds.config import FitConfig, parse_method, to_json
from afds.cost import has_selection, measure_cost
from afds.data import (
    Augment,
    ImageDataset,
    Item,
    Preprocess,
    Splits,
    eval_transform,
    make_loader,
    train_transform,
)  # fmt: skip
from afds.distillation import AttentiveDistillation, FrozenNetwork, feature_sizes
from afds.errors import ConfigError
from afds.graph import convbn_units, residual_blocks, stage_ends
from afds.hardware import stamp
from afds.schedule import parse_budget, plan_descent, solve, uniform
from afds.selection import SelectionConfig, gates, select, selective_units, set_density
from afds.sources import check_supported, load_source
from afds.training import Plan, Task

IMAGES_SEEN = 60_000  # by default a training shows about so many images ...
FEWEST_EPOCHS, MOST_EPOCHS = 12, 60  # ... within these bounds


def default_epochs(images: int) -> int:
    """Passes over ``images`` training images: fewer images, more passes."""
    return max(FEWEST_EPOCHS, min(MOST_EPOCHS, round(IMAGES_SEEN / images)))


class Setup:
    """A checked run: network, loaders, teacher, schedule.

    Raises:
        AfdsError: anything that would stop the run later.
    """

    def __init__(self, config: FitConfig, splits: Splits, fabric: Fabric) -> None:
        self.config, self.splits, self.fabric = config, splits, fabric
        self.selection: SelectionConfig | None = None
        self._pretrained_cfg: dict[str, Any] | None = None
        self._preprocess_of_run: Preprocess | None = None
        transfer, compression = parse_method(config.method)
        budget = parse_budget(config.budget)
        torch.manual_seed(config.seed)  # the fresh classifier, phi and low-rank predictors
        network = self._source(transfer)
        self.preprocess = self._preprocess()
        size = self.preprocess.input_size
        network.to(fabric.device)
        if not has_selection(network):
            check_supported(network, size)
        dense_network = network
        if compression == "afs" and not has_selection(network):
            network, self.selection = select(network, config.selection), config.selection
        elif compression == "dense" and has_selection(network):
            raise ConfigError(f"--source {config.source} carries selection: {config.method} would train it as a dense "
                              "network. Use a method with +afs, or another source.")  # fmt: skip
        self.network = network.requires_grad_(True)
        probe = self._images(splits.val, config.descent.images)
        self.dense_macs = measure_cost(network, probe[:1]).dense
        self.ratio = budget.wanted_ratio(self.dense_macs)
        selects = has_selection(network) and self.ratio > 1
        if selects:  # a hopeless budget: now, not after hours
            solve(network, uniform(network), self.ratio, probe[:1], steps=0)
            set_density(network, 1.0)

        units = [name for name, _ in selective_units(network)] or [u.name for u in convbn_units(network)]
        features = stage_ends(network, units)
        teacher, afd, blocks = None, None, []
        if transfer == "afd":
            if self.is_base and config.distillation.hints > 0:
                blocks = residual_blocks(network)
            teacher = FrozenNetwork(dense_network, features, blocks).to(fabric.device)
            sizes = feature_sizes(teacher, torch.zeros(1, 3, size, size, device=fabric.device))
            afd = AttentiveDistillation(sizes, hidden=config.distillation.hidden, squared=config.distillation.squared)
        task = Task(network, afd, config)
        task.match_blocks(blocks)
        task.to(fabric.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if transfer == "l2-sp":
            heads = self._heads()
            task.start = {n: p.detach().clone() for n, p in network.named_parameters() if not n.startswith(heads)}

        o, d = config.optim, config.data_options
        augment = Augment(scale=(d.scale, 1.0), flip=d.flip)
        train_set = ImageDataset(splits.train, train_transform(self.preprocess, augment), cache=d.cache)
        loader = make_loader(train_set, batch_size=o.batch_size, shuffle=True, seed=config.seed, workers=d.workers,
                             drop_last=True)  # fmt: skip
        epochs = o.epochs or default_epochs(len(splits.train))
        self.plan = Plan(
            config=config, task=task, train_loader=fabric.setup_dataloaders(loader),
            val_loader=self.eval_loader(splits.val), probe=probe,
            labelled=self._labelled(splits.train, 3 * config.descent.images) if selects else [],
            num_classes=len(splits.classes), epochs=epochs,
            steps_per_epoch=len(loader) // fabric.world_size, teacher=teacher, teaches_logits=self.is_base,
            descent=plan_descent(epochs * (len(loader) // fabric.world_size), config.descent, self.ratio)
            if selects else None,
        )  # fmt: skip

    def _source(self, transfer: str) -> nn.Module:
        """The network to start from; sets what is known of it."""
        c, classes = self.config, self.splits.classes
        path = Path(c.source)
        if not (path.is_dir() and is_run(path)):
            try:
                arch_args = json.loads(c.arch_args)
            except ValueError as error:
                raise ConfigError(f"--arch-args {c.arch_args}: not JSON ({error}).") from error
            if not isinstance(arch_args, dict):
                raise ConfigError(
                    f"--arch-args {c.arch_args}: give a JSON object such as '{{\"layers\": [1, 1, 1, 1]}}'."
                )
            source = load_source(c.source, num_classes=len(classes), arch_args=arch_args or None,
                                 scratch=transfer == "scratch")  # fmt: skip
            self.arch, self.arch_args, self.selection = source.arch, source.arch_args, None
            self.origin, self._pretrained_cfg, self._preprocess_of_run = (
                source.origin,
                source.pretrained_cfg,
                None,
            )
            self.is_base = False
            return source.model
        run = load_run(path)
        self.arch, self.arch_args, self.selection = run.arch, run.arch_args, run.selection
        self.origin, self._pretrained_cfg, self._preprocess_of_run = f"the run {path}", None, run.preprocess
        if has_selection(run.model):
            set_density(run.model, 1.0)
            for gate in gates(run.model).values():
                gate.reset_masks()
        # The same classes: the run is this task's own dense network, and its classifier is worth keeping.
        self.is_base = run.labels == tuple(classes)
        if not self.is_base:
            run.model.reset_classifier(len(classes))  # type: ignore[operator]
        return run.model

    def _preprocess(self) -> Preprocess:
        size = self.config.data_options.input_size
        p = self._preprocess_of_run
        if p is None:
            assert self._pretrained_cfg is not None
            return Preprocess.for_source(self._pretrained_cfg, size or None)
        if size in (0, p.input_size):
            return p
        return dataclasses.replace(p, input_size=size, resize=max(size, round(p.resize * size / p.input_size)))

    def eval_loader(self, items: Sequence[Item]) -> Any:
        """Batches of (images, labels) as the network is evaluated, in order."""
        dataset = ImageDataset(items, eval_transform(self.preprocess), cache=self.config.data_options.cache)
        return make_loader(dataset, batch_size=64, shuffle=False, seed=self.config.seed, workers=0)

    def _labelled(self, items: Sequence[Item], count: int) -> list[tuple[Tensor, Tensor]]:
        """Evenly spaced images, which cover the classes, in batches of 32 on the device."""
        count = min(count, len(items))
        dataset = ImageDataset([items[i * len(items) // count] for i in range(count)], eval_transform(self.preprocess))
        images, labels = zip(*(dataset[i] for i in range(count)), strict=True)
        device = self.fabric.device
        return [
            (torch.stack(images[i : i + 32]).to(device), torch.tensor(labels[i : i + 32], device=device))
            for i in range(0, count, 32)
        ]

    def _images(self, items: Sequence[Item], count: int) -> list[Tensor]:
        return [x_BCHW for x_BCHW, _ in self._labelled(items, count)]

    def _heads(self) -> tuple[str, ...]:
        """Prefixes of the classifier's parameters, which are new."""
        head = getattr(self.network, "pretrained_cfg", {}).get("classifier", "fc")
        return tuple(f"{h}." for h in (head if isinstance(head, tuple | list) else (head,)))

    def record(self, facts: dict[str, Any]) -> dict[str, Any]:
        """What config.json says: everything needed to repeat the run."""
        from afds import __version__

        fabric = self.fabric
        return {
            "afds": __version__, "command": shlex.join(["afds", *sys.argv[1:]]),
            "config": to_json(dataclasses.replace(self.config, resume=None)), "data": facts,
            "resolved": {"epochs": self.plan.epochs, "steps_per_epoch": self.plan.steps_per_epoch,
                         "input_size": self.preprocess.input_size, "source": self.origin,
                         "dense_macs": self.dense_macs, "ratio": self.ratio},
            "hardware": stamp(fabric.device.type, str(fabric._precision.precision)),
        }  # fmt: skip

    def describe(self) -> str:
        """One paragraph for the terminal, before the first step."""
        s, size, p = self.splits, self.preprocess.input_size, self.plan
        test = f", {len(s.test)} test" if s.test else ", no test split"
        fewer = f", to {self.dense_macs / self.ratio / 1e9:.3f} ({self.ratio:.3g}x fewer)" if self.ratio > 1 else ""
        return (
            f"{len(s.classes)} classes: {len(s.train)} training, {len(s.val)} validation{test} photos, {size} px\n"
            f"{self.origin}: {self.dense_macs / 1e9:.3f} GMACs dense{fewer}\n"
            f"{self.config.method}, {p.epochs} epochs of {p.steps_per_epoch} steps "
            f"({self.fabric.device.type}, {self.fabric._precision.precision})"
        )
