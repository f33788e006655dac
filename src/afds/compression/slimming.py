"""Network Slimming: train with an L1 penalty on the batch norms' scales, cut the channels whose scale went to zero.

::

    L + lambda sum |gamma|  ---->  gammas sparse  ---->  one threshold for all layers  ---->  fine-tune

Liu, Li, Shen, Huang, Yan, Zhang, *Learning Efficient Convolutional Networks through Network Slimming*, ICCV 2017. The
sparse training is the fine-tuning that comes first (`TRANSFER+slimming` at 1x); lambda = 1e-4 as for their CIFAR and
ImageNet networks. Channels that a residual stream ties together go by their mean scale (torch-pruning); the paper
leaves the stream whole and skips channels at the entry of each block.
"""

from __future__ import annotations

from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from afds.transfer.base import Regulariser, Step


class Sparsity(Regulariser):
    """sum |gamma| over all batch norms."""

    name = "sparsity"

    def forward(self, step: Step) -> Tensor:
        return sum_of_scales(step.network)


def sum_of_scales(network: nn.Module) -> Tensor:
    scales = [m.weight.abs().sum() for m in network.modules() if isinstance(m, nn.BatchNorm2d) and m.affine]
    return torch.stack(scales).sum()


def importance() -> Any:
    """torch-pruning's score of a group of channels: the mean of abs(gamma), comparable between layers."""
    return tp.importance.BNScaleImportance(normalizer=None)
