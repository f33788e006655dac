"""The main job on real photos and real weights: run with `make test-slow` and AFDS_DATA."""

from __future__ import annotations

from pathlib import Path

import pytest

import afds
from afds.config import DataConfig, DescentConfig, FitConfig, OptimConfig
from afds.evaluation import evaluate_folder


@pytest.mark.data
def test_flowers_at_a_third_of_the_cost(afds_data: Path, tmp_path: Path) -> None:
    """12 species, 64 px, three epochs each of base and descent: far from trained, and far above chance (8 %)."""
    run = tmp_path / "run"
    result = afds.fit(FitConfig(
        data=afds_data / "flowers12", source=f"resnet18:{afds_data / 'weights/resnet18_imagenet.safetensors'}",
        budget="3x", out=run, base_epochs=3, data_options=DataConfig(input_size=64, workers=0),
        optim=OptimConfig(epochs=3, lr=0.01), descent=DescentConfig(stages=4),
    ), quiet=True)  # fmt: skip
    assert result.cost.ratio >= 3
    assert result.test is not None
    assert result.test.top1 > 0.3
    again = evaluate_folder(run, afds_data / "flowers12")
    assert again.split == "test"
    assert again.metrics.top1 == result.test.top1
    photos = sorted((afds_data / "flowers12/test").glob("*/*"))[:3]
    assert len(afds.load(run).predict(photos, top_k=2)[0].top) == 2
