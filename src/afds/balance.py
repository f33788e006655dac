"""Where the budget is spent: stages and streams against each other, tried out with a refit (ours; an option).

::

    d_l = t ^ e_l      e_l = stage's exponent, times the stream's where l writes a residual stream
                       larger e: fewer channels;  t: by bisection, the whole always meets the budget

    exponents --> choose --> cut --> least squares --> KL( dense || cut ) on validation images, no labels
        ^                                                  |
        '---- one exponent times or over STEP at a time, kept where the KL falls ---'

A refit costs seconds and no gradient, and what it cannot give back is what training starts from. Judged before
refitting, a Taylor estimate shares the densities out worse than a fixed rule does (docs/accuracy.md). The search starts
from that rule: early stages are cut harder than late ones, what lies inside of blocks harder than streams. Not the
default: what starts nearest to the dense network does not end nearest, one density for all layers ends nearer
(docs/accuracy.md).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afds.graph import stage_ends, unit_roles
from afds.reconstruction import Reconstruction
from afds.schedule import Allocation
from afds.selection import gates
from afds.settling import settle

STREAM = 0.55  # exponent of what writes a residual stream, as a multiple
FIRST, LAST = 1.5, 0.7  # exponents of the first and the last stage; geometric between them
STEP = 1.35  # first factor by which an exponent is changed; its root after a change that did not help


@dataclass(frozen=True)
class Exponents:
    """How density is shared out."""

    stream: float
    stages: tuple[float, ...]

    def densities(self, t: float, layers: Mapping[str, tuple[int, bool]]) -> dict[str, float]:
        """layers: stage, and whether it writes a residual stream, of each unit."""
        found = {}
        for name, (stage, streams) in layers.items():
            exponent = self.stages[stage] * (self.stream if streams else 1.0)
            found[name] = min(1.0, max(t**exponent, 1e-4))
        return found

    def scaled(self, place: int, factor: float) -> Exponents:
        """Place 0 is the stream, 1 the first stage."""
        if place == 0:
            return replace(self, stream=self.stream * factor)
        stages = list(self.stages)
        stages[place - 1] *= factor
        return replace(self, stages=tuple(stages))


def layers_of(model: nn.Module, tied: Sequence[tuple[str, ...]]) -> dict[str, tuple[int, bool]]:
    """Stage and role of every unit that chooses; tied units have those of the first of them that is no stem."""
    names = list(gates(model))
    ends, roles, found, stage = stage_ends(model, names), unit_roles(model), {}, 0
    for name in names:
        found[name] = (min(stage, len(ends) - 1), roles.get(name, "inner") in ("stream", "shortcut"))
        stage += name in ends
    for group in tied:
        told = next((name for name in group if roles.get(name) != "stem"), group[0])
        for name in group:
            found[name] = found[told]
    return found


def start(stages: int) -> Exponents:
    """The fixed rule."""
    step = (LAST / FIRST) ** (1 / max(1, stages - 1))
    return Exponents(STREAM, tuple(FIRST * step**i for i in range(stages)))


class Trial:
    """How far a network that was cut and refitted is from the dense one."""

    def __init__(
        self, network: nn.Module, refit: Reconstruction, held: Sequence[Tensor], dense: Sequence[Tensor], ridge: float
    ) -> None:
        """
        Args:
            network: with selection, at d = 1; it stays as it is.
            refit: of the dense network.
            held: images (B, 3, H, W) that the refit does not see.
            dense: the dense network's logits (B, K) on them.
        """
        self.network, self.refit, self.held, self.dense, self.ridge = network, refit, held, dense, ridge

    @torch.no_grad()
    def __call__(self, place: Callable[[nn.Module], None]) -> float:
        """KL(dense || cut) in nats per image, after ``place`` has chosen the channels of a copy."""
        cut = copy.deepcopy(self.network)
        place(cut)
        kept = settle(cut)
        self.refit(cut, ridge=self.ridge, channels=kept)
        cut.eval()
        total, images = 0.0, 0
        for x_BCHW, dense_BK in zip(self.held, self.dense, strict=True):
            ours, theirs = F.log_softmax(cut(x_BCHW).float(), 1), F.log_softmax(dense_BK.float(), 1)
            total += float(F.kl_div(ours, theirs, log_target=True, reduction="sum"))
            images += len(x_BCHW)
        return total / images


def balance(
    judge: Callable[[Exponents], float], stages: int, trials: int, told: Callable[[Exponents, float], None]
) -> Exponents:
    """Coordinate search from the fixed rule.

    Args:
        judge: what is to be small; infinite where the budget cannot be met this way.
        trials: how often it may be asked; 0: the fixed rule as it is.
        told: hears of every trial.
    """
    best, steps, places = start(stages), [STEP] * (stages + 1), range(stages, -1, -1)
    if trials < 1:
        return best
    lowest, asked = judge(best), 1
    told(best, lowest)
    while asked < trials and max(steps) > 1.03:
        for place in places:
            for factor in (steps[place], 1 / steps[place]):
                if asked >= trials:
                    return best
                tried = best.scaled(place, factor)
                value, asked = judge(tried), asked + 1
                told(tried, value)
                if value < lowest:
                    best, lowest = tried, value
                    break
            else:
                steps[place] **= 0.5
    return best


def allocation(exponents: Exponents, layers: Mapping[str, tuple[int, bool]]) -> Allocation:
    """The path of densities along t."""
    return lambda t: exponents.densities(t, layers)
