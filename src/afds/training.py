"""The training loop: one network, one loss, from the pretrained start to the final density.

::

    epoch 0 .. d = 1 .. | descent: d falls by stages | ........ final density ........ last epoch

Each step: loss = CE + the transfer's terms (`transfer/`). Before a stage's first step the masks
and the channels' importance are updated on training images and the densities are solved for on validation images;
winners are ranked by the new importance from then on. After each epoch: validation accuracy and counted MACs, a
checkpoint that replaces the last one atomically. The order of images, augmentation and everything random in epoch
e depend only on (seed, e), so a resumed run ends where the unbroken one would have.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from afds.checkpoint import load_checkpoint, save_checkpoint
from afds.cost import CostMeter, has_selection
from afds.data import TimedLoader, set_epoch
from afds.errors import RunFolderError, TrainingError
from afds.evaluation import evaluate
from afds.mixing import mixture
from afds.norms import reestimate_norms
from afds.record import Record
from afds.selection import densities
from afds.signs import pass_through_zero
from afds.stages import cut_channels, descend, settle_winners
from afds.state import Plan, State
from afds.task import learning_rate
from afds.views import views_of

LOGGED = 10  # steps between two lines of the record


def train(fabric: Fabric, plan: Plan, out: Path, record: Record, progress: Callable[[dict[str, Any]], None]) -> None:
    """Run, or go on with, the training of ``plan``; its network is then in its final state."""
    c, task = plan.config, plan.task
    state = State(task, plan)
    saved = load_checkpoint(out / "last.ckpt") if (out / "last.ckpt").exists() else None
    try:
        if saved is not None:
            state.restore_shape(saved)
        wrapped, optimizer = state.start(fabric)
        if saved is not None:
            state.load(saved)
    except (RuntimeError, TypeError, KeyError, ValueError, AttributeError) as error:
        if saved is None:
            raise
        raise RunFolderError(f"{out / 'last.ckpt'} is not of this run ({str(error).splitlines()[0]}). Start the run "
                             "again in a new folder.") from error  # fmt: skip
    record.rewind(state.epoch)  # also without a checkpoint: what was stopped in its first epoch has left lines
    timed = TimedLoader(plan.train_loader)
    meter = CostMeter(task.network, plan.reference_macs)
    for epoch in range(state.epoch, plan.epochs):
        torch.manual_seed(c.seed * 100_003 + epoch)
        set_epoch(plan.train_loader, epoch)
        timed.reset()
        started, sums, images, step = time.perf_counter(), _Sums(), 0, epoch * plan.steps_per_epoch
        task.train()
        for x, y_B in timed:
            descend(fabric, plan, state, step, record, epoch)
            settled = settle_winners(fabric, plan, state, step, record, epoch, progress)
            if settled or cut_channels(plan, state, step, record, epoch):
                wrapped, optimizer = state.start(fabric)
            views = [v_BCHW.contiguous(memory_format=torch.channels_last) for v_BCHW in views_of(x)]
            rate = learning_rate(step, plan.epochs * plan.steps_per_epoch, c.optim)
            rate *= c.descent.lr if plan.descent is not None else 1.0
            for group in optimizer.param_groups:
                group["lr"] = rate * group["multiple"]
            views, other = mixture(views, c.optim)
            mixed = None if other is None else (y_B[other[0]], other[1])
            losses = wrapped(views[-1], y_B, state.teach(views[0], fabric), mixed)
            if not torch.isfinite(losses["loss"]):
                recovers = plan.descent is not None and plan.descent.settles
                option = "--recovery.lr" if recovers else "--optim.lr"
                raise TrainingError(
                    f"The loss is {float(losses['loss'].detach())} at step {step} (epoch {epoch + 1}). "
                    f"Start again, in a new folder, with a lower {option} than {c.optim.lr:g}."
                )
            fabric.backward(losses["loss"])
            if c.optim.clip > 0:
                fabric.clip_gradients(wrapped, optimizer, max_norm=c.optim.clip, error_if_nonfinite=False)
            optimizer.step()
            pass_through_zero(task.network, optimizer.state)
            optimizer.zero_grad(set_to_none=True)
            images += len(y_B) * fabric.world_size
            sums.add(losses)
            step += 1
            progress({"epoch": epoch, "epochs": plan.epochs, "step": step, "steps": plan.epochs * plan.steps_per_epoch,
                      "loss": sums.last, "images": len(y_B) * fabric.world_size,
                      "wait_share": timed.wait_share})  # fmt: skip
            if step % LOGGED == 0 or step % plan.steps_per_epoch == 0:
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
        torch.manual_seed(c.seed * 100_003 + plan.epochs)
        set_epoch(plan.train_loader, plan.epochs)
        batches = ((mixture(views_of(x), c.optim)[0][-1], y_B) for x, y_B in plan.train_loader)
        reestimate_norms(task.network, batches, c.descent.reestimate)


def _phase(plan: Plan, step: int) -> str:
    if plan.descent is None:
        return "tuning" if plan.pruning is None or step > plan.pruning.stage_steps[-1] else "pruning"
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
