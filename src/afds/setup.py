"""Everything that a training needs, built and checked in the order in which things can be wrong."""

from __future__ import annotations

import copy
import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from afds import balance
from afds.artifact import is_run, load_run
from afds.compression.lowres import input_size_for, macs_at
from afds.compression.pruning import Pruning, check_reachable, plan_pruning
from afds.compression.slimming import Sparsity
from afds.compression.small import require_small, too_dear
from afds.config import PRUNED, FitConfig, parse_method, recovering, to_json
from afds.cost import has_selection, measure_cost
from afds.data import (
    Augment,
    ImageDataset,
    Item,
    Preprocess,
    Splits,
    Transform,
    TwoViews,
    eval_transform,
    make_loader,
    train_transform,
)  # fmt: skip
from afds.data.loader import Ticket, step_seed
from afds.distillation import AttentiveDistillation, FrozenNetwork, feature_sizes
from afds.errors import BudgetError, ConfigError
from afds.graph import convbn_units, residual_blocks, stage_ends, unit_roles
from afds.hardware import stamp
from afds.latency import Stopwatch, ratio_for
from afds.schedule import Allocation, Place, Spend, parse_budget, plan_descent, solve, sparing_stream, uniform
from afds.selection import SelectionConfig, gates, select, selective_units, set_density
from afds.settling import Winners, fix_scales, tied_units
from afds.sources import check_supported, load_source
from afds.state import Plan
from afds.task import Task
from afds.transfer import (
    AttentiveTransfer,
    BlockHints,
    Delta,
    LogitDistillation,
    NearStart,
    Regulariser,
    channel_weights,
    map_variances,
)  # fmt: skip

# By default a training shows about so many images, within these numbers of epochs. A settled network's accuracy rises
# for longer, the longer the more it has lost, and its epochs cost less (docs/accuracy.md, "Mixing, and how long").
DENSE = 60_000, 12, 60
SETTLED = 120_000, 24, 120
NARROW = 300_000, 24, 240  # from NARROW_FROM on
NARROW_FROM = 4.0  # ratio of MACs

CROPS_EACH = 8  # of a photo at most, for the refit, so that few photos do not take minutes; not tuned
CROPS_BYTES = 768 * 2**20  # of all crops; feature maps, which take more, are cut short by `reconstruction.MEMORY`


def default_epochs(images: int, ratio: float = 1.0) -> int:
    """Passes over ``images`` training images: fewer images, more passes; ratio: of a settled network, else 1."""
    shown, fewest, most = DENSE if ratio <= 1 else SETTLED if ratio < NARROW_FROM else NARROW
    return max(fewest, min(most, round(shown / images)))


def _command() -> str | None:
    """The line that was typed; None where another program called, whose arguments would not repeat anything."""
    program = Path(sys.argv[0])
    typed = program.stem == "afds" or (program.name == "__main__.py" and program.parent.name == "afds")
    return shlex.join(["afds", *sys.argv[1:]]) if typed else None


class Setup:
    """A checked run: network, loaders, teacher, schedule.

    Raises:
        AfdsError: anything that would stop the run later.
    """

    def __init__(self, config: FitConfig, splits: Splits, fabric: Fabric, *, rehearsal: bool = False) -> None:
        """rehearsal: only to see that it can be built; what takes long and cannot fail is left out."""
        self.config, self.splits, self.fabric = config, splits, fabric
        self.rehearsal = rehearsal
        self.selection: SelectionConfig | None = None
        self._pretrained_cfg: dict[str, Any] | None = None
        self._preprocess_of_run: Preprocess | None = None
        transfer, compression = parse_method(config.method)
        torch.manual_seed(config.seed)  # the fresh classifier, phi and low-rank predictors
        dense_network = self._start(transfer, compression)
        probe = self._meet_budget()
        self.plan = self._plan(transfer, compression, dense_network, probe)

    def _start(self, transfer: str, compression: str) -> nn.Module:
        """Opens the source and makes `network` of it, what learns; returns the same before selection was put in."""
        config, fabric, budget = self.config, self.fabric, parse_budget(self.config.budget)
        network = self._source(config.source, transfer)
        self.preprocess = self._preprocess()
        network.to(fabric.device)
        if not has_selection(network):
            check_supported(network, self.preprocess.input_size)
        self.dense_macs = measure_cost(network, self._images(self.splits.val, 1)).dense
        if budget.ms is not None and compression != "afs":
            raise ConfigError(f"--budget {config.budget}: a latency can be asked of methods with +afs; give "
                              f"{config.method} a ratio of MACs such as 5x.")  # fmt: skip
        self.ratio = config.latency.ratio if budget.ms is not None else budget.wanted_ratio(self.dense_macs)
        self.reference_macs = 0.0
        if compression in ("small", "lowres", "small+lowres"):
            network = self._cheaper(network, compression, transfer)
        self.taught_at = self.preprocess  # what training images are read as; the network may look at smaller ones
        self.network = network
        if compression == "afs" and not has_selection(network):
            self.network, self.selection = select(network, config.selection), config.selection
        elif compression != "afs" and has_selection(network):
            raise ConfigError(f"--source {config.source} carries selection: {config.method} would train it as a dense "
                              "network. Use a method with +afs, or another source.")  # fmt: skip
        self.network.requires_grad_(True)
        # What learns is prepared in place; one that carries selection stays as it was, as teacher and aim of the refit.
        return copy.deepcopy(network) if network is self.network and has_selection(network) else network

    def _meet_budget(self) -> list[Tensor]:
        """Finds what milliseconds come to, refuses what cannot be met; returns the images, of the validation split, on
        which cost is counted."""
        config, budget = self.config, parse_budget(self.config.budget)
        d, will_settle = config.descent, config.method == "afds" and config.descent.settle and budget.ratio != 1
        if will_settle and d.scales != "predicted":
            images = partial(self._images, self.splits.train, 3 * d.images)
            fix_scales(self.network, images, but_cheap=d.scales == "cheap")
        if will_settle and d.input_size:
            self._look_at(d.input_size)
        probe = self._images(self.splits.val, d.images)
        self.stopwatch = self._time(budget.ms, probe)
        if has_selection(self.network) and self.ratio > 1:  # a hopeless budget: now, not after hours
            solve(self.network, uniform(self.network), self.ratio, probe[:1], steps=0, reference=self.reference_macs)
            set_density(self.network, 1.0)
        return probe

    def _plan(self, transfer: str, compression: str, dense_network: nn.Module, probe: list[Tensor]) -> Plan:
        """What the training is given."""
        config, splits, fabric, network = self.config, self.splits, self.fabric, self.network
        size = self.preprocess.input_size
        selects = has_selection(network) and self.ratio > 1
        best = selects and self.is_base and config.method == "afds"
        settles, refits = best and config.descent.settle, best and config.descent.reconstruct > 0
        o, d = config.optim, config.data_options
        augment = Augment(crop=d.crop, scale=(d.scale, 1.0), flip=d.flip,
                          colour=config.recovery.colour if settles else d.colour)  # fmt: skip
        items = (*splits.train, *splits.unlabelled) if settles else splits.train
        train_set = ImageDataset(items, self._views(augment), cache=d.cache)
        seed = step_seed(config.seed, 1 if self.is_base else 0)
        loader = make_loader(train_set, batch_size=o.batch_size, shuffle=True, seed=seed, workers=d.workers,
                             drop_last=True)  # fmt: skip
        train_loader = fabric.setup_dataloaders(loader)  # each process has its share of it
        if not len(train_loader):
            raise ConfigError(f"--optim.batch-size {o.batch_size} on {fabric.world_size} devices: {len(items)} photos "
                              "are too few for a step. Give a smaller batch, or fewer devices.")  # fmt: skip
        epochs = o.epochs or default_epochs(len(items), self.ratio if settles else 1.0)
        total_steps = epochs * len(train_loader)
        if settles:
            config = recovering(config, epochs)
        aim = dense_network if has_selection(dense_network) else network
        reference = copy.deepcopy(aim).requires_grad_(False) if refits else None
        terms, teacher = self._transfer(config, transfer, dense_network, size)
        if compression == "slimming" and self.ratio == 1 and config.pruning.sparsity > 0:
            terms.append(Sparsity(config.pruning.sparsity))
        task = Task(network, terms, config, self._heads(network))
        task.to(fabric.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return Plan(
            config=config, task=task, train_loader=train_loader,
            val_loader=self.eval_loader(splits.val), probe=probe,
            labelled=self._labelled(splits.train, 3 * config.descent.images) if selects else [],
            num_classes=len(splits.classes), epochs=epochs,
            steps_per_epoch=len(train_loader), teacher=teacher,
            teaches_logits=self.is_base or transfer == "kd",
            descent=plan_descent(total_steps, config.descent, self.ratio, settles=settles) if selects else None,
            reference=reference, held=tuple(self._images(splits.val, 4 * config.descent.images)) if settles else (),
            refit_on=self._crops if refits else None,
            pruning=self._pruning(compression, size, total_steps), reference_macs=self.reference_macs,
            ms=parse_budget(config.budget).ms, stopwatch=self.stopwatch,
        )  # fmt: skip

    def _look_at(self, side: int) -> None:
        """The network is to look at images of this side, in pixels; its teacher goes on to see those of now."""
        now = self.taught_at.input_size
        if side > now:
            raise ConfigError(f"--descent.input-size {side}: the dense network sees {now} px; give at most that.")
        crop = self.config.data_options.crop
        if side < now and crop != "resized":
            raise ConfigError(f"--descent.input-size {side}: with --data-options.crop {crop} a crop is not the same at "
                              "two sizes. Leave one of them out.")  # fmt: skip
        if side < now:
            self.preprocess, self.reference_macs = self.taught_at.at(side), self.dense_macs
            macs_at(self.network, side)  # refused where the network cannot run on it
        self.config = dataclasses.replace(
            self.config, descent=dataclasses.replace(self.config.descent, input_size=side)
        )

    def _views(self, augment: Augment) -> Transform | TwoViews:
        """Training images in the teacher's size, and in the network's where that is smaller."""
        large = train_transform(self.taught_at, augment)
        if self.preprocess == self.taught_at:
            return large
        return TwoViews(large, train_transform(self.preprocess, augment))

    def _time(self, ms: float | None, probe: Sequence[Tensor]) -> Stopwatch | None:
        """The stopwatch of a budget in milliseconds, and what they come to in MACs; into `config` and `ratio`."""
        if ms is None:
            return None
        stopwatch = Stopwatch(probe, len(self.splits.classes), self.config.latency)
        if not self.ratio:
            network, found = self.network, 0.0
            if self.fabric.is_global_zero:  # the others would only disturb the measurement
                kept = {name: gate.kept.clone() for name, gate in gates(network).items()}
                allocation, place, spend = self._widths_to_time(network)
                found = ratio_for(network, allocation, place, ms, stopwatch, probe, self.reference_macs, spend=spend)
                set_density(network, 1.0)
                for name, gate in gates(network).items():
                    gate.kept.copy_(kept[name])
            self.ratio = float(self.fabric.broadcast(found))
            latency = dataclasses.replace(self.config.latency, ratio=self.ratio)
            self.config = dataclasses.replace(self.config, latency=latency)
        return stopwatch

    def _widths_to_time(self, network: nn.Module) -> tuple[Allocation, Place, Spend | None]:
        """How densities fall while a stopwatch looks, and how they are put in: which channels win is of no matter."""
        descent = self.config.descent
        settles = self.config.method == "afds" and descent.settle
        allocation = (sparing_stream if descent.allocation == "stream" else uniform)(network)
        if not settles:
            return allocation, set_density, None
        tied = tied_units(network)
        if descent.allocation == "refit":
            layers = balance.layers_of(network, tied)
            allocation = balance.allocation(balance.start(1 + max(stage for stage, _ in layers.values())), layers)
        alike = {name: torch.ones(gate.sign.numel()) for name, gate in gates(network).items()}
        winners = Winners(alike, tied, descent.multiple_of)
        return allocation, winners.place, winners.spend

    def _cheaper(self, whole: nn.Module, compression: str, transfer: str) -> nn.Module:
        """The network that is trained in place of ``whole``: smaller, on smaller images, or both."""
        config, size, network = self.config, self.preprocess.input_size, whole
        macs, self.reference_macs = self.dense_macs / self.ratio, self.dense_macs
        if self.is_base:
            raise ConfigError(f"--source {config.source} has been fine-tuned on these classes: +{compression} starts "
                              "from pretrained weights. Give the source of that run.")  # fmt: skip
        if "small" in compression:
            named = require_small(config.small_source, macs, size, len(self.splits.classes))
            torch.manual_seed(config.seed)
            network = self._source(named, transfer).to(self.fabric.device)
            theirs, self.preprocess = self.preprocess, self._preprocess()
            self.preprocess = dataclasses.replace(self.preprocess, input_size=size, resize=theirs.resize)
            alone = transfer == "kd" and config.teacher is None  # a teacher of its own is compared when it is opened
            if alone and (theirs.mean, theirs.std) != (self.preprocess.mean, self.preprocess.std):
                raise ConfigError(f"{config.method}: the teacher, --source {config.source}, wants its images "
                                  f"normalised with {theirs.mean}, {theirs.std}, and --small-source {named} with "
                                  f"{self.preprocess.mean}, {self.preprocess.std}: they cannot look at the same ones. "
                                  "Give another --small-source, or l2 in place of kd.")  # fmt: skip
            check_supported(network, size)
            cost = macs_at(network, size)
            if "lowres" not in compression and cost > macs:
                raise BudgetError(too_dear(named, cost, macs, size))
        if "lowres" in compression:
            self.preprocess = self.preprocess.at(input_size_for(network, macs, size))
        return network

    def _pruning(self, compression: str, size: int, total_steps: int) -> Pruning | None:
        """When channels are cut away; a budget that cannot be met is refused."""
        if compression not in PRUNED or self.ratio <= 1:
            return None
        method: Any = compression
        p, self.reference_macs = self.config.pruning, self.dense_macs
        plan = plan_pruning(method, p.scope, stages=p.stages, end=p.end, total_steps=total_steps,
                            ratio=self.ratio, reference=self.dense_macs, input_size=size)  # fmt: skip
        check_reachable(self.network, plan)
        return plan

    def _transfer(
        self, config: FitConfig, transfer: str, dense_network: nn.Module, size: int
    ) -> tuple[list[Regulariser], FrozenNetwork | None]:
        """The regularisers of a transfer, and the frozen network that they compare with."""
        c, network, device = config, self.network, self.fabric.device
        if transfer == "l2-sp":
            heads = self._heads(network)
            start = {n: p.detach().clone() for n, p in self._anchor(network).named_parameters()
                     if not n.startswith(heads)}  # fmt: skip
            return [NearStart(c.transfer.l2_sp, start)], None
        if transfer == "kd":
            teacher = FrozenNetwork(self._teacher(dense_network), ()).to(device)
            return [LogitDistillation(c.distillation.logits, c.distillation.temperature)], teacher
        if transfer not in ("afd", "delta"):
            return [], None
        units = [name for name, _ in selective_units(network)] or [u.name for u in convbn_units(network)]
        features = stage_ends(network, units)
        if transfer == "delta":
            teacher = FrozenNetwork(self._anchor(dense_network), features, before_norm=True).to(device)
            if self.rehearsal:  # weighing channels takes as long as some epochs
                return [], teacher
            labelled = self._labelled(self.splits.train, c.transfer.delta_images)
            variances = map_variances(teacher, labelled)
            weights = channel_weights(teacher, features, labelled, len(self.splits.classes))
            return [Delta(c.transfer.delta, weights, variances)], teacher
        d, writers = c.distillation, {}
        if self.is_base and d.hints > 0:  # of blocks whose output a unit writes, so that its channels are known
            roles = unit_roles(network)
            written = {b: [u for u in units if u.startswith(b + ".") and roles.get(u) == "stream"]
                       for b in residual_blocks(network)}  # fmt: skip
            writers = {b: found[-1] for b, found in written.items() if found}
        teacher = FrozenNetwork(dense_network, features, tuple(writers)).to(device)
        if self.preprocess != self.taught_at:
            teacher.look_from(size)
        sizes = feature_sizes(teacher, torch.zeros(1, 3, size, size, device=device))
        terms: list[Regulariser] = [
            AttentiveTransfer(d.afd, AttentiveDistillation(sizes, hidden=d.hidden, squared=d.squared))
        ]
        if self.is_base and d.logits > 0:
            terms.append(LogitDistillation(d.logits, d.temperature))
        if writers:
            terms.append(BlockHints(d.hints, writers))
        return terms, teacher

    def _anchor(self, network: nn.Module) -> nn.Module:
        """The pretrained network that l2-sp and delta stay near: ``network`` itself, or what --anchor names."""
        c = self.config
        if not c.anchor or c.anchor == c.source:
            return network
        path, classes = Path(c.anchor), len(self.splits.classes)
        if path.is_dir() and is_run(path):
            anchor = load_run(path).model
        else:
            anchor = load_source(c.anchor, num_classes=classes, arch_args=json.loads(c.arch_args) or None).model
        anchor.to(self.fabric.device)
        return select(anchor, c.selection) if has_selection(network) and not has_selection(anchor) else anchor

    def _teacher(self, network: nn.Module) -> nn.Module:
        """The fine-tuned dense network whose logits are learned from: --teacher, or the base that is the source."""
        path = self.config.teacher
        if path is None:  # the base: trained first, or the source itself; until then the source stands in
            return network
        run = load_run(path)
        if run.labels != tuple(self.splits.classes):
            raise ConfigError(f"--teacher {path} was trained on other classes than {self.config.data} has.")
        if run.preprocess.input_size != self.preprocess.input_size:
            raise ConfigError(f"--teacher {path} looks at {run.preprocess.input_size} px images, this run at "
                              f"{self.preprocess.input_size} px.")  # fmt: skip
        theirs, ours = run.preprocess, self.preprocess
        if (theirs.mean, theirs.std) != (ours.mean, ours.std):
            raise ConfigError(f"--teacher {path} wants its images normalised with {theirs.mean}, {theirs.std}; this "
                              f"run with {ours.mean}, {ours.std}.")  # fmt: skip
        return run.model

    def _source(self, spec: str, transfer: str) -> nn.Module:
        """The network to start from; sets what is known of it."""
        c, classes = self.config, self.splits.classes
        path = Path(spec)
        if not (path.is_dir() and is_run(path)):
            try:
                arch_args = json.loads(c.arch_args)
            except ValueError as error:
                raise ConfigError(f"--arch-args {c.arch_args}: not JSON ({error}).") from error
            if not isinstance(arch_args, dict):
                raise ConfigError(
                    f"--arch-args {c.arch_args}: give a JSON object such as '{{\"layers\": [1, 1, 1, 1]}}'."
                )
            own = arch_args if spec == c.source else {}  # of the source, not of a smaller network
            source = load_source(spec, num_classes=len(classes), arch_args=own or None,
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
        if run.structure.get("widths"):
            raise ConfigError(
                f"{spec} has lost channels for good to pruning: start from the network that it came from."
            )
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
            p, d = Preprocess.for_source(self._pretrained_cfg, size or None), self.config.data_options
            return p.as_large_as_in(d.scale) if d.crop == "resized" else p
        if size in (0, p.input_size):
            return p
        return p.at(size)

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

    def _crops(self) -> list[Tensor]:
        """Training crops in the network's size to refit on, in batches on the device: the same whenever asked.

        Photo after photo, again from the first with other crops, up to `CROPS_EACH` of each and `CROPS_BYTES` in all.
        """
        c, side = self.config, self.preprocess.input_size
        items = (*self.splits.train, *self.splits.unlabelled)
        d = c.data_options
        count = min(c.descent.reconstruct, CROPS_EACH * len(items), max(64, CROPS_BYTES // (12 * side * side)))
        augment = Augment(crop=d.crop, scale=(d.scale, 1.0), flip=d.flip)
        dataset = ImageDataset(items, train_transform(self.preprocess, augment), cache=d.cache)
        seed, tickets = step_seed(c.seed, 2), list[Ticket]()
        for again in range(-(-count // len(items))):
            order = torch.randperm(len(items), generator=torch.Generator().manual_seed(again)).tolist()
            tickets += [Ticket(position, again, seed) for position in order]
        with torch.random.fork_rng(devices=[]):
            crops = [dataset[ticket][0] for ticket in tickets[:count]]
        return [torch.stack(crops[i : i + 64]).to(self.fabric.device) for i in range(0, count, 64)]

    @staticmethod
    def _heads(network: nn.Module) -> tuple[str, ...]:
        """Prefixes of the classifier's parameters, which are new."""
        head = getattr(network, "pretrained_cfg", {}).get("classifier", "fc")
        return tuple(f"{h}." for h in (head if isinstance(head, tuple | list) else (head,)))

    def record(self, facts: dict[str, Any]) -> dict[str, Any]:
        """What config.json says: everything needed to repeat the run."""
        from afds import __version__

        fabric = self.fabric
        return {
            "afds": __version__, "command": _command(),
            "config": to_json(dataclasses.replace(self.config, resume=None)), "data": facts,
            "resolved": {"epochs": self.plan.epochs, "steps_per_epoch": self.plan.steps_per_epoch,
                         "input_size": self.preprocess.input_size, "taught_at": self.taught_at.input_size,
                         "source": self.origin,
                         "dense_macs": self.dense_macs, "ratio": self.ratio},
            "hardware": stamp(fabric.device.type, str(fabric._precision.precision)),
        }  # fmt: skip

    def describe(self) -> str:
        """One paragraph for the terminal, before the first step."""
        s, size, p = self.splits, self.preprocess.input_size, self.plan
        taught = self.taught_at.input_size
        seen = f"{size} px" if size == taught else f"{size} px, its dense network's {taught} px"
        test = f", {len(s.test)} test" if s.test else ", no test split"
        more = f"{len(s.unlabelled)} unlabelled, " if s.unlabelled else ""
        fewer = f", to {self.dense_macs / self.ratio / 1e9:.3f} ({self.ratio:.3g}x fewer)" if self.ratio > 1 else ""
        return (
            f"{len(s.classes)} classes: {len(s.train)} training, {more}{len(s.val)} validation{test} photos, {seen}\n"
            f"{self.origin}: {self.dense_macs / 1e9:.3f} GMACs dense{fewer}\n"
            f"{self.config.method}, {p.epochs} epochs of {p.steps_per_epoch} steps "
            f"({self.fabric.device.type}, {self.fabric._precision.precision})"
        )
