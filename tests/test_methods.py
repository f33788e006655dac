"""Every method through the one loop, on digits: it meets its budget, reloads, and resumes bit for bit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from afds import fitting
from afds.artifact import is_run, load_run
from afds.config import DataConfig, DescentConfig, FitConfig, OptimConfig, PruningConfig, parse_method
from afds.data import write_digits
from afds.errors import BudgetError, ConfigError
from afds.evaluation import evaluate_folder
from afds.fitting import fit, read_result
from afds.selection import SelectionConfig
from afds.steps import base_of
from runs import changed

ARCH = '{"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}'
TINY = '{"layers": [1, 1, 1, 1], "channels": [2, 2, 2, 2], "stem_width": 2, "stem_type": "deep"}'


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Target photos, a source that was trained on other digits, and a smaller one."""
    root = tmp_path_factory.mktemp("methods")
    write_digits(root / "photos", range(3), per_class=16, test_per_class=10)
    other = write_digits(root / "other", range(3, 6), per_class=16, test_per_class=5)
    for name, arch in (("source", ARCH), ("tiny", TINY)):
        config = FitConfig(data=other, source="resnet18", arch_args=arch, method="scratch", out=root / name)
        fit(dataclasses.replace(config, data_options=DATA, optim=OptimConfig(epochs=2, batch_size=8)), quiet=True)
    return root


DATA = DataConfig(input_size=32, flip=False, workers=0, val_fraction=0.2)


def options(room: Path, out: Path | None, method: str, budget: str = "2x", **changes: Any) -> FitConfig:
    config = FitConfig(
        data=room / "photos", out=out, source=str(room / "source"), method=method, budget=budget, base_epochs=1,
        data_options=DATA, optim=OptimConfig(epochs=2, batch_size=8, lr=0.02),
        descent=DescentConfig(stages=2, images=8),
    )  # fmt: skip
    return changed(config, changes)


def lines(out: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


@pytest.mark.parametrize(
    ("method", "terms", "base"),
    [
        ("l2+l1", set(), "l2+dense"),
        ("delta+l1", {"delta"}, "delta+dense"),
        ("afd+l1", {"afd", "kd", "hints"}, "afd+dense"),
        ("l2-sp+slimming", {"l2_sp"}, "l2-sp+slimming"),
        ("kd+slimming", {"kd"}, "l2+slimming"),
        ("kd+small", {"kd"}, "l2+dense"),
        ("delta+afs", {"delta"}, None),
        ("l2-sp+lowres", {"l2_sp"}, None),
        ("l2+small+lowres", set(), None),
    ],
)
def test_method_meets_its_budget_and_reloads(
    room: Path, tmp_path: Path, method: str, terms: set[str], base: str | None
) -> None:
    out = tmp_path / "run"
    config = options(room, out, method, small_source=str(room / "tiny") if "small" in method else "")
    result = fit(config, quiet=True)
    assert result.cost.ratio >= 2
    assert read_result(out).cost == result.cost
    logged = {name.removeprefix("train_") for name in lines(out, "epoch")[-1] if name.startswith("train_")}
    assert logged == terms | {"ce", "correct", "loss"}
    assert (load_run(out / "base").config or {})["config"]["method"] == base if base else not (out / "base").exists()
    again = evaluate_folder(out, room / "photos")
    assert result.test is not None
    assert again.metrics.top1 == result.test.top1
    assert again.metrics.hits == result.test.hits
    assert again.metrics.cost is not None
    assert again.metrics.cost.ratio == pytest.approx(result.test.cost.ratio if result.test.cost else result.cost.ratio,
                                                     rel=0.05)  # fmt: skip


@pytest.mark.parametrize("method", ["kd", "delta", "l2-sp"])
def test_transfer_alone_keeps_the_network_whole(room: Path, tmp_path: Path, method: str) -> None:
    result = fit(options(room, tmp_path / "run", method, budget=""), quiet=True)
    assert result.cost.ratio == 1
    assert load_run(tmp_path / "run").structure["widths"] is None


def test_slimming_is_sparse_before_it_cuts(room: Path, tmp_path: Path) -> None:
    fit(options(room, tmp_path / "run", "l2+slimming"), quiet=True)
    assert lines(tmp_path / "run/base", "step")[0]["sparsity"] > 0
    assert "sparsity" not in lines(tmp_path / "run", "step")[0]


def test_gradual_pruning_resumes_bit_for_bit(room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With DELTA, L2-SP's sibling, so that regularisers, momentum and widths all come back cut."""
    fit(options(room, tmp_path / "base", "l2-sp", budget=""), quiet=True)
    config = options(room, tmp_path / "whole", "l2-sp+l1", budget="4x", source=str(tmp_path / "base"),
                     anchor=str(room / "source"), pruning=PruningConfig(stages=3, end=0.9))  # fmt: skip
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, epochs=3))
    fit(config, quiet=True)
    stages = lines(tmp_path / "whole", "stage")
    assert [s["target_ratio"] for s in stages] == pytest.approx([4 ** (1 / 3), 4 ** (2 / 3), 4])
    assert all(s["ratio"] >= s["target_ratio"] for s in stages)
    assert [s["epoch"] for s in stages] == [0, 0, 1]

    done = []

    def interrupt(self: object, event: dict[str, Any]) -> None:
        if "done" in event:
            done.append(event)
        elif len(done) == 2:
            raise KeyboardInterrupt

    out = tmp_path / "broken"
    with monkeypatch.context() as patch:
        patch.setattr(fitting.Progress, "update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(dataclasses.replace(config, out=out), quiet=True)
    assert not is_run(out)
    fit(FitConfig(resume=out), quiet=True)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_momentum_goes_with_the_channels(room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from afds.state import State

    seen: list[tuple[dict[str, torch.Tensor], State]] = []
    cut = State.cut

    def watch(self: State, kept: Any) -> None:
        named = {i: n for n, i in self.names.items()}
        state = self.optimizer.state
        before = {named[id(p)]: s["momentum_buffer"].clone() for p, s in state.items() if id(p) in named}
        cut(self, kept)
        if before:
            seen.append((before, self))
            for name, moments in self.moments.items():
                buffer = moments["momentum_buffer"]
                assert buffer.shape == self.task.get_parameter(name).shape
                assert set(buffer.flatten().tolist()) <= set(before[name].flatten().tolist())

    monkeypatch.setattr(State, "cut", watch)
    config = options(room, tmp_path / "run", "l2+l1", budget="4x", pruning=PruningConfig(stages=2, end=0.9))
    fit(config, quiet=True)
    assert len(seen) == 1  # the second stage; before the first no step was taken
    _, state = seen[0]
    current = {id(p) for p in state.task.parameters()}
    assert {id(p) for group in state.optimizer.param_groups for p in group["params"]} == current


def test_what_cannot_be_is_refused_before_training(room: Path, tmp_path: Path) -> None:
    def refused(error: type[Exception], match: str, **changes: Any) -> None:
        with pytest.raises(error, match=match):
            fit(options(room, tmp_path / "never", **changes), quiet=True)
        assert not (tmp_path / "never").exists()

    refused(BudgetError, "by pruning", method="l2+l1", budget="100000x")
    refused(BudgetError, "smaller images", method="l2+lowres", budget="100000x")
    refused(ConfigError, "needs --small-source", method="l2+small")
    refused(BudgetError, r"small\+lowres", method="l2+small", budget="2x", small_source=str(room / "source"))
    refused(ConfigError, "--small-source .* would be of no effect", method="l2+l1", small_source=str(room / "tiny"))
    refused(ConfigError, "--anchor .* would be of no effect", method="afds", anchor=str(room / "source"))
    refused(ConfigError, "--descent.no-settle", method="afds", selection=SelectionConfig(group=2))
    with pytest.raises(ConfigError, match="same small images"):
        parse_method("kd+lowres")
    fit(options(room, tmp_path / "pruned", "l2+l1"), quiet=True)
    refused(ConfigError, "lost channels for good", method="l2", budget="", source=str(tmp_path / "pruned"))


def test_which_methods_have_a_base() -> None:
    def base(method: str, budget: str) -> str | None:
        return base_of(FitConfig(method=method, budget=budget))

    assert base("afds", "5x") == "afd+dense"
    assert base("afds-paper", "5x") is None
    assert base("afds", "1x") is None
    assert base("l2-sp+l1", "2x") == "l2-sp+dense"
    assert base("delta+slimming", "2x") == "delta+slimming"
    assert base("delta+slimming", "1x") is None
    assert base("kd+small", "2x") == base("kd", "1x") == base("kd+afs", "2x") == "l2+dense"
    assert base("l2", "1x") is base("l2+lowres", "2x") is None


def test_read_test_off_leaves_the_test_split_alone(room: Path, tmp_path: Path) -> None:
    result = fit(options(room, tmp_path / "run", "l2", budget="", read_test=False), quiet=True)
    assert result.test is None
    assert lines(tmp_path / "run", "final")[0]["test"] is None
