"""A budget in milliseconds: densities are searched with a stopwatch in place of the MACs counter (ours).

::

    network at densities d(t) --> compacted copy --> runtime, threads --> ms of one image a call
             ^                                                               |
             '---- halve log t: the largest t with  ms <= asked  <-----------'

Time depends on how many channels win, hardly on which, so the search needs no trained weights: once before training
(what ratio of MACs the milliseconds come to, for the stages of the descent), once at the last stage (its own densities)
and once at the end (the trained network; densities go down a little where it takes longer).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from afds.compaction import deployable
from afds.config import LatencyConfig
from afds.cost import CostMeter, has_selection
from afds.errors import BudgetError, ConfigError
from afds.hardware import usable_cores
from afds.runtimes import OPENERS, check_runtime
from afds.schedule import Allocation, Place, Spend, search
from afds.selection import set_density

WARM_UP = 3  # calls before the first that counts
GROUPS = 5
IMAGES = 8  # different images that the calls go through
STEPS = 7  # halvings of log t: the last ones change the time by less than it scatters
AIM = 0.97  # of the milliseconds: what is measured again later must not be above them


class Stopwatch:
    """Milliseconds of one image through a network, in one runtime with a fixed number of threads."""

    def __init__(self, images: Sequence[Tensor], classes: int, config: LatencyConfig) -> None:
        """
        Args:
            images: batches (B, 3, H, W); their first `IMAGES` images are used.
        Raises:
            ConfigError: the runtime is not installed, or there are not so many cores.
        """
        check_runtime(config.runtime)
        cores = usable_cores()
        if config.threads > cores:
            raise ConfigError(f"--latency.threads {config.threads}: there are {cores} cores for this process.")
        x_BCHW = torch.cat([batch.cpu() for batch in images])[:IMAGES].contiguous().float()
        self.images = [np.ascontiguousarray(x_BCHW[i : i + 1].numpy()) for i in range(len(x_BCHW))]
        self.classes, self.config = classes, config

    def __call__(self, network: nn.Module) -> float:
        """The median of the quietest of `GROUPS` groups of calls, at the network's present densities.

        Ours: on an idle machine that is the median; where other work passes by, a plain median would blame the network.
        """
        c, side = self.config, self.images[0].shape[-1]
        copied = copy.deepcopy(network).to("cpu", memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
        before = torch.get_num_threads()
        torch.set_num_threads(c.threads)
        try:
            served = deployable(copied)
            form = "dynamic" if has_selection(served) else "static"
            predict = OPENERS[c.runtime](served, form, side, self.classes, c.threads)
            seconds = []
            for i in range(WARM_UP + c.calls):
                begun = time.perf_counter()
                predict(self.images[i % len(self.images)])
                seconds.append(time.perf_counter() - begun)
            groups = np.array_split(np.array(seconds[WARM_UP:]), GROUPS)
        finally:
            torch.set_num_threads(before)
        return 1e3 * min(float(np.median(group)) for group in groups)

    def describe(self) -> str:
        """Runtime and threads, in words."""
        c = self.config
        return f"{c.runtime}, {c.threads} thread{'s' if c.threads > 1 else ''}, one image a call"


def solve_latency(
    network: nn.Module, allocation: Allocation, ms: float, watch: Stopwatch, *, place: Place = set_density,
    spend: Spend | None = None,
) -> float:  # fmt: skip
    """Set the largest densities along ``allocation`` at which an image takes at most ``AIM * ms``.

    Args:
        place, spend: as of `search`.
    Returns:
        t of the allocation; the network's densities are set accordingly.
    Raises:
        BudgetError: one channel in every layer still takes longer.
    """

    def unreachable() -> str:
        return (f"A budget of {ms:.4g}ms cannot be reached: with one channel in every layer this network takes "
                f"{watch(network):.3g} ms here ({watch.describe()}). Ask for less, take smaller images or a smaller "
                "network.")  # fmt: skip

    return search(network, allocation, lambda: watch(network) <= AIM * ms, unreachable, steps=STEPS, place=place,
                  spend=spend)  # fmt: skip


def ratio_for(
    network: nn.Module, allocation: Allocation, place: Place, ms: float, watch: Stopwatch, probe: Sequence[Tensor],
    reference: float = 0.0, *, spend: Spend | None = None,
) -> float:  # fmt: skip
    """The ratio of MACs that ``ms`` comes to on this machine, along ``allocation``; the model stays there.

    Args:
        reference: MACs of the dense network that the ratio is meant of; 0: this one's.
        place, spend: as of `search`.
    Raises:
        BudgetError: out of reach; or the network with all its channels is within the budget.
    """
    t = solve_latency(network, allocation, ms, watch, place=place, spend=spend)
    if t >= 1:
        raise BudgetError(f"The budget {ms:.4g}ms leaves nothing to do: with all channels this network takes less "
                          f"here ({watch.describe()}). Use --budget 1x, or ask for fewer milliseconds.")  # fmt: skip
    return CostMeter(network, reference).mean(probe).ratio
