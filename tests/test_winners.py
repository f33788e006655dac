"""What the predictors do, measured: against slow loops, and on networks whose answer is known."""

from __future__ import annotations

import itertools
import json
import statistics
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from afds.artifact import load_run
from afds.cli import main
from afds.errors import ConfigError, DataError
from afds.evaluation import eval_batches, labelled_items
from afds.inspection import Inspection
from afds.report.winners import NOTHING, summary
from afds.selection import SelectionConfig, gates, select, set_density
from afds.winners import measure_winners
from networks import FAMILIES, randomise_bn, train_like
from runs import write_photos, write_run


def batches(x_NCHW: Tensor, y_N: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x_NCHW.split(size), y_N.split(size), strict=True))


def network(name: str, seed: int, density: float, **like: float) -> nn.Module:
    torch.manual_seed(seed)
    model = select(randomise_bn(FAMILIES[name](), seed), SelectionConfig(), density=density)
    return train_like(model, seed, **like).eval()


def seen_one_by_one(model: nn.Module, x_NCHW: Tensor) -> dict[str, list[tuple[list[float], set[int]]]]:
    """Saliencies and winners of each gate for each image by itself."""
    found: dict[str, list[tuple[list[float], set[int]]]] = {name: [] for name in gates(model)}
    inputs: dict[str, Tensor] = {}
    handles = [g.register_forward_pre_hook(lambda _, a, name=name: inputs.update({name: a[0]}))
               for name, g in gates(model).items()]  # fmt: skip
    with torch.no_grad():
        for x_CHW in x_NCHW:
            model(x_CHW[None])
            for name, gate in gates(model).items():
                pi = gate(inputs[name])[0].tolist()
                found[name].append(
                    (gate.saliency(inputs[name])[0].tolist(), {c for c, value in enumerate(pi) if value != 0})
                )
    for handle in handles:
        handle.remove()
    return found


def mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


@settings(max_examples=15)
@given(
    name=st.sampled_from(["resnet-basic", "resnet-bottleneck", "mobilenetv2"]),
    seed=st.integers(0, 50),
    density=st.sampled_from([1e-3, 0.2, 0.5, 0.8, 1.0]),
    images=st.integers(2, 9),
    classes=st.integers(1, 4),
    size=st.integers(1, 9),
    static=st.sampled_from([0.0, 0.3, 1.0]),
    pruned=st.sampled_from([0.0, 0.4]),
)
def test_equals_a_slow_loop(
    name: str, seed: int, density: float, images: int, classes: int, size: int, static: float, pruned: float
) -> None:
    model = network(name, seed, density, static=static, pruned=pruned, spread=0.5)
    x_NCHW, y_N = torch.randn(images, 3, 33, 33), torch.randint(classes, (images,))
    found = measure_winners(model, batches(x_NCHW, y_N, size))
    slow = seen_one_by_one(model, x_NCHW)
    assert list(found) == list(gates(model))
    # Sums over a batch round otherwise than over one image: where that turned a near tie, only shares are close.
    for layer, per_image in slow.items():
        got, gate = found[layer], gates(model)[layer]
        rates = [sum(c in won for _, won in per_image) / images for c in range(got.channels)]
        assert got.k == gate.k
        assert got.never == pytest.approx(sum(r == 0 for r in rates) / got.channels)
        assert got.rare == pytest.approx(sum(0 < r < 0.1 for r in rates) / got.channels)
        assert got.some == pytest.approx(sum(0.1 <= r < 0.9 for r in rates) / got.channels)
        assert got.most == pytest.approx(sum(0.9 <= r < 1 for r in rates) / got.channels)
        assert got.always == pytest.approx(sum(r == 1 for r in rates) / got.channels)
        assert got.never + got.sometimes + got.always == pytest.approx(1)
        every: list[float] = []
        same: list[float] = []
        for (i, (_, a)), (j, (_, b)) in itertools.combinations(enumerate(per_image), 2):
            overlap = 2 * len(a & b) / (len(a) + len(b)) if a or b else 1.0
            every.append(overlap)
            if y_N[i] == y_N[j]:
                same.append(overlap)
        assert got.overlap == pytest.approx(mean(every), rel=1e-6)
        assert got.overlap_same == (None if not same else pytest.approx(mean(same), rel=1e-6))
        if got.overlap_different is not None and same:
            together = got.overlap_different * (len(every) - len(same)) + sum(same)
            assert together == pytest.approx(sum(every), rel=1e-6)
        kept = [c for c in range(got.channels) if bool(gate.kept[c])]
        assert got.pruned == got.channels - len(kept)
        importance = gate.importance.tolist()
        for scale, share in (([1.0] * got.channels, got.between_images), (importance, got.ranked_between_images)):
            columns = [[q[c] * scale[c] for q, _ in per_image] for c in kept]
            within = statistics.fmean(statistics.pvariance(column) for column in columns)
            total = statistics.pvariance([value for column in columns for value in column])
            assert share == pytest.approx(within / total if total else 0.0, rel=1e-3, abs=1e-6)
        columns = [[q[c] for q, _ in per_image] for c in kept]
        assert got.saliency == pytest.approx(statistics.fmean(map(statistics.fmean, columns)), rel=1e-4, abs=1e-6)
        assert got.spread_images**2 + got.spread_channels**2 == pytest.approx(
            statistics.pvariance([value for column in columns for value in column]), rel=1e-3, abs=1e-6
        )
        assert got.dead == sum(all(value == 0 for value in column) for column in columns)


def test_predictors_of_the_start_say_nothing(tiny_resnet: nn.Module) -> None:
    model = select(tiny_resnet, density=0.5)
    model.train()
    model.conv1.eval()
    found = measure_winners(model, batches(torch.randn(6, 3, 64, 64), torch.arange(6) % 3, 4))
    for name, layer in found.items():
        gate = gates(model)[name]
        assert layer.sometimes == 0
        assert layer.overlap == layer.overlap_same == layer.overlap_different == 1
        assert layer.between_images == layer.ranked_between_images == layer.spread_images == 0
        assert layer.constant == layer.channels - layer.dead
        assert layer.dead == int((gate.predictor.bias == 0).sum())
    assert model.training
    assert not model.conv1.training
    assert not any(m._forward_hooks for m in model.modules())


def test_hooks_go_when_the_network_fails(tiny_resnet: nn.Module) -> None:
    model = select(tiny_resnet)
    with pytest.raises(RuntimeError):
        measure_winners(model, [(torch.randn(2, 5, 64, 64), torch.zeros(2))])
    assert not any(m._forward_hooks for m in model.modules())


def test_a_class_that_has_winners_of_its_own(tiny_resnet: nn.Module) -> None:
    """A gate that reads the class off its input: alike within a class, apart between classes."""
    model = select(tiny_resnet, density=0.5).eval()
    gate = model.conv1.gate
    half = gate.predictor.out_channels // 2
    with torch.no_grad():
        gate.predictor.bias.fill_(1.0)
        gate.importance.fill_(1.0)
        gate.predictor.weight.zero_()
        gate.predictor.weight[:half] = 0.1
        gate.predictor.weight[half:] = -0.1
    y_N = torch.tensor([0, 0, 1, 1, 0, 1])
    x_NCHW = torch.where(y_N[:, None, None, None] == 0, 1.0, -1.0).expand(-1, 3, 64, 64)
    layer = measure_winners(model, batches(x_NCHW, y_N, 3))["conv1"]
    assert (layer.overlap_same, layer.overlap_different) == (1.0, 0.0)
    assert layer.some == 1
    assert layer.between_images == pytest.approx(1)


def test_what_is_refused(tiny_resnet: nn.Module) -> None:
    image = (torch.randn(1, 3, 64, 64), torch.zeros(1))
    with pytest.raises(ConfigError, match="dense"):
        measure_winners(tiny_resnet, [image, image])
    model = select(tiny_resnet)
    set_density(model, 0.5)
    for few in ([], [image]):
        with pytest.raises(DataError, match="two or more"):
            measure_winners(model, few)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_photos(tmp_path / "photos")
    return tmp_path / "photos"


def test_inspect_from_the_command_line(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    model = write_run(run, selection=SelectionConfig())
    assert main(["inspect", str(run), "--data", str(photos)]) == 0
    out = capsys.readouterr().out
    kept = json.loads((run / "winners.json").read_text())
    assert (kept["images"], kept["classes"], kept["split"]) == (12, 3, "all")
    assert list(kept["layers"]) == list(gates(model))
    assert kept["weights_sha256"] == json.loads((run / "structure.json").read_text())["weights"]["sha256"]
    assert all(name[:10] in out for name in kept["layers"])
    assert "Two images share" in out
    report = (run / "report.html").read_text()
    assert "Which channels win" in report
    assert "of other weights" not in report
    items = labelled_items(load_run(run), photos, "all")[1]
    again = measure_winners(model, eval_batches(load_run(run), items))
    assert kept["layers"] == {name: asdict(layer) for name, layer in again.items()}
    choosing = [x for x in again.values() if x.k < x.channels - x.pruned]
    assert 0 < kept["choosing"] == len(choosing)
    mean_of = sum(x.overlap * x.channels for x in choosing) / sum(x.channels for x in choosing)
    assert kept["mean"]["overlap"] == pytest.approx(mean_of)
    assert main(["inspect", str(run), "--data", str(photos), "--images", "3"]) == 0
    assert json.loads((run / "winners.json").read_text())["images"] == 3


def test_means_are_of_the_layers_that_choose(tiny_resnet: nn.Module) -> None:
    model = train_like(select(tiny_resnet, density=0.5), spread=0.5)
    set_density(model, {"conv1": 1.0})
    layers = measure_winners(model, [(torch.randn(4, 3, 64, 64), torch.arange(4))])
    two = {name: layers[name] for name in ("conv1", "layer4.0.conv1")}
    found = Inspection(4, 4, "all", "", two)
    assert two["conv1"].overlap != found.mean("overlap") == two["layer4.0.conv1"].overlap
    assert found.mean("overlap_same") is None
    assert found.to_dict()["choosing"] == 1
    nothing = Inspection(4, 4, "all", "", {"conv1": layers["conv1"]}).to_dict()
    assert summary(nothing) == [NOTHING]


def test_inspect_takes_the_photos_of_the_run(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    write_run(run, selection=SelectionConfig())
    assert main(["inspect", str(run)]) == 2
    assert "does not say which photos" in capsys.readouterr().err
    for place, message in ((tmp_path / "gone", "are not there any more"), (photos, "")):
        (run / "config.json").write_text(json.dumps({"config": {"data": str(place)}}))
        assert main(["inspect", str(run)]) == (2 if message else 0)
        assert message in capsys.readouterr().err


def test_inspect_refuses(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, run = tmp_path / "dense", tmp_path / "run"
    write_run(dense, selection=None)
    write_run(run, selection=SelectionConfig())
    for arguments, message in (
        ([str(dense), "--data", str(photos)], "carries no selection"),
        ([str(run), "--data", str(tmp_path / "nowhere")], "no such folder"),
        ([str(run), "--data", str(photos), "--images", "1"], "--images must be from 2"),
        ([str(tmp_path / "no-run")], "no-run"),
    ):
        assert main(["inspect", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not (dense / "winners.json").exists()
    assert not (run / "winners.json").exists()
