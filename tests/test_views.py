"""A settled network may look at smaller images than its teacher: sizes, maps, and a whole run of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from afds import fitting
from afds.artifact import load_run
from afds.config import (
    DataConfig,
    DescentConfig,
    FitConfig,
    LatencyConfig,
    OptimConfig,
    RecoveryConfig,
    resolve_method,
)
from afds.cost import measure_cost
from afds.data import Augment, Preprocess, TwoViews, train_transform, write_digits
from afds.distillation import FrozenNetwork
from afds.errors import ConfigError
from afds.evaluation import evaluate_folder
from afds.files import read_json
from afds.fitting import fit, read_photos
from afds.hardware import make_fabric
from afds.measure import measure_run
from afds.mixing import mix
from afds.progress import Progress
from afds.runtime import is_built
from afds.setup import Setup
from afds.views import averaged, views_of
from runs import changed

ARCH = '{"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_width": 8}'


@pytest.mark.parametrize("photo_side", [40, 90, 400])
def test_two_views_show_the_same_part_as_sharply_as_one(photo_side: int) -> None:
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 255, (photo_side, photo_side + 8, 3), dtype=np.uint8))
    large = Preprocess(32, 36, "bicubic", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    augment = Augment(colour=0.3)
    views = TwoViews(train_transform(large, augment), train_transform(large.at(24), augment))
    torch.manual_seed(3)
    one, two = views(photo)
    after = torch.rand(())
    torch.manual_seed(3)
    assert torch.equal(one, train_transform(large, augment)(photo))
    assert torch.equal(after, torch.rand(()))  # nothing after it depends on there being two
    assert two.shape == (3, 24, 24)
    coarse = [F.interpolate(view[None], (6, 6), mode="area") for view in (one, two)]
    assert torch.corrcoef(torch.stack([c.flatten() for c in coarse]))[0, 1] > 0.8


def test_views_of_a_batch() -> None:
    x, y = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 6, 6)
    assert views_of(x)[0] is views_of(x)[-1] is x
    assert views_of([x, y])[0] is x
    assert views_of([x, y])[-1] is y
    mixed, other, share = mix([x, y], 1.0)
    for blend, view in zip(mixed, (x, y), strict=True):
        assert torch.allclose(blend, share * view + (1 - share) * view[other], atol=1e-6)


def test_averaged_keeps_means_and_leaves_equal_sizes_alone() -> None:
    maps = {"a": torch.randn(2, 3, 8, 8), "b": torch.randn(2, 3, 4, 4)}
    found = averaged(maps, {"a": (4, 4), "b": (4, 4)})
    assert found["b"] is maps["b"]
    assert torch.allclose(found["a"].mean((2, 3)), maps["a"].mean((2, 3)), atol=1e-6)
    assert averaged(maps, {}) == maps


def test_a_teacher_looks_from_the_size_of_its_target(tiny_resnet: torch.nn.Module) -> None:
    frozen = FrozenNetwork(tiny_resnet, ["layer1.0.conv2", "layer4.0.conv2"])
    own = {name: value.shape for name, value in frozen(torch.randn(1, 3, 48, 48))[1].items()}
    frozen.look_from(48)
    logits, features = frozen(torch.randn(2, 3, 64, 64))
    assert logits.shape[0] == 2
    assert {name: value.shape[1:] for name, value in features.items()} == {n: s[1:] for n, s in own.items()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits at 32 px, and in `dense` a network that was fine-tuned on them."""
    path = tmp_path_factory.mktemp("views")
    write_digits(path / "digits", range(3), per_class=20, test_per_class=10)
    fit(options(path, path / "dense", method="scratch+dense", budget="", descent=DescentConfig()), quiet=True)
    return path


def options(place: Path, out: Path, **changes: Any) -> FitConfig:
    config = FitConfig(
        data=place / "digits", out=out, source="resnet18", arch_args=ARCH, method="afds", budget="3x",
        data_options=DataConfig(input_size=32, flip=False, workers=0, val_fraction=0.2),
        optim=OptimConfig(epochs=3, batch_size=8, lr=0.05),
        descent=DescentConfig(images=8, reconstruct=32, multiple_of=2, input_size=24),
    )  # fmt: skip
    return changed(config, changes)


def test_a_run_on_smaller_images_meets_its_budget_and_resumes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = str(place / "dense")
    result = fit(options(place, place / "whole", source=source), quiet=True)
    dense, run = load_run(source), load_run(place / "whole")
    full = measure_cost(dense.model, [torch.randn(1, 3, 32, 32)]).dense
    counted = measure_cost(run.model, [torch.randn(4, 3, 24, 24)]).counted
    assert result.cost.dense == full
    assert result.cost.counted == pytest.approx(counted)
    assert 3 <= full / counted < 4
    assert (run.preprocess.input_size, dense.preprocess.input_size) == (24, 32)
    assert (run.preprocess.resize, dense.preprocess.resize) == (26, 35)  # not the source's: the crops are ours
    (stage,) = [json.loads(s) for s in (place / "whole/metrics.jsonl").read_text().splitlines() if '"stage"' in s]
    assert stage["ratio"] == pytest.approx(result.cost.ratio)
    assert "24 px, dense 32 px" in (place / "whole/report.html").read_text()
    again = evaluate_folder(place / "whole", place / "digits", "test").metrics
    assert result.test is not None
    assert (again.top1, again.cost and again.cost.ratio) == (result.test.top1, pytest.approx(result.cost.ratio))

    def interrupt(self: object, event: dict[str, Any]) -> None:
        if event.get("step") == 9:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fitting.Progress, "update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(options(place, place / "broken", source=source), quiet=True)
    fit(FitConfig(resume=place / "broken"), quiet=True)
    same = [(place / name / "model.safetensors").read_bytes() for name in ("whole", "broken")]
    assert same[0] == same[1]


def test_without_the_option_the_network_looks_at_what_its_teacher_sees(place: Path) -> None:
    changes = {"source": str(place / "dense"), "budget": "5x", "descent": DescentConfig(images=8, reconstruct=16)}
    fit(options(place, place / "same", **changes), quiet=True)
    record = read_json(place / "same/config.json")
    assert record["resolved"]["input_size"] == record["resolved"]["taught_at"] == 32


def test_the_refit_sees_crops_in_the_network_s_size_the_same_whenever_asked(place: Path) -> None:
    descent = DescentConfig(images=8, reconstruct=100, multiple_of=2, input_size=24)
    config = resolve_method(options(place, place / "crops", source=str(place / "dense"), descent=descent))
    splits, _ = read_photos(config, Progress(quiet=True))
    setup = Setup(config, splits, make_fabric(config.hardware))
    assert setup.plan.refit_on is not None
    before = torch.get_rng_state()
    crops = torch.cat(list(setup.plan.refit_on()))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.cat(list(setup.plan.refit_on())), crops)
    assert crops.shape == (100, 3, 24, 24)
    assert len(torch.unique(crops.flatten(1), dim=0)) == 100  # 48 photos: other crops when their turn comes again
    each, more = 8 * len(splits.train), dataclasses.replace(descent, reconstruct=10_000)
    setup = Setup(dataclasses.replace(config, descent=more), splits, make_fabric(config.hardware))
    assert setup.plan.refit_on is not None
    assert sum(map(len, setup.plan.refit_on())) == each


def test_a_run_and_its_refit_draw_other_crops_than_the_run_that_it_starts_from(place: Path) -> None:
    def crops(**changes: Any) -> tuple[set[bytes], set[bytes]]:
        config = resolve_method(options(place, place / "draws", recovery=RecoveryConfig(colour=0), **changes))
        setup = Setup(config, read_photos(config, Progress(quiet=True))[0], make_fabric(config.hardware))
        seen = {x.numpy().tobytes() for x_BCHW, _ in setup.plan.train_loader for x in x_BCHW}
        refit = setup.plan.refit_on() if setup.plan.refit_on is not None else ()
        return seen, {x.numpy().tobytes() for x_BCHW in refit for x in x_BCHW}

    base, _ = crops(method="scratch+dense", budget="", descent=DescentConfig())
    run, refit = crops(source=str(place / "dense"), descent=DescentConfig(images=8, reconstruct=32, multiple_of=2))
    assert len(base) == len(run) == 48
    assert len(refit) == 32
    assert not base & run
    assert not base & refit
    assert not run & refit


@pytest.mark.parametrize("colour", [0.0, 0.9])
def test_colours_vary_after_settling_and_the_same_for_both_networks(place: Path, colour: float) -> None:
    changes = {"source": str(place / "dense"), "recovery": RecoveryConfig(colour=colour)}
    config = resolve_method(options(place, place / "colours", **changes))
    splits, _ = read_photos(config, Progress(quiet=True))
    apart = []
    for large_BCHW, small_BCHW in (x for x, _ in Setup(config, splits, make_fabric(config.hardware)).plan.train_loader):
        apart += [abs((a.mean() - b.mean()).item()) for a, b in zip(large_BCHW, small_BCHW, strict=True)]
        brightest = large_BCHW.amax((1, 2, 3))
    assert max(apart) < 0.2
    assert (float(brightest.std()) > 0.1) == (colour > 0)  # a digit's ink is white, until its brightness varies


@pytest.mark.parametrize("colour", [0.0, 0.9])
def test_colours_vary_in_other_trainings_when_asked(place: Path, colour: float) -> None:
    varied = dataclasses.replace(options(place, place / "colours").data_options, colour=colour)
    config = resolve_method(
        options(
            place, place / "varied", source=str(place / "dense"), method="l2+dense", budget="1x", data_options=varied
        )
    )
    splits, _ = read_photos(config, Progress(quiet=True))
    batches = [x_BCHW for x_BCHW, _ in Setup(config, splits, make_fabric(config.hardware)).plan.train_loader]
    assert (float(torch.cat(batches).amax((1, 2, 3)).std()) > 0.1) == (colour > 0)


def test_each_network_is_timed_on_images_of_its_own(place: Path) -> None:
    fit(options(place, place / "timed", source=str(place / "dense")), quiet=True)
    result = measure_run(place / "timed", threads=(1,), rounds=2, only=("torch", "dense", "dynamic"))
    assert (result.input_size, result.dense_size) == (24, 32)
    ratios = {row.form: row.macs_ratio for row in result.rows}
    assert ratios["dense"] == 1
    assert 3 <= ratios["dynamic"] < 4


@pytest.mark.skipif(not is_built(), reason="native runtime not built")
def test_milliseconds_are_measured_at_the_size_that_is_looked_at(place: Path) -> None:
    from afds.latency import Stopwatch

    small = Stopwatch([torch.randn(8, 3, 24, 24)], 3, LatencyConfig())(load_run(place / "dense").model)
    descent = DescentConfig(images=8, reconstruct=16, multiple_of=1, input_size=24)
    fit(
        options(place, place / "ms", source=str(place / "dense"), budget=f"{0.55 * small:.5f}ms", descent=descent),
        quiet=True,
    )
    assert load_run(place / "ms").preprocess.input_size == 24
    assert read_json(place / "ms/config.json")["config"]["latency"]["ratio"] > 1


def test_what_cannot_be_is_refused(place: Path) -> None:
    with pytest.raises(ConfigError, match="at most that"):
        fit(options(place, place / "no", source=str(place / "dense"), descent=DescentConfig(input_size=48)), quiet=True)
    cropped = DataConfig(input_size=32, workers=0, val_fraction=0.2, crop="random")
    with pytest.raises(ConfigError, match="two sizes"):
        fit(options(place, place / "no", source=str(place / "dense"), data_options=cropped), quiet=True)
    with pytest.raises(ConfigError, match="without settling"):
        DescentConfig(settle=False, input_size=24)
    assert not (place / "no").exists()
