"""From an image file to upright RGB pixels, or an error that names the file.

Never silently wrong: a truncated file is an error, not a photo with a grey lower half. What Pillow cannot
notice stays unnoticed: bytes garbled in the middle of a JPEG that still decodes to its end.
Colour profiles (ICC) are not applied. Of animations and multi-page files the first frame is read.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps

from afds.errors import DataError

MAX_ASPECT = 8  # sides; a longer image is cut to its middle, or resizing a 1 x 10,000 strip would fill memory
SLACK = 1.25  # shrinking by less costs more time than the smaller image saves


class ImageError(DataError):
    """A file that is not a readable image. The message alone rebuilds it, as pickle and DataLoader do."""

    def __init__(self, message: str, path: Path | None = None, reason: str = "") -> None:
        super().__init__(message)
        self.path = path
        self.reason = reason


def read_rgb(path: Path | str, *, at_least: int | None = None) -> Image.Image:
    """The image in `path`, upright (EXIF) and RGB.

    Transparency is laid on white. 16-bit greys keep their upper 8 bits; for 32-bit and float greys see
    `_grey_from_numbers`. The content decides the format, not the ending.
    at_least: a shorter side, in pixels, that suffices. JPEGs are then decoded at 1/2, 1/4 or 1/8 of
    their size where that still is as large, which is several times faster. The result may be larger.
    Raises ImageError naming the file, for whatever reason it cannot be read.
    """
    path = Path(path)
    try:
        if ImageFile.LOAD_TRUNCATED_IMAGES:
            raise ValueError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on, which would turn damage into grey")
        with Image.open(path) as image:
            if at_least is not None:
                image.draft(None, (at_least, at_least))
            image.load()  # before anything else, so that damage shows here
            return to_rgb(image)
    # Damaged and hostile files make Pillow raise almost anything: SyntaxError, struct.error, ...
    except Exception as error:
        reason = _reason(path, error)
        raise ImageError(
            f"{path}: not a readable image ({reason}). Replace it or take it out.", path, reason
        ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened image as `read_rgb` gives it: upright, RGB, a copy. ValueError where there is no way."""
    image = _upright(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return _grey_from_numbers(image).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def shrink(image: Image.Image, limit: int | None) -> Image.Image:
    """`image` with its shorter side brought down to `limit` pixels.

    No limit, or an image not much larger (SLACK), changes nothing. Applied twice it does what it does once,
    so it may stand both before a cache and in a transform. Images longer than MAX_ASPECT times their shorter
    side are first cut to their middle.
    """
    shorter = min(image.size)
    if max(image.size) > MAX_ASPECT * shorter:
        width, height = (min(side, MAX_ASPECT * shorter) for side in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    if limit is None or shorter <= SLACK * limit:
        return image
    return image.resize(shrunk_size(image.size, limit), Image.Resampling.BICUBIC, reducing_gap=3.0)


def shrunk_size(size: tuple[int, int], limit: int | None) -> tuple[int, int]:
    """What `shrink` makes of `size`."""
    shorter = min(size)
    width, height = (min(side, MAX_ASPECT * shorter) for side in size)
    if limit is None or shorter <= SLACK * limit:
        return width, height
    return round(width * limit / shorter), round(height * limit / shorter)


def read_shrunk(path: Path | str, limit: int | None) -> Image.Image:
    """`read_rgb`, then `shrink`, decoding no more than is needed. Raises ImageError."""
    return shrink(read_rgb(path, at_least=limit), limit)


def header_size(path: Path | str, *, at_least: int | None = None) -> tuple[int, int] | None:
    """(width, height) that `read_rgb` would give, before any EXIF rotation, without decoding.

    None for an unreadable file.
    """
    try:
        with Image.open(path) as image:
            if at_least is not None:
                image.draft(None, (at_least, at_least))
            return image.size
    except Exception:  # as in read_rgb, where it becomes an error that names the file
        return None


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # garbled EXIF says nothing about the pixels: take them as they lie
        return image


def _grey_from_numbers(image: Image.Image) -> Image.Image:
    """8-bit grey from 16-bit, 32-bit or float grey.

    16 bits: 65535 is white. The others have no agreed white: values within [0, 1] of a float image are taken
    as such, values within [0, 255] as 8 bits, within [0, 65535] as 16 bits, all else from its least (black)
    to its largest (white).
    """
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it holds NaN or infinite values")
    low, high = float(values.min()), float(values.max())
    if image.mode.startswith("I;"):
        low, high = 0.0, 65535.0
    elif low >= 0 and high <= 65535:
        whites = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        low, high = 0.0, next(white for white in whites if high <= white)
    scaled = (values - low) * (255.0 / max(high - low, 1e-12))
    return Image.fromarray(np.clip(np.rint(scaled), 0, 255).astype(np.uint8))


def _reason(path: Path, error: Exception) -> str:
    """Why, in a few words that need no knowledge of Pillow."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if path.is_file() and path.stat().st_size == 0:
        return "the file is empty"
    if isinstance(error, Image.UnidentifiedImageError):
        return "its content is no image format that Pillow knows"
    if isinstance(error, Image.DecompressionBombError):
        return f"it would decode to more than {2 * (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000} million pixels"
    return " ".join(str(error).split()) or type(error).__name__
