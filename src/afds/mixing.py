"""Mixing the images of a batch: more to ask a teacher than the photos themselves.

::

    blend   x = share a + (1 - share) b                 mixup: Zhang et al., ICLR 2018
    paste   x = a with a rectangle of b, whose area     CutMix: Yun et al., ICCV 2019
            is 1 - share of the image

A teacher sees the same mixture (Beyer et al., *Knowledge distillation: A good teacher is patient and consistent*, CVPR
2022). share ~ Beta(alpha, alpha), one for the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from afds.config import OptimConfig


def mixture(views: Sequence[Tensor], optim: OptimConfig) -> tuple[list[Tensor], tuple[Tensor, float] | None]:
    """A step's images, mixed or not as the options and chance have it.

    Args:
        views: the batch (B, 3, H, W), in one size or several.
    Returns:
        The images in all sizes; where they are mixtures, the other image of each (B,) and the share of the first.
    """
    if optim.mixup <= 0 or len(views[0]) < 2 or float(torch.rand(())) >= optim.mixup_share:
        return list(views), None
    cut = optim.cutmix > 0 and float(torch.rand(())) < optim.cutmix
    mixed, other_B, share = (paste if cut else mix)(views, optim.mixup)
    return mixed, (other_B, share)


def mix(views: Sequence[Tensor], alpha: float) -> tuple[list[Tensor], Tensor, float]:
    """Each image blended with another of the batch.

    Args:
        views: the batch (B, 3, H, W), in one size or several.
    Returns:
        The blends in all sizes, the other image of each (B,), and the share of the first.
    """
    share, other_B = _draw(views, alpha)
    return [torch.lerp(x_BCHW[other_B], x_BCHW, share) for x_BCHW in views], other_B, share


def paste(views: Sequence[Tensor], alpha: float) -> tuple[list[Tensor], Tensor, float]:
    """Each image with a rectangle of another of the batch, at the same place.

    The rectangle has the image's proportions; its centre is drawn evenly, and what falls outside is lost, as published.
    Args:
        views: the batch (B, 3, H, W), in one size or several; its place is the same part of each.
    Returns:
        The mixtures in all sizes, the other image of each (B,), and the share that the first keeps in the last size.
    """
    share, other_B = _draw(views, alpha)
    half = 0.5 * (1 - share) ** 0.5
    y, x = torch.rand(2).tolist()
    out = []
    for x_BCHW in views:
        height, width = x_BCHW.shape[2:]
        rows = slice(round(max(0.0, y - half) * height), round(min(1.0, y + half) * height))
        columns = slice(round(max(0.0, x - half) * width), round(min(1.0, x + half) * width))
        mixed_BCHW = x_BCHW.clone(memory_format=torch.preserve_format)
        mixed_BCHW[:, :, rows, columns] = x_BCHW[other_B][:, :, rows, columns]
        share = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
        out.append(mixed_BCHW)
    return out, other_B, share


def _draw(views: Sequence[Tensor], alpha: float) -> tuple[float, Tensor]:
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    return share, torch.randperm(len(views[0]))
