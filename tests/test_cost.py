"""The count against a dumb loop over products, and against a well-kept counter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from afds.cost import Cost, CostMeter, LayerCost, has_selection, measure_cost
from afds.errors import SourceError
from afds.graph import convbn_units
from afds.selection import FollowingGate, SelectionConfig, SelectiveConvBN, gates, select, set_density
from networks import FAMILIES, mobilenetv2, mobilenetv3, randomise_bn, regnet, resnet_basic, train_like, vgg


def images(count: int = 2, side: int = 32, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


# --- A count of products that knows nothing of graphs


def transparent(model: nn.Module) -> nn.Module:
    """Replace activations so that a suppressed channel is the only one whose map can be zero.

    A ReLU may silence a whole channel that was computed and paid for; with these a zero map means a suppressed
    one, so that the loop below can read the active sets off the data, without the counter's help.
    """
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            kind = type(child).__name__
            if kind in ("ReLU", "ReLU6", "Hardswish", "HardSwish", "SiLU"):
                setattr(parent, name, nn.LeakyReLU(0.5))
            elif kind in ("HardSigmoid", "Hardsigmoid"):
                setattr(parent, name, nn.Sigmoid())
    return model


def alive(x: Tensor) -> Tensor:
    return (x != 0).flatten(2).any(2) if x.dim() == 4 else x != 0


def count_products(conv: nn.Conv2d | nn.Linear, into_BC: Tensor, out_BC: Tensor, area: int) -> list[int]:
    """Products with both sides active, for each image: for each output channel, each input channel of its group."""
    groups, taps = (conv.groups, conv.kernel_size[0] * conv.kernel_size[1]) if isinstance(conv, nn.Conv2d) else (1, 1)
    wide, deep = out_BC.shape[1] // groups, into_BC.shape[1] // groups
    counts = []
    for into, out in zip(into_BC.tolist(), out_BC.tolist(), strict=True):
        products = 0
        for o in range(len(out)):
            if out[o]:
                first = o // wide * deep
                for i in range(first, first + deep):
                    if into[i]:
                        products += taps * area
        counts.append(products)
    return counts


@torch.no_grad()
def dumb_count(model: nn.Module, x: Tensor) -> dict[str, dict[str, float]]:
    """Mean MACs per image of each layer: conv, predictor and scaling, from what flows through the modules."""
    counted: dict[str, dict[str, float]] = {}

    def mean(numbers: list[int]) -> float:
        return sum(numbers) / len(numbers)

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
            into_BC, area = alive(args[0]), out.shape[2] * out.shape[3] if out.dim() == 4 else 1
            if not isinstance(module, SelectiveConvBN):
                every = torch.ones(out.shape[:2], dtype=torch.bool)
                counted[name] = {"conv": mean(count_products(module, into_BC, every, area))}
                return
            out_BC, gate = alive(out), module.gate
            counted[name] = defaultdict(float, conv=mean(count_products(module.conv, into_BC, out_BC, area)))
            if isinstance(gate, FollowingGate):
                return
            rows = [c for c in range(len(gate.kept)) if gate.kept[c] and gate.dynamic[c]]
            if not rows:
                return
            rank = len(gate.predictor.reduce.weight) if gate.predictor.reduce is not None else 0
            arriving = [sum(into) for into in into_BC.tolist()]
            counted[name]["predictor"] = mean(
                [a * rank + rank * len(rows) + len(rows) if rank else a * len(rows) + len(rows) for a in arriving]
            )
            counted[name]["scaling"] = mean([sum(out[c] for c in rows) * area for out in out_BC.tolist()])

        return hook

    units = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, SelectiveConvBN))
    handles = [
        module.register_forward_hook(watch(name))
        for name, module in model.named_modules()
        if isinstance(module, SelectiveConvBN)
        or (isinstance(module, nn.Conv2d | nn.Linear) and not name.startswith(units))
    ]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return counted


def check(model: nn.Module, x: Tensor) -> Cost:
    """The meter's count is the dumb one, layer by layer and part by part."""
    expected = dumb_count(model, x)
    logits, cost = CostMeter(model)(x)
    assert set(cost.layers) == set(expected)
    for name, parts in expected.items():
        layer = cost.layers[name]
        for part in ("conv", "predictor", "scaling"):
            assert getattr(layer, part) == pytest.approx(parts.get(part, 0.0), rel=1e-9), f"{name}: {part}"
    total = sum(sum(parts.values()) for parts in expected.values())
    assert cost.counted == pytest.approx(total, rel=1e-9)
    with torch.no_grad():
        assert torch.equal(logits, model(x))
    return cost


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("density", [1.0, 0.4])
def test_the_count_is_the_number_of_products(name: str, density: float) -> None:
    mobile = name.startswith("mobile")
    # A depthwise channel is computed if it arrives, even where gamma = beta = 0 makes zero of it afterwards.
    model = transparent(randomise_bn(FAMILIES[name](), zeros=0.0 if mobile else 0.15, by_bias=True))
    selected = train_like(select(model, density=density), spread=0.5).eval()  # sigmoids must not saturate to 0
    cost = check(selected, images(side=64 if mobile else 32))
    assert cost.counted < cost.dense
    assert all(layer.dense > 0 for layer in cost.layers.values())


def test_the_count_of_a_plain_network_is_its_dense_count(family: nn.Module) -> None:
    cost = check(transparent(randomise_bn(family, zeros=0.0)), images(count=1))
    assert cost.counted == cost.dense
    assert cost.ratio == 1.0


def test_the_count_with_a_low_rank_predictor() -> None:
    model = transparent(randomise_bn(resnet_basic()))
    config = SelectionConfig(predictor="low-rank", rank_divisor=3)
    cost = check(train_like(select(model, config, density=0.5)).eval(), images())
    layer = cost.layers["layer3.0.conv1"]
    assert layer.predictor < layer.active_in * 16


PROPERTY_NET = transparent(randomise_bn(resnet_basic(), by_bias=True)).eval()


@given(st.integers(0, 2**31 - 1), st.floats(0, 1), st.floats(0, 0.9))
@settings(max_examples=12)
def test_the_count_for_any_densities_and_masks(seed: int, static: float, pruned: float) -> None:
    model = train_like(select(PROPERTY_NET).eval(), seed, static=static, pruned=pruned)
    generator = torch.Generator().manual_seed(seed)
    set_density(model, {name: float(torch.rand((), generator=generator).clamp_min(0.02)) for name in gates(model)})
    check(model, images(side=16, seed=seed))


def test_residual_active_channels_are_the_union_per_image() -> None:
    model = train_like(select(randomise_bn(resnet_basic()), density=0.3), static=0.0, pruned=0.0).eval()
    x = images(count=6)
    _, cost = CostMeter(model)(x)
    block = model.layer2[0]
    union_BC = block.conv2.gate.active_BC | block.downsample[0].gate.active_BC
    assert cost.layers["layer3.0.conv1"].active_in == pytest.approx(float(union_BC.sum(1).double().mean()))
    assert cost.layers["layer3.0.conv1"].active_in == cost.layers["layer3.0.downsample.0"].active_in
    assert cost.layers["layer3.0.conv1"].active_in > cost.layers["layer2.0.conv2"].active_out


def test_static_scales_fold_into_the_weights() -> None:
    model = select(randomise_bn(resnet_basic(), zeros=0.0), density=0.5).eval()
    for gate in gates(model).values():
        gate.dynamic.fill_(False)
    _, cost = CostMeter(model)(images())
    assert all(layer.predictor == layer.scaling == 0 for layer in cost.layers.values())
    assert cost.layers["layer1.0.conv2"].conv == cost.layers["layer1.0.conv2"].dense / 4  # half of both sides


def test_the_formula_by_hand() -> None:
    """One 3x3 convolution 4 -> 6 after one of 3 -> 4, on 8 x 8 pixels, half of the channels."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip
    cost = measure_cost(select(model, density=0.5).eval(), [images(side=8)])
    first, second, head = cost.layers.values()
    assert (first.conv, first.predictor, first.scaling) == (3 * 2 * 64, 3 * 4 + 4, 2 * 64)
    assert (second.conv, second.predictor, second.scaling) == (9 * 2 * 3 * 64, 2 * 6 + 6, 3 * 64)
    assert (head.conv, head.predictor, head.scaling) == (3 * 5, 0, 0)
    assert [layer.dense for layer in cost.layers.values()] == [3 * 4 * 64, 9 * 4 * 6 * 64, 6 * 5]
    assert cost.ratio == pytest.approx((768 + 13824 + 30) / (384 + 16 + 128 + 3456 + 18 + 192 + 15))


# --- Against torch's counter, which counts 2 per MAC


def torch_count(model: nn.Module, x: Tensor) -> float:
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        model(x)
    return flops.get_total_flops() / 2 / len(x)


def test_dense_is_what_a_well_kept_counter_says(family: nn.Module) -> None:
    x = images(count=2, side=64)
    expected = torch_count(family, x)
    assert CostMeter(family)(x)[1].dense == expected
    assert CostMeter(select(family, density=0.3))(x)[1].dense == expected


def test_the_head_of_a_vgg_is_counted_at_any_size(tiny_vgg: nn.Module) -> None:
    for side in (32, 96):  # smaller and larger than the 7 x 7 that its head wants
        x = images(side=side)
        assert CostMeter(tiny_vgg)(x)[1].dense == torch_count(tiny_vgg, x)


# --- Manners


def test_logits_are_the_models_and_its_modes_stay(family: nn.Module) -> None:
    model = train_like(select(family, density=0.5)).eval()
    x = images()
    with torch.no_grad():
        expected = model(x)
    for index, module in enumerate(model.modules()):
        module.training = index % 3 == 0
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits, cost = CostMeter(model)(x)
    assert torch.equal(logits, expected)
    assert not logits.requires_grad
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert cost.images == 2


def test_a_meter_follows_the_densities_of_its_model() -> None:
    model = select(randomise_bn(regnet())).eval()
    meter = CostMeter(model)
    dense = meter(images())[1]
    set_density(model, 0.25)
    sparse = meter(images())[1]
    assert sparse.dense == dense.dense
    assert sparse.counted < dense.counted / 4


def test_batches_are_weighted_by_their_images() -> None:
    model = train_like(select(randomise_bn(vgg()), density=0.4)).eval()
    x = images(count=5)
    whole = measure_cost(model, [x])
    parts = measure_cost(model, [x[:1], x[1:3], x[3:]])
    single = [CostMeter(model)(x[i : i + 1])[1].counted for i in range(5)]
    assert parts.images == whole.images == 5
    assert parts.counted == pytest.approx(whole.counted) == pytest.approx(sum(single) / 5)
    for name, layer in whole.layers.items():
        assert vars(parts.layers[name]) == pytest.approx(vars(layer))


def test_cost_adds_up() -> None:
    cost = Cost({"a": LayerCost(dense=100, conv=10, predictor=2, scaling=3, channels_out=4)}, images=1)
    cost.add(Cost({"a": LayerCost(dense=100, conv=40, predictor=2, scaling=9, channels_out=4)}, images=2))
    assert cost.images == 3
    assert (cost.dense, cost.counted) == (100, 30 + 2 + 7)
    assert cost.ratio == 100 / 39


def test_has_selection() -> None:
    model = resnet_basic()
    assert not has_selection(model)
    assert has_selection(select(model))


@pytest.mark.parametrize("build", [mobilenetv2, mobilenetv3])
def test_depthwise_units_cost_neither_predictor_nor_scaling(build: Callable[[], nn.Module]) -> None:
    model = select(randomise_bn(build()), density=0.5).eval()
    _, cost = CostMeter(model)(images(side=64))
    depthwise = [u.name for u in convbn_units(build()) if u.depthwise]
    assert depthwise
    for name in depthwise:
        layer = cost.layers[name]
        assert layer.predictor == layer.scaling == 0
        assert layer.active_in == layer.active_out
        assert layer.conv == pytest.approx(layer.dense * layer.active_out / layer.channels_out)


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return torch.flip(self.norm(self.conv(x)), (1,))


class Twice(Unknown):
    def forward(self, x):
        return self.norm(self.conv(x)) + self.conv(x)


@pytest.mark.parametrize(("net", "reason"), [(Unknown, "flip"), (Twice, "conv runs twice")])
def test_what_cannot_be_counted_is_named_without_the_graphs_noise(net: type[nn.Module], reason: str) -> None:
    with pytest.raises(SourceError, match=reason) as caught:
        CostMeter(net().eval())(images())
    assert "While executing" not in str(caught.value)
