"""The training loop: one network, one loss, from the pretrained start to the final density.

::

    epoch 0 .. d = 1 .. | descent: d falls by stages | ........ final density ........ last epoch

Each step: loss = CE + lambda AFD + KD + hints, as far as a teacher is there. Before a stage's first step the masks
and the channels' importance are updated on training images and the densities are solved for on validation images;
winners are ranked by the new importance from then on. After each epoch: validation accuracy and counted MACs, a
checkpoint that replaces the last one atomically. The order of images, augmentation and everything random in epoch
e depend only on (seed, e), so a resumed run ends where the unbroken one would have.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn

from afds.checkpoint import load_checkpoint, save_checkpoint
from afds.config import FitConfig, OptimConfig
from afds.cost import CostMeter, has_selection, measure_cost
from afds.data import TimedLoader, set_epoch
from afds.distillation import (
    AttentiveDistillation,
    FrozenNetwork,
    TapPoint,
    block_hints,
    l2_sp,
    logit_distillation,
    tap,
    tap_points,
)  # fmt: skip
from afds.errors import TrainingError
from afds.evaluation import evaluate
from afds.importance import Importance, by_importance, estimate, set_importance
from afds.masks import mask_counts, update_masks
from afds.record import Record
from afds.schedule import Allocation, Descent, solve, sparing_stream, uniform
from afds.selection import Predictor, densities, gates, set_density


class Task(nn.Module):
    """The target network and what else learns with it, in one module, as data parallelism wants it."""

    def __init__(self, network: nn.Module, afd: AttentiveDistillation | None, config: FitConfig) -> None:
        super().__init__()
        self.network = network
        self.afd = afd
        self.config = config
        self.blocks: tuple[str, ...] = ()
        self.points = tap_points(network, afd.names) if afd is not None else {}
        self.start: dict[str, Tensor] | None = None  # weights that l2-sp stays near, by name

    def match_blocks(self, blocks: Sequence[str]) -> None:
        """Compare the outputs of these residual blocks with the teacher's from now on."""
        self.blocks = tuple(blocks)
        self.points = {**self.points, **{name: TapPoint(name) for name in blocks}}

    def forward(
        self, x_BCHW: Tensor, y_B: Tensor, teacher: tuple[Tensor | None, dict[str, Tensor]] | None
    ) -> dict[str, Any]:
        """The terms of the loss, unweighted, their weighted sum `loss`, and rho's `entropy`."""
        c = self.config
        with tap(self.network, self.points if teacher is not None else {}) as features:
            logits_BK = self.network(x_BCHW)
        out: dict[str, Any] = {"entropy": {}}
        out["ce"] = F.cross_entropy(logits_BK.float(), y_B, label_smoothing=c.optim.label_smoothing)
        out["correct"] = (logits_BK.detach().argmax(1) == y_B).float().mean()
        out["loss"] = out["ce"]
        if self.afd is not None and teacher is not None:
            out["afd"], out["entropy"] = self.afd(features, teacher[1])
            out["loss"] = out["loss"] + c.distillation.afd * out["afd"]
        if teacher is not None and teacher[0] is not None and c.distillation.logits > 0:
            out["kd"] = logit_distillation(logits_BK, teacher[0], c.distillation.temperature)
            out["loss"] = out["loss"] + c.distillation.logits * out["kd"]
        if self.blocks and teacher is not None:
            out["hints"] = block_hints(features, teacher[1], self.blocks)
            out["loss"] = out["loss"] + c.distillation.hints * out["hints"]
        if self.start is not None:
            out["l2_sp"] = l2_sp(self.network, self.start)
            out["loss"] = out["loss"] + c.optim.weight_decay * out["l2_sp"]
        return out


def parameter_groups(task: Task, optim: OptimConfig, *, decay: bool = True) -> list[dict[str, Any]]:
    """Weights, predictors' weights (own rate), and scales, biases and norms (no decay), in a stable order."""
    predictors = {
        id(p) for m in task.modules() if isinstance(m, Predictor) for n, p in m.named_parameters() if n != "bias"
    }
    weights, predicting, rest = [], [], []
    for p in task.parameters():
        if id(p) in predictors:
            predicting.append(p)
        elif p.ndim > 1:
            weights.append(p)
        else:
            rest.append(p)
    wd = optim.weight_decay if decay else 0.0
    groups = [
        {"params": weights, "weight_decay": wd, "multiple": 1.0},
        {"params": predicting, "weight_decay": optim.weight_decay, "multiple": optim.predictor_lr},
        {"params": rest, "weight_decay": 0.0, "multiple": 1.0},
    ]
    return [g for g in groups if g["params"]]


def learning_rate(step: int, total: int, optim: OptimConfig) -> float:
    """Rate of a step: warm-up over the first 5 %, then cosine to 0, or times 0.1 after 67 %."""
    warm = max(1, round(0.05 * total))
    rise = min(1.0, (step + 1) / warm)
    if optim.schedule == "step":
        return optim.lr * rise * (0.1 if step >= 0.67 * total else 1.0)
    return optim.lr * rise * 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / max(1, total - warm)))


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


def train(fabric: Fabric, plan: Plan, out: Path, record: Record, progress: Callable[[dict[str, Any]], None]) -> None:
    """Run, or go on with, the training of ``plan``; its network is then in its final state."""
    c, task = plan.config, plan.task
    optimizer = torch.optim.SGD(
        parameter_groups(task, c.optim, decay=task.start is None),
        lr=c.optim.lr, momentum=c.optim.momentum, nesterov=c.optim.momentum > 0,
    )  # fmt: skip
    wrapped, optimizer = fabric.setup(task, optimizer)
    state = _State(task, optimizer, plan)
    if (out / "last.ckpt").exists():
        state.load(load_checkpoint(out / "last.ckpt"))
        record.rewind(state.epoch)
    timed = TimedLoader(plan.train_loader)
    meter = CostMeter(task.network)
    for epoch in range(state.epoch, plan.epochs):
        torch.manual_seed(c.seed * 100_003 + epoch)
        set_epoch(plan.train_loader, epoch)
        timed.reset()
        started, sums, images, step = time.perf_counter(), _Sums(), 0, epoch * plan.steps_per_epoch
        task.train()
        for x_BCHW, y_B in timed:
            _stages(fabric, plan, state, step, record, epoch)
            x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
            rate = learning_rate(step, plan.epochs * plan.steps_per_epoch, c.optim)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["multiple"]
            losses = wrapped(x_BCHW, y_B, state.teach(x_BCHW, fabric))
            if not torch.isfinite(losses["loss"]):
                raise TrainingError(
                    f"The loss is {float(losses['loss'])} at step {step} (epoch {epoch + 1}). "
                    f"The last checkpoint is intact: try again with a lower --optim.lr than {c.optim.lr}."
                )
            fabric.backward(losses["loss"])
            if c.optim.clip > 0:
                fabric.clip_gradients(wrapped, optimizer, max_norm=c.optim.clip, error_if_nonfinite=False)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            images += len(y_B) * fabric.world_size
            sums.add(losses)
            step += 1
            progress({"epoch": epoch, "epochs": plan.epochs, "step": step, "steps": plan.epochs * plan.steps_per_epoch,
                      "loss": sums.last, "images": len(y_B) * fabric.world_size,
                      "wait_share": timed.wait_share})  # fmt: skip
            if step % 10 == 0 or step % plan.steps_per_epoch == 0:
                record.write("step", epoch=epoch, step=step, lr=rate, wait_share=round(timed.wait_share, 4),
                             images_per_s=images / (time.perf_counter() - started), **sums.recent())  # fmt: skip
        seconds = time.perf_counter() - started
        metrics = evaluate(task.network, plan.val_loader, plan.num_classes, count_macs=meter)
        state.epoch = epoch + 1
        assert metrics.cost is not None
        line = {"epoch": epoch, "phase": _phase(plan, step), "seconds": seconds, "images_per_s": images / seconds,
                "wait_share": round(timed.wait_share, 4), **sums.means(), "val_top1": metrics.top1,
                "val_ce": metrics.cross_entropy, "ratio": metrics.cost.ratio,
                "density_mean": _mean_density(task.network)}  # fmt: skip
        record.write("epoch", **line)
        progress({"epochs": plan.epochs, "done": True, **line})
        if fabric.is_global_zero:
            save_checkpoint(out / "last.ckpt", state.dump())
        fabric.barrier()
    if plan.descent is not None and c.descent.reestimate > 0:
        set_epoch(plan.train_loader, plan.epochs)
        reestimate_norms(task.network, plan.train_loader, c.descent.reestimate)


@torch.no_grad()
def reestimate_norms(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], count: int) -> None:
    """Measure the statistics of all batch norms anew, as plain means over ``count`` batches of images.

    Ours: with other channels active in every image the running averages of the last steps are noisy.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's word for a cumulative mean
        norm.train()
    for x_BCHW, _ in itertools.islice(batches, count):
        network(x_BCHW.contiguous(memory_format=torch.channels_last))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


class _State:
    """All that changes while training, and nothing else: what a checkpoint holds."""

    def __init__(self, task: Task, optimizer: Any, plan: Plan) -> None:
        self.task, self.optimizer, self.plan = task, optimizer, plan
        self.epoch = 0
        self.stage = 0
        self.importance: Importance | None = None

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
        }  # fmt: skip

    def load(self, saved: dict[str, Any]) -> None:
        self.epoch, self.stage = saved["epoch"], saved["stage"]
        self.task.load_state_dict(saved["task"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if saved["importance"]:
            self.importance = Importance(*saved["importance"])
        if saved["densities"]:
            set_density(self.task.network, saved["densities"])


def _stages(fabric: Fabric, plan: Plan, state: _State, step: int, record: Record, epoch: int) -> None:
    """Before a step: the stages of the descent that are due."""
    descent, network, d = plan.descent, state.task.network, plan.config.descent
    while descent is not None and state.stage < len(descent.stage_steps) and step >= descent.stage_steps[state.stage]:
        thresholds = {}
        if state.stage > 0:  # the first stage has nothing behind it
            thresholds = update_masks(network, [x for x, _ in plan.labelled], static_quantile=d.static_quantile,
                                      prune_quantile=d.prune_quantile)  # fmt: skip
        importance = None
        if needs_importance(plan.config):
            importance = state.importance = estimate(network, plan.labelled, state.importance)
        if importance is not None and plan.config.selection.importance:
            set_importance(network, importance)
        allocation = choose_allocation(network, plan.config, importance, plan.probe)
        target = descent.target(state.stage)
        t = solve(network, allocation, target, plan.probe)
        _agree(fabric, network)
        record.write("stage", epoch=epoch, step=step, target_ratio=target, t=t, densities=densities(network),
                     thresholds=thresholds, **mask_counts(network))  # fmt: skip
        state.stage += 1
        network.train()


def needs_importance(config: FitConfig) -> bool:
    return config.selection.importance or config.descent.allocation == "importance"


def choose_allocation(
    network: nn.Module, config: FitConfig, importance: Importance | None, probe: Sequence[Tensor]
) -> Allocation:
    """The path of densities that the configuration asks for."""
    if config.descent.allocation == "stream":
        return sparing_stream(network)
    if config.descent.allocation == "uniform" or importance is None:
        return uniform(network)
    return by_importance(network, importance, measure_cost(network, probe[:1]), floor=config.descent.floor)


def _agree(fabric: Fabric, network: nn.Module) -> None:
    """All ranks take rank 0's masks and densities: a choice near a threshold must not differ between them."""
    if fabric.world_size == 1:
        return
    set_density(network, fabric.broadcast(densities(network)))
    for gate in gates(network).values():
        for value in (gate.kept, gate.dynamic, gate.importance):
            value.copy_(fabric.broadcast(value))


def _phase(plan: Plan, step: int) -> str:
    if plan.descent is None:
        return "tuning"
    if step <= plan.descent.warm_end:
        return "warm"
    return "descent" if step <= plan.descent.stage_steps[-1] else "final"


def _mean_density(network: nn.Module) -> float:
    if not has_selection(network):
        return 1.0
    values = list(densities(network).values())
    return sum(values) / len(values)


class _Sums:
    """Running means of the loss terms, over the epoch and over the steps since the last line."""

    def __init__(self) -> None:
        self.total: dict[str, float] = {}
        self.window: dict[str, float] = {}
        self.entropy: dict[str, float] = {}
        self.steps = 0
        self.window_steps = 0
        self.last = math.nan

    def add(self, losses: dict[str, Any]) -> None:
        for name, value in losses.items():
            if isinstance(value, Tensor):
                for sums in (self.total, self.window):
                    sums[name] = sums.get(name, 0.0) + float(value.detach())
        self.entropy = {name: float(value) for name, value in losses["entropy"].items()}
        self.last = float(losses["loss"].detach())
        self.steps += 1
        self.window_steps += 1

    def recent(self) -> dict[str, Any]:
        out: dict[str, Any] = {name: value / self.window_steps for name, value in self.window.items()}
        if self.entropy:
            out["entropy"] = self.entropy
        self.window, self.window_steps = {}, 0
        return out

    def means(self) -> dict[str, float]:
        return {f"train_{name}": value / max(1, self.steps) for name, value in self.total.items()}
