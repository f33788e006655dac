"""Signs: a scale that learns may pass through zero (ours).

::

    scale of a static channel:  sign * relu(gamma)           gamma learns, sign is a constant
    after each step, gamma < 0: sign <- -sign, gamma <- -gamma, and so with what the optimizer remembers of gamma

Why: a saliency is not negative, so a channel whose gamma had passed through zero was dead for good, its shift masked
with it and no gradient left to bring it back. Seen: 37 of the 136 channels of a shortcut after a training at 10x,
whose scales had begun near zero. A batch norm's scale passes through zero as it likes; so does this one now.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from afds.selection import gates


@torch.no_grad()
def pass_through_zero(network: nn.Module, moments: Mapping[Any, Mapping[str, Any]]) -> None:
    """Give the scales of static channels that have just become negative the other sign, in place.

    Args:
        moments: what the optimizer holds of each parameter: its first moments turn as well.
    """
    for gate in gates(network).values():
        turn_C = torch.where((gate.gamma < 0) & ~gate.dynamic, -1.0, 1.0)
        gate.gamma.mul_(turn_C)
        gate.sign.mul_(turn_C)
        for name in ("momentum_buffer", "exp_avg"):
            first = moments.get(gate.gamma, {}).get(name)
            if isinstance(first, Tensor):
                first.mul_(turn_C)
