"""`load(run).predict(...)`: paths, pixels, many files, and files that cannot be read."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from afds.cores import quota_cores
from afds.data import ImageError, eval_transform, image_files, read_rgb
from afds.errors import ConfigError, DataError, RunFolderError
from afds.inference import Model, Prediction, load
from afds.selection import SelectionConfig
from runs import LABELS, write_photos, write_run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    run = tmp_path_factory.mktemp("run")
    write_run(run, selection=SelectionConfig())
    return load(run)


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    return write_photos(tmp_path / "photos")


def test_knows_its_classes_and_preprocessing(model: Model) -> None:
    assert model.labels == LABELS
    assert model.preprocess.input_size == 32
    assert not model.network.training


def test_a_path_pixels_and_an_array_agree(model: Model, photos: list[Path]) -> None:
    one = model.predict(photos[0])
    assert isinstance(one, Prediction)
    assert one.path == photos[0]
    assert len(one.top) == 3
    assert one.label == one.top[0][0]
    assert sum(p for _, p in one.top) == pytest.approx(1)
    assert [p for _, p in one.top] == sorted((p for _, p in one.top), reverse=True)
    image = Image.open(photos[0])
    for given in (str(photos[0]), image, np.asarray(image)):
        assert model.predict(given).top == one.top


def test_probabilities_are_the_networks(model: Model, photos: list[Path]) -> None:
    x_BCHW = eval_transform(model.preprocess)(read_rgb(photos[0]))[None]
    expected = model.logits(x_BCHW).softmax(1)[0]
    found = dict(model.predict(photos[0]).top)
    assert torch.allclose(torch.tensor([found[label] for label in LABELS]), expected, atol=1e-6)


def test_many_in_order_for_any_batch_size(model: Model, photos: list[Path]) -> None:
    whole = model.predict(photos)
    assert [p.path for p in whole] == photos
    for batch_size in (1, 5, 100):
        again = model.predict(iter(photos), batch_size=batch_size)
        for a, b in zip(whole, again, strict=True):
            assert (a.path, a.label) == (b.path, b.label)
            assert a.top[0][1] == pytest.approx(b.top[0][1], abs=1e-4)  # other batch, other order of the sums
    assert [len(p.top) for p in model.predict(photos, top_k=1)] == [1] * len(photos)
    assert model.predict([]) == []


def test_stream_reads_no_further_than_needed(model: Model, photos: list[Path]) -> None:
    asked = []

    def source() -> object:
        for path in photos * 10:
            asked.append(path)
            yield path

    stream = model.stream(source(), batch_size=2)
    next(stream)
    assert len(asked) <= 4
    stream.close()


def test_unreadable_files(model: Model, photos: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(photos[0].read_bytes()[:200])
    given = [photos[0], broken, tmp_path / "missing.png", photos[1]]
    with pytest.raises(ImageError, match=r"broken\.png"):
        model.predict(given)
    found = model.predict(given, on_error="report", batch_size=2)
    assert [bool(p.top) for p in found] == [True, False, False, True]
    assert "broken.png" in (found[1].error or "")
    with pytest.raises(ImageError, match=r"missing\.png"):
        _ = found[2].label
    assert found[3].top == model.predict(photos[1]).top
    assert model.predict([broken], on_error="report")[0].error
    with pytest.raises(ConfigError, match="on_error='Raise'"):
        model.predict([broken], on_error="Raise")  # type: ignore[call-overload]


@pytest.mark.parametrize("array", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 4), np.uint8),
                                   np.zeros((0, 4, 3), np.uint8), np.zeros(3, np.uint8)])  # fmt: skip
def test_wrong_arrays(model: Model, array: np.ndarray) -> None:
    with pytest.raises(ImageError, match="uint8"):
        model.predict(array)


def test_grey_and_transparent(model: Model) -> None:
    grey = np.full((40, 40), 128, np.uint8)
    expected = model.predict(np.repeat(grey[:, :, None], 3, 2)).top
    assert model.predict(grey).top == expected
    assert model.predict(Image.fromarray(grey).convert("RGBA")).top == expected


def test_wrong_options(model: Model, photos: list[Path], tmp_path: Path) -> None:
    for wrong in ({"top_k": 0}, {"batch_size": 0}):
        with pytest.raises(DataError, match=next(iter(wrong))):
            model.predict(photos[0], **wrong)
    with pytest.raises(RunFolderError, match="no such folder"):
        load(tmp_path / "nowhere")


def test_image_files(photos: list[Path], tmp_path: Path) -> None:
    (tmp_path / "photos" / "notes.txt").write_text("x")
    assert list(image_files([tmp_path / "photos"])) == sorted(photos)
    lost = tmp_path / "photos" / "lost.jpg"  # a link to nothing is named by who reads it, not passed over
    lost.symlink_to(tmp_path / "gone.jpg")
    assert list(image_files([tmp_path / "photos"])) == sorted([*photos, lost])
    lost.unlink()
    assert list(image_files([photos[3], photos[1]])) == [photos[3], photos[1]]
    (tmp_path / "empty").mkdir()
    for path, message in ((tmp_path / "empty", "no image"), (tmp_path / "nothing", "no such")):
        with pytest.raises(DataError, match=message):
            list(image_files([path]))


def test_a_container_share_of_cores(tmp_path: Path) -> None:
    file = tmp_path / "cpu.max"
    for text, cores in (("250000 100000\n", 3), ("50000 100000", 1), ("max 100000", sys.maxsize), ("", sys.maxsize)):
        file.write_text(text)
        assert quota_cores(file) == cores
    assert quota_cores(tmp_path / "none") == sys.maxsize
