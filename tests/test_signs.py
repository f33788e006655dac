"""A learned scale passes through zero, with what the optimizer remembers of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from afds.selection import gates, select, selective_units
from afds.settling import fix_scales
from afds.signs import pass_through_zero
from networks import randomise_bn
from runs import ARCH_ARGS, tiny_network


def constant_scales() -> nn.Module:
    torch.manual_seed(0)
    model = select(randomise_bn(tiny_network(selection=None, **ARCH_ARGS)).eval())
    fix_scales(model, list)
    return model.eval()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_scale_learns_to_be_negative_and_its_channel_stays_alive(optimizer: str) -> None:
    model = constant_scales()
    unit = dict(selective_units(model))["conv1"]
    gate = unit.gate
    x = torch.randn(8, 3, 24, 24)
    wanted = -unit(x).detach()
    steps: torch.optim.Optimizer
    if optimizer == "sgd":
        steps = torch.optim.SGD([gate.gamma, unit.beta], lr=0.05, momentum=0.9)
    else:
        steps = torch.optim.AdamW([gate.gamma, unit.beta], lr=0.05, weight_decay=0.0)
    before, dead = gate.sign.clone(), gate.gamma.detach() == 0

    def loss() -> Tensor:
        return (unit(x) - wanted).square().mean((0, 2, 3)).sum()

    first = loss().item()
    for _ in range(200):
        steps.zero_grad()
        loss().backward()
        steps.step()
        pass_through_zero(model, steps.state)
        assert bool((gate.gamma >= 0).all())
    assert loss().item() < 0.02 * first
    torch.testing.assert_close(gate.sign, torch.where(dead, before, -before))


def test_momentum_turns_with_the_sign() -> None:
    model = constant_scales()
    gate = next(iter(gates(model).values()))
    with torch.no_grad():
        gate.gamma[0] = -0.5
    first, second = torch.full_like(gate.gamma, 2.0), torch.full_like(gate.gamma, 3.0)
    sign = gate.sign.clone()
    pass_through_zero(model, {gate.gamma: {"exp_avg": first, "exp_avg_sq": second, "step": torch.tensor(1.0)}})
    assert gate.gamma[0].item() == 0.5
    assert float(gate.sign[0]) == -float(sign[0])
    assert first.tolist() == [-2.0] + [2.0] * (len(first) - 1)
    assert set(second.tolist()) == {3.0}
    assert torch.equal(gate.sign[1:], sign[1:])


def test_predicted_scales_have_no_sign_of_their_own() -> None:
    torch.manual_seed(0)
    model = select(tiny_network(selection=None, **ARCH_ARGS).eval())
    gate = next(iter(gates(model).values()))
    with torch.no_grad():
        gate.gamma.fill_(-1.0)  # what a dynamic channel does not use
    sign = gate.sign.clone()
    pass_through_zero(model, {})
    assert torch.equal(gate.sign, sign)
    assert set(gate.gamma.tolist()) == {-1.0}
