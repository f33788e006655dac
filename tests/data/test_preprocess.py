"""Preprocessing as data: read back as written, refused when tampered with."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

import afds  # noqa: F401
from afds.data.preprocess import Preprocess
from afds.errors import ConfigError

IMAGENET = {
    "input_size": (3, 224, 224),
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}
GOOD = Preprocess.for_source(IMAGENET).to_dict()


def test_for_source():
    assert Preprocess.for_source(IMAGENET).resize == 256
    small = Preprocess.for_source(IMAGENET, 128)
    assert (small.input_size, small.resize, small.shrink_to) == (128, 146, 192)
    assert Preprocess.for_source({}, 100).resize == 114
    assert Preprocess.for_source({**IMAGENET, "crop_pct": 1.0}).resize == 224


@pytest.mark.parametrize(("least_area", "resize"), [(0.35, 246), (0.08, 306), (1.0, 224)])
def test_things_appear_as_large_as_in_training_crops(least_area, resize):
    source = Preprocess.for_source({**IMAGENET, "crop_pct": 0.95})
    found = source.as_large_as_in(least_area)
    assert found.resize == pytest.approx(resize, abs=1)
    assert replace(found, resize=source.resize) == source
    areas = np.random.default_rng(0).uniform(least_area, 1, 100_000)  # what the formula says, drawn
    assert found.resize / 224 == pytest.approx(max(1, 0.875 * (areas**-0.5).mean()), abs=0.01)


@pytest.mark.parametrize(
    "change", [{"input_size": (1, 28, 28)}, {"input_size": (3, 20, 30)}, {"interpolation": "random"}]
)
def test_sources_that_are_not_supported(change):
    with pytest.raises(ConfigError):
        Preprocess.for_source({**IMAGENET, **change})


def test_there_and_back():
    preprocess = Preprocess.for_source(IMAGENET, 96)
    assert Preprocess.from_dict(json.loads(json.dumps(preprocess.to_dict()))) == preprocess


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("input_size", 0),
        ("input_size", 10**9),
        ("input_size", "224"),
        ("input_size", 224.0),
        ("input_size", True),
        ("resize", 100),
        ("interpolation", "cubic"),
        ("interpolation", ["bicubic"]),
        ("mean", [0.5, 0.5]),
        ("mean", "abc"),
        ("mean", [0.5, 0.5, float("nan")]),
        ("mean", [0.5, 0.5, None]),
        ("std", [0.5, 0.5, 0.0]),
        ("std", 1.0),
    ],
)
def test_tampered_values_are_named(key, value):
    with pytest.raises(ConfigError, match=key):
        Preprocess.from_dict({**GOOD, key: value})


def test_missing_and_unknown_keys():
    with pytest.raises(ConfigError, match="std is missing"):
        Preprocess.from_dict({k: v for k, v in GOOD.items() if k != "std"})
    with pytest.raises(ConfigError, match="'run' is unknown"):
        Preprocess.from_dict({**GOOD, "run": "rm"})
    with pytest.raises(ConfigError, match="expected an object"):
        Preprocess.from_dict([1])
