"""Photos without labels: which are taken, what they cost, and a run that learns from them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from afds import fitting
from afds.artifact import load_run
from afds.config import DataConfig, DescentConfig, FitConfig, OptimConfig, resolve_method
from afds.data import UNLABELLED, make_splits, scan, with_unlabelled, write_digits
from afds.errors import ConfigError, DataError
from afds.files import read_json
from afds.fitting import fit
from afds.task import _cross_entropy
from runs import changed, tiny_network

ARCH = '{"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}'


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled digits, other digits without labels, and in `dense` a network that was fine-tuned on the former."""
    root = tmp_path_factory.mktemp("unlabelled")
    write_digits(root / "digits", range(3), per_class=12, test_per_class=10)
    write_digits(root / "more", range(3), per_class=30, test_per_class=5)
    fit(options(root, root / "dense", method="scratch+dense", budget="", unlabelled=None), quiet=True)
    return root


def options(root: Path, out: Path, **changes: Any) -> FitConfig:
    config = FitConfig(
        data=root / "digits", out=out, source="resnet18", arch_args=ARCH, method="afds", budget="2x",
        unlabelled=root / "more", data_options=DataConfig(input_size=32, flip=False, workers=0, val_fraction=0.2),
        optim=OptimConfig(epochs=2, batch_size=8, lr=0.05), descent=DescentConfig(images=8, reconstruct=32),
    )  # fmt: skip
    return changed(config, changes)


def test_photos_that_a_split_holds_are_left_out_by_their_content(place: Path, tmp_path: Path) -> None:
    splits = make_splits(scan(place / "digits"), val_fraction=0.2, test_fraction=0.2, seed=0)
    assert splits.test is not None
    folder = tmp_path / "mixed"
    for name, item in {"a": splits.train[0], "b/c": splits.val[0], "d/e/f": splits.test[0]}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(item.path, folder / f"{name}.png")
    with pytest.raises(DataError, match=r"its photos, 3, are all among the labelled ones"):
        with_unlabelled(splits, folder)
    known = {item.path.read_bytes() for item in splits.items()}
    new = next(path for path in sorted((place / "more").rglob("*.png")) if path.read_bytes() not in known)
    for name in ("d/new.png", "again.png"):
        shutil.copy(new, folder / name)
    (folder / "notes.txt").write_text("no photo")
    found = with_unlabelled(splits, folder)
    assert [(item.path.read_bytes(), item.label) for item in found.unlabelled] == [(new.read_bytes(), UNLABELLED)]
    assert dataclasses.replace(found, unlabelled=()) == splits
    assert found.fingerprint() == splits.fingerprint()
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        with_unlabelled(splits, tmp_path / "nowhere")


def test_images_without_a_label_cost_nothing_and_count_in_the_mean() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 3, requires_grad=True)
    y = torch.tensor([0, UNLABELLED, 2, UNLABELLED])
    by_hand = (F.cross_entropy(logits[0], y[0]) + F.cross_entropy(logits[2], y[2])) / 4
    torch.testing.assert_close(_cross_entropy(logits, y, 0.0), by_hand)
    nothing = _cross_entropy(logits, torch.full((4,), UNLABELLED), 0.1)
    assert float(nothing.detach()) == 0.0
    nothing.backward()
    assert logits.grad is not None
    assert not logits.grad.any()


def test_a_run_learns_from_them_and_resumes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = str(place / "dense")
    fit(options(place, place / "whole", source=source), quiet=True)
    record = read_json(place / "whole/config.json")
    splits = make_splits(scan(place / "digits"), val_fraction=0.2, test_fraction=0.2, seed=0)
    unlabelled = with_unlabelled(splits, place / "more").unlabelled
    extra = len(unlabelled)
    assert record["data"]["unlabelled"] == extra > 30
    assert record["resolved"]["steps_per_epoch"] == (record["data"]["train"] + extra) // 8
    steps = [json.loads(line) for line in (place / "whole/metrics.jsonl").read_text().splitlines()]
    assert all(torch.isfinite(torch.tensor(s["loss"])) for s in steps if s["kind"] == "step")
    assert "unlabelled images" in (place / "whole/report.html").read_text()
    fit(options(place, place / "without", source=source, unlabelled=None), quiet=True)
    ours, theirs = (load_run(place / name).model.state_dict() for name in ("whole", "without"))
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(ours.values(), theirs.values(), strict=True))

    def interrupt(self: object, event: dict[str, Any]) -> None:
        if event.get("step") == record["resolved"]["steps_per_epoch"] + 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fitting.Progress, "update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(options(place, place / "broken", source=source), quiet=True)
    gone = unlabelled[0].path
    gone.rename(place / "gone.png")
    with pytest.raises(DataError, match="have changed"):
        fit(FitConfig(resume=place / "broken"), quiet=True)
    (place / "gone.png").rename(gone)
    fit(FitConfig(resume=place / "broken"), quiet=True)
    same = [(place / name / "model.safetensors").read_bytes() for name in ("whole", "broken")]
    assert same[0] == same[1]


def test_a_base_that_comes_first_does_not_see_them(place: Path) -> None:
    weights = place / "weights.safetensors"
    import safetensors.torch

    network = tiny_network(selection=None, **json.loads(ARCH))
    safetensors.torch.save_file({k: v.contiguous() for k, v in network.state_dict().items()}, weights)
    fit(options(place, place / "two", source=f"resnet18:{weights}", base_epochs=1), quiet=True)
    base, run = (read_json(place / name / "config.json") for name in ("two/base", "two"))
    assert base["config"]["unlabelled"] is None
    assert "unlabelled" not in base["data"]
    assert run["data"]["unlabelled"] > 30


@pytest.mark.parametrize(
    "changes",
    [{"method": "l2+l1"}, {"method": "afds-paper"}, {"budget": "1x"}, {"descent": DescentConfig(settle=False)}],
)
def test_what_cannot_learn_from_them_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--unlabelled"):
        resolve_method(options(tmp_path, tmp_path / "out", **changes))
