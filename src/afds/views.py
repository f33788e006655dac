"""Two views of one image: a settled network may look at smaller images than its teacher (ours; an option).

::

    photo --> crop, flip --+--> side S -----> teacher --> logits, maps --> averaged to the small maps' size
                           |                                                     |
                           '--> side s < S --> network --> logits, maps ---------+--> loss

MACs go with s^2, so at s = 7/8 S a network keeps 1.3 times the channels' products for the same budget. The weights
start from the same dense network, which was fine-tuned at S; the least squares refit is made at s. The budget is stated
against the dense network at S, and so are all ratios. Not the default: with one density for all layers the network ends
nearer to its teacher where it sees the same images (docs/accuracy.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor


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
