"""Milliseconds as a budget: searched with the runtime that will serve, refused where they cannot be had."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from afds import runtime
from afds.compare.plan import CompareConfig
from afds.config import DataConfig, DescentConfig, FitConfig, LatencyConfig, OptimConfig
from afds.cost import measure_cost
from afds.data import write_digits
from afds.errors import BudgetError, ConfigError
from afds.fitting import fit, read_result
from afds.latency import Stopwatch, ratio_for, solve_latency
from afds.schedule import parse_budget, uniform
from afds.selection import densities, gates, select, set_density

ARGS = {"layers": [1, 1, 1, 1], "channels": [32, 48, 64, 96]}
IMAGES = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))

needs_runtime = pytest.mark.skipif(not runtime.is_built(), reason="the native runtime is not built")


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return select(timm.create_model("resnet18", num_classes=5, **ARGS).eval())


@needs_runtime
def test_fewer_channels_take_less_time_and_the_search_finds_them(network: nn.Module) -> None:
    watch = Stopwatch([IMAGES], 5, LatencyConfig())
    full = watch(network)
    before = densities(network)
    ratio = ratio_for(network, uniform(network), set_density, full / 2, watch, [IMAGES])
    assert 1.2 < ratio < 20
    assert densities(network) != before
    t = solve_latency(network, uniform(network), full / 2, watch)
    assert set(densities(network).values()) == {t}
    assert watch(network) < 0.8 * full  # half was asked; other work on the machine may pass by
    assert measure_cost(network, [IMAGES]).ratio > 1.2


@pytest.mark.parametrize("name", ["torch", pytest.param("native", marks=needs_runtime)])
def test_stopwatch_leaves_the_network_and_torch_as_they_were(network: nn.Module, name: str) -> None:
    network.train()
    state = {key: value.clone() for key, value in network.state_dict().items()}
    threads = torch.get_num_threads()
    assert Stopwatch([IMAGES[:3]], 5, LatencyConfig(runtime=name, calls=5))(network) > 0  # type: ignore[arg-type]
    assert network.training
    assert torch.get_num_threads() == threads
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in state.items())


@needs_runtime
def test_what_cannot_be_had_is_refused(network: nn.Module) -> None:
    watch = Stopwatch([IMAGES], 5, LatencyConfig(calls=5))
    with pytest.raises(BudgetError, match="one channel in every layer"):
        ratio_for(network, uniform(network), set_density, 1e-6, watch, [IMAGES])
    set_density(network, dict.fromkeys(gates(network), 1.0))
    with pytest.raises(BudgetError, match="--budget 1x"):
        ratio_for(network, uniform(network), set_density, 1e6, watch, [IMAGES])


def test_bad_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="cores"):
        Stopwatch([IMAGES], 5, LatencyConfig(runtime="torch", threads=1024))
    with pytest.raises(ConfigError, match=r"latency\.calls"):
        LatencyConfig(calls=1)
    with pytest.raises(ConfigError, match="same MACs"):
        CompareConfig(data=(Path(),), out=Path("x"), budgets="8ms")
    assert parse_budget("8ms").ms == 8
    with pytest.raises(ValueError, match="measured"):
        parse_budget("8ms").wanted_ratio(1e9)


@needs_runtime
def test_fit_meets_milliseconds(tmp_path: Path) -> None:
    data = write_digits(tmp_path / "digits", range(3), per_class=16, test_per_class=4)
    network = select(timm.create_model("resnet18", num_classes=3, **ARGS).eval())
    full = Stopwatch([IMAGES], 3, LatencyConfig())(network)
    config = FitConfig(
        data=data, out=tmp_path / "run", source="resnet18", arch_args=json.dumps(ARGS), method="scratch+afs",
        budget=f"{full / 2:.4f}ms", optim=OptimConfig(epochs=2, batch_size=8),
        descent=DescentConfig(stages=2, images=8),
        data_options=DataConfig(input_size=64, flip=False, workers=0, val_fraction=0.2),
    )  # fmt: skip
    result = fit(config, quiet=True)
    assert result.latency_ms is not None
    assert result.cost.ratio > 1.2
    record = json.loads((tmp_path / "run/config.json").read_text())
    assert record["config"]["latency"]["ratio"] == record["resolved"]["ratio"] > 1.2  # a resumed run needs no stopwatch
    assert read_result(tmp_path / "run").latency_ms == result.latency_ms
    assert "were asked" in (tmp_path / "run/report.html").read_text()
    with pytest.raises(ConfigError, match=r"\+afs"):
        fit(FitConfig(data=data, out=tmp_path / "no", source="resnet18", method="scratch+l1", budget="8ms"), quiet=True)
