"""What happens to a network between two steps: the descent's stages, settling, pruning.

::

    descend           masks, importance, densities of the next stage, [refit]      selection stays open
    settle_winners    worth of channels, densities, winners for good, cut, refit   once, before the first step
    cut_channels      torch-pruning's next stage                                   slimming, l1
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from afds import balance as balancing
from afds.compression.pruning import cut_to
from afds.config import FitConfig
from afds.cost import CostMeter, measure_cost
from afds.elimination import Elimination
from afds.errors import BudgetError
from afds.importance import Importance, by_importance, estimate, set_importance
from afds.latency import solve_latency
from afds.masks import mask_counts, update_masks
from afds.norms import reestimate_norms
from afds.reconstruction import ROWS, Reconstruction
from afds.record import Record
from afds.schedule import Allocation, solve, sparing_stream, uniform
from afds.selection import densities, gates, set_density
from afds.settling import Winners, tied_units
from afds.state import Plan, State

Tell = Callable[[dict[str, Any]], None]  # progress.py listens

TRIED = 4  # a trial of how to share out the densities refits on every so manieth image


def cut_channels(plan: Plan, state: State, step: int, record: Record, epoch: int) -> bool:
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


def descend(fabric: Fabric, plan: Plan, state: State, step: int, record: Record, epoch: int) -> None:
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
            t = solve(network, allocation, target, plan.probe, reference=plan.reference_macs)
        unexplained = _reconstruct(plan, state)
        _agree(fabric, network)
        record.write("stage", epoch=epoch, step=step, target_ratio=target, t=t, densities=densities(network),
                     thresholds=thresholds, unexplained=unexplained, **mask_counts(network))  # fmt: skip
        state.stage += 1
        network.train()


def settle_winners(
    fabric: Fabric, plan: Plan, state: State, step: int, record: Record, epoch: int, progress: Tell
) -> bool:
    """Before the first step: choose the channels that stay, cut the others away, refit; whether that was done."""
    descent, network, d = plan.descent, state.task.network, plan.config.descent
    if descent is None or not descent.settles or state.stage > 0:
        return False
    started = time.perf_counter()

    def told(what: str) -> Callable[[int, int], None]:
        return lambda done, of: progress({"settling": what, "done": done, "of": of})

    told("choosing channels")(0, 0)
    network.eval()
    crops = plan.refit_on() if plan.reference is not None and plan.refit_on is not None else []
    refit = Reconstruction(plan.reference, crops) if plan.reference is not None and crops else None
    eliminate, worth = None, {}
    if d.worth == "elimination" and crops:
        eliminate = Elimination(network, crops, plan.labelled, ridge=d.ridge, told=told("weighing channels"))
        worth = eliminate()
    importance = None
    if d.allocation in ("importance", "refit") or not gates(network).keys() <= worth.keys():
        importance = estimate(network, plan.labelled)
        worth = {**importance.taylor, **worth}
    winners = Winners(worth, tied_units(network), d.multiple_of)
    allocation = _allocation(plan, state, importance, crops, winners, record, told("sharing out the density"))
    if plan.ms is not None and plan.stopwatch is not None:
        alone = fabric.is_global_zero  # rank 0 alone holds the stopwatch
        t = solve_latency(network, allocation, plan.ms, plan.stopwatch, place=winners.place,
                          spend=winners.spend) if alone else 0.0  # fmt: skip
    else:
        one = [plan.probe[0][:1]]  # the choice is the same for all images, and so is what they cost
        t = solve(network, allocation, descent.ratio, one, steps=14, place=winners.place, spend=winners.spend,
                  reference=plan.reference_macs)  # fmt: skip
    chosen = densities(network)
    if eliminate is not None:  # again, now that it is known which outputs need their inputs
        worth |= eliminate({name: gate.kept for name, gate in gates(network).items()})
        winners.place(network, chosen)
        del eliminate  # its matrices
    _agree(fabric, network)
    state.settle()
    unexplained: dict[str, tuple[float, float]] = {}
    if refit is not None:
        unexplained = refit(network, ridge=d.ridge, channels=state.settled, told=told("refitting layers"))
    else:
        whole = [batch for batch in plan.labelled if len(batch[1]) == len(plan.labelled[0][1])]  # all count as much
        reestimate_norms(network, whole, len(whole))
    _agree(fabric, network)
    cost = CostMeter(network, plan.reference_macs)(plan.probe[0][:1])[1]
    record.write("stage", epoch=epoch, step=step, target_ratio=descent.ratio, ratio=cost.ratio, t=t, densities=chosen,
                 thresholds={}, unexplained=unexplained, **mask_counts(network))  # fmt: skip
    stay, channels = sum(len(out) for out in state.settled.values()), sum(len(worth[n]) for n in chosen)
    progress({"settled": cost.ratio, "stay": stay, "channels": channels, "seconds": time.perf_counter() - started})
    state.stage += 1
    network.train()
    return True


def _allocation(
    plan: Plan, state: State, importance: Importance | None, crops: Sequence[Tensor],
    winners: Winners, record: Record, tell: Callable[[int, int], None],
) -> Allocation:  # fmt: skip
    """The path of densities along which the network settles; ``tell`` hears how many ways of how many were tried."""
    network, d, ratio = state.task.network, plan.config.descent, plan.descent.ratio if plan.descent else 1.0
    if d.allocation != "refit" or plan.teacher is None:
        return choose_allocation(network, plan.config, importance, plan.probe)
    layers = balancing.layers_of(network, winners.tied)
    stages = 1 + max(stage for stage, _ in layers.values())
    if not crops or plan.reference is None:
        return balancing.allocation(balancing.start(stages), layers)
    dense = [plan.teacher(x_BCHW)[0] for x_BCHW in plan.held]
    quick = Reconstruction(plan.reference, [x_BCHW[::TRIED] for x_BCHW in crops], rows=ROWS // 2)
    trial = balancing.Trial(network, quick, plan.held, dense, d.ridge)

    def judge(exponents: balancing.Exponents) -> float:
        path = balancing.allocation(exponents, layers)

        def meet(cut: nn.Module) -> None:
            solve(cut, path, ratio, [plan.probe[0][:1]], steps=12, place=winners.place, spend=winners.spend,
                  reference=plan.reference_macs)  # fmt: skip

        try:
            return trial(meet)
        except BudgetError:
            return math.inf

    tried = 0

    def told(exponents: balancing.Exponents, divergence: float) -> None:
        nonlocal tried
        tried += 1
        tell(tried, d.trials)
        record.write("trial", epoch=state.epoch, divergence=divergence, **dataclasses.asdict(exponents))

    return balancing.allocation(balancing.balance(judge, stages, d.trials, told), layers)


def _reconstruct(plan: Plan, state: State) -> dict[str, tuple[float, float]]:
    """Refit the network that has just lost channels; the momentum belonged to the weights before."""
    if plan.reference is None or plan.refit_on is None:
        return {}
    left = Reconstruction(plan.reference, plan.refit_on())(state.task.network, ridge=plan.config.descent.ridge)
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
