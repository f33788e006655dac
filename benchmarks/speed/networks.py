"""Networks with random weights that cost what trained ones do: for timing, which depends on shapes and not on values.

::

    dense      as timm builds it; batch norms have seen an image, so that features are alive
    settled    one set of channels for all images, the rest cut away, scales predicted (`--descent.scales predicted`)
    low_rank   the same with `--selection.predictor low-rank`
    cheap      today's default: the same with predictors of 3 x 3 convolutions only, other scales constants
    learned    the same with `--descent.scales learned`: scales are constants, no predictors
    choosing   `--descent.no-settle`, the paper's way: every image has winners of its own
    choosing8  the same with `--selection.group 8`; choosing16 likewise
"""

from __future__ import annotations

import afds  # first: it makes torchvision importable beside a CPU-only torch

# isort: split
import timm
import torch
from torch import Tensor, nn

from afds.cost import CostMeter
from afds.schedule import solve, uniform
from afds.selection import SelectionConfig, gates, round_predictors
from afds.settling import Winners, fix_scales, settle, tied_units

CLASSES = 101


def dense(arch: str, size: int) -> nn.Module:
    """Eval mode; ``size``: pixels, a side of the square image."""
    torch.manual_seed(0)
    model = timm.create_model(arch, num_classes=CLASSES)
    _see(model, size)
    return model


def choosing(
    model: nn.Module, ratio: float, x_BCHW: Tensor, predictor: str = "full", group: int = 1
) -> tuple[nn.Module, float]:
    """Selection at uniform densities that cost 1 / ``ratio``, and the ratio counted on ``x_BCHW``."""
    selective = afds.select(model, SelectionConfig(predictor=predictor, group=group)).eval()  # type: ignore[arg-type]
    _let_learn(selective, std=0.1)
    _see(selective, x_BCHW.shape[-1])  # or pooled inputs are not standardised, and half of deep networks never wins
    solve(selective, uniform(selective), ratio, [x_BCHW])
    return selective, CostMeter(selective).mean([x_BCHW]).ratio


def choosing8(model: nn.Module, ratio: float, x_BCHW: Tensor, predictor: str = "full") -> tuple[nn.Module, float]:
    """As `choosing`, eight neighbouring channels at a time."""
    return choosing(model, ratio, x_BCHW, predictor, group=8)


def choosing16(model: nn.Module, ratio: float, x_BCHW: Tensor, predictor: str = "full") -> tuple[nn.Module, float]:
    """As `choosing`, sixteen neighbouring channels at a time."""
    return choosing(model, ratio, x_BCHW, predictor, group=16)


def settled(model: nn.Module, ratio: float, x_BCHW: Tensor, predictor: str = "full") -> tuple[nn.Module, float]:
    """One density for all layers, as in `fit`, channels drawn at random, the rest cut away."""
    selective = afds.select(model, SelectionConfig(predictor=predictor)).eval()  # type: ignore[arg-type]
    return _settle(selective, ratio, x_BCHW)


def low_rank(model: nn.Module, ratio: float, x_BCHW: Tensor, predictor: str = "") -> tuple[nn.Module, float]:
    """As `settled`, each predictor of an eighth of the rank that its width allows."""
    return settled(model, ratio, x_BCHW, "low-rank")


def cheap(model: nn.Module, ratio: float, x_BCHW: Tensor, predictor: str = "full") -> tuple[nn.Module, float]:
    """As `settled`, without predictors where they are not cheap."""
    selective = afds.select(model).eval()
    fix_scales(selective, list, but_cheap=True)
    return _settle(selective, ratio, x_BCHW)


def learned(model: nn.Module, ratio: float, x_BCHW: Tensor, predictor: str = "full") -> tuple[nn.Module, float]:
    """As `settled`, without predictors; what they would have cost goes into width."""
    selective = afds.select(model).eval()
    fix_scales(selective, list)
    return _settle(selective, ratio, x_BCHW)


def _settle(selective: nn.Module, ratio: float, x_BCHW: Tensor) -> tuple[nn.Module, float]:
    worth = {name: torch.rand_like(gate.importance) for name, gate in gates(selective).items()}
    winners = Winners(worth, tied_units(selective), 8)
    solve(selective, uniform(selective), ratio, [x_BCHW], place=winners.place, spend=winners.spend)
    settle(selective)
    _let_learn(selective, std=0.003)  # all that is left is computed, as in trained networks
    _see(selective, x_BCHW.shape[-1])
    return selective, CostMeter(selective).mean([x_BCHW]).ratio


def _let_learn(selective: nn.Module, std: float) -> None:
    for gate in gates(selective).values():
        nn.init.normal_(gate.predictor.weight, std=std)
    round_predictors(selective)  # as `fit` does


@torch.no_grad()
def _see(model: nn.Module, size: int) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            if module.affine:
                nn.init.ones_(module.weight)
            module.momentum = None
            module.reset_running_stats()
    model.train()(torch.randn(2, 3, size, size))
    model.eval()
