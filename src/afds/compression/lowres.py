"""The same network on smaller images: the competitor that needs no method at all.

MACs of a ConvNet fall about with the square of the side. The largest side whose counted MACs meet the budget is taken.
"""

from __future__ import annotations

import torch
from torch import nn

from afds.cost import CostMeter
from afds.errors import BudgetError, SourceError

SMALLEST = 16  # pixels


def macs_at(network: nn.Module, side: int) -> float:
    """Counted MACs of one image (3, side, side).

    Raises:
        SourceError: the network cannot run on so small an image.
    """
    image = torch.zeros(1, 3, side, side, device=next(network.parameters()).device)
    try:
        return CostMeter(network)(image)[1].counted
    except RuntimeError as error:
        raise SourceError(f"{type(network).__name__} cannot run on {side} x {side} images.") from error


def input_size_for(network: nn.Module, macs: float, largest: int) -> int:
    """The largest side up to ``largest`` that costs at most ``macs`` per image.

    Raises:
        BudgetError: 16 pixels still cost more.
    """
    if macs_at(network, largest) <= macs:
        return largest
    low, high = SMALLEST, largest
    if macs_at(network, low) > macs:
        raise BudgetError(f"{macs / 1e6:.1f} M MACs cannot be reached by smaller images: at {SMALLEST} pixels this "
                          f"network costs {macs_at(network, SMALLEST) / 1e6:.1f} M. Ask for less.")  # fmt: skip
    while high - low > 1:
        middle = (low + high) // 2
        if macs_at(network, middle) <= macs:
            low = middle
        else:
            high = middle
    return low
