"""AFD as a regulariser: the equations and the attention network are in `distillation.py`."""

from __future__ import annotations

from torch import Tensor

from afds.distillation import AttentiveDistillation
from afds.transfer.base import Regulariser, Step


class AttentiveTransfer(Regulariser):
    """Args: afd: the loss and its attention networks, which learn with the target."""

    name = "afd"

    def __init__(self, weight: float, afd: AttentiveDistillation) -> None:
        super().__init__(weight, units=afd.names)
        self.afd = afd

    def forward(self, step: Step) -> Tensor:
        loss, self.facts = self.afd(step.features, self._teacher(step))
        return loss
