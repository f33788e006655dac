"""Narrow strided 1x1 convolutions: what is trained on has the gradients that double precision has."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from afds.importance import estimate
from afds.selection import select
from afds.strided import BLOCK, taken_apart

LAST = torch.channels_last


def gradients(network: nn.Module, x_BCHW: Tensor) -> dict[str, Tensor]:
    with taken_apart(network):
        out = network(x_BCHW)
    generator = torch.Generator().manual_seed(1)
    (out * torch.randn(out.shape, generator=generator).to(out)).sum().backward()
    return {name: p.grad.double() for name, p in network.named_parameters() if p.grad is not None}


@settings(max_examples=30, deadline=None)
@given(
    channels=st.integers(1, BLOCK + 1), out=st.integers(1, 40), stride=st.sampled_from([2, 3, (2, 1), (1, 2)]),
    height=st.integers(1, 30), width=st.integers(1, 30), bias=st.booleans(),
)  # fmt: skip
def test_gradients_equal_those_in_double_precision(
    channels: int, out: int, stride: int | tuple[int, int], height: int, width: int, bias: bool
) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, channels, 1), nn.Conv2d(channels, out, 1, stride, bias=bias))
    x_BCHW = torch.randn(3, 3, height, width)
    expected = gradients(copy.deepcopy(network).double(), x_BCHW.double())
    found = gradients(network.to(memory_format=LAST), x_BCHW.contiguous(memory_format=LAST))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4)


def test_a_narrow_resnet_trains_with_the_gradients_of_double_precision() -> None:
    torch.manual_seed(0)
    network = timm.create_model("resnet18", num_classes=5, layers=(1, 1, 1, 1), channels=(7, 5, 12, 16))
    x_BCHW = torch.randn(4, 3, 112, 112)
    expected = gradients(copy.deepcopy(network).double(), x_BCHW.double())
    network.to(memory_format=LAST)
    for _ in range(5):  # memory that is written past crashes late
        network.zero_grad()
        found = gradients(network, x_BCHW.contiguous(memory_format=LAST))
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-5, name


def test_importance_of_a_narrow_resnet_is_that_of_double_precision() -> None:
    torch.manual_seed(0)
    network = select(timm.create_model("resnet18", num_classes=5, layers=(1, 1, 1, 1), channels=(7, 5, 12, 16)))
    batch = torch.randn(4, 3, 112, 112), torch.arange(4)
    expected = estimate(copy.deepcopy(network).double(), [(batch[0].double(), batch[1])])
    found = estimate(network.to(memory_format=LAST), [batch])
    for name, taylor in expected.taylor.items():
        torch.testing.assert_close(found.taylor[name], taylor, rtol=2e-2, atol=1e-9, check_dtype=False)


def test_nothing_is_left_behind() -> None:
    network = nn.Sequential(nn.Conv2d(4, 8, 1, 2), nn.Conv2d(32, 8, 1, 2), nn.Conv2d(4, 8, 3, 2))
    before = [dict(m.__dict__) for m in network]
    with taken_apart(network):
        assert ["_conv_forward" in m.__dict__ for m in network] == [True, False, False]
    with pytest.raises(RuntimeError, match="channels"), taken_apart(network):
        network(torch.randn(1, 4, 9, 9))
    assert [dict(m.__dict__) for m in network] == before
