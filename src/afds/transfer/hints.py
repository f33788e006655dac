"""Hints: match the output of every residual block with the fine-tuned dense network's (ours).

::

    mean over blocks of || F_b - F*_b ||^2 / || F*_b ||^2

After FitNets (Romero et al., ICLR 2015), without a regressor, as both networks are one architecture: the logits
alone say too little to each of many layers that have just lost most of their channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from afds.compression.widths import Kept
from afds.transfer.base import Regulariser, Step


class BlockHints(Regulariser):
    """Args: writers: for each residual block, the unit that writes its output, whose channels are the block's."""

    name = "hints"

    def __init__(self, weight: float, writers: dict[str, str]) -> None:
        super().__init__(weight, blocks=tuple(writers))
        self.writers = writers

    def forward(self, step: Step) -> Tensor:
        return block_hints(step.features, self._teacher(step), self.blocks)

    def cut(self, kept: Kept) -> None:
        self.channels = {block: kept[unit].out for block, unit in self.writers.items() if unit in kept}


def block_hints(target: Mapping[str, Tensor], teacher: Mapping[str, Tensor], blocks: Sequence[str]) -> Tensor:
    """Mean relative squared error of the feature maps (B, C, H, W) of ``blocks``."""
    total = torch.zeros(())
    for name in blocks:
        wanted = teacher[name].float()
        total = total.to(wanted.device) + (
            target[name].float() - wanted
        ).square().sum() / wanted.square().sum().clamp_min(1e-6)
    return total / max(1, len(blocks))
