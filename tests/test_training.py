"""Runs on handwritten digits, small enough to be done in seconds: the whole pipeline, resumed and repeated."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from PIL import Image

from afds import fitting
from afds.artifact import is_run, load_run
from afds.checkpoint import save_checkpoint
from afds.config import (
    DataConfig,
    DescentConfig,
    FitConfig,
    OptimConfig,
    resolve_method,
)
from afds.data import write_digits
from afds.errors import BudgetError, ConfigError, DataError, RunFolderError
from afds.files import LOCK, alone_in
from afds.fitting import fit, read_result
from afds.progress import Progress
from afds.schedule import MARGIN
from afds.selection import SelectionConfig, gates, selective_units
from afds.setup import Setup, default_epochs
from afds.task import Task, learning_rate, parameter_groups
from runs import changed

ARCH = '{"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_width": 8}'


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("data") / "digits", range(3), per_class=20, test_per_class=10)


def options(data: Path, out: Path | None, **changes: Any) -> FitConfig:
    config = FitConfig(
        data=data, out=out, source="resnet18", arch_args=ARCH, method="scratch+afs", budget="3x",
        data_options=DataConfig(input_size=32, flip=False, workers=0, val_fraction=0.2),
        optim=OptimConfig(epochs=4, batch_size=8, lr=0.05), descent=DescentConfig(stages=3, images=8),
    )  # fmt: skip
    return changed(config, changes)


def lines(out: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


@pytest.fixture(scope="module")
def finished(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    fit(options(digits, out), quiet=True)
    return out


def test_run_folder_is_whole(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "config.json", "model.safetensors", "structure.json", "labels.json", "preprocess.json", "metrics.jsonl",
        "report.html",
    }  # fmt: skip
    assert not [n for n in names if n.endswith((".pkl", ".pt", ".ckpt", ".part", ".tmp"))]


def test_budget_is_met_on_validation_images(finished: Path) -> None:
    result = read_result(finished)
    assert result.cost.ratio >= 3.0
    assert lines(finished, "final")[0]["ratio"] == pytest.approx(result.cost.ratio)
    for gate in gates(load_run(finished).model).values():  # the runtime reads half the bytes
        assert torch.equal(gate.predictor.weight, gate.predictor.weight.bfloat16().float())
    stages = lines(finished, "stage")
    assert len(stages) == 3
    assert [s["target_ratio"] for s in stages] == pytest.approx([(3 * MARGIN) ** (i / 3) for i in (1, 2, 3)])


def test_record_says_what_is_needed_to_repeat(finished: Path) -> None:
    config = json.loads((finished / "config.json").read_text())
    assert config["config"]["seed"] == 0
    assert config["hardware"]["versions"]["torch"] == torch.__version__
    assert config["config"]["hardware"]["precision"] == config["hardware"]["precision"]  # what auto came to
    assert config["data"]["train"] == 48
    assert {"loss", "lr", "wait_share", "images_per_s"} <= set(lines(finished, "step")[0])
    assert len(lines(finished, "epoch")) == 4


def test_same_seed_same_network(digits: Path, finished: Path, tmp_path: Path) -> None:
    fit(options(digits, tmp_path / "again"), quiet=True)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


@pytest.mark.parametrize("stop_after", [1, 3])
def test_resumed_run_ends_where_the_unbroken_one_does(
    digits: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    """Ctrl-C in the middle of an epoch: before, inside and after the descent."""
    out = tmp_path / "broken"
    seen = []

    def interrupt(self: object, event: dict[str, Any]) -> None:
        if "done" in event:
            seen.append(event)
        elif len(seen) == stop_after and event["step"] % 6 == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fitting.Progress, "update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(options(digits, out), quiet=True)
    assert (out / "last.ckpt").exists()
    assert not is_run(out)
    with pytest.raises(RunFolderError, match=f"--resume {out}"):
        fit(options(digits, out), quiet=True)
    with alone_in(out), pytest.raises(RunFolderError, match=f"{out}: another process is training in it"):
        fit(FitConfig(resume=out), quiet=True)

    @contextlib.contextmanager
    def finished_meanwhile(folder: Path) -> Iterator[None]:
        shutil.copytree(finished, folder, dirs_exist_ok=True)
        yield

    before = tmp_path / "before"
    shutil.copytree(out, before)
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "alone_in", finished_meanwhile)
        with pytest.raises(RunFolderError, match="is finished"):
            fit(FitConfig(resume=before), quiet=True)
    fit(FitConfig(resume=out), quiet=True)
    assert not (out / LOCK).exists()
    assert (out / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    ours, theirs = lines(out, "epoch"), lines(finished, "epoch")
    assert [line["val_ce"] for line in ours] == [line["val_ce"] for line in theirs]
    assert [line["epoch"] for line in ours] == [0, 1, 2, 3]


def test_afds_goes_through_a_dense_base_and_keeps_its_classifier(digits: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "afds"
    weights = tmp_path / "weights"
    fit(options(digits, weights, method="scratch+dense", budget=""), quiet=True)
    few = DescentConfig(images=8, reconstruct=32)
    result = fit(options(digits, out, method="afds", source=str(weights), budget="2x", descent=few), quiet=True)
    assert not (out / "base").exists()  # the source knows these very classes: it is the base
    assert result.cost.ratio >= 2
    assert {"ce", "afd", "kd", "hints", "entropy"} <= set(lines(out, "step")[0])

    refit = DescentConfig(images=8, reconstruct=16)
    fit(options(digits, tmp_path / "refit", method="afds", source=str(weights), budget="2x", descent=refit), quiet=True)
    for stage in lines(tmp_path / "refit", "stage"):
        assert stage["unexplained"]
        assert all(after <= before + 1e-3 for before, after in stage["unexplained"].values())

    other = write_digits(tmp_path / "digits-3-5", range(3, 6), per_class=10, test_per_class=5)
    transfer = options(other, tmp_path / "transfer", method="afds", source=str(weights), budget="2x", base_epochs=2,
                       descent=DescentConfig(images=8, reconstruct=16))  # fmt: skip
    fit(transfer, quiet=True)
    assert is_run(tmp_path / "transfer/base")
    assert load_run(tmp_path / "transfer/base").selection is None
    assert load_run(tmp_path / "transfer").labels == ("five", "four", "three")


def one_by_one(model: torch.nn.Module) -> set[str]:
    return {name for name, unit in selective_units(model) if unit.conv.kernel_size == (1, 1)}


@pytest.mark.parametrize(
    ("scales", "predictor"), [("predicted", "full"), ("learned", "full"), ("cheap", "full"), ("predicted", "low-rank")]
)
def test_a_settled_run_is_narrow_resumes_and_keeps_no_more_than_it_computes(
    scales: Any,
    predictor: Any,
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights = tmp_path / "weights"
    fit(options(digits, weights, method="scratch+dense", budget=""), quiet=True)
    settled = DescentConfig(images=8, reconstruct=32, allocation="refit", trials=3, multiple_of=2, scales=scales)

    def config(out: Path) -> FitConfig:
        return options(digits, out, method="afds", source=str(weights), budget="2x", descent=settled,
                       selection=SelectionConfig(predictor=predictor))  # fmt: skip

    fit(config(tmp_path / "whole"))
    assert len(lines(tmp_path / "whole", "trial")) == 3
    (stage,) = lines(tmp_path / "whole", "stage")
    said = capsys.readouterr().err
    stay, all_channels = map(int, re.search(r"\n(\d+) of (\d+) channels stay, ", said).groups())  # type: ignore[union-attr]
    assert "Choosing the channels that stay ..." in said
    assert f"{stage['ratio']:.2f}x fewer MACs" in said
    assert stage["ratio"] >= 2
    assert stage["unexplained"]
    model = load_run(tmp_path / "whole").model
    chosen = gates(model)
    assert all(gate.k == gate.sign.numel() for gate in chosen.values())
    rows = [gate.predictor.out_channels for gate in chosen.values()]
    plain = {"predicted": set(), "cheap": one_by_one(model), "learned": set(chosen)}[scales]
    assert rows == [0 if name in plain else gate.sign.numel() for name, gate in chosen.items()]
    ranks = [gate.predictor.rank for gate in chosen.values()]
    assert ranks == [-(-n // 8) if predictor == "low-rank" else 0 for n in rows]
    assert sum(gate.sign.numel() for gate in chosen.values()) == stay < all_channels
    assert any(gate.sign.numel() < full for gate, full in zip(chosen.values(), [8] * 20, strict=False))
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in load_run(weights).model.parameters())

    def interrupt(self: object, event: dict[str, Any]) -> None:
        if event.get("step") == 9:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fitting.Progress, "update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(config(tmp_path / "broken"), quiet=True)
    fit(FitConfig(resume=tmp_path / "broken"), quiet=True)
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "broken")]
    assert same[0] == same[1]


def test_a_settled_run_resumes_where_some_layers_cannot_be_cut(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RegNet's grouped convolutions keep their widths; what loses there loses its predictor's row all the same."""
    weights = tmp_path / "weights"
    regnet = {"source": "regnetx_002", "arch_args": "{}", "optim": OptimConfig(epochs=2, batch_size=8)}
    fit(options(digits, weights, method="scratch+dense", budget="", **regnet), quiet=True)
    settled = DescentConfig(images=8, reconstruct=16)
    config = options(digits, tmp_path / "run", method="afds", budget="2x",
                     **{**regnet, "source": str(weights), "descent": settled})  # fmt: skip

    def interrupt(self: object, event: dict[str, Any]) -> None:
        if event.get("step") == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fitting.Progress, "update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(config, quiet=True)
    assert fit(FitConfig(resume=tmp_path / "run"), quiet=True).cost.ratio >= 2
    kept = gates(load_run(tmp_path / "run").model).values()
    assert any(not bool(gate.kept.all()) for gate in kept)


@pytest.mark.parametrize(
    "changes",
    [
        {"allocation": "refit", "trials": 1},
        {"allocation": "refit", "trials": 0},
        {"allocation": "stream"},
        {"allocation": "importance"},
        {"reconstruct": 0},
    ],
)
def test_every_way_to_settle_meets_the_budget(digits: Path, finished: Path, tmp_path: Path, changes: Any) -> None:
    weights = tmp_path / "weights"
    fit(
        options(digits, weights, method="scratch+dense", budget="", optim=OptimConfig(epochs=1, batch_size=8)),
        quiet=True,
    )
    settled = DescentConfig(**{"images": 8, "reconstruct": 16, **changes})
    result = fit(options(digits, tmp_path / "run", method="afds", source=str(weights), budget="3x", descent=settled,
                         optim=OptimConfig(epochs=1, batch_size=8)), quiet=True)  # fmt: skip
    assert result.cost.ratio >= 3
    assert bool(lines(tmp_path / "run", "stage")[0]["unexplained"]) == (settled.reconstruct > 0)


def test_the_time_before_the_first_epoch_is_told_in_steps(
    digits: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "weights"
    fit(options(digits, weights, method="scratch+dense", budget="", optim=OptimConfig(epochs=1, batch_size=8)),
        quiet=True)  # fmt: skip
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(fitting.Progress, "update", lambda _self, event: told.append(event))
    descent = DescentConfig(images=8, reconstruct=32)
    fit(options(digits, tmp_path / "run", method="afds", source=str(weights), budget="2x", descent=descent,
                optim=OptimConfig(epochs=1, batch_size=8)), quiet=True)  # fmt: skip
    begun = [event for event in told if "settling" in event]
    assert begun[0] == {"settling": "choosing channels", "done": 0, "of": 0}
    by_step: dict[str, list[tuple[int, int]]] = {}
    for event in begun[1:]:
        by_step.setdefault(event["settling"], []).append((event["done"], event["of"]))
    assert list(by_step) == ["weighing channels", "refitting layers"]  # no trials of the densities
    for counts in by_step.values():
        assert counts == [(i, len(counts)) for i in range(1, len(counts) + 1)]
    assert len(by_step["refitting layers"]) == len(gates(load_run(tmp_path / "run").model))


def test_a_network_with_channel_attention_is_settled(digits: Path, tmp_path: Path) -> None:
    base, once = tmp_path / "base", OptimConfig(epochs=1, batch_size=8)
    fit(options(digits, base, source="seresnet18", method="scratch+dense", budget="", optim=once), quiet=True)
    result = fit(options(digits, tmp_path / "run", source=str(base), method="afds", budget="2x", optim=once,
                         descent=DescentConfig(images=8, reconstruct=16, multiple_of=2)), quiet=True)  # fmt: skip
    assert result.cost.ratio >= 2
    assert lines(tmp_path / "run", "step")[-1]["hints"] > 0


def test_the_teacher_is_the_base_also_where_that_selects(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "base"
    fit(options(digits, out, budget="1x", optim=OptimConfig(epochs=1, batch_size=8, lr=0.05)), quiet=True)
    config = resolve_method(options(digits, tmp_path / "never", source=str(out), method="afds", budget="5x"))
    splits, _ = fitting.read_photos(config, Progress(quiet=True))
    fabric = Fabric(accelerator="cpu", devices=1)
    plan = Setup(config, splits, fabric).plan
    x_BCHW = torch.randn(4, 3, 32, 32)
    assert plan.teacher is not None
    assert plan.reference is not None
    base = load_run(out).model.eval()
    assert any(gate.predictor.has_learned for gate in gates(base).values())
    with torch.no_grad():
        wanted = base(x_BCHW)
        torch.testing.assert_close(plan.teacher(x_BCHW)[0], wanted)
        torch.testing.assert_close(plan.reference.eval()(x_BCHW), wanted)


def test_a_run_that_is_stopped_in_its_first_epoch_writes_nothing_twice(digits: Path, tmp_path: Path) -> None:
    def interrupt(self: object, event: dict[str, Any]) -> None:
        if event.get("step") == 5:
            raise KeyboardInterrupt

    config = options(digits, tmp_path / "run", method="scratch+dense", budget="",
                     optim=OptimConfig(epochs=1, batch_size=4))  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting.Progress, "update", interrupt)
        patch.setattr("afds.training.LOGGED", 2)
        with pytest.raises(KeyboardInterrupt):
            fit(config, quiet=True)
    assert lines(tmp_path / "run", "step")
    fit(FitConfig(resume=tmp_path / "run"), quiet=True)
    steps = [line["step"] for line in lines(tmp_path / "run", "step")]
    assert len(steps) == len(set(steps))


def test_densities_are_shared_out_as_was_measured_best_for_each_method() -> None:
    def shared_out(**changes: Any) -> str:
        return resolve_method(FitConfig(**changes)).descent.allocation

    assert shared_out(method="afds", budget="5x") == "uniform"
    assert shared_out(method="afds", budget="5x", descent=DescentConfig(settle=False)) == "importance"
    assert shared_out(method="fbs", budget="5x") == "importance"
    assert shared_out(method="afds-paper", budget="5x") == "uniform"
    assert shared_out(method="afds", budget="5x", descent=DescentConfig(allocation="refit")) == "refit"


def test_source_step_runs_first_with_selection(digits: Path, tmp_path: Path) -> None:
    other = write_digits(tmp_path / "target", range(3, 5), per_class=10, test_per_class=5)
    out = tmp_path / "run"
    weights = tmp_path / "weights"
    fit(options(digits, weights, method="scratch+dense", budget=""), quiet=True)
    config = options(other, out, method="afds-paper", source_data=digits, source_epochs=1, budget="2x",
                     source=f"resnet18:{weights / 'model.safetensors'}")  # fmt: skip
    fit(config, quiet=True)
    source = load_run(out / "source")
    assert source.selection is not None
    assert source.labels == ("one", "two", "zero")
    assert load_run(out).labels == ("four", "three")
    assert {"ce", "afd"} <= set(lines(out, "step")[0])
    assert "kd" not in lines(out, "step")[0]


def test_paper_method_turns_ours_off() -> None:
    config = resolve_method(FitConfig(method="afds-paper"))
    assert not config.selection.standardise
    assert not config.selection.importance
    assert config.distillation.logits == config.distillation.hints == 0
    assert config.descent.allocation == "uniform"
    assert config.descent.reestimate == 0
    assert config.budget == "5x"
    assert resolve_method(config) == config
    assert resolve_method(FitConfig(method="l2")).budget == "1x"


def test_paper_method_refuses_what_it_would_overrule() -> None:
    with pytest.raises(ConfigError, match=r"--descent.static-quantile 0.2: method afds-paper has .* 0.05"):
        resolve_method(FitConfig(method="afds-paper", descent=DescentConfig(static_quantile=0.2, settle=False)))


def test_bad_requests_are_refused_before_training(digits: Path, finished: Path, tmp_path: Path) -> None:
    def refused(error: type[Exception], match: str, out: Path | None = tmp_path / "never", **changes: Any) -> None:
        with pytest.raises(error, match=match):
            fit(options(digits, out, **changes), quiet=True)
        assert not (tmp_path / "never" / "metrics.jsonl").exists()

    refused(BudgetError, "cannot be reached", budget="100000x")
    refused(RunFolderError, "lies among the photos", out=digits / "run")
    refused(ConfigError, "cannot meet a budget", method="scratch+dense")
    refused(ConfigError, "--teacher is of the methods kd", method="afds", teacher=finished)
    refused(ConfigError, "not JSON", arch_args="{")
    refused(ConfigError, "JSON object", arch_args="[1]")
    refused(RunFolderError, "not empty", out=finished)
    refused(ConfigError, "needs --out", out=None)
    refused(RunFolderError, "finished", resume=finished)
    with pytest.raises(ConfigError, match="Unknown method 'magic'"):
        FitConfig(method="magic")


@pytest.mark.parametrize("change", ["taken away", "replaced under its name"])
def test_changed_photos_are_not_resumed(
    change: str, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "photos"
    shutil.copytree(digits, data)
    with monkeypatch.context() as patch:
        patch.setattr(fitting.Progress, "update", lambda self, event: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fit(options(data, tmp_path / "run"), quiet=True)
    photo = next((data / "train/one").iterdir())
    if change == "taken away":
        photo.unlink()
    else:
        Image.new("RGB", (50, 40)).save(photo)
    with pytest.raises(DataError, match="photos have changed"):
        fit(FitConfig(resume=tmp_path / "run"), quiet=True)


def test_predictors_have_a_rate_of_their_own(tiny_resnet: torch.nn.Module) -> None:
    from afds.selection import gates, select

    task = Task(select(tiny_resnet), (), FitConfig())
    groups = parameter_groups(task, FitConfig(optim=OptimConfig(predictor_lr=3.0)))
    predicting = {id(g.predictor.weight) for g in gates(task.network).values()}
    assert {id(p) for p in groups[1]["params"]} == predicting
    assert groups[1]["multiple"] == 3.0
    assert sum(len(g["params"]) for g in groups) == len(list(task.parameters()))
    assert all(p.ndim == 1 for p in groups[2]["params"])


def test_paths_may_be_text() -> None:
    assert FitConfig(data="photos", out="run") == FitConfig(data=Path("photos"), out=Path("run"))  # type: ignore[arg-type]


def test_epochs_by_default() -> None:
    """What docs/accuracy.md measured: 2,727 images, 22 passes dense, 44 at 2x, 110 at 5x; and the ends of the range."""
    assert [default_epochs(2727, ratio) for ratio in (1, 2, 5, 10)] == [22, 44, 110, 110]
    assert [default_epochs(30, ratio) for ratio in (1, 2, 5)] == [60, 120, 240]
    assert [default_epochs(10**6, ratio) for ratio in (1, 2, 5)] == [12, 24, 24]


def test_learning_rate_shapes() -> None:
    cosine = [learning_rate(s, 100, OptimConfig(lr=1.0)) for s in range(100)]
    assert cosine[0] == pytest.approx(0.2)
    assert max(cosine) == pytest.approx(1.0)
    assert cosine[-1] < 0.01
    step = [learning_rate(s, 100, OptimConfig(lr=1.0, schedule="step")) for s in range(100)]
    assert step[66] == pytest.approx(1.0)
    assert step[67] == pytest.approx(0.1)


def test_ctrl_c_while_a_checkpoint_is_written_is_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's writer falls over it: a RuntimeError comes out."""

    class Stops:
        def __reduce__(self) -> Any:
            raise KeyboardInterrupt

    save_checkpoint(tmp_path / "last.ckpt", {"epoch": 1})
    before = (tmp_path / "last.ckpt").read_bytes()

    def fall(state: Any, file: Any) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "last.ckpt", {"epoch": Stops()})
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fall)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path / "last.ckpt", {"epoch": 2})
        patch.setattr(torch, "save", lambda state, file: (_ for _ in ()).throw(RuntimeError("no room")))
        (tmp_path / "base").mkdir()
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(RunFolderError, match=f"--resume {tmp_path}$"):
            save_checkpoint(tmp_path / "base" / "last.ckpt", {"epoch": 2})
    assert (tmp_path / "last.ckpt").read_bytes() == before


def test_a_refit_on_a_single_position_changes_nothing(digits: Path, tmp_path: Path) -> None:
    """A 1 x 1 map of one crop has no spread: no NaN may come of it."""
    source = tmp_path / "dense"
    fit(options(digits, source, method="scratch", budget="1x", optim=OptimConfig(epochs=1, batch_size=8)), quiet=True)
    descent = DescentConfig(images=2, reconstruct=1, reestimate=0, multiple_of=1)
    result = fit(options(digits, tmp_path / "run", method="afds", source=str(source), budget="2x", descent=descent,
                         optim=OptimConfig(epochs=1, batch_size=8)), quiet=True)  # fmt: skip
    assert math.isfinite(result.val.cross_entropy)


def test_the_scale_of_the_loss_in_float16_comes_back(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU Fabric takes bf16 in place of float16, so its float16 is put in by hand."""
    config = options(digits, tmp_path / "whole", method="scratch+dense", budget="")
    config = dataclasses.replace(config, optim=OptimConfig(epochs=2, batch_size=8, lr=0.05))
    scalers = []

    def in_float16(hardware: Any) -> Fabric:
        scalers.append(torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1))
        return Fabric(accelerator="cpu", devices=1, plugins=[MixedPrecision("16-mixed", "cpu", scalers[-1])])

    def interrupt(self: object, event: dict[str, Any]) -> None:
        if event.get("step") == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(fitting, "make_fabric", in_float16)
    fit(config, quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(fitting.Progress, "update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(dataclasses.replace(config, out=tmp_path / "broken"), quiet=True)
    fit(FitConfig(resume=tmp_path / "broken"), quiet=True)
    whole, _, resumed = (scaler.get_scale() for scaler in scalers)
    assert resumed == whole > 8
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "broken")]
    assert same[0] == same[1]
