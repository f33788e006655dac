"""Batch norm statistics, measured anew."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def reestimate_norms(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], count: int) -> None:
    """Measure the statistics of all batch norms anew, as plain means over ``count`` batches of images.

    Ours: with other channels active in every image the running averages of the last steps are noisy.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's word for a cumulative mean
        norm.train()
    for x_BCHW, _ in itertools.islice(batches, count):
        network(x_BCHW.contiguous(memory_format=torch.channels_last))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
