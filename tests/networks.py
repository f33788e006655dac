"""Small networks of every supported family, with batch norms as a training may leave them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import timm
import torch
from timm.models.regnet import RegNet, RegNetCfg
from timm.models.vgg import VGG
from torch import nn

from afds.selection import gates

CLASSES = 5


def resnet_basic() -> nn.Module:
    return timm.create_model("resnet18", num_classes=CLASSES, layers=(1, 1, 1, 1), channels=(8, 16, 16, 24))


def resnet_bottleneck() -> nn.Module:
    return timm.create_model("resnet50", num_classes=CLASSES, layers=(1, 2, 1, 1), channels=(4, 4, 8, 8))


def seresnet() -> nn.Module:
    return timm.create_model("seresnet18", num_classes=CLASSES, layers=(1, 1, 1, 1), channels=(8, 16, 16, 24))


def vgg() -> nn.Module:
    cfg = [8, "M", 12, 16, "M", 16, "M"]
    model = VGG(cfg, num_classes=CLASSES, mlp_ratio=0.005, norm_layer=nn.BatchNorm2d)
    # timm's head has 4,096 features whatever the backbone's width: 13 million numbers that no test needs.
    model.pre_logits.fc2 = nn.Conv2d(model.pre_logits.fc1.out_channels, 24, 1)
    model.head.fc = nn.Linear(24, CLASSES)
    return model


def mobilenetv2() -> nn.Module:
    return timm.create_model("mobilenetv2_035", num_classes=CLASSES)


def mobilenetv3() -> nn.Module:
    return timm.create_model("mobilenetv3_small_050", num_classes=CLASSES)


def regnet(se_ratio: float = 0.25) -> nn.Module:
    cfg = RegNetCfg(w0=8, wa=10.0, wm=2.0, group_size=8, depth=5, se_ratio=se_ratio, stem_width=8)
    return RegNet(cfg, num_classes=CLASSES)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "resnet-basic": resnet_basic,
    "resnet-bottleneck": resnet_bottleneck,
    "seresnet": seresnet,
    "vgg": vgg,
    "mobilenetv2": mobilenetv2,
    "mobilenetv3": mobilenetv3,
    "regnetx": partial(regnet, se_ratio=0.0),
    "regnety": regnet,
}


def randomise_bn(model: nn.Module, seed: int = 0, *, zeros: float = 0.15, by_bias: bool = False) -> nn.Module:
    """Batch norms as hostile as a training may leave them: gammas of both signs and of zero, statistics.

    Args:
        zeros: share of the channels with gamma = 0; their beta is 0 as well.
        by_bias: half of these live by a beta that is not.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(n: int) -> torch.Tensor:
        return torch.rand(n, generator=generator)

    with torch.no_grad():
        for module in model.modules():
            if not isinstance(module, nn.BatchNorm2d):
                continue
            n = module.num_features
            zero = uniform(n) < zeros
            dead = zero if not by_bias else zero & (uniform(n) < 0.5)
            module.weight.copy_((0.2 + uniform(n)) * torch.where(uniform(n) < 0.25, -1.0, 1.0) * ~zero)
            module.bias.copy_(0.3 * torch.randn(n, generator=generator) * ~dead)
            module.running_mean.copy_(0.2 * torch.randn(n, generator=generator))
            module.running_var.copy_(0.5 + uniform(n))
    return model


def train_like(
    model: nn.Module, seed: int = 0, *, static: float = 0.3, pruned: float = 0.2, spread: float = 2.0
) -> nn.Module:
    """Give the gates of a selective network what a training would: weights, biases, statistics, masks.

    Args:
        static, pruned: share of the channels; at least one of each layer stays kept.
        spread: standard deviation of the predictors' weights.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(like: torch.Tensor, std: float) -> torch.Tensor:
        return std * torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like)

    def uniform(like: torch.Tensor) -> torch.Tensor:
        return torch.rand(like.shape, generator=generator, dtype=torch.float32)

    with torch.no_grad():
        for gate in gates(model).values():
            predictor = gate.predictor
            predictor.weight.copy_(normal(predictor.weight, spread))
            predictor.bias.add_(normal(predictor.bias, 0.3))
            gate.gamma.add_(normal(gate.gamma, 0.3))  # some fall below zero
            gate.importance.copy_(0.5 + uniform(gate.importance))
            gate.dynamic.copy_(uniform(gate.gamma) >= static)
            gate.kept.copy_(uniform(gate.gamma) >= pruned)
            gate.kept[0] = True
            if predictor.standardise is not None:
                predictor.standardise.running_mean.copy_(0.3 * uniform(predictor.standardise.running_mean))
                predictor.standardise.running_var.copy_(0.1 + uniform(predictor.standardise.running_var))
    return model
