"""AFD against the equations, and the frozen networks that must stay as they are."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from afds.distillation import (
    AttentiveDistillation,
    FrozenNetwork,
    feature_sizes,
    tap,
    tap_points,
)
from afds.graph import convbn_units, residual_blocks, stage_ends
from afds.selection import select, selective_units
from afds.transfer import block_hints, l2_sp, logit_distillation


def ends_of(model: nn.Module) -> list[str]:
    return stage_ends(model, [unit.name for unit in convbn_units(model)])


def test_loss_is_the_equation() -> None:
    torch.manual_seed(1)
    sizes = {"a": 6, "b": 4}
    afd = AttentiveDistillation(sizes, hidden=3)
    target = {"a": torch.randn(2, 5, 2, 3), "b": torch.randn(2, 7, 2, 2)}
    source = {"a": torch.randn(2, 5, 2, 3), "b": torch.randn(2, 7, 2, 2)}
    loss, entropy = afd(target, source)
    expected = 0.0
    for name, phi in zip(sizes, afd.phi, strict=True):
        for b in range(2):
            scores = []
            for c in range(source[name].shape[1]):
                flat = source[name][b, c].reshape(-1)
                hidden = torch.relu(phi[0].weight @ flat + phi[0].bias)
                scores.append(phi[2].weight[0] @ hidden)
            rho = torch.softmax(torch.stack(scores), 0)
            for c in range(len(rho)):
                distance = torch.linalg.vector_norm(target[name][b, c] - source[name][b, c])
                expected += float((rho[c] * distance).detach()) / 2
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
    assert set(entropy) == set(sizes)
    assert all(0 <= float(e) <= 1 + 1e-5 for e in entropy.values())


def test_squared_option_squares() -> None:
    afd = AttentiveDistillation({"a": 4}, squared=True)
    target, source = {"a": torch.full((1, 3, 2, 2), 2.0)}, {"a": torch.zeros(1, 3, 2, 2)}
    loss, _ = afd(target, source)
    assert float(loss.detach()) == pytest.approx(16.0, rel=1e-5)  # 4 positions times 2 squared, rho sums to 1


def test_gradient_is_finite_where_features_agree() -> None:
    """Every run starts with target = source, where a norm has no gradient of its own."""
    afd = AttentiveDistillation({"a": 4})
    feature = torch.randn(2, 3, 2, 2, requires_grad=True)
    loss, _ = afd({"a": feature}, {"a": feature.detach().clone()})
    loss.backward()
    assert feature.grad is not None
    assert torch.isfinite(feature.grad).all()


def test_another_input_size_is_refused_in_words() -> None:
    afd = AttentiveDistillation({"a": 4})
    with pytest.raises(ValueError, match="built for 4 positions at a"):
        afd({"a": torch.zeros(1, 3, 3, 3)}, {"a": torch.zeros(1, 3, 3, 3)})


def test_folded_source_gives_the_convbn_outputs(family: nn.Module) -> None:
    """The frozen, folded copy, the plain network and the selective one at d = 1 show the same features."""
    names = ends_of(family)
    x_BCHW = torch.randn(2, 3, 64, 64)
    frozen = FrozenNetwork(family, names)
    logits, features = frozen(x_BCHW)
    with torch.no_grad(), tap(family, tap_points(family, names)) as plain:
        expected = family(x_BCHW)
    selective = select(family).eval()
    with torch.no_grad(), tap(selective, tap_points(selective, names)) as gated:
        selective(x_BCHW)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
    for name in names:
        scale = float(plain[name].abs().max())
        torch.testing.assert_close(features[name], plain[name], rtol=1e-3, atol=1e-4 * scale)
        torch.testing.assert_close(gated[name], plain[name], rtol=1e-3, atol=1e-4 * scale)


def test_tapped_maps_are_taken_before_the_residual_sum(tiny_resnet: nn.Module) -> None:
    """timm adds and applies the ReLU in place: a map that is not copied would show the block's output."""
    names = ends_of(tiny_resnet)
    frozen = FrozenNetwork(tiny_resnet, names)
    _, features = frozen(torch.randn(2, 3, 64, 64))
    assert all(float(f.min()) < 0 for f in features.values())  # after the ReLU nothing is negative


def test_source_stays_put_while_the_target_learns(tiny_resnet: nn.Module) -> None:
    names = ends_of(tiny_resnet)
    frozen = FrozenNetwork(tiny_resnet, names)
    before = copy.deepcopy(frozen.network.state_dict())
    target = select(tiny_resnet).train()
    x_BCHW, y_B = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])
    afd = AttentiveDistillation(feature_sizes(frozen, x_BCHW), hidden=4)
    optimizer = torch.optim.SGD([*target.parameters(), *afd.parameters()], lr=0.1)
    start = copy.deepcopy(target.state_dict())
    for _ in range(3):
        with tap(target, tap_points(target, names)) as features:
            logits = target(x_BCHW)
        loss = nn.functional.cross_entropy(logits, y_B) + 0.1 * afd(features, frozen(x_BCHW)[1])[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, value in frozen.network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(p.requires_grad for p in frozen.network.parameters())
    assert any(not torch.equal(v, start[n]) for n, v in target.state_dict().items())
    assert all(p.grad is not None for p in afd.parameters())


def test_frozen_batch_norm_of_a_selective_source_stays_put(tiny_resnet: nn.Module) -> None:
    source = select(tiny_resnet).train()
    frozen = FrozenNetwork(source, [name for name, _ in selective_units(source)][:1])
    before = copy.deepcopy(frozen.network.state_dict())
    frozen(torch.randn(4, 3, 64, 64))
    assert all(torch.equal(v, before[n]) for n, v in frozen.network.state_dict().items())


def test_hooks_go_with_the_context(tiny_resnet: nn.Module) -> None:
    points = tap_points(tiny_resnet, ends_of(tiny_resnet))
    with pytest.raises(RuntimeError), tap(tiny_resnet, points):
        raise RuntimeError("anything")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_resnet.modules())


def test_block_hints_are_relative_errors() -> None:
    teacher = {"a": torch.full((2, 3, 2, 2), 2.0), "b": torch.ones(2, 1, 1, 1)}
    target = {"a": torch.full((2, 3, 2, 2), 1.0), "b": torch.ones(2, 1, 1, 1)}
    assert float(block_hints(target, teacher, ["a", "b"])) == pytest.approx((0.25 + 0.0) / 2)


def test_residual_blocks_are_found_by_their_sums() -> None:
    assert residual_blocks(timm.create_model("resnet18", layers=(1, 2, 1, 1), channels=(4, 4, 4, 4))) == [
        "layer1.0", "layer2.0", "layer2.1", "layer3.0", "layer4.0",
    ]  # fmt: skip
    assert residual_blocks(timm.create_model("vgg11_bn", num_classes=2)) == []


def test_logit_distillation_against_the_definition() -> None:
    student, teacher = torch.randn(3, 5), torch.randn(3, 5)
    p, q = torch.softmax(teacher / 2, 1), torch.softmax(student / 2, 1)
    expected = (p * (p.log() - q.log())).sum() / 3 * 4
    torch.testing.assert_close(logit_distillation(student, teacher, 2.0), expected)
    assert float(logit_distillation(teacher, teacher, 3.0)) == pytest.approx(0, abs=1e-6)


def test_l2_sp_is_by_name() -> None:
    layer = nn.Linear(2, 1)
    start = {"weight": layer.weight.detach() - 2.0}  # the bias is new and stays out
    assert float(l2_sp(layer, start).detach()) == pytest.approx(4.0, rel=1e-5)
