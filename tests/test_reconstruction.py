"""The refit after channels were taken: exact where it can be, better where it cannot, harmless where nothing went."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import Conv2dSame
from torch import Tensor, nn

from afds.graph import convbn_units
from afds.reconstruction import Reconstruction, gram, patches
from afds.selection import gates, select, set_density
from networks import randomise_bn
from runs import ARCH_ARGS, tiny_network


def images(count: int = 48, size: int = 32) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(16, 3, size, size) for _ in range(count // 16)]


def settled(model: nn.Module) -> nn.Module:
    """Batch norm statistics as they are on these images, so that nothing is left to correct at d = 1."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
        norm.reset_running_stats()
    with torch.no_grad():
        model.train()
        for x in images():
            model(x)
    return model.eval()


@given(rows=st.integers(1, 9), columns=st.integers(1, 40), least=st.integers(1, 5))
def test_gram_is_the_product(rows: int, columns: int, least: int) -> None:
    x_ND = torch.randn(rows, columns, dtype=torch.double)
    torch.testing.assert_close(gram(x_ND, least=least), x_ND.t() @ x_ND)


def test_nothing_went_nothing_changes() -> None:
    model = select(settled(tiny_network(selection=None, **ARCH_ARGS)))
    before = copy.deepcopy(model.state_dict())
    Reconstruction(copy.deepcopy(model), images())(model)
    for name, value in model.state_dict().items():
        if name.endswith("conv.weight"):
            assert (value - before[name]).norm() < 0.1 * before[name].norm()


@pytest.mark.parametrize("size", [(9, 12), (8, 11), (7, 7)])
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(2, 3, 3, stride=2, padding=1),
        nn.Conv2d(2, 3, (3, 4), padding="same", dilation=2),
        nn.Conv2d(2, 3, 3, stride=2, padding="valid"),
        Conv2dSame(2, 3, 3, stride=2),
        Conv2dSame(2, 3, 5, stride=2),
        Conv2dSame(2, 3, 3),
    ],
)
def test_patches_are_what_a_convolution_sees(conv: nn.Conv2d, size: tuple[int, int]) -> None:
    x_BCHW = torch.randn(2, 2, *size)
    with torch.no_grad():
        y_BCHW = conv(x_BCHW)
        x_BPD = torch.stack(list(patches(conv, x_BCHW, torch.arange(y_BCHW[0, 0].numel()))), 1)
        seen = x_BPD @ conv.weight.flatten(1).t() + conv.bias
    torch.testing.assert_close(seen.transpose(1, 2).reshape(y_BCHW.shape), y_BCHW)


class Twins(nn.Module):
    """The second half of conv1's channels says what the first half says: half of them are enough."""

    feature_info: tuple[()] = ()

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 6, 3, padding=1, stride=2), nn.BatchNorm2d(6)
        randomise_bn(self, zeros=0.0)
        with torch.no_grad():
            for module in (self.conv1, self.bn1):
                for value in module.state_dict().values():
                    if value.ndim:
                        value[4:] = value[:4]

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x)).mean((2, 3))


def test_exact_where_the_rest_can_say_it() -> None:
    torch.manual_seed(0)
    plain = settled(Twins())
    assert len(convbn_units(plain)) == 2
    model, reference = select(plain).eval(), select(plain).eval()
    gate = gates(model)["conv1"]
    gate.importance.copy_(torch.tensor([1.0] * 4 + [1e-3] * 4))  # the first of each pair wins
    set_density(model, {"conv1": 0.5})
    x = torch.cat(images())
    with torch.no_grad():
        wanted, cut = reference(x), model(x)
        left = Reconstruction(reference, images())(model, ridge=1e-6)
        refitted = model(x)
    assert (cut - wanted).abs().max() > 0.05
    # Not to the last digit: the statistics of conv1's norm are measured on these images, and a ReLU follows.
    assert (refitted - wanted).norm() < 0.1 * (cut - wanted).norm()
    assert left["conv2"][1] < 0.05 < left["conv2"][0]


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "mobilenetv2_050"])
def test_nearer_to_the_reference_than_before(arch: str) -> None:
    args = ARCH_ARGS if arch.startswith("resnet") else {}
    plain = settled(tiny_network(selection=None, arch=arch, **args))
    model, reference = select(plain).eval(), select(plain).eval()
    set_density(model, 0.6)
    x = torch.cat(images())
    with torch.no_grad():
        wanted = reference(x)
        before = (model(x) - wanted).square().mean()
        statistics_alone = settled(copy.deepcopy(model))
        middle = (statistics_alone(x) - wanted).square().mean()
        reference_state = copy.deepcopy(reference.state_dict())
        Reconstruction(reference, images())(model)
        after = (model(x) - wanted).square().mean()
    assert after < 0.8 * before
    assert after < middle  # more than what measuring batch norm anew gives
    for name, value in reference.state_dict().items():
        assert torch.equal(value, reference_state[name])


def test_batches_of_several_sizes_are_one_set_of_images() -> None:
    """Depthwise units follow what was chosen for their own batch, whichever batch ran last.

    In double: in single precision, the order of a sum can change an image's last winner, and with it the logits.
    """
    reference = select(settled(tiny_network(selection=None, arch="mobilenetv2_050"))).eval().double()
    x_BCHW, found = torch.cat(images())[:11].double(), []
    for sizes in ((11,), (4, 4, 3), (8, 3)):
        network = copy.deepcopy(reference)
        for gate in gates(network).values():
            torch.manual_seed(1)
            torch.nn.init.normal_(gate.predictor.weight, std=0.3)
        set_density(network, 0.4)
        Reconstruction(reference, x_BCHW.split(list(sizes)))(network)
        found.append(network(x_BCHW).detach())
    for logits_BC in found[1:]:
        torch.testing.assert_close(logits_BC, found[0], rtol=1e-8, atol=1e-8)


def test_all_dead_layers_are_left_alone() -> None:
    model = select(tiny_network(selection=None, **ARCH_ARGS)).eval()
    reference = copy.deepcopy(model)
    first = next(iter(gates(model).values()))
    first.kept.fill_(False)
    Reconstruction(reference, images(16))(model)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_mode_is_restored() -> None:
    model = select(tiny_network(selection=None, **ARCH_ARGS)).train()
    reference = copy.deepcopy(model).eval()
    set_density(model, 0.5)
    Reconstruction(reference, images(16))(model)
    assert model.training
    assert not reference.training
