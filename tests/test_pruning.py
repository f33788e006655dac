"""Channels that go: the right ones, the same ones everywhere, down to the budget, and back from a file."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from afds.artifact import load_run, save_run
from afds.compression.lowres import input_size_for, macs_at
from afds.compression.pruning import check_reachable, cut_to, plan_pruning
from afds.compression.slimming import sum_of_scales
from afds.compression.small import require_small
from afds.compression.widths import cut_tensor, narrow, then, widths
from afds.cost import CostMeter
from afds.errors import BudgetError, ConfigError, RunFolderError
from afds.fitting import cost_summary
from networks import randomise_bn
from runs import ARCH_ARGS, LABELS, PREPROCESS

SIDE = 32


def plan(network: nn.Module, ratio: float, **changes: Any) -> Any:
    reference = macs_at(network, SIDE)
    options = {"method": "l1", "scope": "auto", "stages": 1, "end": 0.5, "total_steps": 10, "input_size": SIDE}
    return plan_pruning(**{**options, **changes}, ratio=ratio, reference=reference)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["l1", "slimming"])
def test_cut_networks_hold_the_original_weights_of_what_is_kept(family: nn.Module, method: str) -> None:
    """The sharpest check of `Kept`: every tensor is the original one, cut by it; and the budget is met."""
    original = copy.deepcopy(family.state_dict())
    p = plan(family, 1.5, method=method)
    kept = cut_to(family, p, 1.5)
    for name, tensor in family.state_dict().items():
        torch.testing.assert_close(tensor, cut_tensor(name, original[name], kept), rtol=0, atol=0)
    cost = CostMeter(family, p.reference)(torch.zeros(1, 3, SIDE, SIDE))[1]
    assert 1.5 <= cost.ratio < 3
    assert cost.dense == p.reference
    assert all(parameter.requires_grad for parameter in family.parameters())
    assert family(torch.zeros(1, 3, SIDE, SIDE)).shape == (1, 5)  # no class is lost


def test_two_cuts_are_one(tiny_resnet: nn.Module) -> None:
    original = copy.deepcopy(tiny_resnet.state_dict())
    p = plan(tiny_resnet, 3.0)
    first = cut_to(tiny_resnet, p, 1.5)
    both = then(first, cut_to(tiny_resnet, p, 3.0))
    for name, tensor in tiny_resnet.state_dict().items():
        assert torch.equal(tensor, cut_tensor(name, original[name], both))


def test_l1_takes_the_channels_of_the_smallest_norm() -> None:
    model = timm.create_model("resnet18", num_classes=3, layers=(1, 1, 1, 1), channels=(8, 8, 8, 8))
    small = [1, 4, 5]
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight.fill_(1.0)
        model.layer2[0].conv1.weight[small] *= 1e-3
        model.layer2[0].conv2.weight[:, small] *= 1e-3
        model.layer2[0].bn1.weight[small] = 1e-3
    kept = cut_to(model, plan(model, 1.6), 1.6)
    gone = set(range(8)) - set(kept["layer2.0.conv1"].out.tolist())
    assert gone
    assert gone <= set(small) or set(small) <= gone
    shares = {len(kept[f"layer{i}.0.conv1"].out) for i in (1, 2, 3, 4)}
    assert len(shares) == 1  # the same share in every layer


def test_slimming_takes_the_channels_whose_scale_is_smallest_anywhere() -> None:
    model = timm.create_model("resnet18", num_classes=3, layers=(1, 1, 1, 1), channels=(8, 8, 8, 8))
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight.fill_(1.0)
        model.layer3[0].bn1.weight[[0, 2, 3, 4, 5, 6, 7]] = -1e-3  # a whole layer but one channel; the sign is no size
    kept = cut_to(model, plan(model, 1.02, method="slimming"), 1.02)
    assert kept["layer3.0.conv1"].out.tolist() == [1]
    assert len(kept["layer1.0.conv1"].out) == 8


def test_penalty_of_slimming_is_the_sum_of_scales() -> None:
    network = nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([0.5, -2.0]))
        network[2].weight.copy_(torch.tensor([0.0, 1.0, -1.0]))
    penalty = sum_of_scales(network)
    assert float(penalty.detach()) == 4.5
    penalty.backward()
    assert network[0].weight.grad.tolist() == [1.0, -1.0]


def test_stages_are_spread_and_geometric(tiny_resnet: nn.Module) -> None:
    p = plan(tiny_resnet, 8.0, stages=3, end=0.6, total_steps=100)
    assert p.stage_steps == (0, 20, 40)
    assert [p.target(i) for i in range(3)] == pytest.approx([2, 4, 8])


def test_a_hopeless_budget_is_refused(tiny_resnet: nn.Module) -> None:
    with pytest.raises(BudgetError, match="cannot be reached by pruning"):
        check_reachable(tiny_resnet, plan(tiny_resnet, 1e5))


def test_largest_side_within_a_budget(tiny_resnet: nn.Module) -> None:
    macs = macs_at(tiny_resnet, 64) / 3
    side = input_size_for(tiny_resnet, macs, 64)
    assert macs_at(tiny_resnet, side) <= macs < macs_at(tiny_resnet, side + 1)
    assert input_size_for(tiny_resnet, macs_at(tiny_resnet, 64), 64) == 64
    with pytest.raises(BudgetError, match="at 16 pixels"):
        input_size_for(tiny_resnet, 1000, 64)


def test_small_wants_a_name_and_offers_some() -> None:
    with pytest.raises(ConfigError, match=r"--small-source NAME.*resnet18 \(\d+ M\)"):
        require_small("", 200e6, 64, 10)
    assert require_small("resnet18:x.safetensors", 1.0, 64, 10) == "resnet18:x.safetensors"


def pruned_run(out: Path) -> nn.Module:
    torch.manual_seed(0)
    model = randomise_bn(timm.create_model("resnet18", num_classes=3, **ARCH_ARGS)).eval()
    p = plan(model, 3.0)
    cut_to(model, p, 3.0)
    cost = CostMeter(model, p.reference)(torch.zeros(1, 3, SIDE, SIDE))[1]
    save_run(out, model=model, arch="resnet18", arch_args=ARCH_ARGS, num_classes=3, selection=None, labels=LABELS,
             preprocess=PREPROCESS, summary=cost_summary(cost))  # fmt: skip
    return model


def test_a_pruned_network_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model = pruned_run(tmp_path / "run")
    run = load_run(tmp_path / "run")
    x_BCHW = torch.randn(3, 3, SIDE, SIDE)
    assert torch.equal(run.model(x_BCHW), model(x_BCHW))
    assert run.structure["cost"]["ratio"] >= 3
    assert widths(run.model) == run.structure["widths"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda w: w.pop("conv1"), "do not name the layers"),
        (lambda w: w.__setitem__("evil", [1, 1, 1]), "do not name the layers"),
        (lambda w: w.__setitem__("conv1", [10**9, 3, 1]), "no part of"),
        (lambda w: w.__setitem__("conv1", [0, 3, 1]), "no part of"),
        (lambda w: w.__setitem__("conv1", [True, 3, 1]), "no part of"),
        (lambda w: w.__setitem__("conv1", "7"), "no part of"),
        (lambda w: w.__setitem__("conv1", [7, 3, 2]), "no part of"),
        (lambda w: w.__setitem__("conv1", [w["conv1"][0] - 1, 3, 1]), "the network needs"),
    ],
)
def test_hostile_widths_are_refused(tmp_path: Path, change: Any, match: str) -> None:
    pruned_run(tmp_path / "run")
    path = tmp_path / "run/structure.json"
    structure = json.loads(path.read_text())
    change(structure["widths"])
    path.write_text(json.dumps(structure))
    with pytest.raises(RunFolderError, match=match):
        load_run(tmp_path / "run")


def test_widths_that_fit_the_weights_but_not_each_other_are_refused(tmp_path: Path) -> None:
    import hashlib

    from safetensors.torch import load_file, save

    pruned_run(tmp_path / "run")
    tensors = load_file(tmp_path / "run/model.safetensors")
    tensors["layer1.0.conv2.weight"] = tensors["layer1.0.conv2.weight"][:, :-1].contiguous()
    weights = save(tensors)
    (tmp_path / "run/model.safetensors").write_bytes(weights)
    path = tmp_path / "run/structure.json"
    structure = json.loads(path.read_text())
    structure["widths"]["layer1.0.conv2"][1] -= 1
    structure["weights"]["sha256"] = hashlib.sha256(weights).hexdigest()
    path.write_text(json.dumps(structure))
    with pytest.raises(RunFolderError, match="do not fit together"):
        load_run(tmp_path / "run")


def test_narrow_leaves_an_uncut_network_alone(tiny_resnet: nn.Module) -> None:
    before = {name: id(p) for name, p in tiny_resnet.named_parameters()}
    narrow(tiny_resnet, widths(tiny_resnet))
    assert {name: id(p) for name, p in tiny_resnet.named_parameters()} == before
