"""What comes out has the network's shape and scale, whatever comes in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import afds  # noqa: F401
from afds.data.preprocess import Preprocess
from afds.data.transforms import Augment, eval_transform, train_transform
from afds.errors import ConfigError

PREPROCESS = Preprocess(32, 36, "bilinear", (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
SIZES = [(64, 48), (20, 30), (1, 1), (5, 500), (500, 5), (36, 36), (300, 301)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("crop", ["resized", "random", "centre", "eval"])
def test_shape_and_normalisation(size, crop):
    transform = (
        eval_transform(PREPROCESS)
        if crop == "eval"
        else train_transform(PREPROCESS, Augment(crop=crop, flip=True, colour=0.0))
    )
    x = transform(Image.new("RGB", size, (255, 0, 51)))
    assert x.shape == (3, 32, 32)
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    expected = (torch.tensor([1.0, 0.0, 0.2]) - torch.tensor(PREPROCESS.mean)) / torch.tensor(PREPROCESS.std)
    torch.testing.assert_close(x.mean((1, 2)), expected)
    assert x.std((1, 2)).max() < 1e-6


def test_evaluation_takes_the_centre():
    pixels = np.zeros((36, 72, 3), np.uint8)
    pixels[:, 20:52] = 255  # the central 32 columns
    x = eval_transform(PREPROCESS)(Image.fromarray(pixels))
    torch.testing.assert_close(x.amin((1, 2)), (1 - torch.tensor(PREPROCESS.mean)) / torch.tensor(PREPROCESS.std))


def test_evaluation_agrees_with_timm(photo):
    from timm.data import create_transform

    preprocess = Preprocess(32, 36, "bicubic", (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    timm_eval = create_transform(
        (3, 32, 32), crop_pct=32 / 36, interpolation="bicubic", mean=preprocess.mean, std=preprocess.std
    )
    ours, theirs = eval_transform(preprocess)(photo), timm_eval(photo)
    assert (ours - theirs).abs().max() < 3 / 255 / 0.2  # the two resizers round differently


def test_training_varies_and_evaluation_does_not(photo):
    for augment in (Augment(), Augment(crop="random"), Augment(crop="centre", colour=0.5)):
        transform = train_transform(PREPROCESS, augment)
        torch.manual_seed(0)
        first, second = transform(photo), transform(photo)
        torch.manual_seed(0)
        assert not torch.equal(first, second)
        assert torch.equal(first, transform(photo))
    still = train_transform(PREPROCESS, Augment(crop="centre", flip=False))
    assert torch.equal(still(photo), eval_transform(PREPROCESS)(photo))


def test_without_flips_left_stays_left(photo):
    transform = train_transform(PREPROCESS, Augment(flip=False))
    for _ in range(10):
        red = transform(photo)[0]  # brighter to the right
        assert red[:, 0].mean() < red[:, -1].mean()


def test_the_image_given_is_left_alone(photo):
    before = photo.tobytes()
    train_transform(PREPROCESS, Augment(colour=0.5))(photo)
    assert photo.tobytes() == before


@pytest.mark.parametrize("options", [{"crop": "center"}, {"scale": (0.0, 1.0)}, {"scale": (0.9, 0.5)}, {"colour": 2.0}])
def test_augment_refuses_nonsense(options):
    with pytest.raises(ConfigError):
        Augment(**options)
