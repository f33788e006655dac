"""From RGB pixels to the network's input: the same road for training, evaluation and prediction.

    PIL image -> shrink -> uint8 (3, h, w) -> crop, flip -> float (3, H, W) -> colour, normalised

The random part draws from torch's global generator, which the data set seeds per image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from afds.data.colours import Colours
from afds.data.images import shrink
from afds.data.preprocess import Preprocess
from afds.errors import ConfigError


@dataclass(frozen=True)
class Augment:
    """What is varied in training images."""

    crop: Literal["resized", "random", "centre"] = "resized"
    """resized: a random part at a random scale; random: resize, then a random square (DELTA's recipe);
    centre: no variation, as in evaluation."""
    scale: tuple[float, float] = (0.35, 1.0)
    """Least and largest part of the image's area, for the resized crop."""
    flip: bool = True
    """Mirror every second image, left to right. Turn it off where that changes the class (digits, text)."""
    colour: float = 0.0
    """Strength of the jitter of colours, from 0 (none) to 1: see `Colours`."""

    def __post_init__(self) -> None:
        if self.crop not in ("resized", "random", "centre"):
            raise ConfigError(f"augment: crop is {self.crop!r}; choose resized, random or centre.")
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise ConfigError(f"augment: scale is {self.scale}; give two rising numbers from 0 to 1.")
        if not 0 <= self.colour <= 1:
            raise ConfigError(f"augment: colour is {self.colour}; give a number from 0 to 1.")


class Transform:
    """A transform that knows how large an image it can use, so that a reader decodes no more than that."""

    def __init__(self, steps: list[torch.nn.Module], preprocess: Preprocess, colour: float = 0.0) -> None:
        self.shrink_to = preprocess.shrink_to
        self.bytes = 4 * 3 * preprocess.input_size**2
        steps = [*steps, v2.ToDtype(torch.float32, scale=True)]
        if colour:
            steps.append(Colours(colour))
        self._steps = v2.Compose([*steps, v2.Normalize(preprocess.mean, preprocess.std)])

    def __call__(self, image: Image.Image) -> Tensor:
        """image: RGB, of any size. Returns a float32 tensor (3, input_size, input_size), normalised."""
        return self.render(shrink(image, self.shrink_to))

    def render(self, image: Image.Image) -> Tensor:
        """The same of an image that is not to be shrunk first."""
        pixels_HWC = np.array(image)  # a copy: a cached image stays as it is
        out: Tensor = self._steps(torch.from_numpy(pixels_HWC).permute(2, 0, 1))
        return out.contiguous()


class TwoViews:
    """One crop, flip and colours at two sizes, both straight from the photo.

    Why not one from the other: an image that was resized twice is softer than those that the network meets later, and
    a network that learned from such loses points on sharp ones (docs/accuracy.md).
    """

    def __init__(self, large: Transform, small: Transform) -> None:
        self.shrink_to, self.bytes = large.shrink_to, large.bytes + small.bytes
        self.large, self.small = large, small

    def __call__(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        """image: RGB, of any size. Returns (3, S, S) and (3, s, s); both draw the same random numbers."""
        image = shrink(image, self.shrink_to)
        state = torch.get_rng_state()
        large = self.large.render(image)
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        small = self.small.render(image)
        torch.set_rng_state(after)
        return large, small


def eval_transform(preprocess: Preprocess) -> Transform:
    """Shorter side to `resize`, central square of `input_size`. Small images are enlarged, never padded."""
    size, mode = preprocess.input_size, InterpolationMode(preprocess.interpolation)
    return Transform([v2.Resize(preprocess.resize, mode, antialias=True), v2.CenterCrop(size)], preprocess)


def train_transform(preprocess: Preprocess, augment: Augment | None = None) -> Transform:
    """The same with `augment`'s variation (by default `Augment()`), of the same size and normalisation."""
    augment = augment or Augment()
    size, mode = preprocess.input_size, InterpolationMode(preprocess.interpolation)
    steps: list[torch.nn.Module]
    if augment.crop == "resized":  # where in the image: drawn whatever the output's size, as `TwoViews` needs it
        steps = [v2.RandomResizedCrop(size, scale=augment.scale, interpolation=mode, antialias=True)]
    else:
        cut = v2.RandomCrop(size) if augment.crop == "random" else v2.CenterCrop(size)
        steps = [v2.Resize(preprocess.resize, mode, antialias=True), cut]
    if augment.flip:
        steps.append(v2.RandomHorizontalFlip())
    return Transform(steps, preprocess, augment.colour)
