"""Selection against METHOD's equations, and the promises that hold for any network and any density."""

from __future__ import annotations

import copy
import io
import math
from fractions import Fraction

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from afds.errors import ConfigError
from afds.graph import convbn_units
from afds.selection import (
    FollowingGate,
    Gate,
    Predictor,
    SelectionConfig,
    SelectiveConvBN,
    densities,
    gates,
    select,
    selective_units,
    set_density,
    winner_take_all,
    winners,
)
from networks import FAMILIES, mobilenetv2, randomise_bn, resnet_basic, train_like
from reference import array, unit_output, winners_exactly

CONFIGS = {
    "ours": SelectionConfig(),
    "paper": SelectionConfig(standardise=False, importance=False, bounded=False),
    "raw-bounded": SelectionConfig(standardise=False),
    "standardised-unbounded": SelectionConfig(bounded=False),
    "low-rank": SelectionConfig(predictor="low-rank", rank_divisor=3),
    "groups": SelectionConfig(group=4),
}


def images(count: int = 2, side: int = 32, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def unit(
    config: SelectionConfig | None = None,
    *,
    channels: int = 12,
    groups: int = 1,
    stride: int = 1,
    seed: int = 0,
) -> SelectiveConvBN:
    """One unit, 6 -> `channels`, in eval mode, as if trained."""
    torch.manual_seed(seed)
    conv = nn.Conv2d(6, channels, 3, stride=stride, padding=1, groups=groups, bias=False)
    model = nn.Sequential(conv, nn.BatchNorm2d(channels))
    randomise_bn(model, seed, by_bias=True)
    selected = train_like(select(model, config), seed)
    return next(selective_units(selected))[1].eval()


# --- Nothing changes at d = 1


@torch.no_grad()
@pytest.mark.parametrize("by_bias", [False, True])
def test_select_keeps_the_function(family: nn.Module, by_bias: bool) -> None:
    randomise_bn(family, by_bias=by_bias)
    selected = select(family).double().eval()
    x = images(side=48).double()
    expected = family.double()(x)
    error = (selected(x) - expected).abs().max() / expected.abs().max()
    assert float(error) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_option_keeps_the_function(tiny_resnet: nn.Module, config: SelectionConfig) -> None:
    x = images()
    torch.testing.assert_close(select(tiny_resnet, config)(x), tiny_resnet(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_select_keeps_the_function_in_train_mode_and_the_running_statistics(family: nn.Module) -> None:
    for module in family.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    randomise_bn(family, zeros=0.0)
    plain = family.double().train()
    selected = select(plain).double().train()
    x = images(count=4, side=64).double()
    for _ in range(2):
        expected = plain(x)
        error = (selected(x) - expected).abs().max() / expected.abs().max()
        assert float(error) < 1e-6
    units = dict(selective_units(selected))
    for convbn in convbn_units(plain):
        norm, ours = plain.get_submodule(convbn.norm), units[convbn.name].norm
        torch.testing.assert_close(ours.running_mean, norm.running_mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours.running_var, norm.running_var, rtol=1e-6, atol=1e-6)
        assert ours.num_batches_tracked == norm.num_batches_tracked == 2


def test_select_copies(tiny_mobilenet: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_mobilenet.state_dict().items()}
    selected = select(tiny_mobilenet, density=0.5)
    with torch.no_grad():
        for parameter in selected.parameters():
            parameter.fill_(7.0)
        selected.train()(images())
    after = tiny_mobilenet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not tiny_mobilenet.training
    assert not list(selective_units(tiny_mobilenet))


def test_modes_are_kept(tiny_resnet: nn.Module) -> None:
    tiny_resnet.layer1.train()
    selected = select(tiny_resnet)
    assert selected.layer1[0].conv1.norm.training
    assert not selected.layer2[0].conv1.norm.training


def test_a_copy_of_a_selective_network_follows_its_own_leaders() -> None:
    selected = select(randomise_bn(mobilenetv2())).eval()
    twin = copy.deepcopy(selected)
    set_density(selected, 0.25)
    x = images()
    with torch.no_grad():
        full, quarter = twin(x), selected(x)
    assert not torch.allclose(full, quarter)
    unit, twin_unit = selected.blocks[1][0].conv_dw, twin.blocks[1][0].conv_dw
    assert isinstance(unit.gate, FollowingGate)
    assert unit.gate.active_BC.sum() < twin_unit.gate.active_BC.sum()


def test_state_survives_a_round_trip(tiny_resnet: nn.Module) -> None:
    selected = train_like(select(tiny_resnet), 3)
    set_density(selected, 0.5)
    file = io.BytesIO()
    torch.save(selected.state_dict(), file)
    file.seek(0)
    other = select(resnet_basic().eval(), density=0.5)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = images()
    with torch.no_grad():
        assert torch.equal(other(x), selected(x))


# --- The equations


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("density", ["1", "0.5", "0.3"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_unit_computes_the_equations(config: SelectionConfig, density: str, training: bool) -> None:
    module = unit(config, groups=2 if config.bounded else 1, stride=2 if training else 1).double()
    module.gate.density = float(density)
    module.train(training)
    x = images(count=6, side=7).double().relu().repeat(1, 2, 1, 1)  # as after a ReLU: not negative
    x *= 8 * torch.rand(6, 6, 1, 1, generator=torch.Generator().manual_seed(2)).double() ** 4
    expected, active = unit_output(array(x), module, density, training=training)
    out = module(x)
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-9, atol=1e-11)
    assert np.array_equal(module.gate.active_BC.numpy(), active)
    assert (active.sum(1) <= config.group * winners_exactly(density, 12 // config.group)).all()
    if density == "0.3":
        assert len({tuple(row) for row in active}) > 1, "the choice should depend on the image"


@torch.no_grad()
@pytest.mark.parametrize("density", ["1", "0.4"])
def test_a_whole_resnet_computes_the_equations(density: str) -> None:
    """A ResNet's forward written by hand around the reference units: who feeds whom is checked as well."""
    model = train_like(select(randomise_bn(resnet_basic(), by_bias=True))).double().eval()
    set_density(model, float(density))
    x = images(count=2, side=32).double()

    def relu(x_BCHW: np.ndarray) -> np.ndarray:
        return np.maximum(x_BCHW, 0)

    stem, _ = unit_output(array(x), model.conv1, density)
    h = F.max_pool2d(torch.from_numpy(relu(stem)), 3, stride=2, padding=1).numpy()
    for block in (model.layer1[0], model.layer2[0], model.layer3[0], model.layer4[0]):
        main, _ = unit_output(h, block.conv1, density)
        main, _ = unit_output(relu(main), block.conv2, density)
        h = relu(main + unit_output(h, block.downsample[0], density)[0])
    logits = h.mean((2, 3)) @ array(model.fc.weight).T + array(model.fc.bias)
    np.testing.assert_allclose(model(x).numpy(), logits, rtol=1e-8, atol=1e-10)


@torch.no_grad()
def test_a_depthwise_block_computes_the_equations() -> None:
    model = train_like(select(randomise_bn(mobilenetv2(), by_bias=True), density=0.4)).double().eval()
    block = model.blocks[1][0]
    seen: list[torch.Tensor] = []
    with block.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        model(images().double())

    def relu6(x_BCHW: np.ndarray) -> np.ndarray:
        return np.clip(x_BCHW, 0, 6)

    wide, active = unit_output(array(seen[0]), block.conv_pw, "0.4")
    deep, _ = unit_output(relu6(wide), block.conv_dw, arriving_BC=active)
    narrow, _ = unit_output(relu6(deep), block.conv_pwl, "0.4")
    np.testing.assert_allclose(block(seen[0]).numpy(), narrow, rtol=1e-8, atol=1e-10)


# --- Winners


@pytest.mark.parametrize(
    ("density", "channels", "k"),
    [(0.07, 100, 7), (0.29, 100, 29), (0.57, 100, 57), (1.1 / 3, 30, 11), (0.1 + 0.2, 10, 3), (0.3, 10, 3),
     (0.701, 10, 8), (1e-4, 64, 1), (1.0, 64, 64), (0.5, 7, 4)],
)  # fmt: skip
def test_winners_float_traps(density: float, channels: int, k: int) -> None:
    assert winners(density, channels) == k


@given(st.integers(1, 2048), st.data())
def test_winners_is_the_ceiling(channels: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, channels))
    assert winners(k / channels, channels) == k
    text = str(data.draw(st.integers(1, 1000)) / 1000)
    exact = math.ceil(Fraction(text) * channels)
    assert winners(float(text), channels) == exact == winners_exactly(text, channels)


@given(st.integers(0, 2**31 - 1), st.integers(1, 40), st.floats(0.01, 1.0))
@settings(max_examples=60)
def test_exactly_k_win_and_they_are_the_largest(seed: int, channels: int, density: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    score_BC = 1e-3 + torch.rand(3, channels, generator=generator)
    k = winners(density, channels)
    active_BC = winner_take_all(score_BC, k)
    assert (active_BC.sum(1) == k).all()
    for score, active in zip(score_BC, active_BC, strict=True):
        if k < channels:
            assert score[active].min() >= score[~active].max()


@given(st.integers(0, 2**31 - 1), st.integers(1, 9), st.integers(2, 8), st.floats(0.01, 1.0))
@settings(max_examples=40)
def test_groups_of_the_largest_sum_win_together(seed: int, groups: int, size: int, density: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    score_BC = 1e-3 + torch.rand(3, groups * size, generator=generator)
    score_BC[:, ::3] = 0  # these never win, and do not count
    k = size * winners(density, groups)
    active_BC = winner_take_all(score_BC, k, size)
    sum_BG = score_BC.unflatten(1, (groups, size)).sum(2)
    for score, total, active in zip(score_BC, sum_BG, active_BC, strict=True):
        best = sorted(range(groups), key=lambda g: float(total[g]), reverse=True)[: k // size]
        assert active.nonzero().flatten().tolist() == [
            c for c in range(len(score)) if c // size in best and score[c] > 0
        ]


def test_a_score_of_zero_never_wins() -> None:
    score_BC = torch.tensor([[0.0, 0.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4]])
    for k in (1, 2, 3, 4):
        assert winner_take_all(score_BC, k).sum(1).tolist() == [1, 0, k]
    assert not winner_take_all(-torch.ones(1, 4), 4).any()


def test_ties_do_not_let_more_than_k_win() -> None:
    assert winner_take_all(torch.full((2, 9), 0.5), 4).sum(1).tolist() == [4, 4]


# --- What is suppressed is zero, what is pruned is gone


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_a_suppressed_channel_is_exactly_zero(training: bool) -> None:
    module = unit().train(training)
    module.gate.density = 0.4
    assert (module.beta != 0).any()
    out = module(images(count=4).repeat(1, 2, 1, 1))
    active_BC = module.gate.active_BC
    assert ((out != 0).flatten(2).any(2) == active_BC).all()
    assert 0 < active_BC.sum() <= 4 * winners(0.4, 12)


@torch.no_grad()
def test_pruned_channels_never_win_and_leave_no_place_empty() -> None:
    module = unit()
    gate = module.gate
    gate.predictor.bias.fill_(5.0)
    gate.gamma.fill_(5.0)
    gate.kept.fill_(True)
    gate.kept[:4] = False
    gate.importance[:4] = 1e6
    for density, expected in ((1.0, 8), (0.5, 6), (0.25, 3)):
        gate.density = density
        pi_BC = gate(images(count=3).repeat(1, 2, 1, 1))
        assert (pi_BC[:, :4] == 0).all()
        assert (pi_BC != 0).sum(1).tolist() == [expected] * 3


@torch.no_grad()
def test_static_channels_do_not_look_at_the_image() -> None:
    module = unit()
    gate = module.gate
    gate.kept.fill_(True)
    gate.dynamic.copy_(torch.arange(12) % 2 == 0)
    gate.gamma[1] = -0.3
    q_BC = gate.saliency(images(count=5).repeat(1, 2, 1, 1))
    assert (q_BC[:, 1::2] == F.relu(gate.gamma)[1::2]).all()
    assert (q_BC[:, 0::2].std(0) > 0).any()


@torch.no_grad()
def test_importance_ranks_but_does_not_scale() -> None:
    module = unit()
    gate = module.gate
    x = images().repeat(1, 2, 1, 1)
    q_BC = gate.saliency(x)
    gate.density = 0.25
    positive = (q_BC > 0).all(0).nonzero().flatten()
    gate.importance.fill_(1e-3)
    gate.importance[positive[-3:]] = 1e3
    pi_BC = gate(x)
    assert torch.equal(gate.active_BC.nonzero()[:, 1].view(2, 3), positive[-3:].repeat(2, 1))
    assert torch.equal(pi_BC.abs(), q_BC * gate.active_BC)


@torch.no_grad()
def test_a_negative_gamma_keeps_its_sign_on_the_scale() -> None:
    conv, norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4).eval()
    norm.weight.copy_(torch.tensor([-2.0, 1.0, 0.0, 0.0]))
    norm.bias.copy_(torch.tensor([0.5, 0.0, 0.7, 0.0]))
    module = next(selective_units(select(nn.Sequential(conv, norm))))[1].eval()
    pi_BC = module.gate(images())
    torch.testing.assert_close(pi_BC[0], torch.tensor([-2.0, 1.0, 1e-6, 0.0]))
    assert (module.gate.saliency(images()) >= 0).all()
    assert module.gate.active_BC[0].tolist() == [True, True, True, False]
    torch.testing.assert_close(module(images())[:, 2], torch.full((2, 32, 32), 0.7), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_depthwise_channel_is_suppressed_on_both_sides() -> None:
    model = train_like(select(randomise_bn(mobilenetv2(), by_bias=True), density=0.5)).eval()
    model(images())
    block = model.blocks[2][1]
    x = images(seed=5).mean(1, keepdim=True).repeat(1, block.conv_pw.conv.in_channels, 1, 1)
    wide = block.bn1(block.conv_pw(x))
    deep = block.conv_dw(wide)
    arriving, leaving = (wide != 0).flatten(2).any(2), (deep != 0).flatten(2).any(2)
    assert torch.equal(block.conv_dw.gate.active_BC, block.conv_pw.gate.active_BC)
    assert not (leaving & ~block.conv_pw.gate.active_BC).any()
    assert not (arriving & ~block.conv_pw.gate.active_BC).any()
    assert leaving.any()
    assert not leaving.all()


@torch.no_grad()
def test_a_dead_channel_before_a_depthwise_unit_keeps_its_constant() -> None:
    """norm(0) gamma + beta is not zero: a leader with gamma = beta = 0 must not silence the unit that follows."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4))
    model[1].weight.zero_()
    model[3].weight[0] = 0.0
    model[3].bias.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    model.eval()
    x = images()
    torch.testing.assert_close(select(model)(x), model(x), rtol=1e-5, atol=1e-5)


# --- Gradients


def test_no_gradient_flows_through_the_choice() -> None:
    module = unit(SelectionConfig(standardise=False, bounded=False)).double()
    gate: Gate = module.gate
    gate.density = 0.5
    x = images(count=3).repeat(1, 2, 1, 1).double()
    p_BC = x.mean((2, 3))
    before_BC = p_BC @ gate.predictor.weight.detach().T + gate.predictor.bias.detach()
    out_BC = gate(x)
    upstream_BC = torch.randn(3, 12, dtype=torch.float64)
    out_BC.backward(upstream_BC)
    # d pi / d q = mask (and the sign); d q / d h = s m; d h / d a = [a > 0]
    d_q = upstream_BC * gate.active_BC * gate.sign
    d_a = d_q * gate.dynamic * gate.kept * (before_BC > 0)
    torch.testing.assert_close(gate.predictor.bias.grad, d_a.sum(0))
    torch.testing.assert_close(gate.predictor.weight.grad, d_a.T @ p_BC)
    d_gamma = (d_q * ~gate.dynamic * gate.kept * (gate.gamma.detach() > 0)).sum(0)
    torch.testing.assert_close(gate.gamma.grad, d_gamma)
    assert not gate.active_BC.requires_grad


def test_losers_get_no_gradient_and_beta_only_from_active_channels() -> None:
    module = unit()
    module.gate.density = 0.3
    module(images().repeat(1, 2, 1, 1)).sum().backward()
    active_C = module.gate.active_BC.any(0)
    assert ((module.conv.weight.grad.flatten(1) != 0).any(1) <= active_C).all()
    torch.testing.assert_close(module.beta.grad, module.gate.active_BC.sum(0) * 32.0 * 32.0)


def test_all_that_should_learn_gets_a_gradient(tiny_mobilenet: nn.Module) -> None:
    selected = select(randomise_bn(tiny_mobilenet, by_bias=True)).train()
    selected(images(count=4)).square().sum().backward()
    for name, module in selective_units(selected):
        assert module.conv.weight.grad.abs().sum() > 0, name
        if isinstance(module.gate, Gate):
            assert module.gate.predictor.weight.grad.abs().sum() > 0, name  # W = 0 at the start is no dead end
            assert module.gate.predictor.bias.grad.abs().sum() > 0, name
        else:
            assert module.gate.gamma.grad.abs().sum() > 0, name


# --- Odd circumstances


@torch.no_grad()
def test_a_batch_of_one_in_train_mode(tiny_resnet: nn.Module) -> None:
    selected = train_like(select(tiny_resnet, density=0.5)).train()
    statistics = selected.layer1[0].conv1.gate.predictor.standardise.running_mean.clone()
    out = selected(images(count=1, side=64))
    assert torch.isfinite(out).all()
    assert torch.equal(selected.layer1[0].conv1.gate.predictor.standardise.running_mean, statistics)


def test_low_rank_predictor_is_smaller_and_learns() -> None:
    module = unit(SelectionConfig(predictor="low-rank", rank_divisor=4))
    predictor = module.gate.predictor
    assert predictor.rank == 3
    assert predictor.reduce.weight.shape == (3, 6)
    assert predictor.weight.shape == (12, 3)
    module(images().repeat(1, 2, 1, 1)).square().sum().backward()
    assert predictor.reduce.weight.grad.abs().sum() > 0
    assert predictor.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("scale", [1e4, 1e8, 0.0])
@torch.no_grad()
def test_saliencies_are_finite_and_bounded_under_autocast(tiny_resnet: nn.Module, scale: float) -> None:
    selected = train_like(select(tiny_resnet, density=0.5), static=0.0, pruned=0.0)
    for mode in (True, False):
        selected.train(mode)
        with torch.autocast("cpu", torch.bfloat16):
            out = selected(scale * images(count=4))
        assert torch.isfinite(out).all()
        for module in gates(selected).values():
            q_BC = module.saliency(scale * images(count=2).mean(1, keepdim=True)
                                   .repeat(1, module.predictor.in_channels, 1, 1))  # fmt: skip
            assert q_BC.dtype == torch.float32
            assert (q_BC[:, module.dynamic] <= module.predictor.ceiling).all()


def test_training_with_a_learning_rate_that_is_far_too_large_stays_finite(tiny_resnet: nn.Module) -> None:
    selected = select(tiny_resnet, density=0.5).train()
    optimizer = torch.optim.SGD(selected.parameters(), lr=1.0, momentum=0.9)
    for step in range(12):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(selected(images(count=8, seed=step)).float(), torch.arange(8) % 5)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(selected.parameters(), 10.0)
        optimizer.step()
        assert torch.isfinite(loss)
    assert all(torch.isfinite(p).all() for p in selected.parameters())
    for gate in gates(selected).values():
        assert gate.active_BC.sum(1).max() <= gate.k


@torch.no_grad()
def test_a_layer_without_any_winner_is_silent_not_broken() -> None:
    module = unit()
    module.gate.kept.fill_(False)
    out = module(images().repeat(1, 2, 1, 1))
    assert (out == 0).all()


# --- Densities


def test_densities_are_set_for_all_or_one_by_one(tiny_resnet: nn.Module) -> None:
    selected = select(tiny_resnet, density=0.5)
    assert set(densities(selected).values()) == {0.5}
    set_density(selected, {"layer1.0.conv1": 0.25})
    assert densities(selected)["layer1.0.conv1"] == 0.25
    assert densities(selected)["layer1.0.conv2"] == 0.5
    assert gates(selected)["layer1.0.conv1"].k == 2
    set_density(selected, 1)
    assert set(densities(selected).values()) == {1.0}


@pytest.mark.parametrize("value", [0.0, -0.1, 1.01, float("nan")])
def test_a_density_out_of_range_is_refused(tiny_resnet: nn.Module, value: float) -> None:
    with pytest.raises(ConfigError, match=r"\(0, 1\]"):
        select(tiny_resnet, density=value)


def test_mistakes_are_named(tiny_resnet: nn.Module) -> None:
    selected = select(tiny_resnet)
    with pytest.raises(ConfigError, match=r"no selective unit called layer9\.conv"):
        set_density(selected, {"layer9.conv": 0.5})
    with pytest.raises(ConfigError, match="carries selection already"):
        select(selected)
    with pytest.raises(ConfigError, match="rank-divisor"):
        SelectionConfig(rank_divisor=0)
    with pytest.raises(ConfigError, match="group must be at least 1"):
        SelectionConfig(group=0)
    with pytest.raises(ConfigError, match=r"group 7 does not go into the \d+ channels of conv1"):
        select(tiny_resnet, SelectionConfig(group=7))


def test_all_families_run_at_a_low_density() -> None:
    for name, build in FAMILIES.items():
        model = train_like(select(build(), density=0.2)).eval()
        with torch.no_grad():
            assert torch.isfinite(model(images())).all(), name
        for gate in gates(model).values():
            assert gate.active_BC.sum(1).max() <= gate.k, name


def test_a_channel_that_wakes_after_training_does_not_shout() -> None:
    """Never active in training: pooled variance 0. The first image on which it is must not drive saliencies off."""
    predictor = Predictor(16, torch.ones(8), SelectionConfig()).eval()
    assert predictor.standardise is not None
    assert predictor.standardise.running_var is not None
    predictor.standardise.running_var.zero_()
    with torch.no_grad():
        predictor.weight.fill_(0.1)
        asleep, awake = torch.zeros(1, 16, 4, 4), torch.zeros(1, 16, 4, 4)
        awake[:, 3] = 1.0
        rise_BC = predictor(awake) - predictor(asleep)
    assert 0 < float(rise_BC.max()) <= 0.1 * 10 / 16**0.5 + 1e-6  # ten standard deviations at most, over sqrt(C)


def test_densities_that_cannot_be_change_nothing(tiny_resnet: nn.Module) -> None:
    with pytest.raises(ConfigError, match="carries no selection"):
        set_density(tiny_resnet, 0.5)
    model = select(tiny_resnet)
    before = densities(model)
    first = next(iter(before))
    for wrong, why in (({first: 0.3, "nope": 0.5}, "called nope"), ({first: 0.3, "conv1": 0}, "lies in"),
                       (None, "a number in"), ("much", "a number in")):  # fmt: skip
        with pytest.raises(ConfigError, match=why):
            set_density(model, wrong)  # type: ignore[arg-type]
        assert densities(model) == before
    set_density(model, torch.tensor(0.5))  # type: ignore[arg-type]
    assert set(densities(model).values()) == {0.5}


def test_a_branch_that_is_still_zero_can_learn() -> None:
    plain = timm.create_model("resnet18", num_classes=3, layers=(1, 1, 1, 1), channels=(8, 8, 8, 8))
    assert not plain.layer1[0].bn2.weight.any()  # as timm makes them
    model = select(plain)
    with torch.no_grad():
        assert (model.eval()(images()) - plain.eval()(images())).abs().max() < 1e-4
    model.train()(images()).square().sum().backward()
    unit = model.layer1[0].conv2
    assert float(unit.beta.grad.abs().sum()) > 0
    assert float(unit.gate.predictor.bias.grad.abs().sum()) > 0


def test_a_network_in_double_precision(tiny_resnet: nn.Module) -> None:
    model = select(tiny_resnet.double(), density=0.5).eval()
    assert model(images().double()).dtype == torch.float64
