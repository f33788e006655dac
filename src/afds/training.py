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

from afds import balance as balancing
from afds.checkpoint import load_checkpoint, save_checkpoint
from afds.compression.pruning import Pruning, cut_to
from afds.compression.widths import Kept, KeptChannels, cut_tensor, narrow, then, widths
from afds.config import FitConfig, OptimConfig
from afds.cost import CostMeter, has_selection, measure_cost
from afds.data import TimedLoader, set_epoch
from afds.distillation import FrozenNetwork, TapPoint, tap, tap_points
from afds.errors import BudgetError, TrainingError
from afds.evaluation import evaluate
from afds.importance import Importance, by_importance, estimate, set_importance
from afds.latency import Stopwatch, solve_latency
from afds.masks import mask_counts, update_masks
from afds.reconstruction import Reconstruction
from afds.record import Record
from afds.schedule import Allocation, Descent, solve, sparing_stream, uniform
from afds.selection import Predictor, densities, gates, set_density
from afds.settling import choose, settle, tied_units
from afds.transfer import Regulariser, Step


class Task(nn.Module):
    """The target network and what else learns with it, in one module, as data parallelism wants it.

    Args:
        terms: the transfer's regularisers.
        head: prefixes of the classifier's parameters.
    """

    def __init__(
        self, network: nn.Module, terms: Sequence[Regulariser], config: FitConfig, head: tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        self.network = network
        self.regularisers = tuple(terms)
        self.terms = nn.ModuleList(terms)  # so that what they learn is the task's
        self.config = config
        self.head = tuple(f"network.{prefix}" for prefix in head)
        self.points: dict[str, TapPoint] = {}
        for term in terms:
            if term.units:
                self.points |= tap_points(network, term.units, before_norm=term.before_norm)
        self.points |= {name: TapPoint(name) for term in terms for name in term.blocks}

    def forward(
        self,
        x_BCHW: Tensor,
        y_B: Tensor,
        teacher: tuple[Tensor | None, dict[str, Tensor]] | None,
        mixed: tuple[Tensor, float] | None = None,
    ) -> dict[str, Any]:
        """The terms of the loss, unweighted, their weighted sum `loss`, and rho's `entropy`.

        mixed: where the images are blends, the labels (B,) of their second parts and the share of the first.
        """
        with tap(self.network, self.points) as features:
            logits_BK = self.network(x_BCHW)
        out: dict[str, Any] = {"entropy": {}}
        smoothing = self.config.optim.label_smoothing
        out["ce"] = F.cross_entropy(logits_BK.float(), y_B, label_smoothing=smoothing)
        if mixed is not None:
            second = F.cross_entropy(logits_BK.float(), mixed[0], label_smoothing=smoothing)
            out["ce"] = torch.lerp(second, out["ce"], mixed[1])
        out["correct"] = (logits_BK.detach().argmax(1) == y_B).float().mean()
        out["loss"] = out["ce"]
        seen = Step(self.network, logits_BK, features, *(teacher or (None, {})))
        for term in self.regularisers:
            out[term.name] = term(seen)
            out["loss"] = out["loss"] + term.weight * out[term.name]
            out["entropy"] |= term.facts
        return out


def parameter_groups(task: Task, config: FitConfig) -> list[dict[str, Any]]:
    """Weights, predictors' weights (own rate), and scales, biases and norms (no decay), in a stable order.

    Where a regulariser takes the place of weight decay, the classifier alone decays, at a rate of its own.
    """
    optim = config.optim
    predictors = {
        id(p) for m in task.modules() if isinstance(m, Predictor) for n, p in m.named_parameters() if n != "bias"
    }
    replaced = any(term.replaces_decay for term in task.regularisers)
    weights, heads, predicting, rest = [], [], [], []
    for name, p in task.named_parameters():
        if id(p) in predictors:
            predicting.append(p)
        elif p.ndim > 1 and replaced and name.startswith(task.head):
            heads.append(p)
        elif p.ndim > 1:
            weights.append(p)
        else:
            rest.append(p)
    groups = [
        {"params": weights, "weight_decay": 0.0 if replaced else optim.weight_decay, "multiple": 1.0},
        {"params": heads, "weight_decay": config.transfer.head_decay, "multiple": 1.0},
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


def make_optimizer(groups: list[dict[str, Any]], optim: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer that the options name."""
    if optim.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=optim.lr)
    return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, nesterov=optim.momentum > 0)


def mix(x_BCHW: Tensor, alpha: float) -> tuple[Tensor, Tensor, float]:
    """Mixup: each image blended with another of the batch, by one share of Beta(alpha, alpha).

    Zhang et al., *mixup: Beyond Empirical Risk Minimization*, ICLR 2018; with a teacher that sees the same blend, Beyer
    et al., *Knowledge distillation: A good teacher is patient and consistent*, CVPR 2022.
    Returns:
        The blends, the other image of each (B,), and the share of the first.
    """
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    other_B = torch.randperm(len(x_BCHW))
    return torch.lerp(x_BCHW[other_B], x_BCHW, share), other_B, share


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
    refit_on: tuple[Tensor, ...] = ()  # training images
    held: tuple[Tensor, ...] = ()  # validation images on which cuts are compared
    pruning: Pruning | None = None
    reference_macs: float = 0.0  # of the network that the budget is stated against, where it is not this one
    ms: float | None = None  # a budget in milliseconds
    stopwatch: Stopwatch | None = None


def train(fabric: Fabric, plan: Plan, out: Path, record: Record, progress: Callable[[dict[str, Any]], None]) -> None:
    """Run, or go on with, the training of ``plan``; its network is then in its final state."""
    c, task = plan.config, plan.task
    state = _State(task, plan)
    saved = load_checkpoint(out / "last.ckpt") if (out / "last.ckpt").exists() else None
    if saved is not None:
        state.restore_shape(saved)
    wrapped, optimizer = state.start(fabric)
    if saved is not None:
        state.load(saved)
        record.rewind(state.epoch)
    timed = TimedLoader(plan.train_loader)
    meter = CostMeter(task.network, plan.reference_macs)
    for epoch in range(state.epoch, plan.epochs):
        torch.manual_seed(c.seed * 100_003 + epoch)
        set_epoch(plan.train_loader, epoch)
        timed.reset()
        started, sums, images, step = time.perf_counter(), _Sums(), 0, epoch * plan.steps_per_epoch
        task.train()
        for x_BCHW, y_B in timed:
            _stages(fabric, plan, state, step, record, epoch)
            if _settle(fabric, plan, state, step, record, epoch) or _cut(plan, state, step, record, epoch):
                wrapped, optimizer = state.start(fabric)
            x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
            rate = learning_rate(step, plan.epochs * plan.steps_per_epoch, c.optim)
            rate *= c.descent.lr if plan.descent is not None else 1.0
            for group in optimizer.param_groups:
                group["lr"] = rate * group["multiple"]
            mixed = None
            if c.optim.mixup > 0 and len(y_B) > 1:
                x_BCHW, other_B, share = mix(x_BCHW, c.optim.mixup)
                mixed = y_B[other_B], share
            losses = wrapped(x_BCHW, y_B, state.teach(x_BCHW, fabric), mixed)
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

    def __init__(self, task: Task, plan: Plan) -> None:
        self.task, self.plan = task, plan
        self.optimizer: Any = None
        self.moments: dict[str, dict[str, Tensor]] = {}  # what the optimizer held for parameters that a cut replaced
        self.epoch = 0
        self.stage = 0
        self.importance: Importance | None = None
        self.kept: Kept = {}
        self.settled: dict[str, Tensor] = {}  # channels of each unit that settling has left

    def start(self, fabric: Fabric) -> tuple[Any, Any]:
        """The task and a fresh optimizer over its parameters as they now are, set up by Fabric."""
        optimizer = make_optimizer(parameter_groups(self.task, self.plan.config), self.plan.config.optim)
        for name, parameter in self.task.named_parameters():
            if name in self.moments:
                optimizer.state[parameter] = self.moments[name]
        self.moments = {}
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
        if saved.get("settled"):
            for name, gate in gates(self.task.network).items():
                gate.kept.fill_(False)
                gate.kept[saved["settled"][name].to(gate.kept.device)] = True
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
            "settled": self.settled,
        }  # fmt: skip

    def load(self, saved: dict[str, Any]) -> None:
        self.epoch, self.stage = saved["epoch"], saved["stage"]
        self.task.load_state_dict(saved["task"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if saved["importance"]:
            self.importance = Importance(*saved["importance"])
        if saved["densities"]:
            set_density(self.task.network, saved["densities"])


def _cut(plan: Plan, state: _State, step: int, record: Record, epoch: int) -> bool:
    """Before a step: cut the channels of the pruning stages that are due; whether the parameters are new."""
    pruning, network, done = plan.pruning, state.task.network, False
    while pruning is not None and state.stage < len(pruning.stage_steps) and step >= pruning.stage_steps[state.stage]:
        target = pruning.target(state.stage)
        state.remember_names()
        kept = cut_to(network, pruning, target)
        if kept:
            state.cut(kept)
            done = True
        cost = CostMeter(network, plan.reference_macs)(plan.probe[0][:1])[1]
        record.write("stage", epoch=epoch, step=step, target_ratio=target, ratio=cost.ratio, densities={},
                     thresholds={}, channels={n: len(k.out) for n, k in state.kept.items()})  # fmt: skip
        state.stage += 1
        network.train()
    return done


def _stages(fabric: Fabric, plan: Plan, state: _State, step: int, record: Record, epoch: int) -> None:
    """Before a step: the stages of the descent that are due."""
    descent, network, d = plan.descent, state.task.network, plan.config.descent
    if descent is not None and descent.settles:
        return
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
        last = state.stage == len(descent.stage_steps) - 1
        if last and plan.ms is not None and plan.stopwatch is not None:
            # rank 0 alone holds the stopwatch, `_agree` hands round what it found
            t = solve_latency(network, allocation, plan.ms, plan.stopwatch) if fabric.is_global_zero else 0.0
        else:
            t = solve(network, allocation, target, plan.probe)
        unexplained = _reconstruct(plan, state)
        _agree(fabric, network)
        record.write("stage", epoch=epoch, step=step, target_ratio=target, t=t, densities=densities(network),
                     thresholds=thresholds, unexplained=unexplained, **mask_counts(network))  # fmt: skip
        state.stage += 1
        network.train()


def _settle(fabric: Fabric, plan: Plan, state: _State, step: int, record: Record, epoch: int) -> bool:
    """Before the first step: choose the channels that stay, cut the others away, refit; whether that was done."""
    descent, network, d = plan.descent, state.task.network, plan.config.descent
    if descent is None or not descent.settles or state.stage > 0:
        return False
    network.eval()
    refit = Reconstruction(plan.reference, plan.refit_on) if plan.reference is not None and plan.refit_on else None
    importance = estimate(network, plan.labelled)
    tied = tied_units(network)

    def place(model: nn.Module, density: dict[str, float]) -> None:
        choose(model, density, importance.taylor, tied)

    allocation = _allocation(plan, state, importance, refit, place, tied, record)
    if plan.ms is not None and plan.stopwatch is not None:
        alone = fabric.is_global_zero  # rank 0 alone holds the stopwatch
        t = solve_latency(network, allocation, plan.ms, plan.stopwatch, place=place) if alone else 0.0
    else:
        t = solve(network, allocation, descent.ratio, [plan.probe[0][:1]], steps=14, place=place)
    _agree(fabric, network)
    chosen = densities(network)
    state.settle()
    unexplained = {} if refit is None else refit(network, ridge=d.ridge, channels=state.settled)
    if refit is None:
        reestimate_norms(network, plan.labelled, len(plan.labelled))
    _agree(fabric, network)
    cost = CostMeter(network)(plan.probe[0][:1])[1]
    record.write("stage", epoch=epoch, step=step, target_ratio=descent.ratio, ratio=cost.ratio, t=t, densities=chosen,
                 thresholds={}, unexplained=unexplained, **mask_counts(network))  # fmt: skip
    state.stage += 1
    network.train()
    return True


def _allocation(
    plan: Plan, state: _State, importance: Importance, refit: Reconstruction | None,
    place: Callable[[nn.Module, dict[str, float]], None], tied: Sequence[tuple[str, ...]], record: Record,
) -> Allocation:  # fmt: skip
    """The path of densities along which the network settles."""
    network, d, ratio = state.task.network, plan.config.descent, plan.descent.ratio if plan.descent else 1.0
    if d.allocation != "refit" or plan.teacher is None:
        return choose_allocation(network, plan.config, importance, plan.probe)
    layers = balancing.layers_of(network, tied)
    stages = 1 + max(stage for stage, _ in layers.values())
    if refit is None:
        return balancing.allocation(balancing.start(stages), layers)
    dense = [plan.teacher(x_BCHW)[0] for x_BCHW in plan.held]
    trial = balancing.Trial(network, refit, plan.held, dense, d.ridge)

    def judge(exponents: balancing.Exponents) -> float:
        path = balancing.allocation(exponents, layers)

        def meet(cut: nn.Module) -> None:
            solve(cut, path, ratio, [plan.probe[0][:1]], steps=12, place=place)

        try:
            return trial(meet)
        except BudgetError:
            return math.inf

    def told(exponents: balancing.Exponents, divergence: float) -> None:
        record.write("trial", stream=exponents.stream, stages=exponents.stages, divergence=divergence)

    return balancing.allocation(balancing.balance(judge, stages, d.trials, told), layers)


def _reconstruct(plan: Plan, state: _State) -> dict[str, tuple[float, float]]:
    """Refit the network that has just lost channels; the momentum belonged to the weights before."""
    if plan.reference is None or not plan.refit_on:
        return {}
    left = Reconstruction(plan.reference, plan.refit_on)(state.task.network, ridge=plan.config.descent.ridge)
    for moments in state.optimizer.state.values():
        for value in moments.values():
            if isinstance(value, Tensor) and value.dim():
                value.zero_()
    return left


def needs_importance(config: FitConfig) -> bool:
    return config.selection.importance or config.descent.allocation in ("importance", "refit")


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
    """All ranks take rank 0's masks, densities and weights: a choice near a threshold must not differ between them."""
    if fabric.world_size == 1:
        return
    set_density(network, fabric.broadcast(densities(network)))
    for gate in gates(network).values():
        for value in (gate.kept, gate.dynamic, gate.importance):
            value.copy_(fabric.broadcast(value))
    with torch.no_grad():
        for value in (*network.parameters(), *network.buffers()):
            value.copy_(fabric.broadcast(value))


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
