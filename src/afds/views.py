"""Two views of one image: from some ratio on the settled network looks at smaller images than its teacher (ours).

::

    photo --> crop, flip --+--> side S -----> teacher --> logits, maps --> averaged to the small maps' size
                           |                                                     |
                           '--> side s < S --> network --> logits, maps ---------+--> loss

MACs go with s^2, so at s = 7/8 S a network keeps 1.3 times the channels' products for the same budget. Why: below a
quarter of the MACs, pixels are cheaper to lose than channels (docs/accuracy.md). The weights start from the same dense
network, which was fine-tuned at S; the least squares refit is made at s. The budget is stated against the dense network
at S, and so are all ratios.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

SHRINKS_FROM = 4.0  # ratio of MACs
SHARE = 7 / 8  # of the side
STEP = 16  # pixels: half of what a ResNet's last map stands for
SMALLEST = 96  # a side that is not made smaller


def side_for(ratio: float, side: int) -> int:
    """Side of the images, in pixels, that a settled network looks at by default."""
    if ratio < SHRINKS_FROM or side < SMALLEST:
        return side
    return min(side, STEP * round(SHARE * side / STEP))


def views_of(batch: Any) -> list[Tensor]:
    """The images (B, 3, H, W) of a batch: as the teacher sees them first, as the network does last; mostly the same."""
    return list(batch) if isinstance(batch, list | tuple) else [batch]


def averaged(features: Mapping[str, Tensor], sizes: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    """Feature maps (B, C, H, W) as means over the fields of a coarser grid, where ``sizes`` (H, W) name one."""
    return {
        name: F.adaptive_avg_pool2d(map_BCHW, sizes[name])
        if name in sizes and sizes[name] != tuple(map_BCHW.shape[2:])
        else map_BCHW
        for name, map_BCHW in features.items()
    }
