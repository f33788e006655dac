"""Metrics on hand-made logits, and a run on folders."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afds.config import DataConfig
from afds.cost import measure_cost
from afds.data import scan
from afds.errors import DataError, RunFolderError
from afds.evaluation import evaluate, evaluate_folder
from afds.inference import load
from afds.mistakes import MOST, confusions
from afds.selection import SelectionConfig
from runs import LABELS, tiny_network, write_photos, write_run


class Table(nn.Module):
    """Says what its input says."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x_BK: Tensor) -> Tensor:
        return x_BK


def test_by_hand() -> None:
    logits_BK = torch.tensor([[2.0, 1, 0], [2, 1, 0], [0, 3, 0], [1, 0, 0]])
    y_B = torch.tensor([0, 0, 0, 1])  # class 2 never occurs: it must not count as a class with 0 %
    metrics = evaluate(Table(), [(logits_BK[:3], y_B[:3]), (logits_BK[3:], y_B[3:])], 3)
    assert metrics.images == 4
    assert metrics.top1 == 0.5
    assert metrics.top5 is None
    assert metrics.per_class == (pytest.approx(2 / 3), 0.0, None)
    assert metrics.balanced_accuracy == pytest.approx(1 / 3)
    assert metrics.cross_entropy == pytest.approx(float(F.cross_entropy(logits_BK, y_B)))
    assert metrics.cost is None
    assert (metrics.hits, metrics.said) == ("1100", (0, 0, 1, 0))
    assert metrics.class_images == (3, 1, 0)
    assert metrics.confusions == ((0, 1, 1), (1, 0, 1))
    assert metrics.shares == pytest.approx(logits_BK.softmax(1).amax(1).tolist())
    json.dumps(metrics.to_dict(), allow_nan=False)


def test_the_most_frequent_confusion_comes_first_and_not_all_are_kept() -> None:
    labels, said = [0, 0, 0, 1, 1, 2], [1, 1, 0, 2, 0, 2]
    assert confusions(labels, said) == ((0, 1, 2), (1, 0, 1), (1, 2, 1))
    assert len(confusions([0] * 99, list(range(99)))) == MOST


def test_top5_where_it_means_something() -> None:
    logits_BK = torch.arange(7.0).expand(7, 7)
    metrics = evaluate(Table(), [(logits_BK, torch.arange(7))], 7)
    assert (metrics.top1, metrics.top5) == (pytest.approx(1 / 7), pytest.approx(5 / 7))


def test_nan_shows() -> None:
    metrics = evaluate(Table(), [(torch.full((2, 3), torch.nan), torch.zeros(2, dtype=torch.long))], 3)
    assert math.isnan(metrics.cross_entropy)
    assert metrics.to_dict()["cross_entropy"] is None


def test_nothing_to_evaluate_on() -> None:
    with pytest.raises(DataError, match="no image"):
        evaluate(Table(), [], 3)


def test_cost_and_modes() -> None:
    """MACs in the same pass; the figures are the same, and a training network is given back as one."""
    model = tiny_network(selection=SelectionConfig(), layers=(1, 1, 1, 1), channels=(8, 16, 16, 24))
    model.train()
    model.layer1.eval()
    batches = [(torch.randn(n, 3, 32, 32), torch.randint(3, (n,))) for n in (4, 2)]
    seen: list[int] = []
    counted = evaluate(model, batches, 3, "cpu", count_macs=True, progress=seen.append)
    assert seen == [4, 6]
    assert model.training
    assert not model.layer1.training
    plain = evaluate(model, batches, 3)
    assert counted.to_dict() == plain.to_dict()
    assert counted.cost is not None
    assert counted.cost.counted == pytest.approx(measure_cost(model, [x for x, _ in batches]).counted)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("written")
    write_run(path, selection=SelectionConfig())
    return path


@pytest.fixture
def run(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "run")


def test_folder_without_splits(run: Path, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos")
    result = evaluate_folder(run, tmp_path / "photos", batch_size=5)
    assert (result.split, result.metrics.images, result.notes) == ("all", 12, ())
    predicted = load(run).predict(photos)
    right = sum(p.label == path.parent.name for p, path in zip(predicted, photos, strict=True))
    assert result.metrics.top1 == pytest.approx(right / 12)
    assert result.metrics.cost is not None
    told = result.to_dict()
    assert told["ratio"] == pytest.approx(result.metrics.cost.ratio)
    assert told["class_images"] == dict.fromkeys(LABELS, 4)
    assert all(pair["class"] != pair["taken_for"] for pair in told["confusions"])
    assert sum(pair["images"] for pair in told["confusions"]) == 12 - right
    wrong = {path: p for p, path in zip(predicted, photos, strict=True) if p.label != path.parent.name}
    assert wrong
    found = result.mistakes()
    assert {m.path: (m.label, m.said) for m in found} == {p: (p.parent.name, w.label) for p, w in wrong.items()}
    assert [m.share for m in found] == sorted((m.share for m in found), reverse=True)
    assert found[0].share == pytest.approx(wrong[found[0].path].top[0][1], abs=1e-5)


def test_all_photos_that_cannot_be_read_are_named_and_can_be_left_out(run: Path, tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos")
    for path in (photos[1], photos[7]):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=rf"(?s)2 photos cannot be read.*{photos[1].name}.*{photos[7].name}.*--skip-un"):
        evaluate_folder(run, tmp_path / "photos")
    result = evaluate_folder(run, tmp_path / "photos", skip_unreadable=True)
    assert result.metrics.images == 10
    assert result.notes[0].startswith("2 photos cannot be read and are left out")
    for path in (tmp_path / "photos" / LABELS[0]).iterdir():
        path.write_bytes(b"")
    without = evaluate_folder(run, tmp_path / "photos", skip_unreadable=True)
    assert "1 of the run's 3 classes have no image here." in without.notes


def test_classes_match_by_name(run: Path, tmp_path: Path) -> None:
    """A folder with fewer classes numbers them otherwise: bee is 0 in it, 1 in the run."""
    write_photos(tmp_path / "all")
    write_photos(tmp_path / "two", LABELS[1:])
    whole, two = evaluate_folder(run, tmp_path / "all"), evaluate_folder(run, tmp_path / "two")
    assert two.metrics.per_class[0] is None
    assert two.metrics.balanced_accuracy == pytest.approx(sum(two.metrics.per_class[1:]) / 2)  # type: ignore[arg-type]
    assert any("1 of the run's 3 classes" in note for note in two.notes)
    assert whole.labels == two.labels == LABELS


def test_photos_of_a_single_class_can_be_evaluated(run: Path, tmp_path: Path) -> None:
    write_photos(tmp_path / "all")
    shutil.copytree(tmp_path / "all" / LABELS[0], tmp_path / "photos" / LABELS[0])
    result = evaluate_folder(run, tmp_path / "photos")
    assert result.metrics.images == 4
    assert any("classes have no image here" in note for note in result.notes)


def test_unknown_class(run: Path, tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", ("ant", "dog"))
    with pytest.raises(DataError, match=r"does not know the classes 'dog'"):
        evaluate_folder(run, tmp_path / "photos")


def test_test_folder_is_taken(run: Path, tmp_path: Path) -> None:
    write_photos(tmp_path / "photos" / "train", each=3)
    write_photos(tmp_path / "photos" / "test", each=2)
    assert evaluate_folder(run, tmp_path / "photos").metrics.images == 6
    assert evaluate_folder(run, tmp_path / "photos", "train").metrics.images == 9
    everything = evaluate_folder(run, tmp_path / "photos", "all")
    assert everything.metrics.images == 15
    assert any("Training images" in note for note in everything.notes)
    with pytest.raises(DataError, match="has no val images"):
        evaluate_folder(run, tmp_path / "photos", "val")


def test_train_folder_alone_is_called_flattered(run: Path, tmp_path: Path) -> None:
    write_photos(tmp_path / "photos" / "train")
    result = evaluate_folder(run, tmp_path / "photos")
    assert result.split == "train"
    assert "flattered" in result.notes[0]


def test_own_held_out_images(run: Path, tmp_path: Path) -> None:
    """On the photos it was fitted on, `auto` takes what the run held out and never a training image."""
    from afds.config import FitConfig, to_json
    from afds.data import make_splits
    from afds.data.unlabelled import fingerprint
    from afds.fitting import read_photos
    from afds.progress import Progress

    photos = tmp_path / "photos"
    paths = write_photos(photos, each=8)
    paths[0].write_text("no image")
    options = FitConfig(data=photos, seed=3, data_options=DataConfig(val_fraction=0.25, skip_unreadable=True))
    splits, facts = read_photos(options, Progress(quiet=True))
    (run / "config.json").write_text(json.dumps({"config": to_json(options), "data": facts}))
    moved = photos.rename(tmp_path / "moved")
    assert splits.test is not None
    for split, items in (("auto", splits.test), ("val", splits.val), ("train", splits.train)):
        result = evaluate_folder(run, moved, split)
        assert result.metrics.images == len(items)
        assert "own split" in result.notes[0]
    again = make_splits(scan(moved), val_fraction=0.25, seed=3)
    assert [item.path.name for item in again.val] == [item.path.name for item in splits.val]

    moved.rename(photos)
    paths[0].unlink()  # no longer what was fitted on, and at the same place
    changed = evaluate_folder(run, photos)
    assert changed.split == "all"
    assert "have changed" in changed.notes[0]
    sorted_since = tmp_path / "sorted_since"
    write_photos(sorted_since / "train", each=8)
    write_photos(sorted_since / "test", each=8)
    shutil.rmtree(photos)
    sorted_since.rename(photos)  # what is its test/ now may have been learned from
    assert "have changed" in evaluate_folder(run, photos, "test").notes[0]
    facts |= {"test_fingerprint": fingerprint(scan(photos).splits["test"])}
    (run / "config.json").write_text(json.dumps({"config": to_json(options), "data": facts}))
    assert evaluate_folder(run, photos, "test").notes == ()  # what it was tested on, whatever train/ has become
    for config in ("{}", "[]", '{"config": {"data": 3, "data_options": []}, "data": {"unreadable": 3}}'):
        (run / "config.json").write_text(config)
        assert evaluate_folder(run, photos).notes == ()


def test_wrong_arguments(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no split"):
        evaluate_folder(run, tmp_path, "tets")
    with pytest.raises(RunFolderError):
        evaluate_folder(tmp_path / "nowhere", tmp_path)
