"""Compaction changes no output; what it cuts is only what is never used; the rest still learns."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from afds.artifact import load_run, save_run
from afds.compaction import compact, densify, find_couplings, freeze, kept_channels, static, widths
from afds.cost import measure_cost
from afds.errors import ConfigError, RunFolderError
from afds.files import read_json, write_json
from afds.masks import update_masks
from afds.selection import SelectionConfig, gates, select, selective_units, set_density
from networks import FAMILIES, randomise_bn, train_like
from runs import PREPROCESS, tiny_network

CONFIGS = [SelectionConfig(), SelectionConfig(predictor="low-rank"), SelectionConfig(standardise=False)]


def images(count: int = 3, side: int = 64, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def numbers(model: nn.Module) -> int:
    return sum(t.numel() for t in model.state_dict().values())


@torch.no_grad()
def assert_same(one: nn.Module, other: nn.Module, x_BCHW: Tensor, *, single: bool = False) -> None:
    """Equal to 1e-5; in float64, where rounding does not turn near ties between winners, unless `single`."""
    a, b = (m.eval()(x_BCHW) if single else copy.deepcopy(m).eval().double()(x_BCHW.double()) for m in (one, other))
    tolerance = 1e-5
    assert float((a - b).abs().max()) <= tolerance * max(1.0, float(a.abs().max()))


@torch.no_grad()
def everyone_prunes(model: nn.Module, share: float = 0.3) -> nn.Module:
    """Prune the first channels of every unit, so that those of the streams go too."""
    for gate in gates(model).values():
        gate.kept[: int(share * len(gate.kept))] = False
    return model


@pytest.mark.parametrize("config", CONFIGS, ids=["full", "low-rank", "raw"])
def test_outputs_stay_and_size_falls(family: nn.Module, config: SelectionConfig) -> None:
    model = everyone_prunes(train_like(select(family, config, density=0.5))).eval()
    small = compact(model)
    assert numbers(small) < 0.8 * numbers(model)
    assert_same(model, small, images())
    assert_same(model, small, images(1, side=49))  # an odd size
    if config.standardise:  # raw pooling makes logits of any size
        assert_same(model, small, images(), single=True)
    before, after = (measure_cost(copy.deepcopy(m).double(), [images().double()]) for m in (model, small))
    assert after.dense == before.dense
    assert after.ratio >= before.ratio * (1 - 1e-9)
    assert numbers(compact(small)) == numbers(small)  # nothing is left to cut


@settings(max_examples=12)
@given(
    seed=st.integers(0, 10_000), pruned=st.floats(0.0, 0.95), fixed=st.floats(0.0, 1.0),
    density=st.floats(0.05, 1.0), name=st.sampled_from(list(FAMILIES)), multiple=st.sampled_from([1, 4, 8]),
    group=st.sampled_from([1, 1, 2, 4]),
)  # fmt: skip
def test_any_masks(
    seed: int, pruned: float, fixed: float, density: float, name: str, multiple: int, group: int
) -> None:
    torch.manual_seed(seed)
    plain = randomise_bn(FAMILIES[name](), seed)
    model = train_like(select(plain, SelectionConfig(group=group), density=density), seed, static=fixed, pruned=pruned)
    if seed % 2:
        everyone_prunes(model, pruned)
        for gate in gates(model).values():
            gate.kept[-1] = True
    x_BCHW = images(2, side=33, seed=seed)
    assert_same(model, compact(model, multiple_of=multiple), x_BCHW)
    frozen = freeze(model, [x_BCHW])
    assert_same(frozen, densify(compact(frozen, multiple_of=multiple)), x_BCHW)


def test_residual_streams_lose_only_what_all_writers_prune(tiny_bottleneck: nn.Module) -> None:
    model = select(tiny_bottleneck).eval()
    chosen = gates(model)
    writers = ["layer2.0.conv3", "layer2.0.downsample.0", "layer2.1.conv3"]
    for i, name in enumerate(writers):
        chosen[name].kept[:4] = False  # all of them
        chosen[name].kept[4 + i] = False  # one of them
    chosen["layer2.0.conv1"].kept[1] = False
    kept, small = kept_channels(model), compact(model)
    for name in writers:
        assert kept[name].tolist() == list(range(4, 16))
        assert small.get_submodule(name).conv.out_channels == 12
        assert int(gates(small)[name].kept.sum()) == 11
    assert kept["layer2.0.conv1"].tolist() == [0, 2, 3]
    assert small.get_submodule("layer2.0.conv2").conv.weight.shape[1] == 3
    assert small.get_submodule("layer2.1.conv1").conv.weight.shape[1] == 12
    assert small.get_submodule("layer3.0.conv1").gate.predictor.weight.shape[1] == 12
    assert_same(model, small, images())


def test_classifier_and_depthwise_follow(tiny_mobilenet: nn.Module) -> None:
    model = select(tiny_mobilenet).eval()
    last = list(gates(model).values())[-1]
    last.kept[::2] = False
    inner = gates(model)["blocks.1.0.conv_pw"]
    inner.kept[3] = False
    small = compact(model)
    assert small.classifier.in_features == int(last.kept.sum())
    assert small.num_features == small.classifier.in_features
    dw = small.get_submodule("blocks.1.0.conv_dw").conv
    assert dw.in_channels == dw.out_channels == dw.groups == len(inner.kept) - 1
    assert_same(model, small, images())
    small.reset_classifier(7)
    assert small(images()).shape == (3, 7)


def test_predictors_lose_the_rows_of_static_channels(tiny_resnet: nn.Module) -> None:
    model = train_like(select(tiny_resnet, density=0.5), static=0.5, pruned=0.0).eval()
    small = compact(model)
    for (_, before), (_, after) in zip(gates(model).items(), gates(small).items(), strict=True):
        assert after.predictor.weight.shape[0] == int(before.dynamic.sum())
    assert_same(model, small, images())
    still = gates(small)["layer1.0.conv1"]
    still.reset_masks()  # what has no row stays static
    assert torch.equal(still.dynamic, still.predicted)
    assert small(images()).shape == (3, 5)


def test_a_plain_network_loses_dead_channels(tiny_vgg: nn.Module) -> None:
    randomise_bn(tiny_vgg, zeros=0.5)
    small = compact(tiny_vgg)
    assert numbers(small) < numbers(tiny_vgg)
    assert_same(tiny_vgg, small, images(side=48))
    assert numbers(compact(small)) == numbers(small)


def test_it_still_learns(family: nn.Module) -> None:
    small = compact(everyone_prunes(train_like(select(family, density=0.5)))).train()
    before = {name: p.detach().clone() for name, p in small.named_parameters()}
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    F.cross_entropy(small(images(4)), torch.tensor([0, 1, 2, 3])).backward()
    optimizer.step()
    moved = {name for name, p in small.named_parameters() if not torch.equal(p, before[name])}
    assert any("gate.predictor.weight" in name for name in moved)
    assert any(name.endswith("conv.weight") for name in moved)
    set_density(small, 0.3)
    update_masks(small, [images(4)], static_quantile=0.2, prune_quantile=0.2)
    assert_same(small, compact(small), images())


def test_the_original_is_left_alone(tiny_resnet: nn.Module) -> None:
    model = everyone_prunes(train_like(select(tiny_resnet, density=0.5))).eval()
    before = copy.deepcopy(model.state_dict())
    compact(model), static(model, [images()])
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_multiples(tiny_resnet: nn.Module) -> None:
    model = train_like(select(tiny_resnet), pruned=0.6).eval()
    assert all(width % 4 == 0 for width in widths(compact(model, multiple_of=4)).values())


# --- Static


def test_static_computes_what_wins_most(tiny_resnet: nn.Module) -> None:
    model = train_like(select(tiny_resnet, density=0.4), static=0.0, pruned=0.0).eval()
    frozen = freeze(model, [images(8), images(8, seed=2)])
    always: dict[str, Tensor] = {}
    with torch.no_grad():
        for seed in (1, 2):
            model(images(8, seed=seed))
            for name, gate in gates(model).items():
                always[name] = gate.active_BC.all(0) & always.get(name, torch.tensor(True))
    for name, gate in gates(frozen).items():
        assert int(gate.kept.sum()) <= gates(model)[name].k
        assert not (always[name] & ~gate.kept).any()  # a channel that won every time is in
        assert not gate.dynamic.any()
    small = static(model, [images(8), images(8, seed=2)])
    assert not list(selective_units(small))
    assert_same(frozen, small, images())
    assert measure_cost(small, [images()]).dense == measure_cost(model, [images()]).dense


def test_what_chooses_is_not_dense(tiny_resnet: nn.Module) -> None:
    with pytest.raises(ConfigError, match="still chooses"):
        densify(select(tiny_resnet))


def test_static_of_a_network_without_selection_in_effect_is_the_network(family: nn.Module) -> None:
    """At d = 1 and the identity start, freezing changes nothing, and timm's own modules come back."""
    small = densify(freeze(select(family), [images()]))
    assert [type(m) for m in small.modules()] == [type(m) for m in family.modules()]
    assert_same(family, small, images())


# --- Files

FAMILIES_ON_FILE: dict[str, tuple[str, dict[str, Any]]] = {
    "basic": ("resnet18", {"layers": (1, 1, 1, 1), "channels": (8, 16, 16, 24)}),
    "bottleneck": ("resnet50", {"layers": (1, 2, 1, 1), "channels": (4, 4, 8, 8)}),
    "mobilenetv2": ("mobilenetv2_035", {}),
    "mobilenetv3": ("mobilenetv3_small_050", {}),
}


def save(out: Path, model: nn.Module, arch: str, args: dict[str, Any], selection: SelectionConfig | None) -> Path:
    save_run(out, model=model, arch=arch, arch_args=args, num_classes=3, selection=selection,
             labels=["a", "b", "c"], preprocess=PREPROCESS, summary={})  # fmt: skip
    return out


@pytest.mark.parametrize("name", list(FAMILIES_ON_FILE))
@pytest.mark.parametrize("config", CONFIGS, ids=["full", "low-rank", "raw"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_reloads_bit_for_bit(tmp_path: Path, name: str, config: SelectionConfig, channels_last: bool) -> None:
    arch, args = FAMILIES_ON_FILE[name]
    model = everyone_prunes(tiny_network(selection=config, arch=arch, **args))
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    whole = save(tmp_path / "whole", model, arch, args, config)
    for kind, small, selection in (
        ("compact", compact(model), config),
        ("static", static(model, [images()]), None),
    ):
        out = save(tmp_path / kind, small, arch, args, selection)
        run = load_run(out)
        with torch.no_grad():
            assert torch.equal(run.model(images()), small(images()))
        assert run.structure["format"] == (2 if selection else 1)
        assert measure_cost(run.model, [images()]).dense == measure_cost(model, [images()]).dense
        sizes = [(path / "model.safetensors").stat().st_size for path in (out, whole)]
        assert sizes[0] < 0.8 * sizes[1]
        assert numbers(compact(run.model)) == numbers(small)


HOSTILE: list[tuple[str, Any, str]] = [
    ("widths.layer1.0.conv1", 0, "whole number from 1"),
    ("widths.layer1.0.conv1", 10**9, "whole number from 1"),
    ("widths.layer1.0.conv1", 2.5, "whole number from 1"),
    ("widths.layer1.0.conv1", True, "whole number from 1"),
    ("widths.layer1.0.conv1", "8", "whole number from 1"),
    ("widths.layer1.0.conv1", 3, "model.safetensors"),
    ("widths.fc", 3, "no such convolution"),
    ("widths.evil", 3, "no such convolution"),
    ("widths.layer2.0.conv2", 3, "tied"),
    ("widths.layer2.0.conv2", None, "tied"),
    ("widths", [], "should be an object"),
    ("predictors.layer1.0.conv1", -1, "whole number from 0 to"),
    ("predictors.layer1.0.conv1", 10**9, "whole number from 0 to"),
    ("predictors.layer1.0.conv1", 1, "model.safetensors"),
    ("predictors.evil", 1, "no predictor"),
    ("predictors", "x", "should be an object"),
    ("ranks", {"layer1.0.conv1": 1}, "it is not low-rank"),
    ("ranks", {"evil": 1}, "no predictor"),
    ("ranks", 3, "should be an object"),
]


@pytest.mark.parametrize(("where", "value", "message"), HOSTILE)
def test_hostile_structures_are_refused(tmp_path: Path, where: str, value: Any, message: str) -> None:
    arch, args = FAMILIES_ON_FILE["basic"]
    model = everyone_prunes(tiny_network(selection=SelectionConfig(), arch=arch, **args))
    run = save(tmp_path / "run", compact(model), arch, args, SelectionConfig())
    structure = read_json(run / "structure.json")
    key, _, name = where.partition(".")
    if not name:
        structure["compact"][key] = value
    elif value is None:
        del structure["compact"][key][name]
    else:
        structure["compact"][key][name] = value
    write_json(run / "structure.json", structure)
    with pytest.raises(RunFolderError, match=message):
        load_run(run)


def test_masks_that_do_not_go_with_the_rows(tmp_path: Path) -> None:
    arch, args = FAMILIES_ON_FILE["basic"]
    model = compact(tiny_network(selection=SelectionConfig(), arch=arch, **args))
    gate = gates(model)["layer1.0.conv1"]
    gate.predicted[gate.predicted.nonzero()[0]] = False
    with pytest.raises(RunFolderError, match="do not go with the rows"):
        load_run(save(tmp_path / "run", model, arch, args, SelectionConfig()))


def test_structure_is_data(tmp_path: Path) -> None:
    arch, args = FAMILIES_ON_FILE["basic"]
    model = everyone_prunes(tiny_network(selection=SelectionConfig(), arch=arch, **args))
    run = save(tmp_path / "run", compact(model), arch, args, SelectionConfig())
    left = json.loads((run / "structure.json").read_text())["compact"]
    assert left["widths"] == widths(compact(model))
    assert find_couplings(load_run(run).model).producers().keys() >= left["widths"].keys()


@pytest.mark.parametrize("name", ["resnet-basic", "resnet-bottleneck", "mobilenetv2"])
def test_the_native_runtime_takes_compacted_networks(name: str) -> None:
    runtime = pytest.importorskip("afds.runtime")
    if not runtime.is_built():
        pytest.skip("the native runtime is not built")
    model = train_like(select(randomise_bn(FAMILIES[name]()), density=0.5), spread=0.5)
    small, x_BCHW = compact(everyone_prunes(model)).eval(), images(2, side=40)
    with torch.no_grad():
        expected = small(x_BCHW)
    logits = torch.from_numpy(runtime.compile(small, input_size=40)(x_BCHW.numpy()))
    assert float((logits - expected).abs().max()) < 1e-3 * float(expected.abs().max())
