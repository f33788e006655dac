"""From a budget to densities, and how the density falls.

A user states a budget; each layer needs a density. All layers' densities follow one number t in (0, 1] along an
allocation; the counted MACs grow with t, so t is found by bisection on *measured* cost: residual unions and
predictors depend on the images and on what the gates have learned, so no formula replaces the measurement.

::

    MACs  1 |=====.                      d = 1 | stages, each from the one before | final density
            |      '--.__                cost falls geometrically: every stage removes the same share
     budget |            '-----------
            0    start   end         1   share of the epochs
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from afds.config import DescentConfig
from afds.cost import CostMeter
from afds.errors import BudgetError
from afds.graph import unit_roles
from afds.selection import gates, set_density


@dataclass(frozen=True)
class Budget:
    """A bound on an image's cost: counted MACs, as a ratio to the dense network's or a number, or milliseconds."""

    text: str
    ratio: float | None = None
    macs: float | None = None
    ms: float | None = None

    def wanted_ratio(self, dense_macs: float) -> float:
        """How many times fewer MACs than ``dense_macs``.

        Raises:
            BudgetError: the dense network costs less than the budget already.
            ValueError: a latency, which only a stopwatch can turn into MACs (`afds.latency`).
        """
        if self.ms is not None:
            raise ValueError("a latency has no ratio of MACs until it is measured")
        if self.ratio is not None:
            return self.ratio
        assert self.macs is not None
        if self.macs >= dense_macs:
            raise BudgetError(f"The budget {self.text} is not below the dense network's {dense_macs / 1e9:.3f} GMACs "
                              "at this input size: use --budget 1x, or a smaller one.")  # fmt: skip
        return dense_macs / self.macs


def parse_budget(text: str) -> Budget:
    """Read `10x` (fewer MACs), `0.8G` or `800M` (MACs per image), or `8ms` (milliseconds per image, measured).

    Raises:
        BudgetError: anything else, or a ratio below 1.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(x|X|ms|([kMG])(?:MACs?)?)\s*", text)
    if not match:
        raise BudgetError(f"Cannot read the budget {text!r}: write a ratio of MACs such as 10x, MACs per image such "
                          "as 0.8G or 800M, or milliseconds per image such as 8ms.")  # fmt: skip
    value, unit = float(match[1]), match[3] or match[2].lower()
    if unit == "x":
        if value < 1:
            raise BudgetError(f"The budget {text!r} asks for more than the dense network: a ratio is 1x or more.")
        return Budget(text, ratio=value)
    if value <= 0:
        raise BudgetError(f"The budget {text!r} leaves nothing: give a number above 0.")
    if unit == "ms":
        return Budget(text, ms=value)
    return Budget(text, macs=value * {"k": 1e3, "M": 1e6, "G": 1e9}[unit])


Allocation = Callable[[float], dict[str, float]]


def uniform(model: nn.Module) -> Allocation:
    """One density for all layers (the paper)."""
    names = list(gates(model))
    return lambda t: dict.fromkeys(names, t)


SPARING = {"stem": 0.6, "shortcut": 0.6, "stream": 0.7, "inner": 1.3}


def sparing_stream(model: nn.Module) -> Allocation:
    """d = t ** e with a smaller e for what writes the residual stream (ours).

    Measured: the loss rises by 1.8 per factor e of MACs saved in the convolutions inside of blocks, by 2.8 in those
    that write the residual stream, by 4.8 in the stem (docs/accuracy-history.md).
    """
    roles = unit_roles(model)
    exponents = {name: SPARING[roles.get(name, "inner")] for name in gates(model)}
    return lambda t: {name: max(t**exponent, 1e-4) for name, exponent in exponents.items()}


Place = Callable[[nn.Module, dict[str, float]], None]
"""Puts densities into a network: `set_density`, or what chooses the channels at once."""

Spend = Callable[[nn.Module, dict[str, float], Callable[[], bool]], None]
"""Given the network, the densities that were found and whether the budget is met: spends what they leave of it."""


def solve(
    model: nn.Module,
    allocation: Allocation,
    ratio: float,
    batches: Sequence[Tensor],
    *,
    upper: float = 1.0,
    steps: int = 9,
    place: Place = set_density,
    spend: Spend | None = None,
    reference: float = 0.0,
) -> float:
    """Set the largest densities along ``allocation`` whose counted MACs are at most dense / ``ratio``.

    Args:
        batches: images (B, 3, H, W) on which the cost is counted.
        reference: MACs of the dense network that ``ratio`` is meant of; 0: this one's.
        upper, steps, place, spend: as of `search`, which says what comes back and what is raised.
    """

    meter = CostMeter(model, reference)

    def unreachable() -> str:
        cost = meter.mean(batches)
        return (f"A budget of {ratio:.4g}x cannot be reached: with one channel in every layer this network is "
                f"{cost.ratio:.4g}x cheaper ({cost.counted / 1e6:.1f} of {cost.dense / 1e6:.1f} M MACs). Ask for less, "
                "or take a network with a smaller head.")  # fmt: skip

    def met() -> bool:
        return meter.mean(batches).ratio >= ratio

    return search(model, allocation, met, unreachable, upper=upper, steps=steps, place=place, spend=spend)


def search(
    model: nn.Module,
    allocation: Allocation,
    met: Callable[[], bool],
    unreachable: Callable[[], str],
    *,
    upper: float = 1.0,
    steps: int = 9,
    place: Place = set_density,
    spend: Spend | None = None,
) -> float:
    """Set the largest densities along ``allocation`` at which the budget is ``met``, by halving log t.

    Args:
        met: whether the model, at its present densities, is within the budget.
        unreachable: what to say where one channel in every layer is still too dear.
        upper: do not look above this t: the density only falls.
        steps: halvings of the interval of log t.
        place: how densities are put into the model.
        spend: what is done with the budget that is left where no larger t meets it, as widths are rounded.
    Returns:
        t; the model's densities are set accordingly.
    Raises:
        BudgetError: one channel in every layer still costs more.
    """

    def reaches(t: float) -> bool:
        place(model, allocation(t))
        return met()

    if reaches(upper):
        return upper
    low, high = 1e-3, upper
    if not reaches(low):
        raise BudgetError(unreachable())
    for _ in range(steps):
        middle = (low * high) ** 0.5
        if reaches(middle):
            low = middle
        else:
            high = middle
    found = allocation(low)
    place(model, found)
    if spend is not None:
        spend(model, found, met)
    return low


# Densities are solved for on a few images and learn on: without a margin, half of all runs would end just above
# their budget, and taking channels away after the last step costs accuracy (seen: 3.6 points for 3 % of MACs).
MARGIN = 1.02


@dataclass(frozen=True)
class Descent:
    """When the density falls, in optimisation steps, and to what cost."""

    warm_end: int  # first step below d = 1
    stage_steps: tuple[int, ...]  # before each of these steps one stage is taken
    ratio: float  # where it ends
    settles: bool = False  # one stage, after which the cost no longer depends on the image

    def target(self, stage: int) -> float:
        """Ratio of MACs after stage 0, 1, ...: geometric, to a little below the budget (`MARGIN`)."""
        if self.settles:
            return self.ratio
        return (MARGIN * self.ratio) ** ((stage + 1) / len(self.stage_steps))


def plan_descent(total_steps: int, config: DescentConfig, ratio: float, *, settles: bool = False) -> Descent:
    """Spread the stages evenly over the steps between ``config.start`` and ``config.end`` of the training.

    settles: one stage before the first step.
    """
    if settles:
        return Descent(0, (0,), ratio, settles=True)
    first, last = round(config.start * total_steps), round(config.end * total_steps)
    stages = max(1, min(config.stages, last - first))
    steps = tuple(first + (last - first) * i // stages for i in range(stages))
    return Descent(first, steps, ratio)
