"""Small networks of every supported family, with batch norms as a training may leave them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import timm
import torch
from timm.models.regnet import RegNet, RegNetCfg
from timm.models.vgg import VGG
from torch import nn

CLASSES = 5


def resnet_basic() -> nn.Module:
    return timm.create_model("resnet18", num_classes=CLASSES, layers=(1, 1, 1, 1), channels=(8, 16, 16, 24))


def resnet_bottleneck() -> nn.Module:
    return timm.create_model("resnet50", num_classes=CLASSES, layers=(1, 2, 1, 1), channels=(4, 4, 8, 8))


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
    "vgg": vgg,
    "mobilenetv2": mobilenetv2,
    "mobilenetv3": mobilenetv3,
    "regnetx": partial(regnet, se_ratio=0.0),
    "regnety": regnet,
}


def randomise_bn(model: nn.Module, seed: int = 0, *, by_bias: bool = False) -> nn.Module:
    """Batch norms as hostile as a training may leave them: gammas of both signs and of zero, betas, statistics.

    Args:
        by_bias: some of the channels with gamma = 0 live by their beta. (Selection keeps these at a saliency of
            1e-6, so equality with the plain network then holds to about 1e-5 only.)
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(n: int) -> torch.Tensor:
        return torch.rand(n, generator=generator)

    with torch.no_grad():
        for module in model.modules():
            if not isinstance(module, nn.BatchNorm2d):
                continue
            n = module.num_features
            zero = uniform(n) < 0.15
            dead = zero if not by_bias else zero & (uniform(n) < 0.5)
            module.weight.copy_((0.2 + uniform(n)) * torch.where(uniform(n) < 0.25, -1.0, 1.0) * ~zero)
            module.bias.copy_(0.3 * torch.randn(n, generator=generator) * ~dead)
            module.running_mean.copy_(0.2 * torch.randn(n, generator=generator))
            module.running_var.copy_(0.5 + uniform(n))
    return model
