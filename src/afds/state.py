"""What a training is given (`Plan`) and all that changes in it (`State`): what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from afds.compression.pruning import Pruning
from afds.compression.widths import Kept, KeptChannels, cut_tensor, narrow, then, widths
from afds.config import FitConfig
from afds.distillation import FrozenNetwork
from afds.importance import Importance
from afds.latency import Stopwatch
from afds.schedule import Descent
from afds.selection import densities, gates, set_density
from afds.settling import settle
from afds.task import Task, make_optimizer, parameter_groups


@dataclass
class Plan:
    """What a run trains with, all checked and built."""

    config: FitConfig
    task: Task
    train_loader: Iterable[Any]
    val_loader: Iterable[Any]
    probe: list[Tensor]  # validation images on which cost is counted
    labelled: list[tuple[Tensor, Tensor]]  # training images for masks and importance
    num_classes: int
    epochs: int
    steps_per_epoch: int
    teacher: FrozenNetwork | None  # the pretrained source, or the fine-tuned dense network
    teaches_logits: bool  # the teacher knows the target's classes
    descent: Descent | None
    reference: nn.Module | None = None  # the network at d = 1, that stages are refitted to
    refit_on: Callable[[], Sequence[Tensor]] | None = None  # crops of training images
    held: tuple[Tensor, ...] = ()  # validation images on which cuts are compared
    pruning: Pruning | None = None
    reference_macs: float = 0.0  # of the network that the budget is stated against, where it is not this one
    ms: float | None = None  # a budget in milliseconds
    stopwatch: Stopwatch | None = None


class State:
    """All that changes while training, and nothing else: what a checkpoint holds."""

    def __init__(self, task: Task, plan: Plan) -> None:
        self.task, self.plan = task, plan
        self.optimizer: Any = None
        self.moments: dict[str, dict[str, Tensor]] = {}  # what the optimizer held for parameters that a cut replaced
        self.scaler: Any = None  # Fabric's precision: in 16-mixed it holds the scale of the loss
        self.epoch = 0
        self.stage = 0
        self.importance: Importance | None = None
        self.kept: Kept = {}
        self.chosen: dict[str, Tensor] = {}  # channels of each unit that settling has kept ...
        self.settled: dict[str, Tensor] = {}  # ... and those it has left: more where a layer's cannot be cut

    def start(self, fabric: Fabric) -> tuple[Any, Any]:
        """The task and a fresh optimizer over its parameters as they now are, set up by Fabric."""
        optimizer = make_optimizer(parameter_groups(self.task, self.plan.config), self.plan.config.optim)
        for name, parameter in self.task.named_parameters():
            if name in self.moments:
                optimizer.state[parameter] = self.moments[name]
        self.moments, self.scaler = {}, fabric._precision
        wrapped, self.optimizer = fabric.setup(self.task, optimizer)
        return wrapped, self.optimizer

    def cut(self, kept: Kept) -> None:
        """Channels have just gone from the network: the optimizer's moments and regularisers follow, by name."""
        old = self.optimizer.optimizer.state if hasattr(self.optimizer, "optimizer") else self.optimizer.state
        held = {id(parameter): moments for parameter, moments in old.items()}
        self.moments = {
            name: {key: cut_tensor(name.removeprefix("network."), value, kept).clone() if isinstance(value, Tensor)
                   else value for key, value in held[before].items() if value is not None}
            for name, before in self.names.items()
            if before in held
        }  # fmt: skip
        self.kept = then(self.kept, kept)
        self._follow()

    def settle(self) -> None:
        """Cut away what is not kept; the optimizer starts afresh, as nothing of what it remembers is true any more."""
        self.chosen = {name: gate.kept.nonzero().flatten().cpu() for name, gate in gates(self.task.network).items()}
        self.settled = settle(self.task.network)
        self._follow()

    def remember_names(self) -> None:
        """Note which parameter has which name, before a cut replaces them."""
        self.names = {name: id(parameter) for name, parameter in self.task.named_parameters()}

    def _follow(self) -> None:
        nothing = torch.empty(0, dtype=torch.long)
        settled = {name: KeptChannels(out.cpu(), nothing) for name, out in self.settled.items()}
        for term in self.task.regularisers:
            term.cut({**self.kept, **settled})
        self.task.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def restore_shape(self, saved: dict[str, Any]) -> None:
        """Give the network the widths that it was saved with, before an optimizer holds its parameters."""
        if saved.get("chosen"):
            for name, gate in gates(self.task.network).items():
                gate.keep_only(saved["chosen"][name])
            self.settle()
        if saved.get("kept"):
            narrow(self.task.network, saved["widths"])
            self.kept = {name: KeptChannels(*channels) for name, channels in saved["kept"].items()}
            self._follow()

    def teach(self, x_BCHW: Tensor, fabric: Fabric) -> tuple[Tensor | None, dict[str, Tensor]] | None:
        """The teacher's logits, if it knows these classes, and features."""
        if self.plan.teacher is None:
            return None
        with fabric.autocast():
            logits_BK, features = self.plan.teacher(x_BCHW)
        return (logits_BK if self.plan.teaches_logits else None), features

    def dump(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch, "stage": self.stage, "task": self.task.state_dict(),
            "optimizer": self.optimizer.state_dict(), "densities": densities(self.task.network),
            "importance": (self.importance.taylor, self.importance.weight) if self.importance else None,
            "kept": {name: (channels.out, channels.in_) for name, channels in self.kept.items()},
            "widths": widths(self.task.network) if self.kept else {},
            "chosen": self.chosen, "scaler": self.scaler.state_dict(),
        }  # fmt: skip

    def load(self, saved: dict[str, Any]) -> None:
        self.epoch, self.stage = saved["epoch"], saved["stage"]
        self.task.load_state_dict(saved["task"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if saved.get("scaler"):
            self.scaler.load_state_dict(saved["scaler"])
        if saved["importance"]:
            self.importance = Importance(*saved["importance"])
        if saved["densities"]:
            set_density(self.task.network, saved["densities"])
