"""Logits and MACs from the native kernels, in the shape in which `afds.cost` gives them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from afds.cost import Cost, CostMeter, LayerCost
from afds.runtime.executor import Executor


class ExecutedMacs:
    """Runs an executor as `CostMeter` runs a network. The MACs are those that were executed, as one layer: `network`.

    Args:
        executor: of `model`.
        model: the network itself, which tells what dense costs.
        reference: MACs of the network that it is compared with; 0: itself, dense.
    """

    def __init__(self, executor: Executor, model: nn.Module, reference: float = 0.0) -> None:
        self.executor = executor
        self.reference = reference
        plan = executor.plan
        self._dense = CostMeter(model)(torch.zeros(1, plan.channels, plan.height, plan.width))[1].dense

    def __call__(self, x_BCHW: Tensor) -> tuple[Tensor, Cost]:
        """Logits (B, classes), and the cost of this batch."""
        logits_BK, macs_B = self.executor.counted(x_BCHW.numpy())
        layer = LayerCost(dense=self._dense, conv=float(macs_B.mean()))
        return torch.from_numpy(logits_BK), Cost({"network": layer}, len(macs_B), self.reference)
