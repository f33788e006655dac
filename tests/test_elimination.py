"""Which channels go: equal to trying every one of them, and blind to none that others can say."""

from __future__ import annotations

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from afds.elimination import Elimination, Reader, losses, order
from afds.selection import gates, select
from afds.settling import tied_units
from networks import randomise_bn
from runs import ARCH_ARGS, tiny_network


def problem(seed: int, channels: int, taps: int) -> tuple[Tensor, Tensor]:
    """Second moments (D, D) of correlated inputs, and weights (D, 5)."""
    g, d = torch.Generator().manual_seed(seed), channels * taps
    x_ND = torch.randn(200, d, generator=g, dtype=torch.double) @ torch.randn(d, d, generator=g, dtype=torch.double)
    moments_DD = x_ND.t() @ x_ND / 200 + 0.1 * torch.eye(d, dtype=torch.double)
    return moments_DD, torch.randn(d, 5, generator=g, dtype=torch.double)


def reader(moments_DD: Tensor, weight_DO: Tensor) -> Reader:
    return Reader(moments_DD.inverse().float(), weight_DO.float())


def error_without(gone: set[int], moments_DD: Tensor, weight_DO: Tensor, channels: int) -> float:
    """Least squares on the channels that are left, written out: tr (W - V)' M (W - V), V = 0 where channels went."""
    taps = len(moments_DD) // channels
    here = torch.tensor([d // taps not in gone for d in range(len(moments_DD))])
    refitted_DO = torch.zeros_like(weight_DO)
    refitted_DO[here] = torch.linalg.solve(moments_DD[here][:, here], moments_DD[here] @ weight_DO)
    miss_DO = weight_DO - refitted_DO
    return float((miss_DO * (moments_DD @ miss_DO)).sum())


@given(st.integers(0, 10_000), st.integers(2, 6), st.sampled_from([1, 2, 4]))
@settings(max_examples=25, deadline=None)
def test_each_step_is_the_best_of_all_that_could_be_taken(seed: int, channels: int, taps: int) -> None:
    """Two readers of one class: the losses add up, and going on from one step to the next stays exact."""
    problems = [problem(seed, channels, taps), problem(seed + 1, channels, 1)]

    def error(gone: set[int]) -> float:
        return sum(error_without(gone, *p, channels) for p in problems)

    first = losses([reader(*p) for p in problems], torch.ones(channels, dtype=torch.bool))
    assert first.tolist() == pytest.approx([error({c}) for c in range(channels)], rel=1e-2)
    went = order([reader(*p) for p in problems], channels, at_once=1).argsort().tolist()
    for step in range(channels - 1):
        gone = set(went[:step])
        tried = {c: error(gone | {c}) for c in range(channels) if c not in gone}
        assert tried[went[step]] <= 1.02 * min(tried.values())


def test_several_at_once_still_give_every_channel_a_place() -> None:
    moments_DD, weight_DO = problem(0, 10, 2)
    assert sorted(order([reader(moments_DD, weight_DO)], 10, at_once=3).tolist()) == list(range(10))


class Twins(nn.Module):
    """conv1's channels 4 to 7 say what 0 to 3 say, at twice the size: alone each of them looks worth more."""

    feature_info: tuple[()] = ()

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)
        randomise_bn(self, zeros=0.0)
        with torch.no_grad():
            for value in (*self.conv1.state_dict().values(), *self.bn1.state_dict().values()):
                if value.ndim:
                    value[4:] = value[:4]
            for value in (self.bn1.weight, self.bn1.bias):
                value[4:] = 2 * value[:4]

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = torch.relu(self.bn1(self.conv1(x_BCHW)))
        return self.head(torch.relu(self.bn2(self.conv2(x_BCHW))).mean((2, 3)))


def data(classes: int = 3, size: int = 16) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(3)
    crops = [torch.randn(8, 3, size, size) for _ in range(4)]
    return crops, [(torch.randn(8, 3, size, size), torch.randint(classes, (8,))) for _ in range(2)]


def test_of_twins_one_stays() -> None:
    torch.manual_seed(0)
    worth = Elimination(select(Twins()), *data(), ridge=1e-4)()
    stay = worth["conv1"].topk(4).indices
    assert sorted((stay % 4).tolist()) == [0, 1, 2, 3]


def test_what_only_feeds_outputs_that_go_goes_first() -> None:
    """conv2's outputs 3 to 5 go; two channels of conv1 write to those only."""
    torch.manual_seed(0)
    model = select(Twins())
    with torch.no_grad():
        conv = model.get_submodule("conv2.conv")
        assert isinstance(conv, nn.Conv2d)
        conv.weight[:3, :2] = 0
        conv.weight[3:, :2] *= 10
    eliminate = Elimination(model, *data())
    assert not set(eliminate()["conv1"].argsort()[:2].tolist()) & {0, 1}
    worth = eliminate({"conv2": torch.tensor([True] * 3 + [False] * 3)})
    assert set(worth["conv1"].argsort()[:2].tolist()) == {0, 1}


def test_tied_units_have_one_order_and_nothing_else_changes() -> None:
    torch.manual_seed(0)
    model = select(tiny_network(selection=None, **ARCH_ARGS)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    worth = Elimination(model, *data(size=32))()
    assert set(worth) == set(gates(model))
    for names in tied_units(model):
        for name in names:
            assert torch.equal(worth[name], worth[names[0]])
            assert sorted(worth[name].tolist()) == list(range(len(worth[name])))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "resnext50_32x4d"])
def test_depthwise_and_grouped_convolutions(name: str) -> None:
    """Channels of a depthwise convolution are judged by who reads them behind it, grouped convolutions by nobody."""
    torch.manual_seed(0)
    model = select(timm.create_model(name, num_classes=3))
    crops, labelled = data(size=32)
    worth = Elimination(model, crops[:1], labelled[:1])()
    assert worth
    for unit, worth_C in worth.items():
        assert sorted(worth_C.tolist()) == list(range(len(gates(model)[unit].sign)))
