"""Which units a network has, who leads a depthwise one, where its stages end, and who is refused."""

from __future__ import annotations

import pytest
import timm
from torch import nn

from afds.errors import SourceError
from afds.graph import convbn_units, stage_ends, unit_roles
from afds.selection import select, selective_units
from networks import FAMILIES, resnet_basic


def test_resnet_units_are_stem_blocks_and_shortcuts() -> None:
    units = convbn_units(resnet_basic())
    assert [u.name for u in units] == [
        "conv1",
        "layer1.0.conv1", "layer1.0.conv2", "layer1.0.downsample.0",
        "layer2.0.conv1", "layer2.0.conv2", "layer2.0.downsample.0",
        "layer3.0.conv1", "layer3.0.conv2", "layer3.0.downsample.0",
        "layer4.0.conv1", "layer4.0.conv2", "layer4.0.downsample.0",
    ]  # fmt: skip
    assert {u.name: u.norm for u in units}["layer2.0.downsample.0"] == "layer2.0.downsample.1"
    assert not any(u.depthwise or u.leaders for u in units)


def test_every_batch_norm_belongs_to_exactly_one_unit(family: nn.Module) -> None:
    norms = [name for name, module in family.named_modules() if isinstance(module, nn.BatchNorm2d)]
    units = convbn_units(family)
    assert sorted(u.norm for u in units) == sorted(norms)
    assert len({u.name for u in units}) == len(units)
    for unit in units:
        conv, norm = family.get_submodule(unit.name), family.get_submodule(unit.norm)
        assert isinstance(conv, nn.Conv2d)
        assert conv.out_channels == norm.num_features


def test_depthwise_units_follow_the_unit_before_them() -> None:
    units = {u.name: u for u in convbn_units(FAMILIES["mobilenetv2"]())}
    assert {u.name for u in units.values() if u.depthwise} == {n for n in units if n.endswith("conv_dw")}
    assert units["blocks.0.0.conv_dw"].leaders == ("conv_stem",)  # no expansion: the stem's channels come
    assert units["blocks.1.0.conv_dw"].leaders == ("blocks.1.0.conv_pw",)
    assert units["blocks.1.0.conv_pw"].leaders == ()


class ResidualThenDepthwise(nn.Module):
    """x -> a + b -> depthwise -> + a -> depthwise: two and then three units arrive."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.a_bn = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
        self.b, self.b_bn = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.dw, self.dw_bn = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.BatchNorm2d(6)
        self.dw2, self.dw2_bn = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.BatchNorm2d(6)
        self.act, self.fc = nn.ReLU(), nn.Linear(6, 2)

    def forward(self, x):
        a = self.act(self.a_bn(self.a(x)))
        x = self.act(self.b_bn(self.b(a)) + a)
        x = self.dw_bn(self.dw(x))
        x = self.dw2_bn(self.dw2(self.act(x) + a))
        return self.fc(x.mean((2, 3)))


def test_depthwise_leaders_through_residual_sums() -> None:
    units = {u.name: u for u in convbn_units(ResidualThenDepthwise())}
    assert units["dw"].depthwise
    assert sorted(units["dw"].leaders) == ["a", "b"]
    assert sorted(units["dw2"].leaders) == ["a", "dw"]


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("resnet-basic", [f"layer{i}.0.conv2" for i in (1, 2, 3, 4)]),
        ("resnet-bottleneck", ["layer1.0.conv3", "layer2.1.conv3", "layer3.0.conv3", "layer4.0.conv3"]),
        ("vgg", ["features.7", "features.11"]),  # the first stage is the stem's one convolution
        ("mobilenetv2", ["blocks.0.0.conv_pw", "blocks.1.1.conv_pwl", "blocks.2.2.conv_pwl",
                         "blocks.4.2.conv_pwl", "blocks.6.0.conv_pwl"]),
        ("mobilenetv3", ["blocks.0.0.conv_pw", "blocks.1.1.conv_pwl", "blocks.3.1.conv_pwl",
                         "blocks.5.0.conv"]),
    ],
)  # fmt: skip
def test_stage_ends(name: str, ends: list[str]) -> None:
    model = FAMILIES[name]()
    units = [u.name for u in convbn_units(model)]
    assert stage_ends(model, units) == ends
    selected = select(model)
    assert stage_ends(selected, [n for n, _ in selective_units(selected)]) == ends


@pytest.mark.parametrize("name", ["regnetx", "regnety"])
def test_stage_ends_of_regnet_are_the_last_convolution_of_each_stage(name: str) -> None:
    model = FAMILIES[name]()
    stages = [f"s{i}" for i in range(1, 5) if hasattr(model, f"s{i}")]
    last = [f"{s}.{[n for n, _ in getattr(model, s).named_children()][-1]}.conv3.conv" for s in stages]
    assert stage_ends(model, [u.name for u in convbn_units(model)]) == last


def test_stage_ends_need_feature_info() -> None:
    with pytest.raises(SourceError, match=r"ResidualThenDepthwise.*feature_info"):
        stage_ends(ResidualThenDepthwise(), ["a"])


@pytest.mark.parametrize(
    ("arch", "reason"),
    [
        ("densenet121", r"DenseNet: the batch norm features\.denseblock1\.denselayer1\.norm1"),
        ("convnext_atto", r"ConvNeXt: .* is a LayerNorm"),
        ("resnet50_gn", r"ResNet: bn1 is a GroupNorm"),
        ("resnetv2_50", r"ResNetV2: the batch norm stages\.0\.blocks\.0\.norm1"),
        ("repvgg_a0", r"ByobNet: the batch norm stages\.0\.1\.identity"),
        ("vgg11", "VGG: no convolution followed by a batch norm"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(arch: str, reason: str) -> None:
    small = {"vgg11": {"mlp_ratio": 0.01}}.get(arch, {})
    with pytest.raises(SourceError, match=reason):
        select(timm.create_model(arch, num_classes=2, **small))


class Net(nn.Module):
    def __init__(self, norm: nn.Module, *, twice: bool = False, fork: bool = False) -> None:
        super().__init__()
        self.conv, self.norm, self.norm2 = nn.Conv2d(3, 3, 1), norm, nn.BatchNorm2d(3)
        self.twice, self.fork = twice, fork

    def forward(self, x):
        y = self.conv(x)
        z = self.norm(y)
        if self.fork:
            z = z + y
        if self.twice:
            z = self.norm2(self.conv(z))
        return z


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (Net(nn.BatchNorm2d(3), twice=True), "conv is used twice"),
        (Net(nn.BatchNorm2d(3), fork=True), "norm does not directly follow"),
        (Net(nn.BatchNorm2d(3, affine=False)), "norm has no affine part"),
        (Net(nn.BatchNorm2d(3, track_running_stats=False)), "running statistics"),
        (Net(nn.InstanceNorm2d(3)), "norm is a InstanceNorm2d"),
    ],
)
def test_units_that_cannot_be_replaced_are_refused(net: nn.Module, reason: str) -> None:
    with pytest.raises(SourceError, match=reason):
        convbn_units(net)


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.conv(x)) if x.sum() > 0 else x


def test_a_forward_that_depends_on_its_data_is_refused() -> None:
    with pytest.raises(SourceError, match="DataDependent: its forward cannot be read"):
        convbn_units(DataDependent())


def test_what_writes_a_stream_through_a_channel_attention_is_known() -> None:
    roles = unit_roles(FAMILIES["seresnet"]())
    assert [name for name, role in roles.items() if role == "stream"] == [f"layer{i}.0.conv2" for i in (1, 2, 3, 4)]
