"""L2-SP: stay near the starting point, not near zero.

::

    Omega = alpha / 2 || w - w0 ||^2  (backbone)  +  beta / 2 || v ||^2  (classifier, by the optimizer's decay)

Li, Grandvalet, Davoine, *Explicit Inductive Bias for Transfer Learning with Convolutional Networks*, ICML 2018.
w0 are the pretrained weights, matched by name. Weight decay of the backbone is off. Ours: where channels have been
cut away, w0 is cut in the same places.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from afds.compression.widths import Kept, cut_tensor
from afds.transfer.base import Regulariser, Step


class NearStart(Regulariser):
    """Args: start: the weights w0, by name, without the classifier's."""

    name = "l2_sp"
    replaces_decay = True

    def __init__(self, weight: float, start: dict[str, Tensor]) -> None:
        super().__init__(weight)
        self.whole = start
        self.start = dict(start)

    def forward(self, step: Step) -> Tensor:
        return l2_sp(step.network, self.start)

    def cut(self, kept: Kept) -> None:
        self.start = {name: cut_tensor(name, tensor, kept) for name, tensor in self.whole.items()}


def l2_sp(model: nn.Module, start: dict[str, Tensor]) -> Tensor:
    """Half the squared distance of the weights from where they started, by name."""
    total = torch.zeros(())
    for name, parameter in model.named_parameters():
        if name in start:
            total = total.to(parameter.device) + (parameter - start[name].to(parameter.device)).square().sum()
    return total / 2
