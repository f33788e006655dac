"""Colours that vary: one affine map of the pixels' three channels, drawn anew for each image.

::

    x' = clamp(c M x + (1 - c) mean grey),      M = b (s R + (1 - s) 1 w')

    b brightness, c contrast, s saturation from 1 - colour to 1 + colour; R turns the hue by up to a tenth of a turn at
    colour 0.4; w are the weights of grey (Rec. 601), which R leaves as it is. One image in ten is made grey (s = 0).

The strengths of SimCLR (Chen et al., ICML 2020) with half its share of grey images. What hue and grey are worth to a
network that has been cut: docs/accuracy.md.

Why not torchvision's: it turns hues through HSV, which takes five times as long as everything else that is done to a
decoded photo. In YIQ a turn of the hue is linear, and so the four jitters are one product.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_TO_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
_GREY = _TO_YIQ[0]


class Colours(nn.Module):
    """Args: colour: strength, from 0 to 1. Draws from torch's global generator, as often for every image size."""

    def __init__(self, colour: float) -> None:
        super().__init__()
        self.colour = colour

    def forward(self, x_3HW: Tensor) -> Tensor:
        """x_3HW: RGB from 0 to 1. Returns the same with other colours."""
        brightness, contrast, saturation, hue, grey = torch.rand(5).tolist()
        brightness, contrast, saturation = (1 + self.colour * (2 * u - 1) for u in (brightness, contrast, saturation))
        if grey < self.colour / 4:
            saturation = 0.0
        return vary(x_3HW, brightness, contrast, saturation, turn=self.colour / 4 * (2 * hue - 1))


def vary(x_3HW: Tensor, brightness: float, contrast: float, saturation: float, turn: float) -> Tensor:
    """x_3HW with the first three multiplied, 1 leaving it as it is, and its hues moved by ``turn`` of a circle."""
    c, s = math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)
    turned = torch.linalg.solve(_TO_YIQ, torch.tensor([[1, 0, 0], [0, c, s], [0, -s, c]]) @ _TO_YIQ)
    mixed = brightness * (saturation * turned + (1 - saturation) * _GREY.expand(3, 3))
    shift = (1 - contrast) * brightness * (_GREY @ x_3HW.mean((1, 2)))
    out = torch.addmm(shift.expand(3, 1), contrast * mixed, x_3HW.flatten(1))
    return out.clamp_(0, 1).view_as(x_3HW)
