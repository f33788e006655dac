"""s, gamma and m: what turns static does so without a jump, what is pruned is the least used."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from afds.masks import mask_counts, observe, update_masks
from afds.selection import gates, select, set_density


@pytest.fixture
def moved(tiny_resnet: nn.Module) -> nn.Module:
    """A selective network whose predictors say something."""
    model = select(tiny_resnet, density=0.5).eval()
    for gate in gates(model).values():
        nn.init.normal_(gate.predictor.weight, std=0.5)
    return model


def test_moments_are_those_of_the_images(moved: nn.Module) -> None:
    x_BCHW = torch.randn(6, 3, 64, 64)
    name, gate = next(iter(gates(moved).items()))
    moments = observe(moved, [x_BCHW[:4], x_BCHW[4:]])[name]
    with torch.no_grad():
        q_BC, pi_BC = gate.saliency(x_BCHW).double(), gate(x_BCHW).double()
    torch.testing.assert_close(moments.mean_q, q_BC.mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(moments.variance_q, q_BC.var(0, unbiased=False), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(moments.mean_pi, pi_BC.abs().mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(moments.win_rate, (pi_BC != 0).double().mean(0))
    assert not any(m._forward_hooks for m in moved.modules())


def test_least_varying_turn_static_at_their_mean(moved: nn.Module) -> None:
    x_BCHW = torch.randn(8, 3, 64, 64)
    before = observe(moved, [x_BCHW])
    thresholds = update_masks(moved, [x_BCHW], static_quantile=0.3, prune_quantile=0.0)
    for name, gate in gates(moved).items():
        static = ~gate.dynamic
        variance = before[name].variance_q
        assert static.any()
        assert float(variance[static].max()) <= thresholds[name]["delta_s"] + 1e-12
        lives = before[name].mean_q != 0
        assert lives[static].all()
        assert float(variance[~static & lives].min()) >= thresholds[name]["delta_s"]
        torch.testing.assert_close(gate.gamma[static].double(), before[name].mean_q[static], rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            q_BC = gate.saliency(torch.randn(5, gate.predictor.in_channels, 4, 4))
        assert torch.equal(q_BC[0, static], q_BC[4, static])
    assert mask_counts(moved)["static"] > 0


def test_least_used_are_pruned_for_good_but_k_stay(moved: nn.Module) -> None:
    x_BCHW = torch.randn(8, 3, 64, 64)
    before = observe(moved, [x_BCHW])
    update_masks(moved, [x_BCHW], static_quantile=0.0, prune_quantile=0.9)
    for name, gate in gates(moved).items():
        assert int(gate.kept.sum()) == gate.k  # 90 % would leave fewer than the density needs
        assert float(before[name].mean_pi[~gate.kept].max()) <= float(before[name].mean_pi[gate.kept].min()) + 1e-12
        with torch.no_grad():
            pi_BC = gate(torch.randn(5, gate.predictor.in_channels, 4, 4))
        assert not pi_BC[:, ~gate.kept].any()
    set_density(moved, 1.0)
    again = update_masks(moved, [x_BCHW], static_quantile=0.0, prune_quantile=0.0)
    assert again == {}


def test_mode_is_given_back(moved: nn.Module) -> None:
    moved.train()
    update_masks(moved, [torch.randn(2, 3, 64, 64)], static_quantile=0.1, prune_quantile=0.1)
    assert moved.training


def test_of_many_that_tie_only_their_share_turns_static_and_none_at_0(moved: nn.Module) -> None:
    name, gate = next(iter(gates(moved).items()))
    channels = gate.sign.numel()
    with torch.no_grad():  # half of the channels are asleep on all images, a quarter says the same of all
        gate.predictor.weight[: channels * 3 // 4] = 0
        gate.predictor.bias[: channels // 2] = -1
        gate.predictor.bias[channels // 2 : channels * 3 // 4] = 1
    update_masks(moved, [torch.randn(8, 3, 64, 64)], static_quantile=0.05, prune_quantile=0.0)
    static = (~gate.dynamic).nonzero().flatten().tolist()
    assert static == [channels // 2 + i for i in range(1 + int(0.05 * (channels // 2 - 1)))], name
    assert float(gate.gamma.detach()[channels // 2]) == pytest.approx(1.0)
