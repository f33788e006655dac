"""What a network expects of its images, as data: written beside the weights, checked when read again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, get_args

from afds.errors import ConfigError

Triple = tuple[float, float, float]

INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
_SIZES = range(8, 4097)  # pixels; outside of it nothing is meant, and 10**9 would only fill the memory
_RESIZE_RATIO = 1.14  # 256 / 224, where the source does not say
NOT_SQUARE = 0.875  # sqrt(short side / long side): 1 of a square, 0.87 of 4 x 3, 0.82 of 3 x 2
_SHRINK_RATIO = 1.5  # a random crop of 0.4 of the area still needs no upscaling


@dataclass(frozen=True)
class Preprocess:
    """Shorter side to `resize`, cut the central square of `input_size`, scale to [0, 1], normalise."""

    input_size: int
    """Side of the square that the network sees, in pixels."""
    resize: int
    """Shorter side before the central cut, in pixels, at least `input_size`."""
    interpolation: str
    """nearest, bilinear or bicubic; always with anti-aliasing."""
    mean: Triple
    """Per channel (R, G, B), subtracted after scaling to [0, 1]."""
    std: Triple
    """Per channel (R, G, B), divided by after the subtraction."""

    def __post_init__(self) -> None:
        for name in ("input_size", "resize"):
            value = getattr(self, name)
            if type(value) is not int or value not in _SIZES:
                raise _wrong(name, value, f"a whole number from {_SIZES.start} to {_SIZES.stop - 1}")
        if self.resize < self.input_size:
            raise _wrong("resize", self.resize, f"at least input_size, which is {self.input_size}")
        if self.interpolation not in INTERPOLATIONS:
            raise _wrong("interpolation", self.interpolation, f"one of {', '.join(INTERPOLATIONS)}")
        object.__setattr__(self, "mean", _triple("mean", self.mean, least=-10.0))
        object.__setattr__(self, "std", _triple("std", self.std, least=1e-6))

    @property
    def shrink_to(self) -> int:
        """Shorter side, in pixels, that no image needs to exceed: clearly larger ones are shrunk when read.

        Part of the preprocessing, in training and after, so that a cached, a fresh and a later image agree.
        """
        return max(self.resize, round(_SHRINK_RATIO * self.input_size))

    @classmethod
    def for_source(cls, pretrained_cfg: Mapping[str, Any], input_size: int | None = None) -> Preprocess:
        """As the source network was trained (timm's `pretrained_cfg`), at `input_size` or its own size.

        Of timm's crop modes only the central cut is offered. Raises ConfigError for what is not supported.
        """
        channels, height, width = pretrained_cfg.get("input_size", (3, 224, 224))
        if channels != 3:
            raise ConfigError(f"The source network takes {channels} channels; only RGB (3) is supported.")
        if input_size is None and height != width:
            raise ConfigError(f"The source network takes {height} x {width} images; give one input size.")
        size = height if input_size is None else input_size
        if type(size) is not int or size not in _SIZES:
            raise _wrong("input_size", size, f"a whole number from {_SIZES.start} to {_SIZES.stop - 1}")
        crop_pct = pretrained_cfg.get("crop_pct")
        return cls(
            input_size=size,
            resize=math.floor(size / crop_pct) if crop_pct and crop_pct <= 1 else round(_RESIZE_RATIO * size),
            interpolation=pretrained_cfg.get("interpolation", "bilinear"),
            mean=pretrained_cfg.get("mean", (0.485, 0.456, 0.406)),  # ImageNet's, timm's own default
            std=pretrained_cfg.get("std", (0.229, 0.224, 0.225)),
        )

    def at(self, side: int) -> Preprocess:
        """The same for images of another side, in pixels."""
        return replace(self, input_size=side, resize=max(side, round(self.resize * side / self.input_size)))

    def as_large_as_in(self, least_area: float) -> Preprocess:
        """The same for a network that learns from resized crops: things appear as large as they do, in the mean, there.

        A crop of the share a of a photo, drawn from [s, 1] and resized to the network's side, magnifies by 1 / sqrt(a),
        in the mean 2 / (1 + sqrt(s)), beside the central cut of the whole; that photos are not square takes an eighth.
        Touvron et al., *Fixing the train-test resolution discrepancy*, NeurIPS 2019; the formula is ours
        (docs/accuracy.md).

        least_area: s, in (0, 1].
        """
        ratio = max(1.0, NOT_SQUARE * 2 / (1 + math.sqrt(least_area)))
        return replace(self, resize=round(ratio * self.input_size))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Any) -> Preprocess:
        """The reverse of `to_dict`. Raises ConfigError naming the key that is missing, unknown or wrong."""
        if not isinstance(data, dict):
            raise ConfigError(f"preprocessing: expected an object, found {type(data).__name__}.")
        names = {field.name for field in fields(cls)}
        if missing := sorted(names - set(data)):
            raise ConfigError(f"preprocessing: {missing[0]} is missing.")
        if unknown := sorted(map(str, set(data) - names)):
            raise ConfigError(f"preprocessing: {unknown[0]!r} is unknown.")
        return cls(**data)


def _triple(name: str, value: Any, *, least: float) -> Triple:
    if not isinstance(value, (list, tuple)) or len(value) != len(get_args(Triple)):
        raise _wrong(name, value, "three numbers")
    for number in value:
        if type(number) not in (int, float) or not least <= number <= 10:
            raise _wrong(name, value, f"three numbers from {least:g} to 10")
    red, green, blue = (float(number) for number in value)
    return red, green, blue


def _wrong(name: str, value: Any, wanted: str) -> ConfigError:
    return ConfigError(f"preprocessing: {name} is {value!r}, which should be {wanted}.")
