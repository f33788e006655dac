"""Fixtures that all tests share; the networks themselves are in `networks.py`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import afds  # noqa: F401  first of all: it makes torchvision, and with it timm, importable

# isort: split
import hypothesis
import pytest
import torch
from torch import nn

from afds import hardware
from networks import FAMILIES, mobilenetv2, randomise_bn, resnet_basic, resnet_bottleneck, vgg

hypothesis.settings.register_profile("afds", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("afds")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _one_precision() -> Iterator[None]:
    """`auto` asks a stopwatch, which a busy machine can answer differently for two runs of one test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "_bf16_speedup", lambda: 1.0)
        yield


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> nn.Module:
    """One network of each supported family, in eval mode, with random batch norms."""
    torch.manual_seed(0)
    return randomise_bn(FAMILIES[request.param]()).eval()


@pytest.fixture
def tiny_resnet() -> nn.Module:
    torch.manual_seed(0)
    return randomise_bn(resnet_basic()).eval()


@pytest.fixture
def tiny_bottleneck() -> nn.Module:
    torch.manual_seed(0)
    return randomise_bn(resnet_bottleneck()).eval()


@pytest.fixture
def tiny_vgg() -> nn.Module:
    torch.manual_seed(0)
    return randomise_bn(vgg()).eval()


@pytest.fixture
def tiny_mobilenet() -> nn.Module:
    torch.manual_seed(0)
    return randomise_bn(mobilenetv2()).eval()


@pytest.fixture
def afds_data() -> Path:
    """The folder of real weights and photos."""
    folder = os.environ.get("AFDS_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("AFDS_DATA is not set to the folder of real weights and photos")
    return Path(folder)
