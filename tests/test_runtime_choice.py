"""`--runtime native|torch` and `load(run, runtime=...)`: the same answers, and PyTorch where native cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import afds.runtime
from afds import load
from afds.cli import main
from afds.errors import ConfigError
from afds.evaluation import evaluate_folder
from afds.runtime import executor
from afds.selection import SelectionConfig
from runs import LABELS, write_photos, write_run

Captured = pytest.CaptureFixture[str]
built = pytest.mark.skipif(not afds.runtime.is_built(), reason="afds was installed without its native runtime")


@pytest.fixture(params=["dense", "full", "low-rank"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    selection = None if request.param == "dense" else SelectionConfig(predictor=request.param)
    write_run(tmp_path / "run", selection=selection)
    return tmp_path / "run"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_photos(tmp_path / "photos", each=3)
    return tmp_path / "photos"


def predicted(arguments: list[str], capsys: Captured) -> tuple[list[Any], str]:
    """The lines of `afds predict --json`, and what it said on stderr."""
    assert main(["predict", *arguments, "--json"]) == 0
    captured = capsys.readouterr()
    return [json.loads(line) for line in captured.out.splitlines()], captured.err


@built
@pytest.mark.parametrize("batch_size", [1, 4])
def test_predict_agrees(run: Path, photos: Path, batch_size: int, capsys: Captured) -> None:
    options = [str(run), str(photos), "--batch-size", str(batch_size)]
    torchs, _ = predicted([*options, "--runtime", "torch"], capsys)
    natives, said = predicted([*options, "--runtime", "native"], capsys)
    assert said == ""
    assert len(torchs) == 9
    assert any(0.01 < entry["probability"] < 0.99 for line in torchs for entry in line["top"])
    for a, b in zip(torchs, natives, strict=True):
        assert a["path"] == b["path"]
        assert [entry["label"] for entry in a["top"]] == [entry["label"] for entry in b["top"]]
        for x, y in zip(a["top"], b["top"], strict=True):
            assert x["probability"] == pytest.approx(y["probability"], abs=1e-4)
    assert predicted(options, capsys) == (natives, "")  # the default


@built
def test_evaluate_agrees(run: Path, photos: Path) -> None:
    ours, theirs = (evaluate_folder(run, photos, batch_size=4, runtime=name) for name in ("native", "torch"))
    assert ours.metrics.hits == theirs.metrics.hits
    assert ours.metrics.per_class == theirs.metrics.per_class
    assert ours.metrics.cross_entropy == pytest.approx(theirs.metrics.cross_entropy, rel=1e-4)
    assert ours.metrics.cost is not None
    assert theirs.metrics.cost is not None
    assert ours.metrics.cost.images == theirs.metrics.cost.images == 9
    assert ours.metrics.cost.dense == pytest.approx(theirs.metrics.cost.dense)
    assert ours.metrics.cost.counted == pytest.approx(theirs.metrics.cost.counted, rel=1e-6)


@built
def test_load_runs_the_executor(run: Path) -> None:
    x_BCHW = torch.randn(3, 3, 32, 32)
    plain, native = load(run), load(run, runtime="native")
    assert plain.executor is None
    assert native.executor is not None
    assert torch.allclose(native.logits(x_BCHW), plain.logits(x_BCHW), atol=1e-4)
    with pytest.raises(ConfigError, match="32, 32"):
        native.logits(torch.randn(1, 3, 33, 32))
    for threads in (1, 2):
        native = load(run, runtime="native", threads=threads)
        assert native.executor is not None
        assert native.executor.threads == threads
        assert torch.allclose(native.logits(x_BCHW), plain.logits(x_BCHW), atol=1e-4)
    with pytest.raises(ConfigError, match="threads"):
        load(run, threads=2)


@built
def test_threads_of_predict(run: Path, photos: Path, capsys: Captured) -> None:
    before, every = torch.get_num_threads(), predicted([str(run), str(photos)], capsys)
    try:
        assert predicted([str(run), str(photos), "--threads", "1"], capsys) == every
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert main(["predict", str(run), str(photos), "--threads", "-1"]) == 2


def check_falls_back(run: Path, photos: Path, reason: str, capsys: Captured) -> None:
    wanted, silent = predicted([str(run), str(photos), "--runtime", "torch"], capsys)
    assert silent == ""
    got, said = predicted([str(run), str(photos)], capsys)
    assert got == wanted
    assert said.startswith("afds: note: PyTorch runs this network.")
    assert reason in said
    assert len(said.splitlines()) == 1
    assert main(["evaluate", str(run), str(photos), "--json", "--runtime", "native"]) == 0
    captured = capsys.readouterr()
    assert captured.err == said
    assert main(["evaluate", str(run), str(photos), "--json"]) == 0
    assert capsys.readouterr() == (captured.out, "")


@built
def test_a_network_that_native_does_not_compute(tmp_path: Path, photos: Path, capsys: Captured) -> None:
    write_run(tmp_path / "gelu", selection=None, act_layer="gelu")
    check_falls_back(tmp_path / "gelu", photos, "does not compute gelu", capsys)
    with pytest.raises(afds.runtime.UnsupportedError, match="gelu"):
        load(tmp_path / "gelu", runtime="native")


def test_without_the_native_part(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    write_run(tmp_path / "run", selection=SelectionConfig())
    monkeypatch.setattr(executor, "_kernels", None)  # as where its import fails
    check_falls_back(tmp_path / "run", photos, "Install a C++ compiler", capsys)
    with pytest.raises(afds.runtime.RuntimeMissingError):
        load(tmp_path / "run", runtime="native")


def test_fit_says_before_it_trains_what_native_will_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    write_photos(tmp_path / "photos", each=6)
    tiny = '{"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_width": 8, "act_layer": "%s"}'
    options = ["--method", "scratch+afs", "--budget", "2x", "--optim.epochs", "1", "--optim.batch-size", "4",
               "--data-options.input-size", "32", "--data-options.workers", "0", "--descent.stages", "2",
               "--descent.images", "4"]  # fmt: skip

    def said(out: str, act: str) -> str:
        fit = ["fit", str(tmp_path / "photos"), "--source", "resnet18", "--arch-args", tiny % act, *options]
        assert main([*fit, "--out", str(tmp_path / out)]) == 0
        return capsys.readouterr().err

    assert "on PyTorch, not natively" in (err := said("gelu", "gelu"))
    assert "gelu" in err
    if afds.runtime.is_built():
        assert "natively" not in said("relu", "relu")
    monkeypatch.setattr(executor, "_kernels", None)
    assert "Install a C++ compiler" in said("missing", "relu")


def test_wrong_choices(tmp_path: Path, capsys: Captured) -> None:
    write_run(tmp_path / "run", selection=None)
    with pytest.raises(ConfigError, match="torch, native"):
        load(tmp_path / "run", runtime="fast")
    with pytest.raises(ConfigError, match="runs on the CPU"):
        load(tmp_path / "run", "meta", runtime="native")
    assert load(tmp_path / "run").labels == LABELS
    assert main(["predict", str(tmp_path / "run"), "x.png", "--runtime", "fast"]) == 2
    assert "runtime" in capsys.readouterr().err
