"""Every kind of file becomes upright RGB, or an error that names it."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import afds  # noqa: F401
from afds.data.images import ImageError, read_rgb, read_shrunk, shrink, shrunk_size
from afds.errors import DataError

WHITE = (255, 255, 255)


def close(image: Image.Image, other: Image.Image, within: int) -> bool:
    difference = np.abs(np.asarray(image).astype(int) - np.asarray(other.convert("RGB")).astype(int))
    return image.mode == "RGB" and image.size == other.size and difference.max() <= within


@pytest.mark.parametrize("ending", ["png", "bmp", "tif", "webp", "ppm"])
def test_rgb_of_lossless_formats(tmp_path, photo, ending):
    photo.save(tmp_path / f"x.{ending}", **({"lossless": True} if ending == "webp" else {}))
    assert close(read_rgb(tmp_path / f"x.{ending}"), photo, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, photo, orientation):
    undo = {  # what the camera did to the pixels, so that the tag puts them right
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = photo.transpose(undo[orientation]) if orientation in undo else photo
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "x.jpg", exif=exif, quality=95, subsampling=0)
    assert close(read_rgb(tmp_path / "x.jpg"), photo, 12)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_garbled_exif_does_no_harm(tmp_path, photo):
    photo.save(tmp_path / "x.png", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    assert close(read_rgb(tmp_path / "x.png"), photo, 0)


@pytest.mark.parametrize("mode", ["L", "1", "LA", "P", "CMYK", "YCbCr", "I;16", "RGBA"])
def test_modes(tmp_path, photo, mode):
    grey = photo.convert("L")
    if mode == "I;16":
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
        expected: Image.Image = grey
    else:
        image = photo.convert(mode)
        expected = photo if mode == "RGBA" else image.convert("RGB")
    ending = "jpg" if mode in ("CMYK", "YCbCr") else "png"
    image.save(tmp_path / f"x.{ending}", **({"quality": 95, "subsampling": 0} if ending == "jpg" else {}))
    assert close(read_rgb(tmp_path / f"x.{ending}"), expected, 14 if ending == "jpg" else 0)


def test_cmyk_jpeg_is_not_inverted(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=95)  # Adobe's, inverted
    red, green, blue = read_rgb(tmp_path / "red.jpg").getpixel((8, 8))
    assert red > 240
    assert green < 15
    assert blue < 15


def test_transparency_is_laid_on_white(tmp_path):
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    half.putpixel((0, 0), (0, 0, 0, 0))
    half.save(tmp_path / "alpha.png")
    image = read_rgb(tmp_path / "alpha.png")
    assert image.getpixel((0, 0)) == WHITE
    assert image.getpixel((1, 1)) == (255, 127, 127)


def test_transparency_of_palettes_colours_and_greys(tmp_path):
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 200, 0, 0])
    palette.putpixel((0, 0), 0)
    palette.save(tmp_path / "one.png", transparency=0)
    palette.save(tmp_path / "each.png", transparency=bytes([0, 255]))
    palette.save(tmp_path / "one.gif", transparency=0)
    for name in ("one.png", "each.png", "one.gif"):
        image = read_rgb(tmp_path / name)
        assert image.getpixel((0, 0)) == WHITE, name
        assert image.getpixel((1, 1)) == (200, 0, 0), name
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "key.png", transparency=(1, 2, 3))
    assert read_rgb(tmp_path / "key.png").getpixel((1, 1)) == WHITE
    Image.new("L", (4, 4), 7).save(tmp_path / "grey.png", transparency=7)
    assert read_rgb(tmp_path / "grey.png").getpixel((1, 1)) == WHITE


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 32896, 65535]], np.uint16), [0, 128, 255]),
        (np.array([[0, 32896, 65535]], ">u2"), [0, 128, 255]),
        (np.array([[0, 128, 255]], np.int32), [0, 128, 255]),
        (np.array([[0, 32896, 65535]], np.int32), [0, 128, 255]),
        (np.array([[-100, 28, 155]], np.int32), [0, 128, 255]),
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
        (np.array([[0, 128, 255]], np.float32), [0, 128, 255]),
        (np.array([[-1, 0, 1]], np.float32), [0, 128, 255]),
        (np.array([[7, 7, 7]], np.float32), [7, 7, 7]),
    ],
)
def test_greys_of_many_bits(tmp_path, values, expected):
    Image.fromarray(values).save(tmp_path / "x.tif")
    image = read_rgb(tmp_path / "x.tif")
    assert [image.getpixel((i, 0)) for i in range(3)] == [(v, v, v) for v in expected]


def test_nan_is_refused(tmp_path):
    Image.fromarray(np.array([[0, np.nan]], np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(ImageError, match=r"x\.tif.*NaN"):
        read_rgb(tmp_path / "x.tif")


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert read_rgb(tmp_path / "x.gif").getpixel((4, 4)) == (255, 0, 0)


def test_the_content_decides_not_the_ending(tmp_path, photo):
    photo.save(tmp_path / "x.jpg", format="PNG")
    assert close(read_rgb(tmp_path / "x.jpg"), photo, 0)


@pytest.mark.parametrize("at_least", [None, 1, 16])
@pytest.mark.parametrize(
    ("ending", "options"),
    [
        ("jpg", {}),
        ("jpg", {"progressive": True}),
        ("png", {}),
        ("webp", {}),
        ("bmp", {}),
        ("tif", {}),
        ("gif", {}),
    ],
)
def test_truncated_files_are_refused(tmp_path, photo, ending, options, at_least):
    noise = np.random.default_rng(0).integers(0, 60, (96, 128, 3)).astype(np.uint8)
    path = tmp_path / f"x.{ending}"
    Image.fromarray(noise + np.asarray(photo.resize((128, 96))) // 2).save(path, **options)
    whole = path.read_bytes()
    read_rgb(path, at_least=at_least)
    path.write_bytes(whole[: len(whole) * 6 // 10])
    with pytest.raises(ImageError) as caught:
        read_rgb(path, at_least=at_least)
    assert str(path) in str(caught.value)
    assert caught.value.path == path
    assert isinstance(caught.value, DataError)


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "empty"), (b"hello", "no image format"), (b"<html>404</html>", "no image format")],
)
def test_what_is_no_image(tmp_path, content, says):
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(ImageError, match=rf"x\.jpg.*{says}"):
        read_rgb(tmp_path / "x.jpg")


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(ImageError, match="no such file"):
        read_rgb(tmp_path / "x.jpg")
    with pytest.raises(ImageError):
        read_rgb(tmp_path)


def test_a_decompression_bomb_is_refused(tmp_path):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(ImageError, match=r"bomb\.png.*million pixels"):
        read_rgb(tmp_path / "bomb.png")


def test_at_least_decodes_less_but_enough(tmp_path, photo):
    photo.resize((640, 480)).save(tmp_path / "x.jpg")
    assert read_rgb(tmp_path / "x.jpg", at_least=100).size == (160, 120)
    assert read_rgb(tmp_path / "x.jpg", at_least=130).size == (320, 240)
    assert read_rgb(tmp_path / "x.jpg").size == (640, 480)


@pytest.mark.parametrize(
    "size",
    [(640, 480), (480, 641), (50, 60), (99, 100), (126, 130), (125, 125), (1000, 3), (1, 9), (101, 4000)],
)
def test_shrink(size):
    image = Image.new("RGB", size)
    small = shrink(image, 100)
    assert small.size == shrunk_size(size, 100)
    assert min(small.size) == (100 if min(size) > 125 else min(size))
    assert max(small.size) <= 8 * min(small.size) + 1
    assert shrink(small, 100) is small  # once is enough
    assert max(shrink(image, None).size) <= 8 * min(size)


def test_read_shrunk(tmp_path, photo):
    photo.resize((640, 480)).save(tmp_path / "x.jpg")
    assert read_shrunk(tmp_path / "x.jpg", 100).size == (160, 120)  # a quarter, and near enough
    assert read_shrunk(tmp_path / "x.jpg", 90).size == (120, 90)
