"""Budgets are read, refused and met."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from afds.config import DescentConfig
from afds.cost import measure_cost
from afds.errors import BudgetError
from afds.graph import unit_roles
from afds.importance import by_importance, estimate, set_importance
from afds.schedule import MARGIN, parse_budget, plan_descent, solve, uniform
from afds.selection import densities, gates, select, selective_units, set_density


@pytest.mark.parametrize(("text", "ratio"), [("10x", 10.0), ("2.5x", 2.5), ("1x", 1.0), (" 4 x ", 4.0)])
def test_ratios(text: str, ratio: float) -> None:
    assert parse_budget(text).wanted_ratio(123.0) == ratio


@pytest.mark.parametrize(("text", "macs"), [("0.8G", 0.8e9), ("800M", 0.8e9), ("5kMACs", 5e3)])
def test_macs(text: str, macs: float) -> None:
    assert parse_budget(text).wanted_ratio(8e9) == pytest.approx(8e9 / macs)


@pytest.mark.parametrize("text", ["", "fast", "10", "x", "-2x", "0.5x", "0G", "0ms", "8 s", "1e3x", "10 x faster"])
def test_what_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(BudgetError, match="budget"):
        parse_budget(text)


def test_macs_above_the_dense_network_are_refused() -> None:
    with pytest.raises(BudgetError, match="not below the dense network"):
        parse_budget("9G").wanted_ratio(8e9)


@pytest.mark.parametrize("ratio", [1.5, 2.0, 4.0])
def test_solve_meets_the_budget_and_no_more(tiny_resnet: nn.Module, ratio: float) -> None:
    model, batches = select(tiny_resnet), [torch.randn(4, 3, 64, 64)]
    t = solve(model, uniform(model), ratio, batches)
    assert measure_cost(model, batches).ratio >= ratio
    assert set(densities(model).values()) == {t}
    solve_looser = uniform(model)(min(1.0, t * 1.1))
    set_density(model, solve_looser)
    assert measure_cost(model, batches).ratio < ratio * 1.02  # the largest that meets it, up to whole channels


def test_hopeless_budget_says_what_can_be_had(tiny_resnet: nn.Module) -> None:
    model = select(tiny_resnet)
    with pytest.raises(BudgetError, match="one channel in every layer"):
        solve(model, uniform(model), 1e6, [torch.randn(1, 3, 64, 64)])


def test_descent_is_geometric_and_inside_its_bounds() -> None:
    descent = plan_descent(100, DescentConfig(start=0.2, end=0.6, stages=4), 16.0)
    assert descent.stage_steps == (20, 30, 40, 50)
    assert [descent.target(i) for i in range(4)] == pytest.approx([(16 * MARGIN) ** (i / 4) for i in (1, 2, 3, 4)])
    short = plan_descent(3, DescentConfig(start=0.0, end=0.5, stages=12), 4.0)
    assert len(short.stage_steps) == 2  # no more stages than steps
    assert short.target(1) == pytest.approx(4.0 * MARGIN)


def test_importance_is_the_change_of_the_loss(tiny_resnet: nn.Module) -> None:
    """Against finite differences: the gated map of one channel and one image scaled by 1 - eps."""
    model = select(tiny_resnet).double().eval()
    x_BCHW, y_B = torch.randn(2, 3, 64, 64, dtype=torch.double), torch.tensor([0, 1])
    importance = estimate(model, [(x_BCHW, y_B)])
    name, unit = list(selective_units(model))[3]
    eps, channels = 1e-6, unit.beta.numel()

    def loss(image: int, channel: int, scale: float) -> float:
        def hook(_m: nn.Module, _a: object, out: torch.Tensor) -> torch.Tensor:
            out = out.clone()
            out[0, channel] *= scale
            return out

        handle = unit.register_forward_hook(hook)
        with torch.no_grad():
            value = nn.functional.cross_entropy(model(x_BCHW[image : image + 1]), y_B[image : image + 1])
        handle.remove()
        return float(value)

    for channel in range(channels):
        effects = [(loss(i, channel, 1.0) - loss(i, channel, 1 - eps)) / eps for i in range(2)]
        expected = sum(e**2 for e in effects) / 2
        assert float(importance.taylor[name][channel]) == pytest.approx(expected, rel=1e-3, abs=1e-12)
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_a_channel_that_never_wins_keeps_its_estimate(tiny_resnet: nn.Module) -> None:
    model, batch = select(tiny_resnet), (torch.randn(3, 3, 64, 64), torch.tensor([0, 1, 2]))
    first = estimate(model, [batch])
    set_importance(model, first)
    set_density(model, 0.3)
    second = estimate(model, [batch], first)
    for name, gate in gates(model).items():
        never = ~gate.active_BC.any(0)  # type: ignore[union-attr]
        assert never.any()
        assert torch.equal(second.taylor[name][never], first.taylor[name][never])


def test_roles_in_the_residual_stream() -> None:
    roles = unit_roles(timm.create_model("resnet50", layers=(1, 2, 1, 1), channels=(4, 4, 8, 8)))
    assert roles["conv1"] == "stem"
    assert roles["layer1.0.conv1"] == roles["layer1.0.conv2"] == "inner"
    assert roles["layer1.0.conv3"] == roles["layer2.1.conv3"] == "stream"
    assert roles["layer2.0.downsample.0"] == "shortcut"
    selective = unit_roles(select(timm.create_model("resnet50", layers=(1, 2, 1, 1), channels=(4, 4, 8, 8))))
    assert selective == roles


def test_allocation_by_importance_is_monotone_and_bounded(tiny_bottleneck: nn.Module) -> None:
    model = select(tiny_bottleneck)
    x_BCHW, y_B = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])
    importance = estimate(model, [(x_BCHW, y_B)])
    set_importance(model, importance)
    allocation = by_importance(model, importance, measure_cost(model, [x_BCHW]), floor=0.5)
    previous = allocation(1.0)
    for t in (0.8, 0.5, 0.2, 0.05):
        now = allocation(t)
        assert all(0.5 * t <= d <= 1 for d in now.values())
        assert all(now[name] <= previous[name] + 1e-9 for name in now)
        previous = now
    solve(model, allocation, 3.0, [x_BCHW])
    assert measure_cost(model, [x_BCHW]).ratio >= 3.0
